"""The log-variance of the training loss at each noise level.

The uncertainty weighting of Karras et al. (2024, arXiv 2312.02696, Section 2)
learns it along with the network; nothing else needs it.
"""

import flax.linen as nn

from models import layers


class LogVariance(nn.Module):
  """A linear function of 128 Fourier features; 0 in the beginning."""

  @nn.compact
  def __call__(self, level):
    """Return u, [B], at noise levels log(sigma / alpha) / 4, [B]."""
    features = layers.GaussianFourierProjection(64, 1.0)(level)
    return nn.Dense(1, kernel_init=nn.initializers.zeros_init())(features)[:, 0]
