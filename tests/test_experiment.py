"""Experiments on arrays of any shape, against closed forms.

With EDM's scales a network that returns 0 is exact for Gaussian data of
variance 1, so that it tests all of the way from the data and back.
"""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import experiment
import run_lib
from configs.base import arrays, compose, ddpmpp, edm, mlp, ncsnpp, ve, vp
from solvers.base import Samples

NETWORKS = {
  (3,): (vp, mlp),
  (8, 2): (ve, ncsnpp),
  (4, 2, 5): (vp, ddpmpp),
  (2, 2, 4, 1): (vp, ddpmpp),
}


def channels(shape):
  """Return mean and deviation of each channel, of very different sizes."""
  c = np.arange(shape[-1])
  return 10.0 * c - 3, 10.0 ** (1 - c / 2)


def config_of(shape, path='', **overrides):
  """Return a config of a tiny network of EDM for arrays of a shape."""
  small = {'model.nf': 8}
  if len(shape) > 1:
    small |= {'model.ch_mult': (1, 1), 'model.num_res_blocks': 1}
    small |= {'model.attn_resolutions': ()}
  few = {'sampling.num_steps': 12, 'eval.bpd_trace': 'exact'}
  few |= {'training.batch_size': 8, 'training.n_jitted_steps': 1}
  changes = {key.replace('__', '.'): v for key, v in overrides.items()}
  parts = *NETWORKS[shape], edm, arrays(str(path))
  return compose(*parts, small | few | changes)


def scaled(shape, **overrides):
  mean, std = channels(shape)
  given = {'data__mean': tuple(mean), 'data__std': tuple(std)}
  return config_of(shape, data__shape=shape, **given, **overrides)


class Zero(nn.Module):
  """A network that returns 0."""

  def __call__(self, x, cond, *, train):
    return jnp.zeros_like(x)


def exact(config):
  """Return the Experiment of a config with a network that is exact."""
  return dataclasses.replace(experiment.build(config), network=Zero())


@pytest.mark.parametrize('shape', NETWORKS)
def test_scaling_is_undone(shape):
  """In samples, and in likelihoods with its Jacobian."""
  mean, std = channels(shape)
  model, params = exact(scaled(shape)), {}
  assert (
    model.kind == ('points', 'signals', 'images', 'volumes')[len(shape) - 1]
  )
  rng = jax.random.key(0)
  n = 16
  drawn = model.sample(params, rng, n)
  assert drawn.shape == (n, *shape) and drawn.dtype == np.float32
  z = (drawn - mean) / std  # Samples of the standard normal, but for steps.
  assert abs(z.mean()) < 4 / np.sqrt(z.size) and 0.6 < z.std() < 1.4

  bits, _, _, success = jax.jit(model.bits_per_dim)(params, rng, drawn)
  assert success
  nats = bits * np.log(2) * np.prod(shape)
  logp = stats.norm.logpdf(drawn, mean, std).reshape(n, -1).sum(1)
  np.testing.assert_allclose(nats, -logp, atol=0.01 * np.prod(shape))


def test_latent_codes():
  """They are those of scaled data, and are decoded to units of the data."""
  mean, std = channels((3,))
  model = exact(scaled((3,)))
  z = np.random.default_rng(0).normal(size=(16, 3))
  x = jnp.float32(z * std + mean)
  codes = jax.jit(lambda x: model.encode({}, x).y)(x)
  np.testing.assert_allclose(codes, z * np.sqrt(1 + 80**2), rtol=0.01, atol=0.1)
  again = np.asarray(jax.jit(lambda z: model.decode({}, z).x)(codes))
  np.testing.assert_allclose((again - mean) / std, z, atol=0.02)


def test_large_units_are_no_divergence():
  """Samples of guides are refused by their size in units of the deviation."""
  config = scaled((3,))
  config.data.mean = (1e6,) * 3
  found = lambda x: Samples(
    x=jnp.float32(x), nfe=0, success=True, frames=None, times=None
  )
  x = np.full((2, 3), 1e6)
  experiment.check_samples(config, found(x), 1e4)
  with pytest.raises(FloatingPointError, match='Samples diverged'):
    experiment.check_samples(config, found(x + 1e5), 1e4)


def test_flips():
  """Images of any channels are mirrored; other arrays are as they are."""
  shape = (4, 2, 5)
  mean, std = channels(shape)
  model = exact(scaled(shape, data__random_flip=True))
  x = np.random.default_rng(0).normal(mean, std, (64, *shape))
  seen = model.model_input(jax.random.key(0), np.float32(x), flip=True)
  z = (x - mean) / std
  error = lambda y: np.abs(seen - y).reshape(64, -1).max(1)
  mirrored = error(z[:, :, ::-1]) < 1e-3
  np.testing.assert_array_equal(mirrored, error(z) > 1e-3)
  assert 16 < mirrored.sum() < 48


def test_a_run_knows_its_scale(tmp_path):
  """It is in config.json, and the data are needed no more."""
  shape = (3,)
  x = np.random.default_rng(0).normal(*channels(shape), (40, *shape))
  path = tmp_path / 'x.npz'
  np.savez(path, x_train=x, x_test=x[:8])
  run = {'training__n_iters': 2, 'training__snapshot_sampling': False}
  config = config_of(shape, path, **run)
  run_lib.train(config, tmp_path / 'run')
  assert config.data.shape == config.data.mean == ()  # It is not changed.
  stored = json.loads((tmp_path / 'run/config.json').read_text())['data']
  assert stored['shape'] == [3]
  np.testing.assert_allclose(stored['mean'], x.mean(0))
  np.testing.assert_allclose(stored['std'], x.std(0))
  # Data that grow do not change the scale of a run, as main reads its config.
  np.savez(path, x_train=x + 1, x_test=x[:8])
  known = experiment.completed(config, tmp_path / 'run')
  assert [*known.data.mean] == stored['mean']
  path.unlink()
  model, params = experiment.load(tmp_path / 'run')
  assert model.sample(params, jax.random.key(0), 2).shape == (2, 3)
  with pytest.raises(FileNotFoundError, match='x.npz does not exist'):
    experiment.build(config)


@pytest.mark.parametrize(
  ('shape', 'overrides', 'message'),
  [
    ((3,), {'data__shape': (8, 2)}, "'mlp' cannot take .*: It is for vectors"),
    ((8, 2), {'data__shape': (3,)}, "'ncsnpp' cannot .*: use model.name='mlp'"),
    ((8, 2), {'data__shape': (7, 2)}, 'Data of 7 pixels cannot be downsampled'),
    ((8, 2), {'data__random_flip': True}, 'set data.random_flip=False'),
  ],
)
def test_shapes_that_do_not_suit(shape, overrides, message):
  given = {'data__shape': shape, 'data__mean': (0.0,), 'data__std': (1.0,)}
  with pytest.raises(ValueError, match=message):
    experiment.build(config_of(shape, **given | overrides))


def test_older_configs():
  """The number of coordinates of points became a shape."""
  old = experiment.json_of(compose(vp, mlp))
  for dims, shape in ((0, ()), (2, (2,))):
    old['data'] |= {'dims': dims}
    old['data'].pop('shape', None)
    assert experiment.schema.from_dict(old).data.shape == shape
