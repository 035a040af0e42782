"""A run that fits itself to a time: its plan, its pieces, its table."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from benchmarks import thirty_minutes
from commands import evaluate
from configs import digits_minutes
from runtime.clock import PieceOver
from runtime.files import write_json, write_text

MEASURED = {
  'images_per_second': 640.0,
  'train_start': 20.0,
  'samples_per_second': 32.0,
  'compile_sampler': 15.0,
  'evaluation': 3.0,
}


@pytest.fixture
def options(tmp_path, monkeypatch):
  monkeypatch.setattr(thirty_minutes, 'BEGUN', time.monotonic())
  flags = thirty_minutes.FLAGS
  flags(['thirty_minutes', f'--workdir={tmp_path}', '--few=64', '--minutes=4'])
  yield flags
  flags.unparse_flags()


@pytest.fixture
def config():
  return digits_minutes.get_config()


def planned(config, measured, steps, pairs):
  """Return the seconds of a plan, summed up part by part."""
  seconds = measured['train_start']
  seconds += steps * config.training.batch_size / measured['images_per_second']
  guided = set()
  many = config.eval.num_samples
  dearest = '2' if any(g == '2' for _, g in pairs) else '1'
  for guidance, count in [*((g, 64) for _, g in pairs), (dearest, many)]:
    factor = 1 if guidance == '1' else 2
    seconds += factor * count / measured['samples_per_second']
    seconds += measured['evaluation']
    if factor == 2 and guidance not in guided:
      seconds += measured['compile_sampler']
      guided.add(guidance)
  return seconds


@pytest.mark.parametrize('guidances', [['1'], ['1', '2']])
def test_the_plan_fills_the_time(config, options, guidances):
  """One unit of steps more would take too long."""
  pairs = [(0.05, '1'), (0.1, '1'), *((None, g) for g in guidances[1:])]
  unit = 32 * config.training.n_jitted_steps
  steps = thirty_minutes.steps_in(200, config, MEASURED, pairs, 64)
  assert steps % unit == 0
  assert planned(config, MEASURED, steps, pairs) <= 200
  assert planned(config, MEASURED, steps + unit, pairs) > 200


def test_too_little_time_is_an_error(config):
  with pytest.raises(ValueError, match=r'too short by 0\.\d minutes for 160'):
    thirty_minutes.steps_in(40, config, MEASURED, [(0.1, '1')], 64)


def test_guidance():
  found = thirty_minutes.control_of('1.5:0.2:2')
  assert found == {
    'control.scale': 1.5,
    'control.interval_low': 0.2,
    'control.interval_high': 2.0,
  }
  assert thirty_minutes.control_of('2') == {'control.scale': 2.0}
  for wrong in ('a', '1:2', '1:2:3:4', ''):
    with pytest.raises(ValueError, match='--guidance'):
      thirty_minutes.control_of(wrong)


def test_missing_files_are_named(config, monkeypatch, tmp_path):
  monkeypatch.setenv('SCORE_SDE_CACHE', str(tmp_path))
  thirty_minutes.check_files(config)
  config.data.dataset = 'cifar10'
  with pytest.raises(FileNotFoundError, match='cifar-10.*--config.data.path'):
    thirty_minutes.check_files(config)
  (tmp_path / 'cifar-10-python.tar.gz').touch()
  thirty_minutes.check_files(config)
  config.eval.extractor = ''
  with pytest.raises(FileNotFoundError, match='pt_incep.*eval.inception_path'):
    thirty_minutes.check_files(config)


class Fake:
  """Stands for training and evaluation, which stop after some calls."""

  # Distances by length and scale.
  FID = {(0.05, 1): 9.0, (0.1, 1): 7.0, (0.1, 1.5): 6.0}

  def __init__(self, monkeypatch, workdir):
    self.done, self.calls, self.left, self.workdir = 0, [], 99, workdir
    for module, name in (
      (thirty_minutes.run_lib, 'train'),
      (evaluate, 'evaluate'),
      (thirty_minutes, 'measure'),
      (thirty_minutes, 'steps_done'),
      (thirty_minutes, 'with_reference'),
    ):
      monkeypatch.setattr(module, name, getattr(self, name))

  def measure(self, config, workdir):
    self.calls.append('measure')
    return MEASURED

  def with_reference(self, config, workdir):
    return config

  def steps_done(self, workdir):
    return self.done

  def train(self, config, workdir):
    self.calls.append('train')
    self.done = min(config.training.n_iters, self.done + self.left)
    line = {'loss': 2.0, 'images_per_second': 640.0, 'test_loss': 3.0}
    write_text(workdir / 'train.jsonl', json.dumps(line) + '\n')

  def evaluate(self, config, workdir):
    self.calls.append('evaluate')
    if not self.left:
      raise PieceOver
    self.left -= 1
    path = workdir / 'eval' / 'results.json'
    results = json.loads(path.read_text()) if path.is_file() else []
    (length,) = config.eval.ema_length
    value = self.FID[length, config.control.scale] + (config.seed == 43)
    fid = {'value': value, 'std_error': None}
    result = {'config': thirty_minutes.as_json(config), 'fid': fid, 'nfe': 35}
    write_json(path, [*results, result])


def test_pieces(config, options, monkeypatch, tmp_path, capsys):
  """Each piece goes on where the last has stopped, by the first plan."""
  fake = Fake(monkeypatch, tmp_path)
  thirty_minutes.run(config, tmp_path)
  plan = json.loads((tmp_path / 'plan.json').read_text())
  assert fake.calls == ['measure', 'train']
  assert f'after 99 of {plan["steps"]} steps' in capsys.readouterr().out
  fake.done, fake.left, fake.calls = plan['steps'] - 3, 3, []
  thirty_minutes.run(config, tmp_path)
  assert fake.calls == ['train', *['evaluate'] * 4]
  assert 'repeat the command' in capsys.readouterr().out
  fake.left, fake.calls = 99, []
  thirty_minutes.run(config, tmp_path)
  assert fake.calls == ['evaluate']
  result = json.loads((tmp_path / 'thirty_minutes.json').read_text())
  assert [row['fid'] for row in result['compared']] == [9.0, 7.0, 6.0]
  assert result['final'] == {
    'ema_length': 0.1, 'guidance': '1.5:0.2:2', 'count': 256, 'seed': 43,
    'nfe': 35, 'fid': 7.0, 'std_error': None,
  }  # fmt: skip
  assert result['images'] == plan['steps'] * 64
  assert json.loads((tmp_path / 'plan.json').read_text()) == plan
  table = (tmp_path / 'thirty_minutes.md').read_text()
  assert '| 0.1 | 1.5:0.2:2 | 256 | 43 | 35 | 7.0000 |' in table
  thirty_minutes.run(config, tmp_path)  # All is done: it prints the table.
  assert fake.calls == ['evaluate']
  assert table in capsys.readouterr().out
  (tmp_path / 'thirty_minutes.json').unlink()
  config.seed = 1
  with pytest.raises(ValueError, match='made with another config'):
    thirty_minutes.run(config, tmp_path)


SMALL = {'training.n_jitted_steps': 1, 'eval.num_samples': 64}


@pytest.mark.slow
def test_measured_speeds(config, options, tmp_path):
  config = thirty_minutes.changed(config, SMALL)
  config = thirty_minutes.with_reference(config, tmp_path)
  begun = time.monotonic()
  found = thirty_minutes.measure(config, tmp_path)
  seconds = time.monotonic() - begun
  assert found.keys() == MEASURED.keys()
  assert 0 < found['train_start'] + found['compile_sampler'] < seconds
  assert 0 < found['evaluation'] < seconds
  # It trained 20 steps, and drew 7 batches of samples.
  assert found['images_per_second'] > 20 * 64 / seconds
  assert found['samples_per_second'] > 7 * 64 / seconds


@pytest.mark.slow
def test_dry_run(config, tmp_path):
  """Two kills in a real run change no number; the plan is given here."""
  command = [sys.executable, '-m', 'benchmarks.dry_run', '--minutes=600']
  command += ['--few=64', '--guidance=1', f'--workdir={tmp_path}']
  command += [f'--config.{key}={value}' for key, value in SMALL.items()]
  config = thirty_minutes.as_json(thirty_minutes.changed(config, SMALL))
  plan = {'steps': 96, 'seconds': 0.0, 'minutes': 600, 'few': 64}
  plan |= {'guidance': ['1'], 'config': config}
  write_json(tmp_path / 'whole' / 'plan.json', plan)
  done = subprocess.run(
    command, check=False, capture_output=True, text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'The same in both: images, loss' in done.stdout
  assert done.stdout.count('Killed.') == 2
