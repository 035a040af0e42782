"""An adaptive solver of reverse-time SDEs, on the device.

Jolicoeur-Martineau et al. 2021, "Gotta Go Fast When Generating Data with
Score-Based Models" (arXiv 2105.14080), Algorithm 1.
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

  def increments(h, x, t, z):
    """Those of both solutions: k'' and k', each as an Euler step."""

    def stage(j, increments):
      k, _ = increments
      at = t - j * h
      noise = jnp.sqrt(h) * diffusion(at)
      k_next = -expand(h, x) * drift(x + k, at) + expand(noise, x) * z
      return k_next, k

    zero = jnp.zeros_like(x)
    k2, k1 = jax.lax.fori_loop(0, 2, stage, (zero, zero))
    return 0.5 * (k1 + k2), k1

  def attempt(carry):
    x, x_prev, t, h, steps = carry
    z = jax.random.normal(jax.random.fold_in(rng, steps), x.shape, x.dtype)
    k_improved, k_euler = increments(h, x, t, z)
    x_euler = x + k_euler
    scale = jnp.maximum(jnp.abs(x_euler), jnp.abs(x_prev))
    scale = jnp.maximum(atol, rtol * scale)
    square = ((k_improved - k_euler) / scale) ** 2
    error = jnp.sqrt(jnp.mean(square.reshape(len(x), -1), axis=-1))
    accept = error <= 1
    wide = expand(accept, x)
    x = jnp.where(wide, x + k_improved, x)
    x_prev = jnp.where(wide, x_euler, x_prev)
    last = h >= t - t1
    t = jnp.where(accept, jnp.where(last, t1, t - h), t)
    factor = _SAFETY * jnp.maximum(error, tiny) ** -_EXPONENT
    # A NaN error rejects, too, and shrinks the step.
    h = jnp.where(jnp.isfinite(factor), factor, 0.1) * h
    return x, x_prev, t, jnp.minimum(h, t - t1), steps + 1

  def unfinished(carry):
    _, _, t, h, steps = carry
    going = t > t1
    return jnp.any(going) & (steps < max_steps) & jnp.all(~going | (h > tiny))

  t1 = jnp.asarray(t1, x.dtype)
  t = jnp.full(x.shape[:1], t0, x.dtype)
  start = (x, x, t, jnp.minimum(_FIRST, t - t1), jnp.asarray(0))
  x, _, t, _, steps = jax.lax.while_loop(unfinished, attempt, start)
  success = jnp.all(t == t1) & jnp.all(jnp.isfinite(x))
  return SdeSolution(x, 2 * steps, success)
