"""Test the adaptive solver of the reverse SDE with known scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sde_lib
from solvers import adaptive_sde
from tests.exact import MIXTURE
from tests.test_sampling import SDES, assert_moments, name, prior


def sample(sde, rtol):
  """Return Samples of the mixture."""
  sampler = adaptive_sde.AdaptiveSDE(eps=1e-3, sde_rtol=rtol, sde_atol=rtol)
  score_fn = MIXTURE.score_fn(sde)
  return jax.jit(lambda z: sampler(jax.random.key(0), score_fn, sde, z))(
    prior(sde)
  )


@pytest.mark.parametrize('sde', SDES[:3], ids=name)
def test_it_reaches_the_data(sde):
  samples = sample(sde, 0.02)
  assert samples.success
  assert_moments(np.asarray(samples.x), MIXTURE, bias=0.04)


def test_tolerance_costs_evaluations():
  nfe = [int(sample(SDES[1], rtol).nfe) for rtol in (0.5, 0.1, 0.02)]
  assert nfe[0] < nfe[1] < nfe[2]


def test_brownian_path():
  """Check w(0) = 0 and that the increments are independent N(0, dt)."""
  times = jnp.asarray([0.0, 1e-3, 0.25, 0.3, 0.9, 1.0])
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
  errors = [float(abs(solve(r).y - np.exp(-1)).max()) for r in (1e-2, 1e-3)]
  assert errors[0] < 1e-2 and errors[1] < errors[0] / 3


def test_failure_is_reported():
  def run(drift, **options):
    return adaptive_sde.solve_sde(
      jax.random.key(0),
      drift,
      lambda t: 0 * t + 1,
      np.ones((2, 3), np.float32),
      1.0,
      0.0,
      rtol=1e-2,
      atol=1e-2,
      **options,
    )

  assert not run(lambda x, t: -x, max_steps=2).success
  blown = run(lambda x, t: x * sde_lib.expand(1 / (t < 0.5), x) * np.nan)
  assert not blown.success and int(blown.nfe) < 200


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
