"""What stops a training: signals, other trainings, errors before it began."""

import json
import os
import pathlib
import signal
import socket
import time

import jax
import numpy as np
import pytest
from absl import app, flags

import experiment
import run_lib
from checkpoints.workdir import Checkpoints, read_config
from commands import control as control_command
from commands import stats
from configs import schema
from runtime import files
from runtime.locks import lock
from runtime.progress import Log
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('shared_programs')
FEW = {'training__n_iters': 8, 'training__snapshot_freq': 0}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Return the workdir of eight steps, with the checkpoints 4 and 8."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  run_lib.train(tiny.points(**FEW), workdir)
  return workdir


def losses(workdir):
  lines = (workdir / 'train.jsonl').read_text().splitlines()
  return [json.loads(line)['loss'] for line in lines]


def ema(workdir, step):
  model = experiment.build(tiny.points())
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding),
    model.abstract_params(),
  )
  with Checkpoints(workdir) as saved:
    return jax.tree.map(np.asarray, saved.restore(step, like, 'ema'))


def assert_same(workdir, other):
  assert losses(workdir) == losses(other)
  ours, theirs = ema(workdir, 8), ema(other, 8)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def no_training(*_):
  raise ValueError('This cannot be trained.')


# ------------------------------------------------------------------- signals


def test_a_second_signal_stops_at_once():
  program = """
import os, run_lib, signal, time
with run_lib._Interrupt():
  os.kill(os.getpid(), signal.SIGINT)
  print('goes on', flush=True)
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(60)
"""
  process = tiny.start(program)
  out, err = process.communicate()
  assert process.returncode == -signal.SIGINT
  assert out == 'goes on\n'
  assert err.count('SIGINT: the run saves and stops') == 1
  assert 'Traceback' not in err


# Trains on one of two hosts. Arguments: workdir, number of this host, port. The
# second host alone gets signals: one after step 5, one after step 8.
HOST = """
import os, signal, sys
import jax
workdir, host, port = sys.argv[1:]
jax.config.update('jax_num_cpu_devices', 1)
jax.distributed.initialize('127.0.0.1:' + port, 2, int(host))
import run_lib
from tests import tiny
SENT = {5: signal.SIGTERM, 8: signal.SIGINT}
class Watched(run_lib.Log):
  def write(self, step, **scalars):
    super().write(step, **scalars)
    if step in SENT and host == '1':
      os.kill(os.getpid(), SENT[step])
run_lib.Log = Watched
never = {'training__eval_freq': 0, 'training__checkpoint_freq': 0}
config = tiny.points(training__n_iters=10_000, **never)
with tiny.shared_programs():
  for _ in SENT:
    run_lib.train(config, workdir)
"""


def test_a_signal_to_one_host_stops_all_at_the_same_step(tmp_path):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  hosts = [tiny.start(HOST, tmp_path, i, port) for i in range(2)]
  outputs = [host.communicate() for host in hosts]
  for host, (_, err) in zip(hosts, outputs, strict=True):
    assert host.returncode == 0, err
  for line in (
    'Stopped by SIGTERM; step 6 is saved.',
    'Resuming at step 6.',
    'Stopped by SIGINT; step 9 is saved.',
  ):
    assert line in outputs[0][0]
  with Checkpoints(tmp_path) as saved:
    assert saved.last == 9
  assert not (tmp_path / 'train.lock').exists()


# -------------------------------------------------------------- the workdir


def test_two_trainings_in_one_workdir(finished):
  config = tiny.points(**FEW | {'training__n_iters': 9})
  before = {p: p.stat().st_mtime_ns for p in finished.rglob('*')}
  with (
    lock(finished / 'train.lock'),
    pytest.raises(OSError, match=f'in use by process {os.getpid()} on host'),
  ):
    run_lib.train(config, finished)
  after = {p: p.stat().st_mtime_ns for p in finished.rglob('*')}
  assert {p: t for p, t in after.items() if p.is_file()} == {
    p: t for p, t in before.items() if p.is_file()
  }


def test_a_run_that_never_began_claims_nothing(tmp_path, monkeypatch):
  """So the command can be corrected and repeated in the same workdir."""
  workdir = tmp_path / 'run'
  with monkeypatch.context() as patch:
    patch.setattr(run_lib, 'make_train_steps', lambda *_: no_training)
    with pytest.raises(ValueError, match='cannot be trained'):
      run_lib.train(tiny.points(model__nf=4), workdir)
  assert not workdir.exists()
  workdir.mkdir()
  with monkeypatch.context() as patch:
    patch.setattr(run_lib, 'make_train_steps', lambda *_: no_training)
    with pytest.raises(ValueError, match='cannot be trained'):
      run_lib.train(tiny.points(model__nf=4), workdir)
  assert not (workdir / 'config.json').exists()
  run_lib.train(tiny.points(**FEW), workdir)
  assert read_config(workdir)['model']['nf'] == 8


def test_a_first_step_that_is_not_finite_claims_nothing(tmp_path, monkeypatch):
  def make_train_steps(*_):
    return lambda state, batches: (state, np.full(1, np.nan))

  monkeypatch.setattr(run_lib, 'make_train_steps', make_train_steps)
  with pytest.raises(FloatingPointError, match='step 1 is not finite'):
    run_lib.train(tiny.points(**FEW), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


# -------------------------------------------------------------------- damage


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(
  finished, tmp_path, capsys
):
  run_lib.train(tiny.points(**FEW), tmp_path)
  for path in (tmp_path / 'checkpoints' / '8').rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      os.truncate(path, path.stat().st_size // 2)
  log = tmp_path / 'train.jsonl'
  lines = log.read_bytes().splitlines(keepends=True)
  log.write_bytes(b''.join([*lines[:2], b'\xff\xfe no entry\n', *lines[2:]]))
  capsys.readouterr()
  run_lib.train(tiny.points(**FEW), tmp_path)
  said = capsys.readouterr().out
  assert f'warning: Checkpoint {tmp_path}/checkpoints/8 cannot be read' in said
  assert 'Resuming at step 4.' in said
  assert f'warning: {log} is damaged in line 3' in said
  assert_same(tmp_path, finished)


def test_a_full_disk_names_the_log(tmp_path):
  (tmp_path / 'train.jsonl').symlink_to('/dev/full')
  with (
    Log(tmp_path, resumed_at=0) as log,
    pytest.raises(OSError, match='jsonl cannot be written: No space left'),
  ):
    log.write(1, loss=2.0)


# -------------------------------------------------------------- command line


@pytest.fixture
def home(monkeypatch, tmp_path):
  """Return a home folder of its own, and run in another folder."""
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.setenv('SCORE_SDE_CACHE', '~/cache')
  (tmp_path / 'elsewhere').mkdir()
  monkeypatch.chdir(tmp_path / 'elsewhere')
  return tmp_path / 'home'


def call(*arguments):
  """Return what main.py says in its last line."""
  import main

  flags.FLAGS.unparse_flags()
  config = f'--config={ROOT}/configs/toy/rings_vp.py'
  with pytest.raises(SystemExit) as stopped:
    argv = ['main.py', config, *arguments]
    app.run(main.main, argv=argv, flags_parser=main.parse)
  return stopped.value.code


@pytest.mark.parametrize(
  'flag',
  ['config', 'workdir', 'samples', 'checkpoint', 'output', 'eval_folder'],
)
def test_paths_of_flags_may_begin_with_a_tilde(home, flag):
  import main

  flags.FLAGS.unparse_flags()
  mode = main.MODE_OF.get(flag, 'train')
  main.parse(
    ['main.py', f'--mode={mode}', '--workdir=w', f'--{flag}=~/a/b.safetensors']
  )
  assert flags.FLAGS[flag].value == f'{home}/a/b.safetensors'


@pytest.mark.parametrize(
  ('mode', 'key'),
  [
    ('train', 'data.path'),
    ('stats', 'eval.inception_path'),
    ('eval', 'eval.stats_path'),
    ('sample', 'control.images'),
    ('sample', 'control.classifier_workdir'),
  ],
)
def test_paths_of_keys_may_begin_with_a_tilde(home, mode, key, monkeypatch):
  """The file is not there: the error says where it was looked for."""
  config = tiny.get_config(
    **{key.replace('.', '__'): '~/missing', 'training__n_iters': 1}
  )
  config.data.dataset = 'npz' if key == 'data.path' else 'digits'
  control = {'images': 'inpaint', 'classifier_workdir': 'classifier'}
  config.control.name = control.get(key.partition('.')[2], '')
  command = {
    'train': lambda: run_lib.train(config, home / 'run'),
    'stats': lambda: stats.stats(config, home / 'run'),
    'eval': lambda: (
      schema.check(config),
      stats.reference(config, home / 'run', lambda images: images),
    ),
    'sample': lambda: control_command.sample(config, home / 'run'),
  }[mode]
  with pytest.raises(OSError, match=f'{home}/missing'):
    command()


def test_a_cache_folder_that_cannot_be_made(home, monkeypatch):
  monkeypatch.setenv('SCORE_SDE_CACHE', '/dev/null/cache')
  error = call('--mode=train', '--workdir=run')
  assert error == (
    'error: The cache folder /dev/null/cache cannot be made or written (Not a '
    'directory): set $SCORE_SDE_CACHE to another folder.'
  )
  assert not os.path.exists('run')


def test_an_interrupted_command_is_one_line(home, monkeypatch):
  import main

  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(main.sample, 'sample', interrupted)
  error = call('--mode=sample', '--workdir=run')
  assert error == 'error: Stopped by SIGINT; what was written stays.'


@pytest.mark.parametrize('mode', ['sample', 'eval', 'encode', 'stats'])
def test_sigterm_ends_other_modes_with_a_line_and_no_parts(
  home, monkeypatch, mode
):
  import main

  def terminated(*_):
    with files.atomic('result.npz') as part:
      part.write_text('half')
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(60)

  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setitem(main.MODES, mode, terminated)
  there = sorted(os.listdir())
  error = call(f'--mode={mode}', '--workdir=run')
  assert error == 'error: Stopped by SIGTERM; what was written stays.'
  assert sorted(os.listdir()) == there
  assert signal.getsignal(signal.SIGTERM) == before


def test_memory_that_runs_out_is_one_line(home, monkeypatch):
  import main

  for failure in (
    MemoryError(),
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory\nallocating'),
  ):

    def fail(*_, failure=failure):
      raise failure

    monkeypatch.setattr(main.sample, 'sample', fail)
    error = call('--mode=sample', '--workdir=run')
    assert error.startswith('error: Out of memory') and '\n' not in error
    assert 'config.eval.batch_size' in error
