r"""Adaptive solver of ordinary differential equations, on the device.

`solve_ode` runs inside `jax.jit`; samplers, likelihoods and latent codes use
it. The sampler `ODE` solves the probability-flow ODE (Eq. 13) with it. Long
solutions can be computed in stretches, with the same result: `begin`, then
`proceed` as often as it takes, then `end`.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Real

from runtime.options import option
from solvers import base


class OdeSolution(typing.NamedTuple):
  """Solution of an ODE.

  Attributes:
    y: state at t1.
    nfe: number of drift evaluations.
    success: whether t1 was reached with a finite state and within the allowed
      number of steps.
    not_finite_at: time at which the drift is not finite, which is why t1 was
      not reached; else NaN.
  """

  y: PyTree
  nfe: Int[Array, '']
  success: Bool[Array, '']
  not_finite_at: Float[Array, '']


class OdeState(typing.NamedTuple):
  """Where a solution stands between two attempted steps.

  Attributes:
    t: time that was reached.
    y: state there.
    slope: drift there.
    h: size of the next step.
    rejected: whether the last attempt was rejected.
    steps: number of attempted steps.
    stuck: whether no step from here is possible.
    finite: whether the last attempt (or the start) had finite slopes.
  """

  t: Float[Array, '']
  y: PyTree
  slope: PyTree
  h: Float[Array, '']
  rejected: Bool[Array, '']
  steps: Int[Array, '']
  stuck: Bool[Array, '']
  finite: Bool[Array, '']


MAX_STEPS = 10_000  # A solution that takes more attempts has failed.

# Dormand & Prince (1980): nodes, stages (the last row is the fifth-order
# solution) and the difference between that and the fourth-order solution.
_NODES = np.array([1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1], np.float32)
_STAGES = np.array(
  [
    [1 / 5, 0, 0, 0, 0, 0, 0],
    [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
    [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
  ],
  np.float32,
)
_ERROR = np.array(
  [-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40],
  np.float32,
)
_SAFETY, _MIN_FACTOR, _MAX_FACTOR = 0.9, 0.2, 10.0


def combine(weights, slopes):
  """Return sum_i weights_i slopes_i, for a pytree stacked along axis 0."""
  contract = functools.partial(
    jnp.tensordot, weights, axes=1, precision=jax.lax.Precision.HIGHEST
  )
  return jax.tree.map(contract, slopes)


def _axpy(h, x, y):
  """Return y + h x for pytrees."""
  return jax.tree.map(lambda x, y: y + h * x, x, y)


def _finite(tree):
  """Return whether all numbers of a pytree are finite."""
  leaves = jax.tree.leaves(tree)
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in leaves]))


def _rms(tree, scale):
  """Return the root mean square over all numbers of tree / scale."""
  leaves = jax.tree.leaves(jax.tree.map(lambda v, s: (v / s) ** 2, tree, scale))
  total = sum(jnp.sum(v) for v in leaves)
  return jnp.sqrt(total / sum(v.size for v in leaves))


def _first_step(drift, y0, t0, t1, scale):
  """Return (slope at y0, size of the first step) (Hairer et al., II.4)."""
  direction = jnp.sign(t1 - t0)

  def explore(_, carry):
    """Make Euler's step of size h along the slope k; find the slope there."""
    _, k, _, h = carry
    k_next = drift(t0 + direction * h, _axpy(direction * h, k, y0))
    d0, d1 = _rms(y0, scale), _rms(k_next, scale)
    tiny = (d0 < 1e-5) | (d1 < 1e-5)
    h_next = jnp.where(tiny, 1e-6, 0.01 * d0 / d1)
    return k, k_next, h, jnp.minimum(h_next, jnp.abs(t1 - t0))

  # The slope k0 at y0, and k1 after a trial step of size h0. A loop, so that
  # the drift is compiled once for both.
  zero = jax.tree.map(jnp.zeros_like, y0)
  k0, k1, h0, _ = jax.lax.fori_loop(
    0, 2, explore, (zero, zero, jnp.zeros(()), jnp.zeros(()))
  )
  d1 = _rms(k0, scale)
  d2 = _rms(jax.tree.map(jnp.subtract, k1, k0), scale) / h0
  steepest = jnp.maximum(d1, d2)
  flat = jnp.maximum(1e-6, h0 * 1e-3)
  h1 = jnp.where(steepest <= 1e-15, flat, (0.01 / steepest) ** (1 / 5))
  # Where the trial step left the domain of the drift, the first step is the
  # smallest one that there is.
  return k0, jnp.where(jnp.isfinite(d2), jnp.minimum(100 * h0, h1), 0.0)


def _runge_kutta(drift, t, y, k0, h):
  """Make one step of size h from y, whose slope is k0.

  Returns:
    (the new state, all slopes stacked; the last is that of the new state).
  """
  stages, nodes = jnp.asarray(_STAGES), jnp.asarray(_NODES)

  def stage(i, carry):
    slopes, _ = carry
    y_i = _axpy(h, combine(stages[i], slopes), y)
    k = drift(t + nodes[i] * h, y_i)
    return jax.tree.map(lambda s, k: s.at[i + 1].set(k), slopes, k), y_i

  slopes = jax.tree.map(
    lambda k: jnp.zeros((7, *k.shape), k.dtype).at[0].set(k), k0
  )
  slopes, y_new = jax.lax.fori_loop(0, 6, stage, (slopes, y))
  return y_new, slopes


def _scale(y, y_new, rtol, atol):
  """Return atol + rtol max(|y|, |y_new|)."""
  return jax.tree.map(
    lambda a, b: atol + rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)), y, y_new
  )


def begin(
  drift: Callable,
  y0: PyTree,
  t0: Real[ArrayLike, ''],
  t1: Real[ArrayLike, ''],
  *,
  rtol: Real[ArrayLike, ''],
  atol: Real[ArrayLike, ''],
) -> OdeState:
  """Return the state of `solve_ode` before its first step.

  The state is stuck if the slope at y0 is not finite.
  """
  t0, t1 = jnp.float32(t0), jnp.float32(t1)
  scale = _scale(y0, y0, rtol, atol)
  slope, h = _first_step(drift, y0, t0, t1, scale)
  finite = _finite((y0, slope))
  start = (t0, y0, slope, h, np.False_, np.int32(0), ~finite, finite)
  return OdeState(*jax.tree.map(jnp.asarray, start))


def proceed(
  drift: Callable,
  state: OdeState,
  t1: Real[ArrayLike, ''],
  *,
  rtol: Real[ArrayLike, ''],
  atol: Real[ArrayLike, ''],
  max_steps: Int[ArrayLike, ''] = MAX_STEPS,
) -> OdeState:
  """Make steps until t1 is reached, or max_steps were attempted in all."""
  t1 = jnp.float32(t1)

  def attempt(carry):
    t, y, k0, h_abs, rejected, steps, _, _ = carry
    direction = jnp.sign(t1 - t)
    # A step below the spacing of floats at t would not change t.
    h_min = 10 * jnp.finfo(jnp.float32).eps * jnp.maximum(jnp.abs(t), 1e-7)
    h_abs = jnp.maximum(h_abs, h_min)
    last = h_abs >= jnp.abs(t1 - t)
    t_new = jnp.where(last, t1, t + direction * h_abs)
    h = t_new - t
    y_new, slopes = _runge_kutta(drift, t, y, k0, h)
    difference = combine(jnp.asarray(_ERROR), slopes)
    error = jnp.abs(h) * _rms(difference, _scale(y, y_new, rtol, atol))
    factor = _SAFETY * error ** (-1 / 5)
    accept = error < 1
    # Written so that a NaN error rejects the step and shrinks it.
    factor = jnp.where(
      accept,
      jnp.minimum(jnp.where(rejected, 1.0, _MAX_FACTOR), factor),
      jnp.where(factor > _MIN_FACTOR, factor, _MIN_FACTOR),
    )
    stuck = ~accept & (h_abs <= h_min)
    choose = functools.partial(jnp.where, accept)
    return OdeState(
      choose(t_new, t),
      jax.tree.map(choose, y_new, y),
      jax.tree.map(lambda k, k0: choose(k[-1], k0), slopes, k0),
      jnp.abs(h) * factor,
      ~accept,
      steps + 1,
      stuck,
      jnp.isfinite(error),
    )

  def unfinished(carry):
    return ~arrived_or_stuck(carry, t1) & (carry.steps < max_steps)

  return jax.lax.while_loop(unfinished, attempt, state)


def arrived_or_stuck(
  state: OdeState, t1: Real[ArrayLike, '']
) -> Bool[Array, '']:
  """Return whether no more steps are needed, or none are possible."""
  return (state.t == t1) | state.stuck


def end(state: OdeState, t1: Real[ArrayLike, '']) -> OdeSolution:
  """Return the solution of a state."""
  finite = _finite(state.y)
  bad = ~finite | (state.stuck & ~state.finite)
  # Two evaluations for the first step's size, then six a step: the seventh is
  # the first of the next step.
  return OdeSolution(
    y=state.y,
    nfe=2 + 6 * state.steps,
    success=(state.t == t1) & ~bad,
    not_finite_at=jnp.where(bad, state.t, jnp.nan),
  )


def solve_ode(
  drift: Callable,
  y0: PyTree,
  t0: Real[ArrayLike, ''],
  t1: Real[ArrayLike, ''],
  *,
  rtol: Real[ArrayLike, ''],
  atol: Real[ArrayLike, ''],
  max_steps: int = MAX_STEPS,
) -> OdeSolution:
  """Solve dy/dt = drift(t, y) from t0 to t1 by RK45, inside `jax.jit`.

  Dormand and Prince's pair with local extrapolation and the step control of
  Hairer, Norsett & Wanner (Solving ODEs I, II.4), as in scipy's RK45: one step
  size for the whole batch, from the root mean square of the error relative to
  atol + rtol |y|.

  Args:
    drift: drift(t, y) for a scalar t; y and the result are pytrees like y0.
    y0: pytree of float arrays.
    t0, t1: start and end; t1 may be smaller than t0.
    rtol, atol: relative and absolute tolerance of the error of a step.
    max_steps: number of attempted steps after which success is False. A slope
      at y0 that is not finite ends the solution at once.
  """
  t1, tolerances = jnp.float32(t1), {'rtol': rtol, 'atol': atol}
  state = begin(drift, y0, t0, t1, **tolerances)
  state = proceed(drift, state, t1, **tolerances, max_steps=max_steps)
  return end(state, t1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ODE(base.BaseSampler):
  """Probability-flow ODE from t = 1 to eps (Eq. 13), with adaptive steps.

  Example:
    >>> ODE(rtol=1e-3, atol=1e-3).continuous
    True
  """

  continuous = True

  rtol: float = option(
    1e-5,
    'Relative tolerance of adaptive ODE steps, in likelihoods too.',
    '(0, inf)',
    marks=('samples', 'cost'),
  )
  atol: float = option(
    1e-5,
    'Absolute tolerance of adaptive ODE steps, in likelihoods too.',
    '(0, inf)',
    marks=('samples', 'cost'),
  )

  def _sample(self, rng, score_fn, sde, z, frames):
    del rng

    def drift(t, x):
      t = jnp.full(x.shape[:1], t)
      return sde.ode_drift(x, t, score_fn(x, t))

    def solve(i, x, t, t_next):
      del i
      return solve_ode(drift, x, t, t_next, rtol=self.rtol, atol=self.atol)

    return base.scan_stretches(solve, self, score_fn, sde, z, frames)
