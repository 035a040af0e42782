"""A classifier of noisy images, for class-conditional sampling.

The Wide ResNet of Zagoruyko & Komodakis 2016, with the noise level as a second
input (Song et al. 2021, Section 5 and Appendix I.1). The defaults are the
paper's CIFAR-10 classifier, WRN-28-10. Parameter names are those of its
checkpoint.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import fields, layers
from runtime.options import option

_group_norm = functools.partial(layers.group_norm, epsilon=1e-5)


def _conv(features, dtype, *, stride=1, name):
  return nn.Conv(
    features,
    (3, 3),
    (stride, stride),
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    dtype=dtype,
    name=name,
  )


def _output_init(key, shape, dtype=jnp.float32):
  """Draw from U(-1, 1) / sqrt(number of classes)."""
  bound = 1 / np.sqrt(shape[1])
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class WideResnetBlock(nn.Module):
  """Two convolutions; the shortcut pools and appends channels of zeros."""

  features: int
  stride: int
  activate_shortcut: bool
  dtype: Any

  @nn.compact
  def __call__(self, x, temb):
    h = nn.relu(_group_norm(x, dtype=self.dtype, name='init_bn'))
    shortcut = h if self.activate_shortcut else x
    conv = functools.partial(_conv, self.features, self.dtype)
    h = conv(stride=self.stride, name='conv1')(h)
    dense = nn.Dense(self.features, dtype=self.dtype)
    h = h + dense(nn.swish(temb))[:, None, None, :]
    h = nn.relu(_group_norm(h, dtype=self.dtype, name='bn_2'))
    h = conv(name='conv2')(h)
    pool = (self.stride, self.stride)
    missing = self.features - x.shape[-1]
    shortcut = nn.avg_pool(shortcut, pool, pool)
    return h + jnp.pad(shortcut, [(0, 0), (0, 0), (0, 0), (0, missing)])


class WideResnetGroup(nn.Module):
  """Blocks of one resolution."""

  num_blocks: int
  features: int
  stride: int
  activate_shortcut: bool
  dtype: Any
  remat: bool

  @nn.compact
  def __call__(self, x, temb):
    block = layers.numbered(
      WideResnetBlock, 'WideResnetBlock', remat=self.remat, dtype=self.dtype
    )
    for k in range(self.num_blocks):
      x = block(
        features=self.features,
        stride=1 if k else self.stride,
        activate_shortcut=self.activate_shortcut and not k,
      )(x, temb)
    return x


class WideResNet(nn.Module):
  """Noise-conditional Wide ResNet.

  Example:
    >>> WideResNet(num_outputs=2).blocks_per_group
    4
  """

  blocks_per_group: int = option(4, 'n, for a depth of 6 n + 4.', '[1, 1000]')
  channel_multiplier: int = option(
    10, 'Width in multiples of 16 channels.', '[1, 1e4]'
  )
  num_outputs: int = option(10, 'Number of classes.', '[1, 1e7]')
  dtype: str = fields.dtype()
  remat: bool = fields.remat()

  def __post_init__(self):
    fields.check(self)
    super().__post_init__()

  @nn.compact
  def __call__(self, x, cond, *, train):
    """Return the logits of the classes of noisy images.

    Args:
      x: noisy images [B, H, W, C]; each is standardised, so that their scale
        does not matter.
      cond: standard deviation sigma of the noise [B].
      train: has no effect, because there is no dropout.

    Returns:
      float32 logits [B, num_outputs].

    Raises:
      ValueError: the images cannot be halved twice.
    """
    del train
    layers.check_divisible(x, 4)
    dtype = jnp.dtype(self.dtype)
    axes = (1, 2, 3)
    # At least 1 / size, so that an image of one colour is not divided by 0.
    var = jnp.maximum(x.var(axis=axes, keepdims=True), 1 / x[0].size)
    x = (x - x.mean(axis=axes, keepdims=True)) / jnp.sqrt(var)

    project = layers.GaussianFourierProjection(128, 16.0)
    features = project(jnp.log(cond.astype(jnp.float32)))
    temb = nn.Dense(512)(features)
    temb = nn.Dense(512)(nn.swish(temb))

    h = _conv(16, dtype, name='init_conv')(x)
    for k in range(3):
      h = WideResnetGroup(
        num_blocks=self.blocks_per_group,
        features=16 * 2**k * self.channel_multiplier,
        stride=2 if k else 1,
        activate_shortcut=k == 0,
        dtype=dtype,
        remat=self.remat,
      )(h, temb)
    h = nn.relu(_group_norm(h, dtype=dtype, name='pre-pool-bn'))
    h = h.astype(jnp.float32).mean(axis=(1, 2))
    return nn.Dense(self.num_outputs, kernel_init=_output_init)(h)
