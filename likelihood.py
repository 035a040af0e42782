r"""Exact likelihood and latent codes by the probability flow (Section 4.3).

Along the probability-flow ODE dx/dt = F(x, t) the density obeys
d log p / dt = -div F, so that (Eq. 39)

    log p_0(x_0) = log p_1(x_1) + int_0^1 div F(x_t, t) dt.

The divergence is the trace of dF/dx: exact, from one Jacobian-vector product a
dimension, or Skilling and Hutchinson's estimate e^T (dF/dx) e (Eq. 40), one
product a probe e. The forward pass that gives the drift serves them all.

x_1 is the latent code of x_0. The ODE's solution depends on the data's
distribution alone, so any two networks that know the score agree on it.
"""

import math
import typing

import jax
import jax.numpy as jnp

from solvers import ode


class Likelihood(typing.NamedTuple):
  """Densities and latent codes of data.

  Attributes:
    logp: [B], in nats; the mean over probes.
    std_error: [B], in nats, the standard error of logp over probes; 0 for the
      exact trace, NaN for a single probe, which cannot tell.
    z: latent codes, shaped as the data.
    nfe: drift evaluations.
    success: whether the ODE solver reached t = 1.
  """

  logp: jax.Array
  std_error: jax.Array
  z: jax.Array
  nfe: jax.Array
  success: jax.Array


def rademacher(rng, shape):
  """Probes of independent, equally likely +1 and -1; the paper's choice.

  Of all probes of independent entries they have the least variance: that of the
  Jacobian's off-diagonal entries alone.
  """
  return jax.random.rademacher(rng, shape, dtype=jnp.float32)


def gaussian(rng, shape):
  """Standard normal probes."""
  return jax.random.normal(rng, shape)


PROBES = {'rademacher': rademacher, 'gaussian': gaussian}


def drift_and_divergence(score_fn, sde, x, t, probes=None):
  """(F(x, t), div F(x, t)), shaped as x and [K, B], by one forward pass.

  Args:
    score_fn: score_fn(x, t) -> score.
    sde: the forward process.
    x: state [B, ...].
    t: times [B].
    probes: K probes e of identity covariance, [K, B, ...], for the estimates
      e^T (dF/dx) e; None for the exact trace, with K = 1, which costs a product
      for each dimension of x.
  """
  # Forward mode: in loops on CPUs XLA runs the convolutions of a vjp nine times
  # slower, and e^T (J e) is the same number as (e^T J) e.
  drift, jacobian = jax.linearize(
    lambda x: sde.ode_drift(x, t, score_fn(x, t)), x
  )

  def form(e):
    return jnp.sum(e * jacobian(e), axis=tuple(range(1, x.ndim)))

  if probes is not None:
    return drift, jax.vmap(form)(probes)

  dims = math.prod(x.shape[1:])

  def diagonal(i):
    unit = jax.nn.one_hot(i, dims).reshape(x.shape[1:])
    return form(jnp.broadcast_to(unit, x.shape))

  # Some at once, as memory may not hold a large image's all.
  entries = jax.lax.map(diagonal, jnp.arange(dims), batch_size=min(dims, 16))
  return drift, jnp.sum(entries, axis=0, keepdims=True)


def log_likelihood(
  score_fn, sde, x, probes=None, *, eps=1e-5, rtol=1e-5, atol=1e-5
) -> Likelihood:
  """log p_0(x) in nats, [B], by the ODE from eps to 1 (Eq. 39).

  All probes share one solution of the ODE, and its steps.

  Args:
    score_fn: score_fn(x, t) -> score, in continuous time.
    sde: the forward process.
    x: data [B, ...] in the model's range.
    probes: [K, B, ...], of `PROBES`; None for the exact trace.
    eps: time at which the data are put.
    rtol, atol: tolerances of the ODE solver.
  """

  def augmented(t, state):
    t = jnp.full(x.shape[:1], t)
    return drift_and_divergence(score_fn, sde, state[0], t, probes)

  k = 1 if probes is None else probes.shape[0]
  start = (x, jnp.zeros((k, x.shape[0])))
  solution = ode.solve_ode(augmented, start, eps, 1.0, rtol=rtol, atol=atol)
  z, integrals = solution.y
  logp = sde.prior_logp(z) + jnp.mean(integrals, axis=0)
  if probes is None:
    std_error = jnp.zeros_like(logp)
  elif k == 1:
    std_error = jnp.full_like(logp, jnp.nan)
  else:
    std_error = jnp.std(integrals, axis=0, ddof=1) / math.sqrt(k)
  return Likelihood(logp, std_error, z, solution.nfe, solution.success)


def encode(
  score_fn, sde, x, *, eps=1e-5, rtol=1e-5, atol=1e-5
) -> ode.OdeSolution:
  """Latent codes y [B, ...] of data x, the ODE's states at t = 1.

  `sampling.ode_sample` from y decodes them.

  Args: as `log_likelihood`.
  """

  def drift(t, x):
    t = jnp.full(x.shape[:1], t)
    return sde.ode_drift(x, t, score_fn(x, t))

  return ode.solve_ode(drift, x, eps, 1.0, rtol=rtol, atol=atol)


def interpolate(z0, z1, weights):
  """Latent codes between z0 and z1 on a great circle, [K, B, ...].

  Gaussian codes of many dimensions lie about a sphere, which straight lines
  would leave; this keeps to it (slerp).

  Args:
    z0, z1: latent codes [B, ...].
    weights: [K], 0 for z0 to 1 for z1.
  """
  flat0, flat1 = (z.reshape(z.shape[0], -1) for z in (z0, z1))
  norms = jnp.linalg.norm(flat0, axis=1) * jnp.linalg.norm(flat1, axis=1)
  cosine = jnp.sum(flat0 * flat1, axis=1) / norms
  # Codes in one direction have no circle: the limit there is the straight line.
  angle = jnp.arccos(jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6))

  def at(w):
    a, b = jnp.sin((1 - w) * angle), jnp.sin(w * angle)
    shape = (-1,) + (1,) * (z0.ndim - 1)
    a, b = ((v / jnp.sin(angle)).reshape(shape) for v in (a, b))
    return a * z0 + b * z1

  return jax.vmap(at)(jnp.asarray(weights, jnp.float32))


def bits_per_dim(logp, dims, *, data_width):
  """Bits per dimension of dequantised 8-bit data, shaped as logp.

  A density over data scaled to an interval of width w becomes one over the 256
  grey levels by adding log2(256 / w) to -log2 p per dimension: 8 bits for
  [0, 1], 7 for [-1, 1], and none for data of no levels, whose "width" is 256.

  Args:
    logp: log-density in nats.
    dims: number of dimensions of one example.
    data_width: width of the interval that the 256 levels were scaled to.
  """
  return -logp / nats_per_bit(dims) + math.log2(256 / data_width)


def nats_per_bit(dims):
  """Nats of one example that are a bit per dimension."""
  return dims * math.log(2)
