"""Distributions of points in the plane whose density is known at every noise.

A diffusion makes x_t = alpha x_0 + sigma z of data x_0. For these distributions
the density of x_t is known for every alpha and sigma. With alpha = 1 and
sigma = 0 it is the density of the data. Its gradient is the exact score, which
a network learns (Song & Ermon 2019, Section 4.1) and with which networks and
samplers are compared.

Points are arrays [N, 2]. `DISTRIBUTIONS` is the table; its names are those of
`datasets.DATASETS`.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, logsumexp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution(abc.ABC):
  """Base class of distributions of points in the plane.

  Attributes:
    extent: half the side of the square [-extent, extent]^2, which holds nearly
      all data and which pictures show.
    has_density: whether the data have a density without noise. It is False for
      data on a curve.
  """

  extent: float
  has_density = True

  @abc.abstractmethod
  def sample(self, rng, n):
    """Draw points.

    Args:
      rng: a numpy Generator.
      n: number of points.

    Returns:
      float64 [n, 2].
    """

  @abc.abstractmethod
  def logp(self, x, alpha=1.0, sigma=0.0):
    """Return the log-density of alpha x_0 + sigma z, in nats.

    Args:
      x: points [N, 2] at which to evaluate it.
      alpha: factor of the data, a scalar or [N].
      sigma: standard deviation of the noise, a scalar or [N].

    Returns:
      [N].
    """

  def score_fn(self, sde):
    """Return the exact score of the marginals of an SDE.

    Args:
      sde: a `sde_lib.SDE`.

    Returns:
      Function of x [N, 2] and t [N] that returns [N, 2].
    """

    def score(x, t):
      alpha, sigma = sde.marginal(t)
      return jax.grad(lambda x: jnp.sum(self.logp(x, alpha, sigma)))(x)

    return score


def _gaussians_logp(x, weights, means, variance):
  """Return log sum_k weights_k N(x; means_k, variance I) at x [D]."""
  square = jnp.sum((x[None] - means) ** 2, axis=-1)
  dims = means.shape[1]
  exponent = -0.5 * (square / variance + dims * jnp.log(2 * jnp.pi * variance))
  return logsumexp(exponent, b=weights)


@jax.jit
def _convolved(x, weights, means, std, alpha, sigma):
  """Return `Distribution.logp` of Gaussians around means [K, D]."""
  alpha, sigma = (jnp.broadcast_to(v, x.shape[:1]) for v in (alpha, sigma))

  def one(inputs):
    x, alpha, sigma = inputs
    variance = (alpha * std) ** 2 + sigma**2
    return _gaussians_logp(x, weights, alpha * means, variance)

  # The distances of a part of the points take about 64 MiB at most.
  return jax.lax.map(one, (x, alpha, sigma), batch_size=2**23 // len(means))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Distribution):
  """A mixture of Gaussians, sum_k weights_k N(means_k, std^2 I).

  Attributes:
    weights: probabilities of the K components.
    means: their means, K tuples of D numbers; D can differ from 2.
    std: their standard deviation.

  Example:
    >>> means = (0.0, 0.0), (4.0, 4.0)
    >>> two = Mixture(weights=(0.5, 0.5), means=means, std=1.0, extent=7.0)
    >>> two.sample(np.random.default_rng(0), 3).shape
    (3, 2)
  """

  weights: tuple
  means: tuple
  std: float

  def sample(self, rng, n):
    k = rng.choice(len(self.weights), n, p=self.weights)
    mean = np.asarray(self.means)[k]
    return mean + self.std * rng.standard_normal(mean.shape)

  def logp(self, x, alpha=1.0, sigma=0.0):
    weights, means = np.float32(self.weights), np.float32(self.means)
    return _convolved(x, weights, means, self.std, alpha, sigma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve(Distribution):
  """Points c(u) of a curve, with u ~ U[0, 1), and Gaussian noise.

  The density is the integral of N(x; c(u), std^2 I) over u, computed with the
  midpoint rule.

  Attributes:
    path: the curve c, a numpy function of u [n] that returns [n, 2].
    std: standard deviation of the noise. With 0 the data lie on the curve and
      have no density; then `logp` is defined for sigma > 0 only.
    nodes: number of nodes of the midpoint rule. Neighbouring nodes should be
      less than std apart on the curve.

  Example:
    >>> Curve(path=wave, std=0.0, extent=2.4).has_density
    False
  """

  path: Callable
  std: float
  nodes: int = 600

  @property
  def has_density(self):
    return self.std > 0

  def sample(self, rng, n):
    return self.path(rng.random(n)) + self.std * rng.standard_normal((n, 2))

  def logp(self, x, alpha=1.0, sigma=0.0):
    means = self.path((np.arange(self.nodes) + 0.5) / self.nodes)
    weights = np.full(self.nodes, 1 / self.nodes, np.float32)
    return _convolved(x, weights, np.float32(means), self.std, alpha, sigma)


def rings(u):
  """Return points [n, 2] of two circles of radii 0.8 and 1.6 for u [n]."""
  ring = np.floor(2 * u)
  angle = 2 * np.pi * (2 * u - ring)
  radius = 0.8 * (1 + ring)
  return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def swiss_roll(u):
  """Return points [n, 2] of a spiral of 1.5 turns, radius 0.67 to 2."""
  angle = 1.5 * np.pi * (1 + 2 * u)
  radius = 2 * angle / (4.5 * np.pi)
  return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def wave(u):
  """Return points [n, 2] of a wave from (-2, 0) to (2, 0) for u [n]."""
  x = 4 * u - 2
  return np.stack([x, np.sin(np.pi * x)], axis=-1)


def _log_interval(low, high):
  """Return log(Phi(high) - Phi(low)), accurate in both tails."""
  # An interval on the right is mirrored to the left, where Phi is not near 1.
  right = low + high > 0
  low, high = jnp.where(right, -high, low), jnp.where(right, -low, high)
  log_high = log_ndtr(high)
  return log_high + jnp.log(-jnp.expm1(log_ndtr(low) - log_high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkerboard(Distribution):
  """The uniform distribution on the eight dark unit squares of [-2, 2]^2.

  Example:
    >>> Checkerboard(extent=2.4).sample(np.random.default_rng(0), 3).shape
    (3, 2)
  """

  def sample(self, rng, n):
    column, row = rng.integers(0, 4, n), rng.integers(0, 2, n)
    corner = np.stack([column, 2 * row + column % 2], axis=-1) - 2
    return corner + rng.random((n, 2))

  @functools.partial(jax.jit, static_argnums=0)
  def logp(self, x, alpha=1.0, sigma=0.0):
    alpha, sigma = (
      jnp.broadcast_to(v, x.shape[:1])[:, None, None] for v in (alpha, sigma)
    )
    sigma = jnp.maximum(sigma, 1e-12)
    edge = alpha * jnp.arange(-2.0, 3.0)[None, None]
    scaled = (edge - x[:, :, None]) / sigma  # [N, 2, 5]
    inside = _log_interval(scaled[..., :-1], scaled[..., 1:])  # [N, 2, 4]
    square = inside[:, 0, :, None] + inside[:, 1, None, :]  # [N, 4, 4]
    dark = (np.add.outer(np.arange(4), np.arange(4)) + 1) % 2
    logp = logsumexp(square, axis=(1, 2), b=jnp.float32(dark)[None])
    return logp - math.log(8) - 2 * jnp.log(alpha[:, 0, 0])


# The mixture is from Song & Ermon 2019, Section 3.2 (Figures 2 and 3).
DISTRIBUTIONS = {
  'toy/mixture': Mixture(
    weights=(0.2, 0.8), means=((-5.0, -5.0), (5.0, 5.0)), std=1.0, extent=10.0
  ),
  'toy/rings': Curve(path=rings, std=0.1, extent=2.4),
  'toy/checkerboard': Checkerboard(extent=2.4),
  'toy/swiss_roll': Curve(path=swiss_roll, std=0.08, extent=2.6),
  'toy/curve': Curve(path=wave, std=0.0, extent=2.4),
}
