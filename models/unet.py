"""The U-Net that DDPM and NCSN++ share (Ho et al. 2020, Appendix B).

Residual blocks at each resolution on the way down, the same and one more on the
way up, which also read the outputs of the way down; attention at some
resolutions. The network has as many axes of space as its input: one for
signals, two for images, three for volumes. The base class is the plain network;
subclasses choose the blocks and override the methods that they do differently.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from models import conditions, fields, layers
from runtime.options import option


class UNet(nn.Module):
  """Base class: the options and the walk down and up."""

  nf: int = fields.nf()
  ch_mult: tuple[int, ...] = option(
    (1, 2, 2, 2),
    'Multiples of nf for each resolution, from the highest.',
    '[1, 1000]',
  )
  num_res_blocks: int = fields.num_res_blocks(2)
  attn_resolutions: tuple[int, ...] = option(
    (16,),
    'Sizes of the first axis (height) at which attention follows the blocks.',
    '[1, inf)',
  )
  attention: str = option(
    'xla',
    "Implementation of attention; 'cudnn' needs bfloat16 and an NVIDIA GPU.",
    choices=('xla', 'cudnn'),
    marks=('samples',),
  )
  dropout: float = option(0.1, 'Dropout rate in training.', '[0, 1)')
  resamp_with_conv: bool = option(
    True, 'Whether resampling between blocks convolves.'
  )
  conditional: bool = fields.conditional()
  num_labels: int = fields.num_labels()
  condition: str = fields.condition()
  condition_shape: tuple[int, ...] = fields.condition_shape()
  augment_labels: int = fields.augment_labels()
  nonlinearity: str = fields.nonlinearity('swish')
  centered: bool = fields.centered(True)
  dtype: str = fields.dtype()
  remat: bool = fields.remat()

  # What subclasses choose.
  num_groups: ClassVar[int | None] = None  # Of the norms; None for automatic.
  init_scale: ClassVar[float] = 0.0  # Variance scale of the last layers.
  conv_size: ClassVar[int] = 3  # Kernel size of the first and last layers.
  taps: ClassVar[tuple[int, ...] | None] = None  # Of the resampling filter.

  def __post_init__(self):
    fields.check(self)
    super().__post_init__()

  def block_style(self) -> tuple[str, dict[str, Any]]:
    """Return the name of the residual blocks and what else they are given."""
    raise NotImplementedError

  def attention_style(self) -> tuple[str, dict[str, Any]]:
    """Return the name of the attention blocks and what else they are given."""
    raise NotImplementedError

  @nn.compact
  def __call__(
    self, x, cond, label=None, condition=None, augment=None, *, train
  ):
    """Return the output of the network.

    Args:
      x: noisy images [B, H, W, C], signals [B, L, C] or volumes [B, D, H, W,
        C].
      cond: noise levels [B], as the embedding takes them.
      label: classes [B], for a class-conditional network; None for no class.
      condition: `conditions.marked` conditions [B, ...]; None for none.
      augment: [B, augment_labels], how the images were augmented; None for
        zeros, images as they are.
      train: whether dropout is active; it draws from the stream 'dropout'.

    Returns:
      float32, shaped as x.

    Raises:
      ValueError: the data cannot be halved len(ch_mult) - 1 times.
    """
    layers.check_divisible(x, 2 ** (len(self.ch_mult) - 1))
    act = layers.ACTIVATIONS[self.nonlinearity]
    common = {'dtype': jnp.dtype(self.dtype), 'remat': self.remat}
    name, style = self.attention_style()
    style = {'implementation': self.attention, **style}
    attention = layers.numbered(layers.AttnBlock, name, **style, **common)
    common |= {'act': act, 'dropout': self.dropout, 'train': train}
    name, style = self.block_style()
    block = layers.numbered(layers.ResnetBlock, name, **style, **common)

    temb = None
    if self.conditional:
      features = self.noise_features(cond)
      if self.augment_labels:
        features += layers.embed_augment(augment, self.augment_labels, features)
      temb = layers.embed_noise(features, 4 * self.nf, act)
    if self.num_labels:
      temb = layers.add_label(temb, label, self.num_labels)
    channels = x.shape[-1]
    if not self.centered:
      x = 2 * x - 1
    x, temb = conditions.join(self, x, temb, condition)

    hs = self._down(x, temb, block, attention)
    h = block()(hs[-1], temb)
    h = attention()(h)
    h = block()(h, temb)
    return self._up(h, hs, temb, block, attention, channels)

  def _down(self, x, temb, block, attention):
    """Return the outputs of the blocks, for the way up."""
    pyramid = x
    h = layers.conv(self.nf, self.conv_size, dtype=jnp.dtype(self.dtype))(x)
    hs = [h]
    for level, mult in enumerate(self.ch_mult):
      for _ in range(self.num_res_blocks):
        h = block(out_ch=self.nf * mult)(h, temb)
        if h.shape[1] in self.attn_resolutions:
          h = attention()(h)
        hs.append(h)
      if level != len(self.ch_mult) - 1:
        h = self.halve(h, temb, block)
        pyramid, h = self.join_input(pyramid, h)
        hs.append(h)
    return hs

  def _up(self, h, hs, temb, block, attention, channels):
    """Return the image; each block also reads an output of the way down."""
    pyramid = None
    for level, mult in reversed([*enumerate(self.ch_mult)]):
      for _ in range(self.num_res_blocks + 1):
        h = jnp.concatenate([h, hs.pop()], axis=-1)
        h = block(out_ch=self.nf * mult)(h, temb)
      if h.shape[1] in self.attn_resolutions:
        h = attention()(h)
      pyramid, h = self.join_output(pyramid, h, channels)
      if level != 0:
        h = self.double(h, temb, block)
    return self.finish(pyramid, h, channels)

  def noise_features(self, cond):
    """Return features of the noise levels [B] for the embedding, [B, ...]."""
    return layers.positional_embedding(cond, self.nf)

  def halve(self, h, temb, block):
    """Return features of half the resolution."""
    dtype = jnp.dtype(self.dtype)
    return layers.Downsample(self.resamp_with_conv, self.taps, dtype)(h)

  def double(self, h, temb, block):
    """Return features of twice the resolution."""
    dtype = jnp.dtype(self.dtype)
    return layers.Upsample(self.resamp_with_conv, self.taps, dtype)(h)

  def join_input(self, pyramid, h):
    """Return the input pyramid at the resolution of h, and h with it."""
    return pyramid, h

  def join_output(self, pyramid, h, channels):
    """Return the output pyramid with h at its resolution, and the next h."""
    return pyramid, h

  def head(self, h, features, init_scale):
    """Return a norm, the nonlinearity and a convolution of h."""
    dtype = jnp.dtype(self.dtype)
    h = layers.group_norm(h, dtype=dtype, num_groups=self.num_groups)
    h = layers.ACTIVATIONS[self.nonlinearity](h)
    conv = layers.conv(
      features, self.conv_size, init_scale=init_scale, dtype=dtype
    )
    return conv(h)

  def finish(self, pyramid, h, channels):
    """Return the output of the network, float32."""
    return self.head(h, channels, self.init_scale).astype(jnp.float32)
