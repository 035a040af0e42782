r"""Langevin dynamics (Song & Ermon 2019, Sections 2.2 and 4.3).

    x <- x + e s(x) + sqrt(2 e) z,    z ~ N(0, I),

samples from the density whose score is s, up to a bias that decreases linearly
with e. A Metropolis test removes the bias. Noise that decreases level by level
lets the chain find all modes. The paper's alpha is 2 e in this project. Chains
are x [B, ...], B of them in parallel, and loops are `lax.scan`.
"""

import abc
import dataclasses
import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Real

from runtime.options import option
from sde_lib import expand
from solvers import base

StepSize = Real[ArrayLike, '...']


class Chains(typing.NamedTuple):
  """Result of Langevin dynamics.

  Attributes:
    x: states of the chains at the end, [B, ...].
    acceptance: share of the proposals that each chain accepted, [B]; 1 without
      a Metropolis test.
    nfe: number of score evaluations per chain.
  """

  x: Float[Array, ' B *dims']
  acceptance: Float[Array, ' B']
  nfe: Int[Array, '']


def langevin_step(x, score, z, e):
  """Return x + e score + sqrt(2 e) z, for e [B], and its mean."""
  e = expand(e, x)
  x_mean = x + e * score
  return x_mean + jnp.sqrt(2 * e) * z, x_mean


def unadjusted(
  rng: base.Rng,
  score_fn: Callable,
  x: base.State,
  *,
  step_size: StepSize,
  num_steps: int,
) -> Chains:
  """Run unadjusted Langevin dynamics with a fixed step (Eq. 4 of 2019).

  For a Gaussian of variance v the chain samples a Gaussian of variance
  v / (1 - e / 2v), and it diverges if e > 2v.

  Args:
    rng: key.
    score_fn: score_fn(x) -> score, shaped as x.
    x: start of the chains, [B, ...].
    step_size: e > 0, in units of x squared; a scalar or [B].
    num_steps: number of steps of each chain.
  """
  e = jnp.broadcast_to(step_size, x.shape[:1])

  def step(x, key):
    z = jax.random.normal(key, x.shape)
    return langevin_step(x, score_fn(x), z, e)[0], None

  x, _ = jax.lax.scan(step, x, jax.random.split(rng, num_steps))
  return Chains(x, jnp.ones(x.shape[:1]), jnp.asarray(num_steps))


# Gauss-Legendre nodes and weights on [0, 1].
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(5)
_NODES, _WEIGHTS = np.float32(0.5 + 0.5 * _NODES), np.float32(0.5 * _WEIGHTS)


def path_integral(
  score_fn: Callable, x: base.State, y: base.State
) -> Float[Array, ' B']:
  """Return log p(y) - log p(x), [B]: the integral of the score from x to y.

      int_0^1 s(x + u (y - x))^T (y - x) du,

  by Gauss's rule with five nodes. For a network that is not a gradient, it is
  the integral along the straight line.
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
  rng: base.Rng,
  score_fn: Callable,
  x: base.State,
  *,
  step_size: StepSize,
  num_steps: int,
  log_ratio: Callable | None = None,
) -> Chains:
  """Run Metropolis-adjusted Langevin dynamics (Roberts & Tweedie 1996).

  A step of `unadjusted` from x to y is accepted with probability

      min(1, p(y) q(x | y) / p(x) q(y | x)),    q(. | x) = N(x + e s(x), 2 e I),

  so the chain leaves the density unchanged for every e.

  Args:
    rng, score_fn, x, step_size, num_steps: as in `unadjusted`.
    log_ratio: log_ratio(x, y) = log p(y) - log p(x), [B]; for an energy E it is
      E(x) - E(y). None computes it from the score, by `path_integral`.
  """
  ratio = log_ratio or functools.partial(path_integral, score_fn)
  e = jnp.broadcast_to(step_size, x.shape[:1])

  def log_q(to, start, score):
    """Return log q(to | start), [B], up to a constant."""
    square = (to - start - expand(e, x) * score) ** 2
    return -jnp.sum(square, axis=tuple(range(1, x.ndim))) / (4 * e)

  def step(carry, key):
    x, score, accepted = carry
    key_z, key_u = jax.random.split(key)
    z = jax.random.normal(key_z, x.shape)
    y = langevin_step(x, score, z, e)[0]
    score_y = score_fn(y)
    log_a = ratio(x, y) + log_q(x, y, score_y) - log_q(y, x, score)
    # Written so that a proposal without a finite density is rejected.
    accept = jnp.log(jax.random.uniform(key_u, log_a.shape)) < log_a
    x, score = (
      jnp.where(expand(accept, x), new, old)
      for new, old in ((y, x), (score_y, score))
    )
    return (x, score, accepted + accept), None

  start = x, score_fn(x), jnp.zeros(x.shape[:1])
  keys = jax.random.split(rng, num_steps)
  (x, _, accepted), _ = jax.lax.scan(step, start, keys)
  each = 1 if log_ratio else 1 + len(_NODES)
  return Chains(x, accepted / num_steps, jnp.asarray(1 + each * num_steps))


def annealed(
  rng: base.Rng,
  score_fn: Callable,
  sigmas: Real[ArrayLike, ' L'],
  x: base.State,
  *,
  step_size: StepSize,
  num_steps: int,
  final_denoise: bool = True,
  levels: Real[ArrayLike, ' L'] | None = None,
) -> Chains:
  """Run annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1).

  `num_steps` steps of `unadjusted` at each sigma_i, from the largest to the
  smallest, sigma_L, with e_i = step_size sigma_i^2 / sigma_L^2, so that the
  ratio of signal and noise is constant. (The corrector 'ald' has another rule:
  e = 2 (snr sigma)^2, independent of sigma_L.)

  Args:
    rng: key.
    score_fn: score_fn(x, sigma) -> score of the data with noise of standard
      deviation sigma [B], shaped as x [B, ...].
    sigmas: noise levels [L], decreasing.
    x: start of the chains, [B, ...].
    step_size: e > 0 at the smallest level; half of the paper's epsilon.
    num_steps: T, number of steps at each level.
    final_denoise: whether to end with the mean of the clean data,
      x + sigma_L^2 s (Jolicoeur-Martineau et al. 2020; not in the paper of
      2019).
    levels: second argument of score_fn in place of sigmas, [L], such as times.
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


# ------------------------------------------------------------------ samplers


@dataclasses.dataclass(frozen=True, kw_only=True)
class LangevinSampler(base.BaseSampler):
  """Base class of samplers by Langevin dynamics of a given step size."""

  records_frames = False

  step_size: float = option(
    1e-5,
    'Step size e of Langevin dynamics at the smallest time, in units of the '
    'data squared.',
    '(0, inf)',
  )

  def _samples(self, chains, score_fn, sde, t):
    """Return the Samples of chains that ended at time t."""
    x = chains.x
    if self.final_denoise:
      x = base.denoise_at(score_fn, sde, x, t)
    nfe = chains.nfe + int(self.final_denoise)
    return base.result(x, nfe, jnp.zeros((0, *x.shape)), jnp.zeros(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AtOneTime(LangevinSampler, base.FixedSteps):
  """Langevin dynamics at the single time eps, from z on."""

  @abc.abstractmethod
  def _chains(self, rng, score_fn, x):
    """Run the chains; score_fn(x) -> score at eps."""

  def _sample(self, rng, score_fn, sde, z, frames):
    def at_eps(x):
      return score_fn(x, jnp.full(x.shape[:1], self.eps, x.dtype))

    return self._samples(self._chains(rng, at_eps, z), score_fn, sde, self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ULA(_AtOneTime):
  """Unadjusted Langevin dynamics at the time eps.

  Example:
    >>> ULA(step_size=1e-3).step_size
    0.001
  """

  def _chains(self, rng, score_fn, x):
    return unadjusted(
      rng, score_fn, x, step_size=self.step_size, num_steps=self.num_steps
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MALA(_AtOneTime):
  """Metropolis-adjusted Langevin dynamics at the time eps.

  Example:
    >>> MALA().records_frames
    False
  """

  def _chains(self, rng, score_fn, x):
    return metropolis(
      rng, score_fn, x, step_size=self.step_size, num_steps=self.num_steps
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnealedLangevin(LangevinSampler, base.LevelSampler):
  """Annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1).

  num_steps is L, the number of noise levels, and corrector_steps is T, the
  number of steps at each. The step size at a level sigma is larger than
  step_size by sigma^2 / sigma_L^2.

  Example:
    >>> AnnealedLangevin(num_steps=10, corrector_steps=100).corrector_steps
    100
  """

  def _sample(self, rng, score_fn, sde, z, frames):
    t = self.times(sde)
    chains = annealed(
      rng,
      score_fn,
      sde.marginal(t)[1],
      z,
      step_size=self.step_size,
      num_steps=self.corrector_steps,
      final_denoise=False,
      levels=t,
    )
    return self._samples(chains, score_fn, sde, t[-1])
