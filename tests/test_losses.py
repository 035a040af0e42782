"""Objectives: golden numbers, closed forms and the optimizer's schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import losses
import sde_lib
from tests.exact import GAUSSIAN

SDES = [
  sde_lib.VESDE(sigma_max=10.0),
  sde_lib.VPSDE(),
  sde_lib.SubVPSDE(),
  sde_lib.EDM(sigma_max=10.0),
]
name = lambda sde: type(sde).__name__


@pytest.mark.parametrize('sde', SDES, ids=name)
@pytest.mark.parametrize('weighting', ['variance', 'likelihood'])
def test_the_exact_score_minimises_the_loss(sde, weighting):
  """Scaling or shifting the closed-form score of Gaussian data costs loss."""
  x0 = jnp.asarray(GAUSSIAN.sample(0, 20_000))
  exact = GAUSSIAN.score_fn(sde)

  def loss(score_fn):
    values = losses.score_matching(
      jax.random.key(0), score_fn, sde, x0, weighting=weighting, eps=1e-2
    )
    return jnp.mean(values)

  best = loss(exact)
  assert best < loss(lambda x, t: 0.9 * exact(x, t))
  assert best < loss(lambda x, t: 1.1 * exact(x, t))
  assert best < loss(lambda x, t: exact(x, t) + 0.3)


@pytest.mark.parametrize('sde', SDES, ids=name)
def test_importance_sampling_estimates_the_same_loss(sde):
  x0 = jnp.asarray(GAUSSIAN.sample(0, 50_000))
  zero = lambda x, t: jnp.zeros_like(x)
  estimates = {
    times: losses.score_matching(
      jax.random.key(1),
      zero,
      sde,
      x0,
      times=times,
      weighting='likelihood',
      eps=0.01,
    )
    for times in ('uniform', 'importance')
  }
  uniform, importance = estimates['uniform'], estimates['importance']
  error = jnp.std(uniform) / np.sqrt(len(x0))
  np.testing.assert_allclose(
    jnp.mean(importance), jnp.mean(uniform), atol=4 * error
  )
  if isinstance(sde, sde_lib.VESDE):  # log SNR is linear in t
    np.testing.assert_allclose(importance, uniform, rtol=1e-3, atol=1e-4)
  else:
    assert jnp.std(importance) < 0.8 * jnp.std(uniform)


def test_grid_times_are_the_levels():
  sde = sde_lib.DDPM(num_scales=50)
  t, weight = losses.grid_times(jax.random.key(0), sde, 5000, 0.0)
  labels = np.asarray(t) * 49
  np.testing.assert_allclose(labels, np.rint(labels), atol=1e-4)
  assert set(np.rint(labels)) == set(range(50))
  assert (weight == 1).all()
  with pytest.raises(ValueError, match='num_scales'):
    losses.grid_times(jax.random.key(0), sde_lib.VPSDE(), 2, 0.0)


def test_loss_is_per_example():
  x0 = jnp.zeros((3, 4, 4, 1))
  value = losses.score_matching(
    jax.random.key(0), lambda x, t: -x, sde_lib.VPSDE(), x0
  )
  assert value.shape == (3,)


def _step(optimizer, grads, params, state):
  updates, state = optimizer.update(grads, state, params)
  return optax.apply_updates(params, updates), state


ADAM = {'beta1': 0.9, 'beta2': 0.999, 'eps': 1e-8, 'weight_decay': 0.0}


def test_warmup_starts_at_zero_and_adam_moves_by_lr():
  optimizer = losses.make_optimizer(lr=0.1, warmup=4, grad_clip=0.0, **ADAM)
  params, moves = {'w': jnp.ones(3)}, []
  state = optimizer.init(params)
  for _ in range(6):
    new, state = _step(optimizer, {'w': jnp.full(3, 2.0)}, params, state)
    moves.append(float((params['w'] - new['w'])[0]))
    params = new
  # A constant gradient makes Adam's direction 1.
  want = [0, 0.025, 0.05, 0.075, 0.1, 0.1]
  np.testing.assert_allclose(moves, want, atol=1e-6)


def test_lr_is_not_part_of_the_state():
  """A resumed run takes its rate from the config that it is resumed with."""
  params, grads = {'w': jnp.ones(3)}, {'w': jnp.ones(3)}
  first = losses.make_optimizer(lr=0.1, warmup=0, grad_clip=1.0, **ADAM)
  second = losses.make_optimizer(lr=0.3, warmup=0, grad_clip=1.0, **ADAM)
  params, state = _step(first, grads, params, first.init(params))
  moved, _ = _step(second, grads, params, state)
  np.testing.assert_allclose(params['w'] - moved['w'], 0.3, rtol=1e-4)


def test_clipping_is_by_global_norm():
  optimizer = losses.make_optimizer(lr=1.0, warmup=0, grad_clip=1.0, **ADAM)
  clipped = optimizer.init({'a': jnp.zeros(1), 'b': jnp.zeros(1)})
  grads = {'a': jnp.asarray([30.0]), 'b': jnp.asarray([40.0])}
  _, state = optimizer.update(grads, clipped, grads)
  mu = optax.tree.get(state, 'mu')
  np.testing.assert_allclose([mu['a'][0], mu['b'][0]], [0.06, 0.08], rtol=1e-5)


def test_ema_decay():
  assert losses.ema_decay(1, rate=0.999, warmup=False) == 0.999
  np.testing.assert_allclose(
    losses.ema_decay(1, rate=0.999, warmup=True), 2 / 11
  )
  np.testing.assert_allclose(
    losses.ema_decay(10**6, rate=0.999, warmup=True), 0.999
  )
