"""Test the adaptive ODE solver against scipy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import sde_lib
from solvers import ode


def _oscillator(t, y):
  return {'x': y['v'], 'v': -y['x'] * (1 + 0.5 * jnp.sin(3 * t))}


Y0 = {'x': np.float32([1.0, 0.5]), 'v': np.float32([0.0, -1.0])}


@functools.cache
def _solver(**kwargs):
  return jax.jit(
    lambda rtol, t1: ode.solve_ode(
      _oscillator, Y0, 0.0, t1, rtol=rtol, atol=rtol, **kwargs
    )
  )


def _solve(rtol, t1=5.0, **kwargs):
  return _solver(**kwargs)(np.float32(rtol), np.float32(t1))


@pytest.mark.parametrize('t1', [5.0, -2.0])
def test_rk45_takes_scipys_steps(t1):
  def flat(t, y):
    return np.concatenate([y[2:], -y[:2] * (1 + 0.5 * np.sin(3 * t))])

  ours = _solve(1e-4, t1)
  reference = scipy.integrate.solve_ivp(
    flat, (0, t1), [1.0, 0.5, 0.0, -1.0], rtol=1e-4, atol=1e-4
  )
  y = np.concatenate([ours.y['x'], ours.y['v']])
  np.testing.assert_allclose(y, reference.y[:, -1], rtol=2e-5, atol=2e-5)
  assert int(ours.nfe) == reference.nfev
  assert ours.success


def test_ode_error_falls_with_the_tolerance():
  exact = _solve(1e-7).y['x']
  errors = [
    np.abs(np.subtract(_solve(rtol).y['x'], exact)).max()
    for rtol in (1e-2, 1e-4)
  ]
  assert errors[1] < errors[0] / 20


def test_ode_failure_is_reported():
  assert not _solve(1e-6, max_steps=3).success
  blow_up = jax.jit(
    lambda: ode.solve_ode(
      lambda t, y: y**2, jnp.ones(1), 0.0, 2.0, rtol=1e-5, atol=1e-5
    )
  )()
  assert not blow_up.success


def test_a_slope_that_is_not_finite_stops_at_once():
  """Two evaluations, not tens of thousands, and the time of the cause."""

  @jax.jit
  def solve(y, bad):
    return ode.solve_ode(
      lambda t, y: y * bad, y, 0.25, 1.0, rtol=1e-5, atol=1e-5
    )

  for bad in (np.nan, np.inf, -np.inf):
    found = solve(np.float32([1, 1]), np.float32(bad))
    assert not found.success and int(found.nfe) == 2
    assert float(found.not_finite_at) == 0.25
  bad_start = solve(np.float32([1, np.nan]), np.float32(0))
  assert not bad_start.success and int(bad_start.nfe) == 2


@pytest.mark.parametrize('where', [1e-5, 0.5])
def test_a_slope_that_is_not_finite_later_on(where):
  """Steps shrink towards the time of the cause, which is named."""
  found = jax.jit(
    lambda where: ode.solve_ode(
      lambda t, y: jnp.where(t > where, jnp.nan, y),
      jnp.ones(2),
      0.0,
      1.0,
      rtol=1e-4,
      atol=1e-4,
    )
  )(np.float32(where))
  assert not found.success and int(found.nfe) < 500
  np.testing.assert_allclose(found.not_finite_at, where, rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(found.y, np.exp(where), rtol=1e-3)


def test_a_trial_step_beyond_the_domain_is_no_failure():
  """The slope after the trial step is not finite; the first step is tiny."""
  found = jax.jit(
    lambda: ode.solve_ode(
      lambda t, y: jnp.where(
        y < 1e-3, jnp.nan, -1e6 * jnp.maximum(y - 2e-3, 0)
      ),
      jnp.full(1, 2.1e-3),
      0.0,
      1e-3,
      rtol=1e-3,
      atol=1e-6,
    )
  )()
  assert found.success and np.isnan(found.not_finite_at)
  assert int(found.nfe) < 20_000


def test_too_many_steps_have_no_such_cause():
  found = _solve(1e-6, max_steps=3)
  assert not found.success and np.isnan(found.not_finite_at)
  assert np.isnan(_solve(1e-4).not_finite_at)


def test_stretches_give_the_same_bits():
  options = {'rtol': 1e-4, 'atol': 1e-4}
  state = jax.jit(lambda: ode.begin(_oscillator, Y0, 0.0, 5.0, **options))()
  proceed = jax.jit(
    lambda state, n: ode.proceed(
      _oscillator, state, 5.0, **options, max_steps=n
    )
  )
  stretches = 0
  while not ode.arrived_or_stuck(state, 5.0):
    state, stretches = proceed(state, state.steps + 3), stretches + 1
  found, whole = ode.end(state, 5.0), _solve(1e-4)
  assert stretches > 3 and found.success
  assert int(found.nfe) == int(whole.nfe)
  for key in Y0:
    np.testing.assert_array_equal(found.y[key], whole.y[key])


def test_a_sampler_that_fails_makes_no_more_stretches():
  """With frames the solver restarts, but not after a failure."""
  sampler = ode.ODE(rtol=1e-3, atol=1e-3)
  found = jax.jit(
    lambda z: sampler(
      None, lambda x, t: x * jnp.nan, sde_lib.VPSDE(), z, frames=50
    )
  )(jnp.ones((2, 3)))
  assert not found.success and float(found.not_finite_at) == 1.0
  assert int(found.nfe) < 150
