r"""Distributions in the plane whose density is known, noise included.

A diffusion turns data x_0 into x_t = alpha x_0 + sigma z, and for these data
the density of x_t is known for every alpha and sigma: that of the data
(alpha = 1, sigma = 0), those which noise-conditional score matching learns
(Song & Ermon 2019, Section 4.1), and with their gradient the exact score that
networks and samplers are measured against.

Points are [N, 2]; `DISTRIBUTIONS` is the table, by the names of
`datasets.DATASETS`.
"""

import abc
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, logsumexp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution(abc.ABC):
  """Data in the plane.

  Attributes:
    extent: nearly all data are in [-extent, extent]^2, which pictures show.
  """

  extent: float

  @abc.abstractmethod
  def sample(self, rng, n):
    """n points, float64 [n, 2], drawn with a numpy Generator."""

  @abc.abstractmethod
  def logp(self, x, alpha=1.0, sigma=0.0):
    """log-density [N], in nats, of alpha x_0 + sigma z at x [N, 2].

    alpha and sigma are scalars or [N].
    """

  has_density = True  # False: the data lie on a curve, until noise is added

  def score_fn(self, sde):
    """score(x, t), the exact score of the marginals of `sde`."""

    def score(x, t):
      alpha, sigma = sde.marginal(t)
      return jax.grad(lambda x: jnp.sum(self.logp(x, alpha, sigma)))(x)

    return score


def _gaussians_logp(x, weights, means, variance):
  """log sum_k weights_k N(x; means_k, variance I) of x [D], means [K, D]."""
  square = jnp.sum((x[None] - means) ** 2, axis=-1)
  dims = means.shape[1]
  exponent = -0.5 * (square / variance + dims * jnp.log(2 * jnp.pi * variance))
  return logsumexp(exponent, b=weights)


def _convolved(x, weights, means, std, alpha, sigma):
  """logp [N] of Gaussians about means [K, D], under alpha and sigma."""
  alpha, sigma = (jnp.broadcast_to(v, x.shape[:1]) for v in (alpha, sigma))
  weights, means = jnp.float32(weights), jnp.float32(means)

  def one(inputs):
    x, alpha, sigma = inputs
    variance = (alpha * std) ** 2 + sigma**2
    return _gaussians_logp(x, weights, alpha * means, variance)

  # At most some 64 MiB at a time for the distances.
  return jax.lax.map(one, (x, alpha, sigma), batch_size=2**23 // len(means))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Distribution):
  """sum_k weights_k N(means_k, std^2 I), means [K, D]; D need not be 2."""

  weights: tuple
  means: tuple
  std: float

  def sample(self, rng, n):
    k = rng.choice(len(self.weights), n, p=self.weights)
    mean = np.asarray(self.means)[k]
    return mean + self.std * rng.standard_normal(mean.shape)

  def logp(self, x, alpha=1.0, sigma=0.0):
    return _convolved(x, self.weights, self.means, self.std, alpha, sigma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve(Distribution):
  """A curve c(u), u uniform in [0, 1), and Gaussian noise about it.

  Its density is the integral of N(x; c(u), std^2 I) over u, by the midpoint
  rule.

  Attributes:
    path: c, from u [n] to [n, 2], in numpy.
    std: of the noise; 0 leaves the data on the curve, where they have no
      density: `logp` is then for sigma > 0 only.
    nodes: of the midpoint rule; c should move by less than std between two.
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
    weights = np.full(self.nodes, 1 / self.nodes)
    return _convolved(x, weights, means, self.std, alpha, sigma)


def rings(u):
  """Two circles of radii 0.8 and 1.6, equally likely."""
  ring = np.floor(2 * u)
  angle = 2 * np.pi * (2 * u - ring)
  radius = 0.8 * (1 + ring)
  return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def swiss_roll(u):
  """A spiral of one and a half turns, of radius 0.67 to 2."""
  angle = 1.5 * np.pi * (1 + 2 * u)
  radius = 2 * angle / (4.5 * np.pi)
  return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def wave(u):
  """A wave from (-2, 0) to (2, 0)."""
  x = 4 * u - 2
  return np.stack([x, np.sin(np.pi * x)], axis=-1)


def _log_interval(low, high):
  """log(Phi(high) - Phi(low)), accurate in both tails."""
  # By symmetry the interval may lie on the left, where Phi is not near 1.
  right = low + high > 0
  low, high = jnp.where(right, -high, low), jnp.where(right, -low, high)
  log_high = log_ndtr(high)
  return log_high + jnp.log(-jnp.expm1(log_ndtr(low) - log_high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkerboard(Distribution):
  """Uniform on the eight dark squares, of side 1, of [-2, 2]^2."""

  def sample(self, rng, n):
    column, row = rng.integers(0, 4, n), rng.integers(0, 2, n)
    corner = np.stack([column, 2 * row + column % 2], axis=-1) - 2
    return corner + rng.random((n, 2))

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


# The mixture is that of Song & Ermon 2019, Section 3.2 (Figures 2 and 3).
DISTRIBUTIONS = {
  'toy/mixture': Mixture(
    weights=(0.2, 0.8), means=((-5.0, -5.0), (5.0, 5.0)), std=1.0, extent=10.0
  ),
  'toy/rings': Curve(path=rings, std=0.1, extent=2.4),
  'toy/checkerboard': Checkerboard(extent=2.4),
  'toy/swiss_roll': Curve(path=swiss_roll, std=0.08, extent=2.6),
  'toy/curve': Curve(path=wave, std=0.0, extent=2.4),
}
