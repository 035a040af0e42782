"""Test consistency training and sampling on a Gaussian (Geng et al. 2024)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import experiment
import losses
import run_lib
import sampling
import sde_lib
from checkpoints.workdir import restore_ema
from configs.base import compose, edm, mlp, toy, vp
from tests.exact import optimized

SDE, STD = sde_lib.EDM(), 0.5


def exact(x, sigma):
  """Return the consistency function of N(0, STD^2)."""
  return x * STD / jnp.sqrt(STD**2 + sigma**2)


def score_of(f):
  """Return the score whose denoiser is f(x, sigma)."""

  def score_fn(x, t):
    sigma = sde_lib.expand(SDE.marginal(t)[1], x)
    return (f(x, sigma) - x) / sigma**2

  return score_fn


@pytest.mark.parametrize('middle', [0.0, 0.821])
def test_steps_with_the_exact_function_give_the_data(middle):
  z = SDE.prior_sample(jax.random.key(0), (20_000, 1))
  sampler = sampling.SAMPLERS['consistency'](middle=middle)
  sample = lambda rng, z: sampler(rng, score_of(exact), SDE, z)
  found = jax.jit(sample)(jax.random.key(1), z)
  found, z = jax.tree.map(np.asarray, (found, z))
  assert found.nfe == (2 if middle else 1)
  np.testing.assert_allclose(found.x.std(), STD, rtol=0.02)
  if not middle:
    np.testing.assert_allclose(found.x, STD / 80 * z, rtol=2e-3)
  else:  # The second step draws again, mostly by the new noise.
    correlation = np.corrcoef(found.x[:, 0], z[:, 0])[0, 1]
    np.testing.assert_allclose(
      correlation, STD / np.hypot(STD, middle), atol=0.02
    )


def test_the_gap_is_that_of_the_paper():
  objective = losses.Consistency()
  sigma = jnp.float32([0.01, 1.0, 60.0])
  gaps = [
    objective.at(f).keywords['gap'] for f in (0.0, 0.124, 0.126, 0.99, 1.0)
  ]
  np.testing.assert_allclose(gaps, [1 / 2, 1 / 2, 1 / 4, 1 / 256, 1 / 256])
  for gap in gaps:
    n = 1 + 8 / (1 + np.exp(np.float64(sigma)))
    want = sigma * np.maximum(0, 1 - n * float(gap))
    np.testing.assert_allclose(objective.earlier(sigma, gap), want, atol=1e-6)
  assert (objective.earlier(sigma[:2], 0.5) == 0).all()
  with pytest.raises(ValueError, match="'consistency' needs sde.name='edm'"):
    losses.ScoreMatching(objective=objective).check(sde_lib.VPSDE())


def limit(sigma, gap):
  """Return a(sigma), where a x is the function that ECT finds at a gap.

  E[x_r | x] = x (1 - (sigma - r) sigma / (STD^2 + sigma^2)), as both have the
  same noise, so a(sigma) is the product of these factors down to r = 0.
  """
  a = 1.0
  while sigma > 1e-4:
    n = 1 + 8 / (1 + np.exp(sigma))
    r = sigma * max(0.0, 1 - n * gap)
    a *= 1 - (sigma - r) * sigma / (STD**2 + sigma**2)
    sigma = r
  return a


def test_the_limit_of_small_gaps_is_the_exact_function():
  for sigma in (0.1, 0.5, 2.0, 10.0):
    error = [limit(sigma, 2.0**-a) / exact(1.0, sigma) - 1 for a in (6, 7, 8)]
    np.testing.assert_allclose(np.divide(error[:-1], error[1:]), 2, rtol=0.1)
    assert abs(error[-1]) < 0.02


def test_training_finds_the_consistency_function():
  """Fit f = (c_skip + c_out theta(log sigma)) x, with theta piecewise linear.

  Compare with the limit at the gap 1 / 16 of the last stage.
  """
  knots = jnp.linspace(np.log(0.002), np.log(80), 17)
  loss = losses.ScoreMatching(
    objective=losses.Consistency(ect_c=0.1, ect_stages=4),
    times=losses.Lognormal(p_mean=-1.1, p_std=2.0),
  )

  def f_of(theta):
    def f(x, sigma):
      total = STD**2 + sigma**2
      value = jnp.interp(jnp.log(sigma).ravel(), knots, theta)
      value = value.reshape(sigma.shape)
      c_skip, c_out = STD**2 / total, sigma * STD / jnp.sqrt(total)
      return c_skip * x + c_out * value * x / jnp.sqrt(total)

    return f

  steps, batch = 4000, 2048
  schedule = optax.linear_schedule(0.02, 0.0, steps)
  optimizer = optax.adam(schedule)

  def step(carry, i):
    theta, state = carry
    key = jax.random.fold_in(jax.random.key(0), i)
    x0 = STD * jax.random.normal(jax.random.fold_in(key, 9), (batch, 1))
    value = lambda theta: loss(
      key, score_of(f_of(theta)), SDE, x0, None, i / steps
    ).mean()
    updates, state = optimizer.update(jax.grad(value)(theta), state)
    return (optax.apply_updates(theta, updates), state), None

  theta = jnp.zeros(17)
  start = theta, optimizer.init(theta)
  (theta, _), _ = optimized(
    lambda start: jax.lax.scan(step, start, jnp.arange(steps))
  )(start)
  sigma, x = np.float32([[0.1], [0.5], [2.0], [10.0]]), np.ones((4, 1))
  want = np.array([[limit(float(v), 1 / 16)] for v in sigma[:, 0]])
  f = jax.jit(lambda theta: f_of(theta)(x, sigma))
  error = lambda theta: np.abs(f(theta) / want - 1)
  # theta = 0, the best denoiser, is no consistency function.
  assert error(np.zeros(17, np.float32)).max() > 0.7
  assert error(theta).max() < 0.1, error(theta)


def test_a_run_begins_with_the_weights_of_another(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  change = {
    'model.nf': 8, 'model.num_layers': 1, 'training.n_iters': 4,
    'training.n_jitted_steps': 2,
    'training.snapshot_sampling': False, 'training.batch_size': 32,
  }  # fmt: skip
  config = compose(vp, mlp, edm, toy('mixture'), change)
  run_lib.train(config, tmp_path / 'first')
  config = compose(
    vp, mlp, edm, toy('mixture'), change,
    {
      'training.begin_with': '~/first', 'optim.lr': 0.0,
      'training.ema_rate': 0.0,
      'training.objective': 'consistency', 'sampling.method': 'consistency',
    },
  )  # fmt: skip
  run_lib.train(config, tmp_path / 'second')
  like = experiment.build(config).abstract_params()
  first, second = (restore_ema(tmp_path / n, like) for n in ('first', 'second'))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  config.training.begin_with = str(tmp_path / 'none')
  with pytest.raises(FileNotFoundError, match='begin_with=.* no config.json'):
    run_lib.train(config, tmp_path / 'third')
