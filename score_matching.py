r"""Score matching: objectives whose minimiser is the score of the data.

Each is, up to a constant, the explicit objective J(s) = 1/2 E || s(x) - grad
log p(x) ||^2 (Hyvarinen 2005), without asking for p. Sliced ones replace the
trace of the Jacobian by its projections on random directions v with
E v v^T = I (Song et al. 2019, arXiv 1905.07088).

An objective is objective(rng, score_fn, x, **options) -> [B], with score_fn(x)
-> [B, D] at points (or images) x [B, ...]; examples must not influence each
other. `score_matching_loss` applies any of them to the noisy data of a
diffusion, as Song et al. (2021) say below their Eq. 7.
"""

import jax
import jax.numpy as jnp

import losses
import sde_lib


def _dot(a, b):
  """Inner product of each example, [B]."""
  return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def energy_score(energy):
  """The score -dE/dx of p ~ exp(-E), for energy(x) -> [B]."""
  return lambda x: -jax.grad(lambda x: jnp.sum(energy(x)))(x)


def explicit(rng, score_fn, x, *, target):
  """1/2 || s(x) - grad log p(x) ||^2, [B]; target(x) is the true score."""
  del rng
  error = score_fn(x) - target(x)
  return 0.5 * _dot(error, error)


def _slice(score_fn, x, v):
  """(s(x), v^T (ds/dx) v), by one Jacobian-vector product."""
  score, jacobian_v = jax.jvp(score_fn, (x,), (v,))
  return score, _dot(v, jacobian_v)


def implicit(rng, score_fn, x):
  """tr(ds/dx) + 1/2 || s ||^2, [B] (Hyvarinen 2005, Theorem 1).

  The trace is exact and costs a Jacobian-vector product per dimension.
  """
  del rng
  basis = jnp.eye(x[0].size).reshape(-1, *x.shape[1:])
  along = lambda e: _slice(score_fn, x, jnp.broadcast_to(e[None], x.shape))
  score, diagonal = jax.vmap(along, out_axes=(None, 0))(basis)
  return jnp.sum(diagonal, axis=0) + 0.5 * _dot(score, score)


def sliced(rng, score_fn, x):
  """v^T (ds/dx) v + 1/2 (v^T s)^2, v ~ N(0, I), [B] (Song et al. 2019, Eq. 7).

  An unbiased estimate of `implicit`.
  """
  v = jax.random.normal(rng, x.shape)
  score, curvature = _slice(score_fn, x, v)
  return curvature + 0.5 * _dot(v, score) ** 2


def sliced_vr(rng, score_fn, x):
  """v^T (ds/dx) v + 1/2 || s ||^2, v ~ N(0, I), [B] (Song et al. 2019, Eq. 8).

  `sliced` with the expectation of its second term: less variance.
  """
  score, curvature = _slice(score_fn, x, jax.random.normal(rng, x.shape))
  return curvature + 0.5 * _dot(score, score)


def finite_difference(rng, score_fn, x, *, step=0.1):
  """`sliced` by central differences, [B] (FD-SSM; Pang et al. 2020).

      v^T (s_+ - s_-) / (2 h) + 1/8 (v^T (s_+ + s_-))^2,    s_+- = s(x +- h v)

  Two evaluations and no derivative; its error is O(h^2).

  Args:
    rng, score_fn, x: as everywhere in this module.
    step: h, in units of x; a scalar or [B].
  """
  v = jax.random.normal(rng, x.shape)
  h = sde_lib.expand(step, x)
  after, before = score_fn(x + h * v), score_fn(x - h * v)
  curvature = _dot(v, after - before) / (2 * step)
  return curvature + 0.125 * _dot(v, after + before) ** 2


def denoising(rng, score_fn, x, *, sigma):
  """1/2 || s(x + sigma z) + z / sigma ||^2, [B] (Vincent 2011).

  Its minimiser is the score of the data with noise of deviation sigma.
  """
  z = jax.random.normal(rng, x.shape)
  error = score_fn(x + sigma * z) + z / sigma
  return 0.5 * _dot(error, error)


OBJECTIVES = {
  'explicit': explicit,
  'implicit': implicit,
  'sliced': sliced,
  'sliced_vr': sliced_vr,
  'finite_difference': finite_difference,
  'denoising': denoising,
}


def score_matching_loss(
  rng,
  score_fn,
  sde,
  x0,
  *,
  objective,
  times,
  weighting,
  reduction,
  eps,
  target=None,
):
  """lambda(t) J(s(., t)) at the noisy data x_t of random times, [B].

  Its minimiser is that of `losses.score_matching`, which is the case of
  denoising.

  Args:
    rng: key for the times, the noise and the directions.
    score_fn: score_fn(x, t) -> score shaped as x.
    sde, x0, times, weighting, reduction, eps: as `losses.score_matching`.
    objective: a key of `OBJECTIVES` but 'denoising'.
    target: the true score, target(x, t), for 'explicit'.
  """
  rng_t, rng_z, rng_v = jax.random.split(rng, 3)
  t, weight = losses.TIMES[times](rng_t, sde, x0.shape[0], eps)
  x = sde.perturb(x0, t, jax.random.normal(rng_z, x0.shape))
  options = {
    'explicit': {'target': lambda x: target(x, t)},
    # The finest structure of x_t is of the size of its noise.
    'finite_difference': {'step': 0.1 * sde.marginal(t)[1]},
  }.get(objective, {})
  value = OBJECTIVES[objective](rng_v, lambda x: score_fn(x, t), x, **options)
  # J has half the sum over the dimensions.
  scale = {'half_sum': 1.0, 'mean': 2 / x0[0].size}[reduction]
  return scale * weight * losses.WEIGHTINGS[weighting](sde, t) * value
