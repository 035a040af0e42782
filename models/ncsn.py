"""Noise-conditional score networks: RefineNets with InstanceNorm++.

NCSN (Song & Ermon 2019, Appendix A) is told the index of the noise level, has
one set of normalisation weights for each, and is the score. NCSNv2 (Song &
Ermon 2020, Technique 3) is unconditional, and divided by sigma by whoever makes
a score of it (`models.score`). Both are a ResNet whose features at each depth
are fused, from the deepest, by the refinement blocks of Lin et al. 2017.

Parameter names are those of the paper's released NCSNv2 checkpoints.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import layers


class Level(NamedTuple):
  """One depth of the network; widths are multiples of nf."""

  width: int  # of the two residual blocks
  refined: int  # width of the refinement block
  dilation: int = 1  # of convolutions; above 1, the depth does not downsample


_LEVELS_64 = (
  Level(1, 1),
  Level(2, 2),
  Level(2, 2, dilation=2),
  Level(2, 2, dilation=4),
)


def torch_init(key, shape, dtype=jnp.float32):
  """PyTorch's default for kernels [K, K, I, O]: U(-1, 1) / sqrt(K^2 I)."""
  bound = 1 / np.sqrt(np.prod(shape[:-1]))
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def conv(x, features, *, dtype, size=3, dilation=1, bias=True):
  """A convolution with zero padding and PyTorch's initialisers."""
  fan_in = (size, size, x.shape[-1])
  return nn.Conv(
    features,
    (size, size),
    kernel_dilation=dilation,
    use_bias=bias,
    kernel_init=torch_init,
    # As wide as the kernel's.
    bias_init=lambda key, shape, t=jnp.float32: torch_init(
      key, (*fan_in, *shape), t
    )[0, 0, 0],
    dtype=dtype,
  )(x)


def _near_one(key, shape, dtype=jnp.float32):
  return 1 + 0.02 * jax.random.normal(key, shape, dtype)


def _instance_norm(x):
  """Normalised x, and its channel means normalised across channels.

  Statistics over the pixels of one image, float32; x [B, H, W, C] and means
  [B, 1, 1, C].
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

  The shift keeps what plain instance normalisation drops, the means of the
  channels relative to one another (Song & Ermon 2019, Appendix A).
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
  """InstanceNorm++, by noise level if there are `num_classes` of them."""
  if num_classes:
    return ConditionalInstanceNorm2dPlus(num_classes, dtype)(x, labels)
  return InstanceNorm2dPlus(dtype)(x)


class _Block(nn.Module):
  """What all blocks below need to know."""

  features: int
  act: Callable[[jax.Array], jax.Array]
  num_classes: int  # noise levels to distinguish, 0 for an unconditional net
  dtype: Any

  def norm(self, x, labels):
    return instance_norm(
      x, labels, num_classes=self.num_classes, dtype=self.dtype
    )

  def norm_if_conditional(self, x, labels):
    """RefineNet normalises in NCSN only; NCSNv2 dropped it there."""
    return self.norm(x, labels) if self.num_classes else x

  def conv(self, x, **kwargs):
    return conv(x, self.features, dtype=self.dtype, **kwargs)

  def common(self):
    """Fields for a block within this one."""
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
  """Pre-activation residual block; with `down` it ends a depth.

  At dilation 1, `down` halves the image; at greater ones, the dilation takes
  the place of that.
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
    """xs: features at this depth and, but for the deepest, refined ones."""
    common = self.common()
    hs = [RCUBlock(x.shape[-1], **common)(x, labels) for x in xs]
    h = hs[0]
    if len(hs) > 1:
      h = MSFBlock(self.features, **common)(hs, labels)
    h = CRPBlock(self.features, **common)(h, labels)
    num_blocks = 3 if self.last else 1
    return RCUBlock(self.features, num_blocks=num_blocks, **common)(h, labels)


class _RefineNet(nn.Module):
  """The network; subclasses say how deep and whether conditional.

  Attributes:
    nf: channels at the highest resolution.
    nonlinearity: 'elu', 'relu', 'lrelu' or 'swish'.
    centered: images are in [-1, 1]; else in [0, 1] and mapped there.
    dtype: 'float32' or 'bfloat16', for convolutions.
    remat: recompute blocks in the backward pass: less memory, more time.
  """

  nf: int = 128
  nonlinearity: str = 'elu'
  centered: bool = False
  dtype: str = 'float32'
  remat: bool = False

  levels: ClassVar[Sequence[Level]] = _LEVELS_64
  num_classes: ClassVar[int] = 0

  def __post_init__(self):
    layers.check_choices(
      self,
      nonlinearity=tuple(layers.ACTIVATIONS),
      dtype=layers.DTYPES,
    )
    super().__post_init__()

  @nn.compact
  def __call__(self, x, cond, *, train):
    """Evaluates the network: NCSN's score, or NCSNv2's times sigma.

    Args:
      x: noisy images [B, H, W, C].
      cond: index of the noise level [B], 0 for the largest, to NCSN; NCSNv2
        takes no notice of it.
      train: has no effect: there is no dropout.

    Returns:
      float32 [B, H, W, C].

    Raises:
      ValueError: if the images cannot be halved as often as needed.
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
      RefineBlock,
      'RefineBlock',
      remat=self.remat,
      **common,
    )
    labels = cond.astype(jnp.int32) if self.num_classes else None
    if not self.centered:
      x = 2 * x - 1

    h = conv(x, self.nf, dtype=dtype)
    features = []
    for depth, level in enumerate(self.levels):
      fields = {'features': level.width * self.nf, 'dilation': level.dilation}
      h = block(down=depth > 0, **fields)(h, labels)
      h = block(**fields)(h, labels)
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

  Attributes:
    num_classes: the number L of noise levels.
  """

  num_classes: int = 10


class NCSNv2(_RefineNet):
  """NCSNv2 for images of up to 64 pixels."""


class NCSNv2_128(_RefineNet):
  """NCSNv2 for images of about 128 pixels."""

  levels = (
    Level(1, 1),
    Level(2, 1),
    Level(2, 2),
    Level(4, 2, dilation=2),
    Level(4, 4, dilation=4),
  )


class NCSNv2_256(_RefineNet):
  """NCSNv2 for images of about 256 pixels."""

  levels = (
    Level(1, 1),
    Level(2, 1),
    Level(2, 2),
    Level(2, 2),
    Level(4, 2, dilation=2),
    Level(4, 4, dilation=4),
  )
