r"""Exact likelihood and latent codes by the probability flow (Section 4.3).

Along the probability-flow ODE dx/dt = F(x, t) the density obeys
d log p / dt = -div F, so that (Eq. 39)

    log p_0(x_0) = log p_1(x_1) + int_0^1 div F(x_t, t) dt.

The divergence is the trace of dF/dx. It is either exact, from one
Jacobian-vector product per dimension, or Skilling and Hutchinson's estimate
e^T (dF/dx) e (Eq. 40), from one product per probe e. All products share the
forward pass that computes the drift.

x_1 is the latent code of x_0. The solution of the ODE depends only on the
distribution of the data, so all networks that know the score agree on it.
"""

import math
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

import sde_lib
from solvers import ode
from solvers.base import Rng, ScoreFn, State

Probes = Float[ArrayLike, 'K B *dims']


class Likelihood(typing.NamedTuple):
  """Densities and latent codes of data.

  Attributes:
    logp: log-densities [B] in nats; the mean over probes.
    std_error: standard errors of logp over probes, [B], in nats; 0 for the
      exact trace, NaN for a single probe, which does not show its error.
    z: latent codes, shaped as the data.
    nfe: number of drift evaluations.
    success: whether the ODE solver reached t = 1.
    not_finite_at: time at which the score is not finite, which is why t = 1 was
      not reached; else NaN.
    state: where the ODE solver stands, for `log_likelihood` to go on from.
  """

  logp: Float[Array, ' B']
  std_error: Float[Array, ' B']
  z: Float[Array, ' B *dims']
  nfe: Int[Array, '']
  success: Bool[Array, '']
  not_finite_at: Float[Array, '']
  state: ode.OdeState


def rademacher(rng: Rng, shape: Sequence[int]) -> Float[Array, '...']:
  """Draw probes of independent, equally likely +1 and -1; the paper's choice.

  Among probes with independent entries they have the least variance: only the
  off-diagonal entries of the Jacobian contribute.
  """
  return jax.random.rademacher(rng, shape, dtype=jnp.float32)


def gaussian(rng: Rng, shape: Sequence[int]) -> Float[Array, '...']:
  """Draw standard normal probes."""
  return jax.random.normal(rng, shape)


PROBES = {'rademacher': rademacher, 'gaussian': gaussian}


def drift_and_divergence(
  score_fn: ScoreFn,
  sde: sde_lib.SDE,
  x: State,
  t: Float[ArrayLike, ' B'],
  probes: Probes | None = None,
) -> tuple[Float[Array, ' B *dims'], Float[Array, 'K B']]:
  """Return (F(x, t), div F(x, t)) by one forward pass.

  Args:
    score_fn: score_fn(x, t) -> score.
    sde: the forward process.
    x: state [B, ...].
    t: times [B].
    probes: K probes e of identity covariance, [K, B, ...], for the estimates
      e^T (dF/dx) e; None for the exact trace, with K = 1, which costs one
      product per dimension of x.

  Returns:
    F shaped as x, and its divergences [K, B].
  """
  # Forward mode, because in loops on CPUs XLA runs the convolutions of a vjp
  # nine times slower, and e^T (J e) is the same number as (e^T J) e.
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

  # Only 16 at once, because all of a large image may exceed the memory.
  entries = jax.lax.map(diagonal, jnp.arange(dims), batch_size=min(dims, 16))
  return drift, jnp.sum(entries, axis=0, keepdims=True)


def log_likelihood(
  score_fn: ScoreFn,
  sde: sde_lib.SDE,
  x: State,
  probes: Probes | None = None,
  *,
  eps: Real[ArrayLike, ''] = 1e-5,
  rtol: Real[ArrayLike, ''] = 1e-5,
  atol: Real[ArrayLike, ''] = 1e-5,
  state: ode.OdeState | None = None,
  max_steps: Int[ArrayLike, ''] | None = ode.MAX_STEPS,
) -> Likelihood:
  """Return log p_0(x) in nats, [B], by the ODE from eps to 1 (Eq. 39).

  All probes share one solution of the ODE, and its steps. A long computation
  can be made in stretches, to report progress: begin with max_steps=None, and
  go on from `state` with larger and larger max_steps until
  `ode.arrived_or_stuck(state, 1)`. The result is the same.

  Args:
    score_fn: score_fn(x, t) -> score, in continuous time.
    sde: the forward process.
    x: data [B, ...] in the model's range.
    probes: probes [K, B, ...] drawn by one of `PROBES`; None for the exact
      trace.
    eps: time in (0, 1) at which x is taken to be the state of the ODE.
    rtol, atol: relative and absolute tolerance of the ODE solver.
    state: `state` of an earlier result for the same arguments; None to begin.
    max_steps: number of attempted steps in all at which to stop; None to make
      no step yet.
  """

  def augmented(t, state):
    t = jnp.full(x.shape[:1], t)
    return drift_and_divergence(score_fn, sde, state[0], t, probes)

  k = 1 if probes is None else probes.shape[0]
  tolerances = {'rtol': rtol, 'atol': atol}
  if state is None:
    start = (x, jnp.zeros((k, x.shape[0])))
    state = ode.begin(augmented, start, eps, 1.0, **tolerances)
  if max_steps is not None:
    state = ode.proceed(
      augmented, state, 1.0, **tolerances, max_steps=max_steps
    )
  solution = ode.end(state, 1.0)
  z, integrals = solution.y
  logp = sde.prior_logp(z) + jnp.mean(integrals, axis=0)
  if probes is None:
    std_error = jnp.zeros_like(logp)
  elif k == 1:
    std_error = jnp.full_like(logp, jnp.nan)
  else:
    std_error = jnp.std(integrals, axis=0, ddof=1) / math.sqrt(k)
  return Likelihood(
    logp=logp,
    std_error=std_error,
    z=z,
    nfe=solution.nfe,
    success=solution.success,
    not_finite_at=solution.not_finite_at,
    state=state,
  )


def encode(
  score_fn: ScoreFn,
  sde: sde_lib.SDE,
  x: State,
  *,
  eps: Real[ArrayLike, ''] = 1e-5,
  rtol: Real[ArrayLike, ''] = 1e-5,
  atol: Real[ArrayLike, ''] = 1e-5,
) -> ode.OdeSolution:
  """Return the latent codes y [B, ...] of data x: the ODE's states at t = 1.

  The sampler `ode.ODE`, started from y, decodes them.

  Args:
    score_fn, sde, x, eps, rtol, atol: as in `log_likelihood`.
  """

  def drift(t, x):
    t = jnp.full(x.shape[:1], t)
    return sde.ode_drift(x, t, score_fn(x, t))

  return ode.solve_ode(drift, x, eps, 1.0, rtol=rtol, atol=atol)


def log_score_norms(
  score_fn: ScoreFn, sde: sde_lib.SDE, x: State, t: Real[ArrayLike, ' L']
) -> Float[Array, 'B L']:
  """Return log |s(alpha x, t)| at times along the path, [B, L].

  These are features of x for `evaluation.norms_mixture` (Mahmood et al. 2021).
  alpha x is the mean of x_t given x_0 = x, so no noise is drawn.

  Args:
    score_fn: score_fn(x, t) -> score.
    sde: the forward process.
    x: data [B, ...] in the model's range.
    t: times in (0, 1], [L].
  """

  def norm(t):
    times = jnp.full(x.shape[:1], t)
    alpha, _ = sde.marginal(times)
    score = score_fn(sde_lib.expand(alpha, x) * x, times)
    square = jnp.sum(score**2, axis=tuple(range(1, x.ndim)))
    return jnp.log(jnp.maximum(square, 1e-30)) / 2

  return jax.lax.map(norm, jnp.asarray(t)).T


def interpolate(
  z0: State, z1: State, weights: Real[ArrayLike, ' K']
) -> Float[Array, 'K B *dims']:
  """Return latent codes between z0 and z1 on a great circle, [K, B, ...].

  Gaussian codes of many dimensions lie close to a sphere. Straight lines would
  leave it; spherical interpolation (slerp) stays on it.

  Args:
    z0, z1: latent codes [B, ...].
    weights: positions [K], from 0 for z0 to 1 for z1.
  """
  size = math.prod(z0.shape[1:])
  flat0, flat1 = (z.reshape(z.shape[0], size) for z in (z0, z1))
  norms = jnp.linalg.norm(flat0, axis=1) * jnp.linalg.norm(flat1, axis=1)
  cosine = jnp.sum(flat0 * flat1, axis=1) / norms
  # Codes in the same direction define no circle: the limit is a straight line.
  angle = jnp.arccos(jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6))

  def at(w):
    a, b = jnp.sin((1 - w) * angle), jnp.sin(w * angle)
    shape = (-1,) + (1,) * (z0.ndim - 1)
    a, b = ((v / jnp.sin(angle)).reshape(shape) for v in (a, b))
    return a * z0 + b * z1

  return jax.vmap(at)(jnp.asarray(weights, jnp.float32))


def bits_per_dim(
  logp: Float[ArrayLike, '*B'], dims: int, *, data_width: float | int
) -> Float[ArrayLike, '*B']:
  """Return the bits per dimension of dequantized 8-bit data, shaped as logp.

  A density over data scaled to an interval of width w becomes a density over
  the 256 grey levels by adding log2(256 / w) to -log2 p per dimension: 8 bits
  for [0, 1], 7 for [-1, 1], and 0 for data without levels, whose "width" is
  256.

  Args:
    logp: log-density in nats.
    dims: number of dimensions of one example.
    data_width: width of the interval that the 256 levels were scaled to.
  """
  return -logp / nats_per_bit(dims) + math.log2(256 / data_width)


def nats_per_bit(dims: int) -> float:
  """Return the nats of one example that equal one bit per dimension."""
  return dims * math.log(2)
