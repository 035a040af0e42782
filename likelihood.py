r"""Exact likelihood by the instantaneous change of variables (Section 4.3).

Along the probability-flow ODE dx/dt = F(x, t) the density obeys
d log p / dt = -div F, so that (Eq. 39)

    log p_0(x_0) = log p_1(x_1) + int_0^1 div F(x_t, t) dt.

The divergence is estimated by Skilling and Hutchinson's e^T (dF/dx) e (Eq. 40),
which one vector-Jacobian product gives along with the drift itself.
"""

import math
import typing

import jax
import jax.numpy as jnp

import ode


class Likelihood(typing.NamedTuple):
  """logp [B] in nats; z: latent code shaped as x; nfe: drift evaluations;
  success: whether the ODE solver reached t = 1."""

  logp: jax.Array
  z: jax.Array
  nfe: jax.Array
  success: jax.Array


def drift_and_divergence(score_fn, sde, x, t, probe):
  """(F(x, t), e^T (dF/dx) e), shaped as x and [B], by one vjp.

  Args:
    score_fn: score_fn(x, t) -> score.
    sde: the forward process.
    x: state [B, ...].
    t: times [B].
    probe: e, shaped as x, with identity covariance.
  """
  drift, vjp = jax.vjp(lambda x: sde.ode_drift(x, t, score_fn(x, t)), x)
  (jacobian_probe,) = vjp(probe)
  axes = tuple(range(1, x.ndim))
  return drift, jnp.sum(jacobian_probe * probe, axis=axes)


def log_likelihood(
  score_fn, sde, x, probe, *, eps=1e-5, rtol=1e-5, atol=1e-5
) -> Likelihood:
  """log p_0(x) in nats, [B], by the ODE from eps to 1 (Eq. 39).

  Args:
    score_fn: score_fn(x, t) -> score, in continuous time.
    sde: the forward process.
    x: data [B, ...] in the model's range.
    probe: e, shaped as x; `rademacher` is the paper's choice.
    eps: time at which the data are put.
    rtol, atol: tolerances of the ODE solver.
  """

  def augmented(t, state):
    t = jnp.full((x.shape[0],), t)
    return drift_and_divergence(score_fn, sde, state[0], t, probe)

  start = (x, jnp.zeros(x.shape[0]))
  solution = ode.solve_ode(augmented, start, eps, 1.0, rtol=rtol, atol=atol)
  z, integral = solution.y
  logp = sde.prior_logp(z) + integral
  return Likelihood(logp, z, solution.nfe, solution.success)


def rademacher(rng, shape):
  """Probe of independent, equally likely +1 and -1."""
  return jax.random.rademacher(rng, shape, dtype=jnp.float32)


def bits_per_dim(logp, dims, *, data_width):
  """Bits per dimension of dequantised 8-bit data, shaped as logp.

  A density over data scaled to an interval of width w becomes one over the 256
  grey levels by adding log2(256 / w) to -log2 p per dimension: 8 bits for
  [0, 1], 7 for [-1, 1].

  Args:
    logp: log-density in nats.
    dims: number of dimensions of one example.
    data_width: width of the interval that the 256 levels were scaled to.
  """
  return -logp / (dims * math.log(2)) + math.log2(256 / data_width)
