"""An adaptive solver of reverse-time SDEs, on the device.

Jolicoeur-Martineau et al. 2021, "Gotta Go Fast When Generating Data with
Score-Based Models" (arXiv 2105.14080), Algorithm 1, but for one thing. There a
rejected step is tried again with new noise, so noise that happens to cancel the
drift is kept more often; in few dimensions variances come out twice too large,
however small the tolerance. Here the Brownian path is fixed beforehand, and a
shorter step sees the same path.
"""

import typing

import jax
import jax.numpy as jnp

from sde_lib import expand


class SdeSolution(typing.NamedTuple):
  """y: the state at t1; nfe: drift evaluations; success: whether t1 was reached
  with a finite state and within the allowed number of steps."""

  y: jax.Array
  nfe: jax.Array
  success: jax.Array


# First step size; r and theta of the paper's step control.
_FIRST, _EXPONENT, _SAFETY = 0.01, 0.9, 0.9


# The path is linear over 2^-24: about what float32 resolves at t = 1.
_LEVELS = 24


def brownian_path(rng, t, shape):
  """w(t) of the Brownian motion on [0, 1] that a key fixes, for a scalar t.

  By bridges from one half to the next (the virtual Brownian tree of Li et al.
  2020, arXiv 2001.01328, Algorithm 3).
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


def solve_sde(
  rng, drift, diffusion, x, t0, t1, *, rtol, atol, max_steps=10_000
) -> SdeSolution:
  """Solves dx = drift dt + diffusion dw backwards from t0 to t1 < t0.

  A step compares Euler-Maruyama's x' with the stochastic improved Euler's x'',
  which has the same noise, and goes on from x''. Every example has steps of its
  own; the batch runs until the last one has arrived.

  Args:
    rng: key.
    drift: drift(x, t), t [B], shaped as x.
    diffusion: diffusion(t), shaped as t.
    x: the state at t0, [B, ...].
    t0, t1: start and end, scalars.
    rtol, atol: tolerances of the difference, the latter in units of x. The
      paper takes 0.01 to 0.05, and one grey level.
    max_steps: attempted steps after which success is False.
  """
  tiny = jnp.finfo(x.dtype).eps  # A smaller step would not move t.

  def path(t):
    keys = jax.random.split(rng, len(x))
    return jax.vmap(lambda k, t: brownian_path(k, t, x.shape[1:]))(keys, t)

  def increments(x, t, t_next, dw):
    """Those of both solutions: x'' - x and x' - x."""

    def stage(j, increments):
      k, _ = increments
      at = jnp.where(j, t_next, t)
      drifted = expand(t_next - t, x) * drift(x + k, at)
      return drifted + expand(diffusion(at), x) * dw, k

    zero = jnp.zeros_like(x)
    k2, k1 = jax.lax.fori_loop(0, 2, stage, (zero, zero))
    return 0.5 * (k1 + k2), k1

  def attempt(carry):
    x, x_prev, w, t, h, steps = carry
    t_next = jnp.where(h >= t - t1, t1, t - h)
    w_next = path(t_next)
    k_improved, k_euler = increments(x, t, t_next, w_next - w)
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
    # A NaN error rejects, too, and shrinks the step.
    h = jnp.where(jnp.isfinite(factor), factor, 0.1) * h
    return x, x_prev, w, t, jnp.minimum(h, t - t1), steps + 1

  def unfinished(carry):
    _, _, _, t, h, steps = carry
    going = t > t1
    return jnp.any(going) & (steps < max_steps) & jnp.all(~going | (h > tiny))

  t1 = jnp.asarray(t1, x.dtype)
  t = jnp.full(x.shape[:1], t0, x.dtype)
  start = (x, x, path(t), t, jnp.minimum(_FIRST, t - t1), jnp.asarray(0))
  x, _, _, t, _, steps = jax.lax.while_loop(unfinished, attempt, start)
  success = jnp.all(t == t1) & jnp.all(jnp.isfinite(x))
  return SdeSolution(x, 2 * steps, success)
