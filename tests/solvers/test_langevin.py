"""Test Langevin dynamics: moments, and the weights of distant modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import toy
from solvers import langevin
from tests.exact import optimized

CHAINS = 20_000
VARIANCE = np.array([1.0, 0.25])
MIXTURE = toy.DISTRIBUTIONS['toy/mixture']


def gaussian_score(x):
  return -x / np.float32(VARIANCE)[None]


def gaussian_ratio(x, y):
  """Return log p(y) - log p(x) for N(0, diag(VARIANCE))."""
  energy = lambda x: 0.5 * jnp.sum(-gaussian_score(x) * x, axis=1)
  return energy(x) - energy(y)


@optimized
def unadjusted(step_size):
  return langevin.unadjusted(
    jax.random.key(0),
    gaussian_score,
    jnp.zeros((CHAINS, 2)),
    step_size=step_size,
    num_steps=200,
  )


def assert_variance(x, want):
  """Check that the mean is 0 and the variance as wanted, in 4 std errors."""
  x, want = np.asarray(x), np.asarray(want)
  error = 4 / np.sqrt(len(x))
  np.testing.assert_allclose(x.mean(0) / np.sqrt(want), 0, atol=error)
  np.testing.assert_allclose(x.var(0) / want, 1, atol=error * np.sqrt(2))


def test_bias_of_the_unadjusted_chain():
  """Check the variance v / (1 - e / 2v) of a Gaussian with the step e."""
  steps = np.array([0.2, 0.1, 0.05])
  biases = []
  for e in steps:
    chains = unadjusted(np.float32(e))
    assert (np.asarray(chains.acceptance) == 1).all()
    assert chains.nfe == 200
    assert_variance(chains.x, VARIANCE / (1 - e / (2 * VARIANCE)))
    biases.append(np.asarray(chains.x)[:, 1].var() - VARIANCE[1])
  assert biases[0] > 20 * VARIANCE[1] * np.sqrt(2 / CHAINS)
  order = np.polyfit(np.log(steps), np.log(biases), 1)[0]
  assert 0.9 < order < 1.4  # e / (2 - e / v) is linear for small e


@pytest.mark.parametrize('ratio', [gaussian_ratio, None], ids=['exact', 'path'])
def test_metropolis_has_no_bias(ratio):
  """Check it with a step at which the unadjusted chain has an error of 2/3."""
  chains = optimized(
    lambda rng: langevin.metropolis(
      rng,
      gaussian_score,
      jnp.zeros((CHAINS, 2)),
      step_size=0.2,
      num_steps=200,
      log_ratio=ratio,
    )
  )(jax.random.key(1))
  assert_variance(chains.x, VARIANCE)
  assert chains.acceptance.shape == (CHAINS,)
  assert 0.7 < np.mean(chains.acceptance) < 0.95
  assert chains.nfe == (201 if ratio else 1201)


def test_acceptance_tends_to_one_with_the_step():
  @jax.jit
  def acceptance(step_size):
    return langevin.metropolis(
      jax.random.key(0),
      gaussian_score,
      jnp.full((4000, 2), 0.3),
      step_size=step_size,
      num_steps=20,
      log_ratio=gaussian_ratio,
    ).acceptance

  shares = [np.mean(acceptance(np.float32(e))) for e in (0.4, 0.1, 0.01)]
  assert shares[0] < shares[1] < shares[2]
  assert shares[2] > 0.995


def test_path_integral_is_the_log_ratio():
  rng = np.random.default_rng(0)
  x = np.float32(rng.uniform(3, 6, (100, 2)))
  y = np.float32(x + 0.5 * rng.standard_normal(x.shape))
  score = lambda x: jax.grad(lambda x: jnp.sum(MIXTURE.logp(x)))(x)

  @jax.jit
  def both(x, y):
    difference = MIXTURE.logp(y) - MIXTURE.logp(x)
    return langevin.path_integral(score, x, y), difference

  np.testing.assert_allclose(*both(x, y), atol=2e-4)


def mixture_score(x, sigma):
  return jax.grad(lambda x: jnp.sum(MIXTURE.logp(x, 1.0, sigma)))(x)


def weight(x):
  """Return the share of the points in the mode of weight 0.8."""
  return float((np.asarray(x).sum(axis=1) > 0).mean())


def test_weights_of_modes():
  """Check that annealed Langevin dynamics finds them and plain does not.

  Song & Ermon 2019, Figure 3, by exact scores: from uniform starts, the plain
  chain ends in the nearer mode, so each has about half of the chains.
  """
  n, steps = 3000, 200
  sigmas = np.geomspace(20.0, 1.0, 10, dtype=np.float32)
  start = np.float32(np.random.default_rng(0).uniform(-8, 8, (n, 2)))
  plain = optimized(
    lambda rng: langevin.unadjusted(
      rng,
      lambda x: mixture_score(x, 0.0),
      start,
      step_size=0.1,
      num_steps=1000,
    )
  )(jax.random.key(1))
  annealed = optimized(
    lambda rng: langevin.annealed(
      rng, mixture_score, sigmas, start, step_size=0.03, num_steps=steps
    )
  )(jax.random.key(2))
  assert plain.nfe == 1000
  assert annealed.nfe == 2001
  error = np.sqrt(0.8 * 0.2 / n)
  assert abs(weight(annealed.x) - 0.8) < 3 * error
  assert abs(weight(plain.x) - 0.5) < 0.05  # 40 standard errors from 0.8
