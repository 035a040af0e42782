"""Layers that the score networks share.

Class and parameter names are those of the paper's released checkpoints, so that
these load; see `numbered`. Data are [B, *space, C] with one to three spatial
axes: NHWC for images, to which the names of checkpoints belong. `dtype` is the
precision of convolutions and matrix products. Parameters, statistics of norms,
softmax and noise embeddings are always float32.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import resampling

ACTIVATIONS = {
  'swish': nn.swish,
  'elu': nn.elu,
  'relu': nn.relu,
  'lrelu': functools.partial(nn.leaky_relu, negative_slope=0.2),
}


def check_divisible(x, factor):
  """Raise ValueError if the space of x [B, *space, C] cannot be divided."""
  space = x.shape[1:-1]
  if not space:
    raise ValueError(
      f'It convolves along axes of space, and vectors of {x.shape[-1]} numbers '
      "have none: use model.name='mlp', or store them as [N, L, 1]."
    )
  if any(size % factor for size in space):
    raise ValueError(
      f'Data of {"x".join(map(str, space))} pixels cannot be downsampled '
      f'{factor}-fold: sizes must be multiples of {factor}.'
    )


def numbered(cls, prefix, *, remat=False, **fields):
  """Return a factory of modules named prefix_0, prefix_1, ...

  With explicit names one class serves several checkpoint formats, and
  parameters keep their place when `remat` wraps the class. With `remat`, the
  activations of the modules are recomputed in the backward pass, not stored.

  Args:
    cls: class of the modules.
    prefix: start of their names.
    remat: whether activations are recomputed.
    **fields: fields of all modules; the factory takes further ones.
  """
  cls = nn.remat(cls) if remat else cls
  names = (f'{prefix}_{k}' for k in itertools.count())
  return lambda **more: cls(name=next(names), **fields, **more)


def default_init(scale=1.0):
  """Return DDPM's initialiser (Ho et al. 2020); scale 0 stands for 1e-10."""
  return nn.initializers.variance_scaling(scale or 1e-10, 'fan_avg', 'uniform')


def conv(features, size, *, dtype, stride=1, init_scale=1.0):
  """Return a zero-padded convolution of `size` along each axis of space.

  It has DDPM's initialiser. Call it in a compact method, whose module then owns
  its parameters.
  """

  def apply(x):
    axes = x.ndim - 2
    return nn.Conv(
      features,
      (size,) * axes,
      (stride,) * axes,
      kernel_init=default_init(init_scale),
      dtype=dtype,
    )(x)

  return apply


@functools.partial(jax.jit, static_argnums=0)
def _trace_once(layer, params, x):
  """Return layer(x); layers that are alike share a trace."""
  return layer.apply({'params': params}, x)


class GroupNorm(nn.Module):
  """The layer of flax, which is traced once for all layers that are alike.

  Networks have up to two hundred of them, a third of the time to trace.
  """

  num_groups: int
  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x):
    size, init = x.shape[-1:], nn.initializers
    params = {
      'scale': self.param('scale', init.ones_init(), size),
      'bias': self.param('bias', init.zeros_init(), size),
    }
    layer = nn.GroupNorm(
      self.num_groups, epsilon=self.epsilon, dtype=self.dtype, parent=None
    )
    return _trace_once(layer, params, x)


def group_norm(x, *, dtype, num_groups=None, epsilon=1e-6, name=None):
  """Apply GroupNorm to x [..., C], by default with min(C // 4, 32) groups."""
  channels = x.shape[-1]
  num_groups = num_groups or max(1, min(channels // 4, 32))
  if channels % num_groups:
    raise ValueError(
      f'GroupNorm cannot split {channels} channels into {num_groups} groups: '
      f'choose nf a multiple of {num_groups}.'
    )
  return GroupNorm(num_groups, epsilon, dtype, name=name)(x)


def bias_of(b, x):
  """Return b [C] or [B, C] with the axes of space that x [B, *space, C] has."""
  first = b.ndim - 1
  return jnp.expand_dims(b, range(first, first + x.ndim - b.ndim))


def merge(x, h, *, rescale):
  """Return x + h, divided by sqrt(2) if `rescale` to keep the variance."""
  return (x + h) / math.sqrt(2) if rescale else x + h


def positional_embedding(cond, size):
  """Return sinusoids of geometric frequencies (Vaswani et al. 2017), [B, size].

  Args:
    cond: steps [B] of 0..999, integer or not.
    size: number of features, at least 4.
  """
  half = size // 2
  frequencies = jnp.exp(-math.log(10000) / (half - 1) * jnp.arange(half))
  angles = cond.astype(jnp.float32)[:, None] * frequencies[None, :]
  features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
  return jnp.pad(features, [(0, 0), (0, size % 2)])


class GaussianFourierProjection(nn.Module):
  """Random Fourier features (Tancik et al. 2020) of v [B]: [B, 2 features].

  The frequencies W ~ N(0, scale^2) are drawn once and not trained.
  """

  features: int
  scale: float

  @nn.compact
  def __call__(self, v):
    init = nn.initializers.normal(self.scale)
    w = jax.lax.stop_gradient(self.param('W', init, (self.features,)))
    angles = v.astype(jnp.float32)[:, None] * w[None, :] * 2 * jnp.pi
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class NIN(nn.Module):
  """A 1x1 convolution, as a matrix W and a bias b."""

  features: int
  dtype: Any
  init_scale: float = 0.1

  @nn.compact
  def __call__(self, x):
    shape = (x.shape[-1], self.features)
    w = self.param('W', default_init(self.init_scale), shape)
    b = self.param('b', nn.initializers.zeros_init(), (self.features,))
    x, w, b = nn.dtypes.promote_dtype(x, w, b, dtype=self.dtype)
    return x @ w + bias_of(b, x)


class AttnBlock(nn.Module):
  """Single-head self-attention over all pixels, in a residual block.

  Called AttnBlockpp in NCSN++ and AttnBlock in DDPM. `implementation` is that
  of `jax.nn.dot_product_attention`.
  """

  dtype: Any
  implementation: str = 'xla'
  init_scale: float = 0.0
  skip_rescale: bool = False
  num_groups: int | None = None

  @nn.compact
  def __call__(self, x):
    batch, channels = x.shape[0], x.shape[-1]
    h = group_norm(x, dtype=self.dtype, num_groups=self.num_groups)
    q, k, v = (
      NIN(channels, self.dtype)(h).reshape(batch, -1, 1, channels)
      for _ in 'qkv'
    )
    # softmax(q k^T / sqrt(C)) v, with the softmax in float32.
    h = jax.nn.dot_product_attention(
      q, k, v, implementation=self.implementation
    )
    h = h.reshape(x.shape)
    h = NIN(channels, self.dtype, self.init_scale)(h)
    return merge(x, h, rescale=self.skip_rescale)


class Conv2d(nn.Module):
  """A convolution of size 3 fused with FIR up- or downsampling (StyleGAN2)."""

  features: int
  resample: Callable[..., jax.Array]
  taps: Sequence[int]
  dtype: Any

  @nn.compact
  def __call__(self, x):
    shape = *(3,) * (x.ndim - 2), x.shape[-1], self.features
    weight = self.param('weight', default_init(), shape)
    bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
    x, weight, bias = nn.dtypes.promote_dtype(x, weight, bias, dtype=self.dtype)
    return self.resample(x, weight, self.taps) + bias_of(bias, x)


class Upsample(nn.Module):
  """Doubled axes of space, with a convolution of size 3 if `with_conv`.

  `taps` is the FIR filter, None for nearest-neighbour upsampling.
  """

  with_conv: bool
  taps: Sequence[int] | None
  dtype: Any
  out_ch: int | None = None

  @nn.compact
  def __call__(self, x):
    features = self.out_ch or x.shape[-1]
    if not self.with_conv:
      return resampling.upsample(x, self.taps or (1, 1))
    if self.taps:
      combined = resampling.upsample_conv
      return Conv2d(features, combined, self.taps, self.dtype)(x)
    x = resampling.upsample(x, (1, 1))
    return conv(features, 3, dtype=self.dtype)(x)


class Downsample(nn.Module):
  """Halved axes of space, with a convolution of size 3 if `with_conv`.

  `taps` is the FIR filter, None for the mean of neighbours or, with the
  convolution, for no filter at all.
  """

  with_conv: bool
  taps: Sequence[int] | None
  dtype: Any
  out_ch: int | None = None

  @nn.compact
  def __call__(self, x):
    features = self.out_ch or x.shape[-1]
    if not self.with_conv:
      return resampling.downsample(x, self.taps or (1, 1))
    if self.taps:
      combined = resampling.downsample_conv
      return Conv2d(features, combined, self.taps, self.dtype)(x)
    return conv(features, 3, stride=2, dtype=self.dtype)(x)


class Combine(nn.Module):
  """Input pyramid x joined to features h, by sum or concatenation."""

  method: str
  dtype: Any

  @nn.compact
  def __call__(self, x, h):
    x = conv(h.shape[-1], 1, dtype=self.dtype)(x)
    return x + h if self.method == 'sum' else jnp.concatenate([x, h], axis=-1)


class ResnetBlock(nn.Module):
  """Residual block conditioned on a noise embedding.

  With `nin_shortcut` it is that of DDPM (Ho et al. 2020), called
  ResnetBlockDDPM, in NCSN++ ResnetBlockDDPMpp. Without, it is that of BigGAN
  (Brock et al. 2019), called ResnetBlockBigGANpp, which can also resample.
  """

  act: Callable[[jax.Array], jax.Array]
  dropout: float
  train: bool
  dtype: Any
  out_ch: int | None = None
  resample: Callable[..., jax.Array] | None = None
  taps: Sequence[int] = (1, 1)
  nin_shortcut: bool = False
  skip_rescale: bool = False
  init_scale: float = 0.0
  num_groups: int | None = None

  @nn.compact
  def __call__(self, x, temb):
    """Return [B, *space', O] of x [B, *space, C] and temb [B, E] or None."""
    features = self.out_ch or x.shape[-1]
    norm = functools.partial(
      group_norm, dtype=self.dtype, num_groups=self.num_groups
    )
    h = self.act(norm(x))
    if self.resample:
      h = self.resample(h, self.taps)
      x = self.resample(x, self.taps)
    h = conv(features, 3, dtype=self.dtype)(h)
    if temb is not None:
      dense = nn.Dense(features, kernel_init=default_init(), dtype=self.dtype)
      h = h + bias_of(dense(self.act(temb)), h)
    h = self.act(norm(h))
    h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
    h = conv(features, 3, init_scale=self.init_scale, dtype=self.dtype)(h)
    if self.nin_shortcut and features != x.shape[-1]:
      x = NIN(features, self.dtype)(x)
    elif self.resample or features != x.shape[-1]:
      x = conv(features, 1, dtype=self.dtype)(x)
    return merge(x, h, rescale=self.skip_rescale)


def embed_noise(features, size, act):
  """Return two dense layers of features of the noise, float32 [B, size].

  Call it in a compact method, whose module then owns Dense_0 and Dense_1.
  """
  h = nn.Dense(size, kernel_init=default_init())(features)
  return nn.Dense(size, kernel_init=default_init())(act(h))


def embed_augment(augment, num_labels, features):
  """Return an embedding of augmentation labels, [B, F] as the features.

  Call it in a compact method, whose module then owns AugmentEmbedding.

  Args:
    augment: labels [B, num_labels], or None for zeros.
    num_labels: their number.
    features: what the embedding is added to.
  """
  if augment is None:
    augment = jnp.zeros((features.shape[0], num_labels))
  size = features.shape[-1]
  return nn.Dense(size, use_bias=False, name='AugmentEmbedding')(augment)


def add_label(temb, label, num_labels):
  """Return the noise embedding [B, E] plus that of classes.

  Call it in a compact method, whose module then owns LabelEmbedding.

  Args:
    temb: noise embedding [B, E].
    label: classes [B] in 0..num_labels, where num_labels stands for no class,
      which classifier-free guidance needs; None for no class.
    num_labels: number of classes.
  """
  if label is None:
    label = jnp.full(temb.shape[:1], num_labels)
  init = nn.initializers.normal(1.0)
  embed = nn.Embed(
    num_labels + 1, temb.shape[1], embedding_init=init, name='LabelEmbedding'
  )
  return temb + embed(label)
