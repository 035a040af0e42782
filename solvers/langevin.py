r"""Langevin dynamics (Song & Ermon 2019, Sections 2.2 and 4.3).

    x <- x + e s(x) + sqrt(2 e) z,    z ~ N(0, I),

samples from the density whose score is s, up to a bias that falls linearly with
e. A Metropolis test removes the bias; noise that is lowered level by level
lets the chain find all modes. Their alpha is 2 e here, as everywhere in this
project. Chains are x [B, ...], B of them at a time, and loops are `lax.scan`.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

import sde_lib


class Chains(typing.NamedTuple):
  """x: where the chains are in the end, [B, ...]; acceptance: share of the
  proposals accepted by each, [B] (1 if there is no test); nfe: score
  evaluations per chain."""

  x: jax.Array
  acceptance: jax.Array
  nfe: jax.Array


def langevin_step(x, score, z, e):
  """x + e score + sqrt(2 e) z, for e [B], and its mean."""
  e = sde_lib.expand(e, x)
  x_mean = x + e * score
  return x_mean + jnp.sqrt(2 * e) * z, x_mean


def unadjusted(rng, score_fn, x, *, step_size, num_steps) -> Chains:
  """Unadjusted Langevin dynamics, of fixed step (Song & Ermon 2019, Eq. 4).

  Of a Gaussian of variance v it samples one of variance v / (1 - e / 2v), and
  diverges where e > 2v.

  Args:
    rng: key.
    score_fn: score_fn(x) -> score shaped as x.
    x: where the chains start, [B, ...].
    step_size: e, in units of x squared; a scalar or [B].
    num_steps: steps of each chain.
  """
  e = jnp.broadcast_to(step_size, x.shape[:1])

  def step(x, key):
    z = jax.random.normal(key, x.shape)
    return langevin_step(x, score_fn(x), z, e)[0], None

  x, _ = jax.lax.scan(step, x, jax.random.split(rng, num_steps))
  return Chains(x, jnp.ones(x.shape[:1]), jnp.asarray(num_steps))


# Gauss and Legendre's nodes and weights on [0, 1].
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(5)
_NODES, _WEIGHTS = np.float32(0.5 + 0.5 * _NODES), np.float32(0.5 * _WEIGHTS)


def path_integral(score_fn, x, y):
  """log p(y) - log p(x), [B]: the integral of the score from x to y.

      int_0^1 s(x + u (y - x))^T (y - x) du,

  by Gauss's rule of five nodes. For a network that is not a gradient, it is the
  integral along the straight line.
  """

  def add(total, node):
    u, weight = node
    slope = jnp.sum(
      score_fn(x + u * (y - x)) * (y - x), axis=tuple(range(1, x.ndim))
    )
    return total + weight * slope, None

  nodes = jnp.asarray(_NODES), jnp.asarray(_WEIGHTS)
  return jax.lax.scan(add, jnp.zeros(x.shape[:1]), nodes)[0]


def metropolis(
  rng, score_fn, x, *, step_size, num_steps, log_ratio=None
) -> Chains:
  """Metropolis-adjusted Langevin dynamics (Roberts & Tweedie 1996).

  A step of `unadjusted` from x to y is accepted with probability

      min(1, p(y) q(x | y) / p(x) q(y | x)),    q(. | x) = N(x + e s(x), 2 e I),

  so the density is left as it is whatever e.

  Args:
    rng, score_fn, x, step_size, num_steps: as `unadjusted`.
    log_ratio: log_ratio(x, y) = log p(y) - log p(x), [B]: of an energy E,
      E(x) - E(y). None takes it from the score, by `path_integral`.
  """
  ratio = log_ratio or functools.partial(path_integral, score_fn)
  e = jnp.broadcast_to(step_size, x.shape[:1])
  expand = functools.partial(sde_lib.expand, x=x)

  def log_q(to, start, score):
    """log q(to | start), [B], up to a constant."""
    square = (to - start - expand(e) * score) ** 2
    return -jnp.sum(square, axis=tuple(range(1, x.ndim))) / (4 * e)

  def step(carry, key):
    x, score, accepted = carry
    key_z, key_u = jax.random.split(key)
    z = jax.random.normal(key_z, x.shape)
    y = langevin_step(x, score, z, e)[0]
    score_y = score_fn(y)
    log_a = ratio(x, y) + log_q(x, y, score_y) - log_q(y, x, score)
    # Written so that a proposal without a finite density is refused.
    accept = jnp.log(jax.random.uniform(key_u, log_a.shape)) < log_a
    x, score = (
      jnp.where(expand(accept), new, old)
      for new, old in ((y, x), (score_y, score))
    )
    return (x, score, accepted + accept), None

  start = x, score_fn(x), jnp.zeros(x.shape[:1])
  keys = jax.random.split(rng, num_steps)
  (x, _, accepted), _ = jax.lax.scan(step, start, keys)
  each = 1 if log_ratio else 1 + len(_NODES)
  return Chains(x, accepted / num_steps, jnp.asarray(1 + each * num_steps))


def annealed(
  rng,
  score_fn,
  sigmas,
  x,
  *,
  step_size,
  num_steps,
  final_denoise=True,
  levels=None,
) -> Chains:
  """Annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1).

  `num_steps` steps of `unadjusted` at each sigma_i, from the largest to the
  smallest, sigma_L, with e_i = step_size sigma_i^2 / sigma_L^2, so that signal
  and noise keep their ratio. (The corrector `annealed_langevin` has
  another rule: e = 2 (snr sigma)^2, whatever sigma_L.)

  Args:
    rng: key.
    score_fn: score_fn(x, sigma) -> score of the data with noise of deviation
      sigma [B], shaped as x [B, ...].
    sigmas: noise levels [L], falling.
    x: where the chains start, [B, ...].
    step_size: e at the smallest level; half of the paper's epsilon.
    num_steps: T, steps at each level.
    final_denoise: whether to end in the mean of the clean data, x + sigma_L^2 s
      (Jolicoeur-Martineau et al. 2020; not in the paper of 2019).
    levels: what score_fn is told in place of sigmas, [L], such as times.
  """
  sigmas = jnp.asarray(sigmas)
  levels = sigmas if levels is None else jnp.asarray(levels)
  full = lambda value: jnp.full(x.shape[:1], value)

  def anneal(x, inputs):
    key, sigma, level = inputs
    chains = unadjusted(
      key,
      lambda x: score_fn(x, full(level)),
      x,
      step_size=step_size * (sigma / sigmas[-1]) ** 2,
      num_steps=num_steps,
    )
    return chains.x, None

  x, _ = jax.lax.scan(
    anneal, x, (jax.random.split(rng, len(sigmas)), sigmas, levels)
  )
  if final_denoise:
    x = x + sigmas[-1] ** 2 * score_fn(x, full(levels[-1]))
  nfe = len(sigmas) * num_steps + int(final_denoise)
  return Chains(x, jnp.ones(x.shape[:1]), jnp.asarray(nfe))
