"""Data whose score is known in closed form: mixtures of isotropic Gaussians."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp


def optimized(function):
  """Compile a function of many steps with the optimization that tests omit."""
  options = {'xla_backend_optimization_level': 1}
  return jax.jit(function, compiler_options=options)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Mixture sum_k weights_k N(means_k, std^2 I), with means [K, D]."""

  weights: tuple = (0.5, 0.5)
  means: tuple = ((0.5, -0.3), (0.5, -0.3))
  std: float = 0.4

  @property
  def dims(self):
    return len(self.means[0])

  def logp(self, x, alpha=1.0, sigma=0.0):
    """Return the log-density [B] of alpha x_0 + sigma z at x [B, D]."""
    alpha = jnp.reshape(jnp.asarray(alpha), (-1, 1))
    variance = (
      alpha**2 * self.std**2 + jnp.reshape(jnp.asarray(sigma), (-1, 1)) ** 2
    )
    means = jnp.asarray(self.means)
    delta = x[:, None, :] - alpha[:, :, None] * means[None]
    square = jnp.sum(delta**2, -1) / variance
    log_normal = -0.5 * (square + self.dims * jnp.log(2 * jnp.pi * variance))
    return logsumexp(log_normal + jnp.log(jnp.asarray(self.weights))[None], -1)

  def score_fn(self, sde):
    """Return the exact score of `sde` for data of this mixture."""

    def score(x, t):
      alpha, sigma = sde.marginal(t)
      return jax.grad(lambda x: jnp.sum(self.logp(x, alpha, sigma)))(x)

    return score

  def sample(self, seed, n):
    rng = np.random.default_rng(seed)
    k = rng.choice(len(self.weights), n, p=self.weights)
    noise = rng.standard_normal((n, self.dims))
    return np.float32(np.asarray(self.means)[k] + self.std * noise)

  @property
  def mean(self):
    return np.asarray(self.weights) @ np.asarray(self.means)

  @property
  def variance(self):
    """Return the variance of each coordinate."""
    second = np.asarray(self.weights) @ np.asarray(self.means) ** 2
    return second - self.mean**2 + self.std**2


GAUSSIAN = Mixture()
MIXTURE = Mixture(weights=(0.7, 0.3), means=((0.8, 0.1), (-0.9, 0.4)), std=0.25)
