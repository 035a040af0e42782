"""Noise-conditional score networks: RefineNets with InstanceNorm++.

NCSN (Song & Ermon 2019, Appendix A) is told the index of the noise level, has
one set of normalisation weights for each, and returns the score. NCSNv2 (Song &
Ermon 2020, Technique 3) is not told the noise level; `models.score` divides its
output by sigma. Both are a ResNet whose features at each depth are fused, from
the deepest on, by the refinement blocks of Lin et al. 2017.

Parameter names are those of the paper's released NCSNv2 checkpoints.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import fields, layers
from runtime.options import option


class Level(NamedTuple):
  """One depth of the network; widths are multiples of nf."""

  width: int  # Of the two residual blocks.
  refined: int  # Width of the refinement block.
  dilation: int = 1  # Of convolutions; above 1 the depth does not downsample.


_LEVELS_64 = (
  Level(1, 1),
  Level(2, 2),
  Level(2, 2, dilation=2),
  Level(2, 2, dilation=4),
)


def torch_init(key, shape, dtype=jnp.float32):
  """Draw kernels [K, K, I, O] as PyTorch does, U(-1, 1) / sqrt(K^2 I)."""
  bound = 1 / np.sqrt(np.prod(shape[:-1]))
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def conv(x, features, *, dtype, size=3, dilation=1, bias=True):
  """Apply a convolution with zero padding and PyTorch's initialisers."""
  fan_in = (size, size, x.shape[-1])
  return nn.Conv(
    features,
    (size, size),
    kernel_dilation=dilation,
    use_bias=bias,
    kernel_init=torch_init,
    # The distribution of the kernel.
    bias_init=lambda key, shape, t=jnp.float32: torch_init(
      key, (*fan_in, *shape), t
    )[0, 0, 0],
    dtype=dtype,
  )(x)


def _near_one(key, shape, dtype=jnp.float32):
  return 1 + 0.02 * jax.random.normal(key, shape, dtype)


def _instance_norm(x):
  """Return normalised x, and its channel means normalised across channels.

  Statistics are over the pixels of one image, in float32; x is [B, H, W, C] and
  the means are [B, 1, 1, C].
  """
  x = x.astype(jnp.float32)
  mean = x.mean(axis=(1, 2), keepdims=True)
  var = x.var(axis=(1, 2), keepdims=True)
  shift = (mean - mean.mean(axis=-1, keepdims=True)) / jnp.sqrt(
    mean.var(axis=-1, keepdims=True) + 1e-5
  )
  return (x - mean) / jnp.sqrt(var + 1e-5), shift


class InstanceNorm2dPlus(nn.Module):
  """InstanceNorm++: gamma (normalised x + alpha shift) + beta.

  The shift keeps the means of the channels relative to one another, which plain
  instance normalisation drops (Song & Ermon 2019, Appendix A).
  """

  dtype: Any

  @nn.compact
  def __call__(self, x):
    shape = (1, 1, 1, x.shape[-1])
    alpha = self.param('alpha', _near_one, shape)
    gamma = self.param('gamma', _near_one, shape)
    beta = self.param('beta', nn.initializers.zeros_init(), shape)
    h, shift = _instance_norm(x)
    return (gamma * (h + alpha * shift) + beta).astype(self.dtype)


class ConditionalInstanceNorm2dPlus(nn.Module):
  """InstanceNorm++ with one gamma, alpha and beta per noise level."""

  num_classes: int
  dtype: Any

  @nn.compact
  def __call__(self, x, labels):
    def init(key, shape, dtype=jnp.float32):
      levels, channels = shape[0], shape[1] // 3
      scales = _near_one(key, (levels, 2 * channels), dtype)
      return jnp.concatenate(
        [scales, jnp.zeros((levels, channels), dtype)], axis=-1
      )

    embed = nn.Embed(self.num_classes, 3 * x.shape[-1], embedding_init=init)
    gamma, alpha, beta = jnp.split(embed(labels)[:, None, None, :], 3, axis=-1)
    h, shift = _instance_norm(x)
    return (gamma * (h + alpha * shift) + beta).astype(self.dtype)


def instance_norm(x, labels, *, num_classes, dtype):
  """Apply InstanceNorm++, with weights per noise level if `num_classes`."""
  if num_classes:
    return ConditionalInstanceNorm2dPlus(num_classes, dtype)(x, labels)
  return InstanceNorm2dPlus(dtype)(x)


class _Block(nn.Module):
  """Base class of the blocks below."""

  features: int
  act: Callable[[jax.Array], jax.Array]
  num_classes: int  # Noise levels to distinguish; 0 for none.
  dtype: Any

  def norm(self, x, labels):
    return instance_norm(
      x, labels, num_classes=self.num_classes, dtype=self.dtype
    )

  def norm_if_conditional(self, x, labels):
    """Normalise in NCSN; NCSNv2 has no such norms in its RefineNet."""
    return self.norm(x, labels) if self.num_classes else x

  def conv(self, x, **kwargs):
    return conv(x, self.features, dtype=self.dtype, **kwargs)

  def common(self):
    """Return the fields of a block within this one."""
    return {
      'act': self.act,
      'num_classes': self.num_classes,
      'dtype': self.dtype,
    }


class ConvMeanPool(nn.Module):
  """A convolution, then the mean of 2x2 pixels."""

  features: int
  size: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    h = conv(x, self.features, size=self.size, dtype=self.dtype)
    return nn.avg_pool(h, (2, 2), (2, 2))


class ResidualBlock(_Block):
  """Pre-activation residual block; with `down` it begins a depth.

  `down` halves the image, except with a dilation above 1, which replaces that.
  """

  down: bool = False
  dilation: int = 1

  @nn.compact
  def __call__(self, x, labels):
    dilated = functools.partial(self.conv, dilation=self.dilation)
    h = self.act(self.norm(x, labels))
    width = x.shape[-1] if self.down else self.features
    h = conv(h, width, dilation=self.dilation, dtype=self.dtype)
    h = self.act(self.norm(h, labels))
    if not self.down:
      return x + dilated(h)
    if self.dilation > 1:
      return dilated(h) + dilated(x)
    h = ConvMeanPool(self.features, 3, self.dtype)(h)
    return h + ConvMeanPool(self.features, 1, self.dtype)(x)


class RCUBlock(_Block):
  """Residual convolution units."""

  num_blocks: int = 2

  @nn.compact
  def __call__(self, x, labels):
    for _ in range(self.num_blocks):
      h = x
      for _ in range(2):
        h = self.act(self.norm_if_conditional(h, labels))
        h = self.conv(h, bias=False)
      x = x + h
    return x


class MSFBlock(_Block):
  """Multi-resolution fusion: the sum of convolved inputs, resized."""

  @nn.compact
  def __call__(self, xs, labels):
    size = xs[0].shape[1:3]
    total = 0
    for x in xs:
      h = self.conv(self.norm_if_conditional(x, labels))
      shape = (h.shape[0], *size, h.shape[-1])
      total = total + jax.image.resize(h, shape, 'bilinear')
    return total


class CRPBlock(_Block):
  """Chained residual pooling: means in NCSN, maxima in NCSNv2."""

  @nn.compact
  def __call__(self, x, labels):
    pool = nn.avg_pool if self.num_classes else nn.max_pool
    x = self.act(x)
    path = x
    for _ in range(2):
      path = self.norm_if_conditional(path, labels)
      path = pool(path, (5, 5), padding='SAME')
      path = self.conv(path, bias=False)
      x = x + path
    return x


class RefineBlock(_Block):
  """Fuses features of one depth with the refined ones of the next deeper."""

  last: bool = False

  @nn.compact
  def __call__(self, xs, labels):
    """Fuse xs: features of this depth, then refined deeper ones, if any."""
    common = self.common()
    hs = [RCUBlock(x.shape[-1], **common)(x, labels) for x in xs]
    h = hs[0]
    if len(hs) > 1:
      h = MSFBlock(self.features, **common)(hs, labels)
    h = CRPBlock(self.features, **common)(h, labels)
    num_blocks = 3 if self.last else 1
    return RCUBlock(self.features, num_blocks=num_blocks, **common)(h, labels)


class _RefineNet(nn.Module):
  """Base class; subclasses choose the depths and whether it is conditional."""

  nf: int = fields.nf()
  nonlinearity: str = fields.nonlinearity('elu')
  centered: bool = fields.centered(False)
  dtype: str = fields.dtype()
  remat: bool = fields.remat()

  levels: ClassVar[Sequence[Level]] = _LEVELS_64
  num_classes: ClassVar[int] = 0

  def __post_init__(self):
    fields.check(self)
    super().__post_init__()

  @nn.compact
  def __call__(self, x, cond, *, train):
    """Return the score (NCSN), or the score times sigma (NCSNv2).

    Args:
      x: noisy images [B, H, W, C].
      cond: index of the noise level [B], 0 for the largest; NCSNv2 ignores it.
      train: has no effect, because there is no dropout.

    Returns:
      float32 [B, H, W, C].

    Raises:
      ValueError: the images cannot be halved as often as needed.
    """
    del train
    halvings = sum(level.dilation == 1 for level in self.levels[1:])
    layers.check_divisible(x, 2**halvings)
    act = layers.ACTIVATIONS[self.nonlinearity]
    dtype = jnp.dtype(self.dtype)
    common = {'act': act, 'num_classes': self.num_classes, 'dtype': dtype}
    block = layers.numbered(
      ResidualBlock, 'ResidualBlock', remat=self.remat, **common
    )
    refine = layers.numbered(
      RefineBlock, 'RefineBlock', remat=self.remat, **common
    )
    labels = cond.astype(jnp.int32) if self.num_classes else None
    if not self.centered:
      x = 2 * x - 1

    h = conv(x, self.nf, dtype=dtype)
    features = []
    for depth, level in enumerate(self.levels):
      size = {'features': level.width * self.nf, 'dilation': level.dilation}
      h = block(down=depth > 0, **size)(h, labels)
      h = block(**size)(h, labels)
      features.append(h)

    refined = []
    for depth in reversed(range(len(self.levels))):
      width = self.levels[depth].refined * self.nf
      fuse = refine(features=width, last=depth == 0)
      refined = [fuse([features[depth], *refined], labels)]

    h = instance_norm(
      refined[0], labels, num_classes=self.num_classes, dtype=dtype
    )
    return conv(act(h), x.shape[-1], dtype=dtype).astype(jnp.float32)


class NCSN(_RefineNet):
  """NCSN of 2019, whose normalisation depends on the noise level.

  Example:
    >>> NCSN(num_classes=232).nonlinearity
    'elu'
  """

  num_classes: int = option(
    10, 'Noise levels, as many as training.num_scales.', '[1, 1e7]'
  )


class NCSNv2(_RefineNet):
  """NCSNv2 for images of up to 64 pixels.

  Example:
    >>> len(NCSNv2(nf=16).levels)
    4
  """


class NCSNv2_128(_RefineNet):
  """NCSNv2 for images of about 128 pixels.

  Example:
    >>> len(NCSNv2_128(nf=16).levels)
    5
  """

  levels = (
    Level(1, 1),
    Level(2, 1),
    Level(2, 2),
    Level(4, 2, dilation=2),
    Level(4, 4, dilation=4),
  )


class NCSNv2_256(_RefineNet):
  """NCSNv2 for images of about 256 pixels.

  Example:
    >>> len(NCSNv2_256(nf=16).levels)
    6
  """

  levels = (
    Level(1, 1),
    Level(2, 1),
    Level(2, 2),
    Level(2, 2),
    Level(4, 2, dilation=2),
    Level(4, 4, dilation=4),
  )
