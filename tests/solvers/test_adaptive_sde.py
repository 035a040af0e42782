"""Test the adaptive solver of the reverse SDE with known scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sde_lib
from solvers import adaptive_sde
from tests.exact import MIXTURE, optimized
from tests.test_sampling import SDES, assert_moments, name, prior


@functools.cache
def sample(sde, rtol):
  """Return Samples of the mixture."""
  sampler = adaptive_sde.AdaptiveSDE(eps=1e-3, sde_rtol=rtol, sde_atol=rtol)
  score_fn = MIXTURE.score_fn(sde)

  @optimized
  def program():
    return sampler(jax.random.key(0), score_fn, sde, prior(sde))

  return program()


@pytest.mark.parametrize('sde', SDES[:3], ids=name)
def test_it_reaches_the_data(sde):
  samples = sample(sde, 0.02)
  assert samples.success
  assert_moments(np.asarray(samples.x), MIXTURE, bias=0.04)


def test_tolerance_costs_evaluations():
  assert sample(SDES[1], 0.5).nfe < sample(SDES[1], 0.02).nfe


def test_brownian_path():
  """Check w(0) = 0 and that the increments are independent N(0, dt)."""
  times = np.float32([0.0, 1e-3, 0.25, 0.3, 0.9, 1.0])
  walk = jax.jit(
    jax.vmap(
      lambda t: adaptive_sde.brownian_path(jax.random.key(3), t, (4000,))
    )
  )
  path = np.asarray(walk(times))
  np.testing.assert_allclose(path[0], 0, atol=1e-6)
  steps = np.diff(path, axis=0) / np.sqrt(np.diff(times))[:, None]
  covariance = np.cov(steps)
  np.testing.assert_allclose(covariance, np.eye(5), atol=4 * np.sqrt(2 / 4000))
  np.testing.assert_allclose(steps.mean(1), 0, atol=4 / np.sqrt(4000))


def test_a_linear_sde_without_noise_is_solved():
  """Check that dx = x dt, solved backwards from 1 to 0, gives exp(-1)."""
  solve = jax.jit(
    lambda rtol: adaptive_sde.solve_sde(
      jax.random.key(0),
      lambda x, t: x,
      lambda t: 0 * t,
      np.ones((2, 3), np.float32),
      1.0,
      0.0,
      rtol=rtol,
      atol=1e-6,
    )
  )
  found = [solve(np.float32(rtol)) for rtol in (1e-1, 1e-2, 1e-3)]
  errors = [np.abs(v.y - np.exp(-1)).max() for v in found]
  assert errors[1] < 1e-2 and errors[2] < errors[1] / 3
  assert found[0].nfe < found[1].nfe < found[2].nfe


def test_failure_is_reported():
  found = jax.jit(
    lambda x: adaptive_sde.solve_sde(
      jax.random.key(0),
      lambda x, t: -x,
      lambda t: 0 * t + 1,
      x,
      1.0,
      0.0,
      rtol=1e-2,
      atol=1e-2,
      max_steps=2,
    )
  )(np.ones((2, 3), np.float32))
  assert not found.success


@pytest.mark.parametrize(('where', 'most'), [(2.0, 2), (0.5, 400)])
def test_a_drift_that_is_not_finite_stops(where, most):
  """At once, if it is the first one; the time of the cause is named."""
  found = jax.jit(
    lambda x: adaptive_sde.solve_sde(
      jax.random.key(0),
      lambda x, t: jnp.where(sde_lib.expand(t < where, x), jnp.nan, -x),
      lambda t: 0 * t + 1,
      x,
      1.0,
      0.0,
      rtol=1e-2,
      atol=1e-2,
    )
  )(np.ones((2, 3), np.float32))
  assert not found.success and int(found.nfe) <= most
  want = min(where, 1.0)
  np.testing.assert_allclose(found.not_finite_at, want, atol=1e-2)
  assert np.isfinite(found.y).all()
