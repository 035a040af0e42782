"""The command line: an error is one clear line, and no file changes."""

import json
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

import experiment
import run_lib
from checkpoints import formats
from checkpoints.workdir import Checkpoints
from commands import exchange
from configs import schema
from tests import golden, tiny

ROOT = pathlib.Path(__file__).parents[1]


# The network does not matter here, except in `test_train`.
pytestmark = pytest.mark.usefixtures('quick_network')

# main.py as a program, with the network of these tests.
PROGRAM = """
from absl import app
import main
from tests import tiny
with tiny.quick_network():
  app.run(main.main, flags_parser=main.parse)
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Return a workdir of two steps."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  run_lib.train(tiny.get_config(training__n_iters=2), workdir)
  return workdir


@pytest.fixture
def command(monkeypatch):
  """Return run(*arguments) -> exit status or line, of main.py."""
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', tiny.CACHE)

  def run(*arguments):
    import main

    flags.FLAGS.unparse_flags()
    with pytest.raises(SystemExit) as stopped:
      argv = ['main.py', *map(str, arguments)]
      app.run(main.main, argv=argv, flags_parser=main.parse)
    return stopped.value.code

  return run


@pytest.fixture
def call(command, capsys):
  """Return run(*arguments) -> the line on stderr, of a command that fails."""

  def run(*arguments):
    code = command('--config', ROOT / 'tests' / 'tiny.py', *arguments)
    assert code not in (0, None)
    return code if isinstance(code, str) else capsys.readouterr().err

  return run


def contents(folder):
  files = [path for path in folder.rglob('*') if path.is_file()]
  return {path: path.read_bytes() for path in files}


def test_train(tmp_path):
  """The program itself trains NCSN++ for two steps."""
  workdir = tmp_path / 'run'
  done = subprocess.run(
    [sys.executable, 'main.py', '--config', 'tests/tiny.py', '--mode', 'train']
    + ['--workdir', workdir, '--config.training.n_iters=2'],
    cwd=ROOT,
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': tiny.CACHE},
    capture_output=True,
    text=True,
    check=True,
  )
  assert 'ncsnpp, 0.01M parameters, 1 cpu device(s), 0.1' in done.stdout
  assert ' MiB of state on each, 1500 images of digits' in done.stdout
  assert 'step 2/2 loss ' in done.stdout
  assert {path.name for path in workdir.iterdir()} >= {
    'config.json',
    'train.jsonl',
    'tensorboard',
    'checkpoints',
  }


def test_nothing_left_to_do(trained, capsys):
  before = contents(trained)
  run_lib.train(tiny.get_config(training__n_iters=2), trained)
  assert 'Nothing to do: 2 of 2 steps are done.' in capsys.readouterr().out
  assert contents(trained) == before


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    (
      '--config.training.batch_sise=12',
      'error: config.training.batch_sise does not exist: did you mean '
      'config.training.batch_size?',
    ),
    (
      '--config.lr=1',
      'error: config.lr does not exist: did you mean config.optim.lr?',
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
      'config.training.grad_accumulation=3.',
    ),
    (
      '--config.sampling.predictor=euler',
      "error: config.sampling.predictor='euler' is unknown: use one of euler",
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
  before = contents(trained)
  error = call(
    '--workdir', str(trained), '--mode=train', '--config.model.nf=16'
  )
  assert error.startswith(f'error: {trained} belongs to a run with ')
  assert 'config.model.nf=8, not 16' in error
  assert contents(trained) == before


def test_truncated_checkpoint(call, trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
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
  output = ['--output=x.safetensors'] if mode == 'export' else []
  error = call('--workdir', str(workdir), f'--mode={mode}', *output)
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
  before = contents(trained)
  error = call(
    '--workdir', str(trained), '--mode=import', '--checkpoint=anything'
  )
  assert f'{trained} exists already: choose another --workdir.' in error
  assert contents(trained) == before


def test_import_that_dies_leaves_no_workdir(call, tmp_path, monkeypatch):
  """It is killed when the checkpoint was saved, and repeated."""
  config, workdir = tiny.get_config(), tmp_path / 'run'
  like = experiment.build(config).abstract_params()
  params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), like)
  formats.export(tmp_path / 'model', config.to_json_best_effort(), params)

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
  """The error comes before anything is read."""
  error = call(
    '--workdir',
    str(trained),
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


# ------------------------------------------------------- which config is read


@pytest.mark.parametrize(
  ('argument', 'value'),
  [
    ('--config.model.ch_mult=(1, 2)', (1, 2)),
    ('--config.model.ch_mult=[1, 2]', (1, 2)),
    ('--config.model.ch_mult=1,2', (1, 2)),
    ('--config.model.ch_mult=3', (3,)),
    ('--config.model.attn_resolutions=()', ()),
    ('--config.optim.lr=1e-2', 0.01),
    ('--config.optim.lr=1', 1.0),
    ('--config.training.batch_size=12', 12),
    ('--config.training.snapshot_sampling', True),
    ('--noconfig.data.random_flip', False),
    ('--config.data.random_flip=false', False),
    ('--config.sampling.corrector=ald', 'ald'),
    ('--config.sampling.corrector=annealed_langevin', 'ald'),
    ('--config.data.path=', ''),
    ('--config.eval.checkpoint=7', '7'),
    ('--config.seed=3', 3),
  ],
)
def test_override(tmp_path, argument, value):
  import main

  flags.FLAGS.unparse_flags()
  argv = ['main.py', '--config', str(ROOT / 'tests' / 'tiny.py'), argument]
  main.parse([*argv, '--workdir', str(tmp_path), '--mode=train'])
  config = main.read_config()
  name = argument.removeprefix('--no').strip('-').partition('=')[0]
  path = name.removeprefix('config.')
  got = dict(schema.leaves(config))[path]
  assert got == value and type(got) is type(value)
  schema.check(config)
  # Nothing else changes.
  want = dict(schema.leaves(tiny.get_config())) | {path: value}
  assert dict(schema.leaves(config)) == want


def test_bad_tuple(call, tmp_path):
  error = call(
    '--workdir', tmp_path, '--mode=train', '--config.model.ch_mult=(1, 2'
  )
  assert 'is no tuple such as (1, 2)' in error and 'ch_mult' in error


@pytest.mark.parametrize('missing', ['mode', 'workdir', 'config'])
def test_missing_flag(command, tmp_path, missing):
  given = {
    'mode': 'train',
    'workdir': tmp_path / 'run',
    'config': ROOT / 'tests' / 'tiny.py',
  }
  given.pop(missing)
  error = command(*(f'--{name}={value}' for name, value in given.items()))
  assert error.startswith('error: ') and f'--{missing}' in error
  assert len(error.splitlines()) == 1
  assert not any(tmp_path.iterdir())


def test_help_config(command, capsys):
  """All keys are printed, and nothing else is needed for it."""
  assert not command('--help_config')
  printed = capsys.readouterr().out
  for path, key in schema.KEYS.items():
    assert f'--config.{path}={key.option.default!r}\n' in printed
    assert key.option.meaning in printed


@pytest.fixture(params=['none', 'json', 'file'])
def config_arguments(request, trained):
  """Return the three ways to give the config of a run: all mean the same."""
  return {
    'none': [],
    'json': ['--config', trained / 'config.json'],
    'file': ['--config', ROOT / 'tests' / 'tiny.py'],
  }[request.param]


def test_sample_with_the_config_of_the_run(
  command, trained, tmp_path, config_arguments
):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  before = (workdir / 'config.json').read_bytes()
  stopped = command(
    '--workdir',
    workdir,
    '--mode=sample',
    '--config.sampling.num_samples=5',
    '--config.sampling.corrector=none',
    *config_arguments,
  )
  assert not stopped
  (path,) = (workdir / 'samples').glob('step_2-*.npz')
  with np.load(path) as file:
    assert file['images'].shape == (5, 8, 8, 1) and file['nfe'] == 3
  # Sampling does not change what the run was trained with.
  assert (workdir / 'config.json').read_bytes() == before


@pytest.mark.parametrize('mode', ['sample', 'eval', 'encode', 'export'])
def test_no_config_and_no_run(command, tmp_path, mode):
  error = command('--workdir', tmp_path / 'run', f'--mode={mode}')
  assert error.startswith('error: ')
  assert 'train with this --workdir first' in error
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('mode', ['sample', 'eval', 'encode'])
def test_keys_of_the_run_are_refused(call, trained, mode):
  """What a run was trained with cannot be another in any mode."""
  before = contents(trained)
  for key, value in {
    'sde.sigma_max': 11.0,
    'model.nf': 16,
    'data.centered': True,
    'training.num_scales': 10,
  }.items():
    error = call(
      '--workdir', trained, f'--mode={mode}', f'--config.{key}={value}'
    )
    assert f'config.{key}=' in error and f'not {value!r}' in error
    assert len(error.splitlines()) == 1
  assert contents(trained) == before


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{"model": {"nf": 8', 'is no config'),
    ('[1, 2]', 'is no config'),
    ('{"training": {"batch_sise": 8}}', 'config.training.batch_sise does not'),
    ('{"training": {"batch_size": "8"}}', "config.training.batch_size='8' is"),
    (None, 'There is no config file'),
  ],
)
def test_bad_config_file(command, tmp_path, content, message):
  path = tmp_path / 'config.json'
  if content:
    path.write_text(content)
  error = command(
    '--config', path, '--workdir', tmp_path / 'run', '--mode=sample'
  )
  assert error.startswith('error: ') and message in error
  assert len(error.splitlines()) == 1


def test_option_without_effect_is_a_warning(trained, tmp_path):
  """One line on stderr names the option and what it has no effect with."""
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  process = tiny.start(
    PROGRAM,
    *('--workdir', workdir, '--mode', 'sample'),
    *('--config.sampling.num_samples=2', '--config.sampling.method=heun'),
    '--config.sampling.sde_rtol=0.5',
  )
  _, said = process.communicate()
  assert not process.returncode, said
  lines = [line for line in said.splitlines() if 'warning: ' in line]
  assert len(lines) == 1
  assert 'sde_rtol=0.5' in lines[0] and "method='heun'" in lines[0]


def test_frames_of_a_sampler_without_frames(call, trained):
  error = call(
    '--workdir',
    trained,
    '--mode=sample',
    '--config.sampling.method=ula',
    '--config.sampling.frames=4',
  )
  assert 'sampling.frames=4' in error and len(error.splitlines()) == 1


# ------------------------------------------------------------------- notebook


def test_load(trained, tmp_path):
  """Two lines of a notebook: load and sample."""
  path = tmp_path / 'model.safetensors'
  exchange.export(tiny.get_config(), trained, path)
  wanted = dict(schema.leaves(tiny.get_config(training__n_iters=2)))
  model, params = experiment.load(trained)
  assert dict(schema.leaves(model.config)) == wanted
  images = model.sample(params, jax.random.key(0), 3)
  assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
  other = model.sample(params, jax.random.key(1), 3)
  assert np.any(images != other)
  model, params = experiment.load(path)
  wanted['training.n_iters'] = 8
  assert dict(schema.leaves(model.config)) == wanted
  again = model.sample(params, jax.random.key(0), 3)
  np.testing.assert_array_equal(images, again)


def test_load_an_older_config(trained, tmp_path):
  """Keys and values that were renamed are read as what they are today."""
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  old = json.loads((workdir / 'config.json').read_text())
  old['sde']['num_scales'] = old['training'].pop('num_scales')
  old['sampling']['corrector'] = 'annealed_langevin'
  (workdir / 'config.json').write_text(json.dumps(old))
  model, params = experiment.load(workdir)
  assert model.config.training.num_scales == 0
  assert model.config.sampling.corrector == 'ald'
  samples = jax.eval_shape(model.make_sample(2), params, jax.random.key(0))
  assert samples.x.shape == (2, 8, 8, 1)
