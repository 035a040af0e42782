"""Test the adaptive ODE solver against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from solvers import ode


def _oscillator(t, y):
  return {'x': y['v'], 'v': -y['x'] * (1 + 0.5 * jnp.sin(3 * t))}


def _solve(rtol, t1=5.0, **kwargs):
  y0 = {'x': jnp.asarray([1.0, 0.5]), 'v': jnp.asarray([0.0, -1.0])}
  solve = lambda: ode.solve_ode(
    _oscillator, y0, 0.0, t1, rtol=rtol, atol=rtol, **kwargs
  )
  return jax.jit(solve)()


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
    float(jnp.abs(_solve(rtol).y['x'] - exact).max()) for rtol in (1e-2, 1e-4)
  ]
  assert errors[1] < errors[0] / 20


def test_ode_failure_is_reported():
  assert not _solve(1e-6, max_steps=3).success
  blow_up = ode.solve_ode(
    lambda t, y: y**2, jnp.ones(1), 0.0, 2.0, rtol=1e-5, atol=1e-5
  )
  assert not blow_up.success
