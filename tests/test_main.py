"""The command line: what goes wrong is one clear line, and changes nothing."""

import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import app, flags

from checkpoints.workdir import Checkpoints
from tests import golden, tiny

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir that main.py trained for two steps, and what it printed."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  done = subprocess.run(
    [sys.executable, 'main.py', '--config', 'tests/tiny.py', '--mode', 'train']
    + ['--workdir', workdir, '--config.training.n_iters=2'],
    cwd=ROOT,
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': tiny.CACHE},
    capture_output=True,
    text=True,
    check=True,
  )
  return workdir, done.stdout


@pytest.fixture
def call(monkeypatch, capsys):
  """call(*arguments) -> the line on stderr, of a command that must fail."""
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', tiny.CACHE)

  def run(*arguments):
    import main

    argv = ['main.py', '--config', str(ROOT / 'tests' / 'tiny.py'), *arguments]
    # Overrides are looked up there.
    monkeypatch.setattr(sys, 'argv', argv)
    flags.FLAGS.unparse_flags()
    with pytest.raises(SystemExit) as stopped:
      main.check_overrides(argv[1:])
      app.run(main.main, argv=argv)
    assert stopped.value.code not in (0, None)
    if isinstance(stopped.value.code, str):
      return stopped.value.code
    return capsys.readouterr().err

  return run


def contents(folder):
  files = [path for path in folder.rglob('*') if path.is_file()]
  return {path: path.read_bytes() for path in files}


def test_train(trained):
  workdir, printed = trained
  assert 'ncsnpp, 0.01M parameters, 1 cpu device(s), 1500 images' in printed
  assert 'step 2/2 loss ' in printed
  assert {path.name for path in workdir.iterdir()} >= {
    'config.json',
    'train.jsonl',
    'tensorboard',
    'checkpoints',
  }


def test_nothing_left_to_do(trained, capsys):
  import run_lib

  before = contents(trained[0])
  run_lib.train(tiny.get_config(training__n_iters=2), trained[0])
  assert 'Nothing to do: 2 of 2 steps done.' in capsys.readouterr().out
  assert contents(trained[0]) == before


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    (
      '--config.training.batch_sise=12',
      'error: config.training.batch_sise does not exist. Did you mean '
      'config.training.batch_size?',
    ),
    (
      '--config.lr=1',
      'error: config.lr does not exist. Did you mean config.optim.lr?',
    ),
    ('--config.training.batch_size=many', 'batch_size=many'),
    ('--mode=trian', 'should be one of <train|eval|'),
    ('--modee=train', "Unknown command line flag 'modee'"),
    (
      '--config.data.path=/nowhere/images.npz',
      'error: npz: data.path /nowhere/images.npz does not exist',
    ),
    (
      '--config.training.grad_accumulation=3',
      'error: config.training.batch_size=8 does not divide by '
      'grad_accumulation=3.',
    ),
    (
      '--config.sampling.predictor=euler',
      "error: config.sampling.predictor='euler' is none of ['",
    ),
  ],
)
def test_bad_argument(call, tmp_path, argument, message):
  workdir = tmp_path / 'run'
  more = ['--config.data.dataset=npz'] if 'npz' in argument else []
  error = call('--workdir', str(workdir), '--mode=train', *more, argument)
  assert message in error
  assert len(error.strip().splitlines()) <= 2
  assert not workdir.exists()


def test_bad_argument_named(call, tmp_path):
  assert 'Unknown argument' in call(
    '--workdir', str(tmp_path), '--mode=train', 'extra'
  )
  assert not any(tmp_path.iterdir())


def test_workdir_of_another_config(call, trained):
  before = contents(trained[0])
  error = call(
    '--workdir', str(trained[0]), '--mode=train', '--config.model.nf=16'
  )
  assert error.startswith(f'error: {trained[0]} belongs to a run with ')
  assert 'config.model.nf=8, not 16' in error
  assert contents(trained[0]) == before


def test_truncated_checkpoint(call, trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  for path in (workdir / 'checkpoints' / '2' / 'state').rglob('*'):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)
  before = contents(workdir)
  error = call('--workdir', str(workdir), '--mode=train')
  assert error.startswith(f'error: Checkpoint {workdir}/checkpoints/2 cannot')
  assert len(error.splitlines()) == 1
  after = contents(workdir)
  assert after.pop(workdir / 'config.json')
  before.pop(workdir / 'config.json')
  assert after == before


@pytest.mark.parametrize('mode', ['eval', 'sample', 'export'])
def test_untrained_workdir(call, tmp_path, mode):
  workdir = tmp_path / 'run'
  error = call(
    '--workdir', str(workdir), f'--mode={mode}', '--output', 'x.safetensors'
  )
  assert error.startswith('error: ')
  assert 'train with this --workdir first' in error
  assert not workdir.exists()


def _hostile(data, trace):
  class Call:
    def __reduce__(self):
      return os.mkdir, (str(trace),)

  return pickle.dumps({'model': Call()}, 2)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (lambda data, trace: data, ' is of another network than the config: '),
    (lambda data, trace: data[: len(data) // 2], ' is damaged, or no file of'),
    (lambda data, trace: b'', ' is damaged, or no file of'),
    (_hostile, 'cannot be read as a PyTorch file: it asks for posix.mkdir'),
    (None, 'error: There is no checkpoint file '),
  ],
)
def test_import_of_a_bad_file(call, tmp_path, content, message):
  workdir, path = tmp_path / 'run', tmp_path / 'checkpoint_1'
  trace = tmp_path / 'trace'
  if content:
    data = (golden.DATA / 'released_jax.checkpoint').read_bytes()
    path.write_bytes(content(data, trace))
  before = contents(tmp_path)
  error = call(
    '--workdir', str(workdir), '--mode=import', '--checkpoint', str(path)
  )
  assert error.startswith('error: ') and message in error
  assert len(error.strip().splitlines()) == 1
  assert contents(tmp_path) == before
  assert not workdir.exists() and not trace.exists()


def test_import_needs_a_file_and_a_new_workdir(call, trained, tmp_path):
  error = call('--workdir', str(tmp_path / 'run'), '--mode=import')
  assert 'needs --checkpoint FILE' in error
  before = contents(trained[0])
  error = call(
    '--workdir', str(trained[0]), '--mode=import', '--checkpoint=anything'
  )
  assert f'{trained[0]} exists already: choose another --workdir.' in error
  assert contents(trained[0]) == before


def test_import_that_dies_leaves_no_workdir(call, tmp_path, monkeypatch):
  """Killed when the checkpoint was saved, and repeated."""
  import experiment
  from checkpoints import formats
  from commands import exchange

  config, workdir = tiny.get_config(), tmp_path / 'run'
  like = experiment.abstract_params(config)
  params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), like)
  formats.export(tmp_path / 'model', config, params)

  def die(self):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, 'wait', die)
    with pytest.raises(KeyboardInterrupt):
      exchange.import_released(config, workdir, tmp_path / 'model')
  assert not workdir.exists()
  exchange.import_released(config, workdir, tmp_path / 'model')
  assert {p.name for p in tmp_path.iterdir()} == {'model', 'run'}
  with Checkpoints(workdir) as saved:
    assert saved.steps == [0]


def test_export_that_diffusers_cannot_represent(call, trained, tmp_path):
  """It is said before anything is read."""
  error = call(
    '--workdir',
    str(trained[0]),
    '--mode=export',
    '--output',
    str(tmp_path / 'x'),
  )
  assert "error: diffusers' UNet2DModel cannot be this network exactly" in error
  assert not any(tmp_path.iterdir())


def test_no_tensorflow():
  program = (
    'import sys, main, run_lib, evaluation; '
    'from checkpoints import workdir; from data import datasets; '
    'sys.exit(any(name.split(".")[0] in ("tensorflow", "torch") '
    'for name in sys.modules))'
  )
  subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True)
