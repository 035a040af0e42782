"""Adaptive solver of reverse-time SDEs, on the device.

Jolicoeur-Martineau et al. 2021, "Gotta Go Fast When Generating Data with
Score-Based Models" (arXiv 2105.14080), Algorithm 1, with one difference. Their
algorithm repeats a rejected step with new noise, so noise that happens to
cancel the drift is kept more often; in few dimensions the variances become
twice too large, however small the tolerance is. Here the Brownian path is fixed
in advance, and a shorter step uses the same path.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from runtime.options import option
from sde_lib import expand
from solvers import base


class SdeSolution(typing.NamedTuple):
  """Solution of an SDE.

  Attributes:
    y: state at t1, [B, ...].
    nfe: number of drift evaluations.
    success: whether t1 was reached with a finite state and within the allowed
      number of steps.
    not_finite_at: time at which the drift is not finite, which is why t1 was
      not reached; else NaN.
  """

  y: Float[Array, ' B *dims']
  nfe: Int[Array, '']
  success: Bool[Array, '']
  not_finite_at: Float[Array, '']


# First step size; r and theta of the paper's step control.
_FIRST, _EXPONENT, _SAFETY = 0.01, 0.9, 0.9


# The path is linear over 2^-24, which is about what float32 resolves at t = 1.
_LEVELS = 24


def brownian_path(
  rng: base.Rng, t: Float[Array, ''], shape: Sequence[int]
) -> Float[Array, '...']:
  """Return w(t) of the Brownian motion on [0, 1] that belongs to a key.

  The path is refined by bridges, halving by halving (the virtual Brownian tree
  of Li et al. 2020, arXiv 2001.01328, Algorithm 3).

  Args:
    rng: key of the path.
    t: time in [0, 1].
    shape: shape of w(t).
  """

  def halve(level, interval):
    low, w_low, w_high, node = interval
    width = 0.5**level
    key = jax.random.fold_in(jax.random.fold_in(rng, level), node)
    bridge = 0.5 * jnp.sqrt(width) * jax.random.normal(key, shape, t.dtype)
    middle, w_middle = low + 0.5 * width, 0.5 * (w_low + w_high) + bridge
    later = t >= middle
    return (
      jnp.where(later, middle, low),
      jnp.where(later, w_middle, w_low),
      jnp.where(later, w_high, w_middle),
      2 * node + later,
    )

  w_end = jax.random.normal(jax.random.fold_in(rng, _LEVELS), shape, t.dtype)
  start = (jnp.zeros_like(t), jnp.zeros_like(w_end), w_end, jnp.asarray(0))
  low, w_low, w_high, _ = jax.lax.fori_loop(0, _LEVELS, halve, start)
  return w_low + (t - low) * 2.0**_LEVELS * (w_high - w_low)


def _increments(drift, diffusion, x, t, t_next, dw):
  """Return the increments of improved Euler and of Euler-Maruyama."""

  def stage(j, increments):
    k, _ = increments
    at = jnp.where(j, t_next, t)
    drifted = expand(t_next - t, x) * drift(x + k, at)
    return drifted + expand(diffusion(at), x) * dw, k

  zero = jnp.zeros_like(x)
  k2, k1 = jax.lax.fori_loop(0, 2, stage, (zero, zero))
  return 0.5 * (k1 + k2), k1


def solve_sde(
  rng: base.Rng,
  drift: Callable,
  diffusion: Callable,
  x: base.State,
  t0: Real[ArrayLike, ''],
  t1: Real[ArrayLike, ''],
  *,
  rtol: Real[ArrayLike, ''],
  atol: Real[ArrayLike, ''],
  max_steps: int = 10_000,
) -> SdeSolution:
  """Solve dx = drift dt + diffusion dw backwards from t0 to t1 < t0.

  A step compares Euler-Maruyama's x' with the stochastic improved Euler's x'',
  which has the same noise, and continues from x''. Every example has its own
  steps; the batch runs until the last example has arrived.

  Args:
    rng: key.
    drift: drift(x, t) for t [B], shaped as x.
    diffusion: diffusion(t), shaped as t.
    x: state at t0, [B, ...].
    t0, t1: start and end, scalars.
    rtol, atol: tolerances of the difference, atol in units of x. The paper
      uses 0.01 to 0.05, and one grey level.
    max_steps: number of attempted steps after which success is False. A drift
      that is not finite at a state that was reached ends the solution at once.
  """
  tiny = jnp.finfo(x.dtype).eps  # A smaller step would not change t.

  def path(t):
    keys = jax.random.split(rng, len(x))
    return jax.vmap(lambda k, t: brownian_path(k, t, x.shape[1:]))(keys, t)

  def attempt(carry):
    x, x_prev, w, t, h, steps, _ = carry
    t_next = jnp.where(h >= t - t1, t1, t - h)
    w_next = path(t_next)
    k_improved, k_euler = _increments(
      drift, diffusion, x, t, t_next, w_next - w
    )
    x_euler = x + k_euler
    scale = jnp.maximum(jnp.abs(x_euler), jnp.abs(x_prev))
    scale = jnp.maximum(atol, rtol * scale)
    square = ((k_improved - k_euler) / scale) ** 2
    error = jnp.sqrt(jnp.mean(square.reshape(len(x), -1), axis=-1))
    accept = error <= 1
    choose = lambda a, b: jnp.where(expand(accept, a), a, b)
    x, x_prev = choose(x + k_improved, x), choose(x_euler, x_prev)
    w, t = choose(w_next, w), choose(t_next, t)
    factor = _SAFETY * jnp.maximum(error, tiny) ** -_EXPONENT
    # A NaN error rejects the step as well, and shrinks it.
    h = jnp.where(jnp.isfinite(factor), factor, 0.1) * h
    # A shorter step from here begins with the same drift.
    stuck = ~jnp.isfinite(k_euler).reshape(len(x), -1).all(axis=-1)
    h = jnp.where(stuck & (t > t1), 0.0, jnp.minimum(h, t - t1))
    return x, x_prev, w, t, h, steps + 1, jnp.isfinite(error)

  def unfinished(carry):
    _, _, _, t, h, steps, _ = carry
    going = t > t1
    return jnp.any(going) & (steps < max_steps) & jnp.all(~going | (h > tiny))

  t1 = jnp.asarray(t1, x.dtype)
  t = jnp.full(x.shape[:1], t0, x.dtype)
  h, finite = jnp.minimum(_FIRST, t - t1), jnp.ones_like(t, bool)
  start = (x, x, path(t), t, h, jnp.asarray(0), finite)
  x, _, _, t, _, steps, finite = jax.lax.while_loop(unfinished, attempt, start)
  bad = (t > t1) & ~finite | ~jnp.isfinite(x).reshape(len(x), -1).all(axis=-1)
  return SdeSolution(
    y=x,
    nfe=2 * steps,
    success=jnp.all(t == t1) & ~jnp.any(bad),
    not_finite_at=jnp.nanmax(jnp.where(bad, t, jnp.nan)),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveSDE(base.BaseSampler):
  """Reverse-time SDE from t = 1 to eps, each example with adaptive steps.

  Example:
    >>> AdaptiveSDE(sde_rtol=0.05).sde_atol * 256
    1.0
  """

  continuous = True

  sde_rtol: float = option(
    0.02,
    'Relative tolerance of adaptive SDE steps.',
    '(0, inf)',
    marks=('samples', 'cost'),
  )
  sde_atol: float = option(
    1 / 256,
    'Absolute tolerance of adaptive SDE steps, for data in [0, 1]; 1/256 is '
    'one grey level.',
    '(0, inf)',
    marks=('samples', 'cost'),
  )
  data_width: float = option(
    1.0,
    "Width of the model's range: 1 for data in [0, 1], 2 for [-1, 1].",
    '(0, inf)',
    given=True,
  )

  def _sample(self, rng, score_fn, sde, z, frames):
    def drift(x, t):
      return sde.reverse_drift(x, t, score_fn(x, t))

    def solve(i, x, t, t_next):
      return solve_sde(
        jax.random.fold_in(rng, i),
        drift,
        lambda t: sde.coefficients(t)[1],
        x,
        t,
        t_next,
        rtol=self.sde_rtol,
        atol=self.sde_atol * self.data_width,
      )

    return base.scan_stretches(solve, self, score_fn, sde, z, frames)
