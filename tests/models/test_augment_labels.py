"""Test that networks are told of augmentation in training, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiment
from configs import base
from tests import tiny
from tests.exact import optimized


def get_config(**changes):
  return tiny.get_config(data__augment=0.5, data__random_flip=False, **changes)


def test_training_tells_the_network_and_sampling_does_not():
  model = experiment.build(get_config())
  shapes = model.abstract_params()
  assert shapes['AugmentEmbedding']['kernel'].shape == (9, 16)
  draw = np.random.default_rng(0).normal
  params = jax.tree.map(lambda s: jnp.float32(draw(size=s.shape)), shapes)
  x, t = jnp.ones((2, 8, 8, 1)), jnp.full(2, 0.5)
  batch = {'image': jnp.full((2, 8, 8, 1), 99, jnp.uint8), 'label': None}
  rng = jax.random.key(0)

  def scores(params):
    labels = jnp.array([[0.0] * 9, [1.0] * 9])
    return [model.score_fn(params, augment=v)(x, t) for v in (None, labels)]

  none, (zero, one) = optimized(scores)(params)
  np.testing.assert_allclose(none[0], zero, rtol=1e-6)
  assert np.abs(one - none[1]).max() > 1e-3

  losses = jax.jit(lambda train_params: (
    model.loss(train_params, rng, batch),
    model.loss(train_params, rng, batch, train=False),
  ))  # fmt: skip
  kept = {**params, 'AugmentEmbedding': {'kernel': jnp.zeros((9, 16))}}
  told, still = (losses(p) for p in (params, kept))
  assert np.abs(told[0] - still[0]).min() > 1e-6
  np.testing.assert_allclose(told[1], still[1], rtol=1e-6)


def test_what_cannot_be_augmented_is_refused():
  with pytest.raises(ValueError, match='random_flip=False'):
    experiment.build(tiny.get_config(data__augment=0.1, data__random_flip=True))
  config = base.compose(
    base.vp, base.mlp, base.toy('rings'), {'data.augment': 0.1}
  )
  with pytest.raises(ValueError, match="not config.model.name='mlp'"):
    experiment.build(config)
