"""Which checkpoints are kept and chosen, damage, and the config of a run."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.workdir import Checkpoints, claim, read_config, restore_ema

LOSSES = {5: 3.0, 10: 1.0, 15: 2.0, 20: 4.0, 25: 5.0}


def params(step):
  # Too large for Orbax to put it beside the index.
  return {'w': np.random.default_rng(0).random(9000, np.float32) + step}


def like():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return {'w': jax.ShapeDtypeStruct((9000,), jnp.float32, sharding=sharding)}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Return a workdir with LOSSES, in which every 15th step is kept."""
  workdir = tmp_path_factory.mktemp('run')
  with Checkpoints(workdir, keep_every=15) as saved:
    assert saved.last is None and saved.best is None and saved.steps == []
    for step, loss in LOSSES.items():
      state = {'step': np.int32(step), 'params': params(step)}
      saved.save(step, state, params(step + 0.5), loss=loss)
    saved.wait()
  return workdir


@pytest.fixture
def copied(run, tmp_path):
  """Return a copy of the run, to be damaged."""
  for path in run.rglob('*'):
    target = tmp_path / path.relative_to(run)
    if path.is_dir():
      target.mkdir()
    else:
      target.write_bytes(path.read_bytes())
  return tmp_path


def test_kept_are_the_best_the_last_two_and_every_nth(run):
  with Checkpoints(run) as saved:
    assert saved.steps == [10, 15, 20, 25]
    assert saved.best == 10
    assert saved.last == 25


def test_a_worse_one_does_not_displace_the_best(copied):
  with Checkpoints(copied, keep_every=15) as saved:
    saved.save(31, {'step': np.int32(31)}, params(31), loss=1.5)
    saved.save(32, {'step': np.int32(32)}, params(32), loss=0.5)
    saved.wait()
    assert saved.best == 32
    assert saved.steps == [15, 31, 32]


@pytest.mark.parametrize(
  ('which', 'steps'),
  [
    ('last', [25]),
    ('best', [10]),
    ('all', [10, 15, 20, 25]),
    ('15', [15]),
    (15, [15]),
    ('11:20', [15, 20]),
  ],
)
def test_select(run, which, steps):
  with Checkpoints(run) as saved:
    assert saved.select(which) == steps


@pytest.mark.parametrize(
  ('which', 'message'),
  [
    ('12', r'no checkpoint .12. .*it has \[10, 15, 20, 25\]'),
    ('26:30', 'no checkpoint .26:30.'),
    ('newest', "config.eval.checkpoint='newest' is none of"),
    ('1:2:3', "config.eval.checkpoint='1:2:3' is none of"),
  ],
)
def test_select_nothing(run, which, message):
  with (
    Checkpoints(run) as saved,
    pytest.raises(ValueError, match=message),
  ):
    saved.select(which)


def test_restore_gives_what_was_saved(run):
  with Checkpoints(run) as saved:
    state = {'step': jnp.zeros((), jnp.int32), 'params': params(0)}
    state = saved.restore(15, jax.tree.map(jnp.asarray, state), 'state')
  assert state['step'] == 15
  np.testing.assert_array_equal(state['params']['w'], params(15)['w'])


@pytest.mark.parametrize(('which', 'step'), [('last', 25), ('best', 10)])
def test_restore_ema(run, which, step):
  ema = restore_ema(run, like(), which)
  np.testing.assert_array_equal(ema['w'], params(step + 0.5)['w'])


def test_reading_where_nothing_was_trained(tmp_path):
  with pytest.raises(FileNotFoundError, match='train with this --workdir'):
    Checkpoints(tmp_path)
  assert not any(tmp_path.iterdir())


def test_another_network(run):
  other = {'v': like()['w']}
  with pytest.raises(ValueError, match='25 cannot be read .*another network'):
    restore_ema(run, other)
  wrong_shape = jax.tree.map(
    lambda v: jax.ShapeDtypeStruct((200,), v.dtype), like()
  )
  with pytest.raises(ValueError, match='25 cannot be read .*another network'):
    restore_ema(run, wrong_shape)


@pytest.mark.parametrize('what', ['largest', '_METADATA', 'manifest.ocdbt'])
def test_cut_short(copied, what):
  folder = copied / 'checkpoints' / '25' / 'ema'
  if what == 'largest':
    files = [path for path in folder.rglob('*') if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
  else:
    path = folder / what
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(ValueError, match='25 cannot be read .damaged') as error:
    restore_ema(copied, like())
  assert len(str(error.value).splitlines()) == 1
  # The one before it is still good.
  ema = restore_ema(copied, like(), '20')
  np.testing.assert_array_equal(ema['w'], params(20.5)['w'])


def test_metrics_cut_short(copied):
  path = copied / 'checkpoints' / '25' / 'metrics' / 'metrics'
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(ValueError, match='one is damaged: move it away'):
    Checkpoints(copied)


def test_unfinished_write_does_not_exist(copied):
  (copied / 'checkpoints' / '30.orbax-checkpoint-tmp').mkdir()
  with Checkpoints(copied) as saved:
    assert saved.last == 25


FIXED = ('data.dataset', 'model.nf', 'model.ch_mult', 'sde.sigma_max')


def config_dict(**changes):
  """Return a config; changes are dotted keys with __ for the dot."""
  config = {
    'data': {'dataset': 'digits', 'path': ''},
    'model': {'nf': 8, 'ch_mult': (1, 2)},
    'optim': {'lr': 0.1},
    'sde': {'sigma_max': 10.0},
  }
  for key, value in changes.items():
    section, _, name = key.partition('__')
    config[section][name] = value
  return config


def test_claim_workdir(tmp_path):
  workdir = tmp_path / 'new'
  config = config_dict()
  claim(workdir, config, FIXED)
  written = json.loads((workdir / 'config.json').read_text())
  assert written['model']['nf'] == config['model']['nf']

  # How training goes on may change, what is trained may not.
  claim(workdir, config_dict(optim__lr=0.5, data__path='elsewhere'), FIXED)
  before = (workdir / 'config.json').read_text()
  assert json.loads(before)['optim']['lr'] == 0.5
  with pytest.raises(ValueError, match=r'config.model.nf=8, not 16'):
    claim(workdir, config_dict(model__nf=16), FIXED)
  with pytest.raises(ValueError, match=r'config.sde.sigma_max=10.0, not 9.0'):
    claim(workdir, config_dict(sde__sigma_max=9.0), FIXED)
  with pytest.raises(ValueError) as error:
    claim(workdir, config_dict(model__ch_mult=(1,)), FIXED, write=False)
  assert str(error.value) == (
    f'{workdir} belongs to a run with config.model.ch_mult=(1, 2), not (1,): '
    'choose another --workdir, or that value.'
  )
  assert (workdir / 'config.json').read_text() == before
  claim(workdir, config_dict(optim__lr=0.7), FIXED, write=False)
  assert (workdir / 'config.json').read_text() == before


def test_claim_without_a_key(tmp_path):
  """A key that is new now is not compared; one that is missing now is."""
  claim(tmp_path, config_dict(), FIXED)
  claim(tmp_path, config_dict(model__mine=3), (*FIXED, 'model.mine'))
  config = config_dict()
  del config['model']['nf']
  with pytest.raises(ValueError, match='config.model.nf=8, not None'):
    claim(tmp_path, config, FIXED)


def test_claim_of_a_config_with_older_keys(tmp_path):
  claim(tmp_path, config_dict(sde__width=8, model__nf=0), FIXED)

  def upgrade(config):
    return config | {'model': {'nf': config['sde'].pop('width')}}

  claim(tmp_path, config_dict(), FIXED, upgrade=upgrade, write=False)
  with pytest.raises(ValueError, match='config.model.nf=8, not 16'):
    claim(tmp_path, config_dict(model__nf=16), FIXED, upgrade=upgrade)


def test_read_config(tmp_path):
  with pytest.raises(FileNotFoundError, match='train with this --work') as e:
    read_config(tmp_path)
  assert '\n' not in str(e.value)
  claim(tmp_path, config_dict(), FIXED)
  assert read_config(tmp_path) == config_dict(model__ch_mult=[1, 2])
  (tmp_path / 'config.json').write_text('{"data": ')
  with pytest.raises(ValueError, match=r'config\.json is not a readable JSON'):
    read_config(tmp_path)
