"""How conditions enter networks, and what stands for none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import conditions

UNET = {
  'nf': 4, 'ch_mult': (1,), 'num_res_blocks': 1, 'attn_resolutions': (),
}  # fmt: skip
CASES = {
  'mlp-vector': ((2,), (3,), {'name': 'mlp', 'nf': 8}),
  'mlp-array': ((2,), (3,), {'name': 'mlp', 'nf': 8, 'num_labels': 2}),
  'energy-array': ((2,), (2,), {'name': 'mlp', 'nf': 8, 'energy': True}),
  'ncsnpp-vector': ((4, 4, 1), (3,), {'name': 'ncsnpp', **UNET}),
  'ncsnpp-array': ((4, 4, 1), (4, 4, 2), {'name': 'ncsnpp', **UNET}),
}


def random_params(network, x):
  """Return parameters that are all away from zero."""
  init = lambda: network.init(jax.random.key(0), x, jnp.ones(2), train=False)
  shapes = jax.eval_shape(init)['params']
  rng = np.random.default_rng(0)
  draw = lambda v: np.float32(rng.normal(size=v.shape) * v.shape[-1] ** -0.5)
  return jax.tree.map(draw, shapes)


@pytest.mark.parametrize('case', CASES)
def test_the_output_depends_on_the_condition(case):
  """None is the same as a dropped condition, and as nothing else."""
  shape, condition_shape, fields = CASES[case]
  x = jax.random.normal(jax.random.key(1), (1, *shape)).repeat(2, 0)
  network = models.create(
    **fields,
    condition=case.partition('-')[2],
    condition_shape=condition_shape,
  )
  params = random_params(network, x)

  @jax.jit
  def apply(condition):
    return network.apply(
      {'params': params}, x, jnp.ones(2), condition=condition, train=False
    )

  c = jax.random.normal(jax.random.key(2), (2, *condition_shape))
  both = apply(conditions.marked(c))
  assert both.shape == x.shape
  assert np.abs(both[0] - both[1]).max() > 1e-3
  drop = jnp.array([True, False])
  _, dropped = conditions.dropped(drop, None, conditions.marked(c), 0)
  free, some = apply(None), apply(dropped)
  np.testing.assert_allclose(some, [free[0], both[1]], rtol=1e-5, atol=1e-6)
  # The mean of the data is a condition as well.
  mean = apply(conditions.marked(jnp.zeros_like(c)))
  assert np.abs(mean - free).max() > 1e-3


def test_class_and_condition_are_dropped_together():
  drop = jnp.array([True, False])
  label, condition = conditions.dropped(
    drop, jnp.array([1, 2]), conditions.marked(jnp.ones((2, 3))), 5
  )
  assert label.tolist() == [5, 2]
  assert condition.tolist() == [[0.0] * 4, [1.0] * 4]


def test_networks_without_conditions_have_the_same_parameters():
  x = jnp.zeros((2, 4, 4, 1))
  plain = models.create('ncsnpp', **UNET)
  told = models.create(
    'ncsnpp', **UNET, condition='vector', condition_shape=(3,)
  )
  shapes = lambda tree: jax.tree.map(lambda v: v.shape, tree)
  params = random_params(told, x)
  assert shapes(params.pop('Condition')) == {
    'Dense_0': {'kernel': (4, 16), 'bias': (16,)},
    'Dense_1': {'kernel': (16, 16), 'bias': (16,)},
  }
  assert shapes(params) == shapes(random_params(plain, x))


def test_vectors_need_a_noise_embedding():
  with pytest.raises(ValueError, match='condition=vector needs conditional'):
    models.create('mlp', condition='vector', conditional=False)
