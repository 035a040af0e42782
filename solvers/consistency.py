"""Sampling by a consistency function in one or two steps (Song et al. 2023)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from runtime.options import option
from sde_lib import expand
from solvers import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency(base.BaseSampler):
  """Evaluate a consistency model at t = 1, and once more after new noise.

  x = f(z, 1), then x = f(alpha x + sigma z', t'), where f is the denoiser of a
  network that was trained with training.objective='consistency' (Song et al.
  2023, Algorithm 1; Geng et al. 2024).

  Example:
    >>> Consistency(middle=0.821).continuous
    True
  """

  continuous = True
  records_frames = False

  middle: float = option(
    0.821,
    'Noise level sigma / alpha of the second step of consistency; 0 for one '
    'step.',
    '[0, inf)',
  )

  def _sample(self, rng, score_fn, sde, z, frames):
    x = base.denoise_at(score_fn, sde, z, 1.0)
    if self.middle:
      t = sde.time(-2 * jnp.log(jnp.full(z.shape[:1], self.middle)))
      alpha, sigma = (expand(v, x) for v in sde.marginal(t))
      x = alpha * x + sigma * jax.random.normal(rng, x.shape, x.dtype)
      x = sde.denoise(x, t, score_fn(x, t))
    film = jnp.zeros((0, *z.shape), z.dtype)
    return base.result(x, 1 + bool(self.middle), film, np.zeros(0, np.float32))
