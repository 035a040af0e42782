"""The U-Net of DDPM (Ho et al. 2020, Appendix B)."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from models import layers


class DDPM(nn.Module):
  """U-Net of residual blocks with attention and sinusoidal time features.

  The defaults are the CIFAR-10 model's. As in the paper's release, attention
  on the way up comes once per resolution, after its last block.

  Attributes:
    nf: channels at the highest resolution, a multiple of 32.
    ch_mult: multiples of nf, one per resolution, from the highest.
    num_res_blocks: blocks per resolution on the way down; one more on the
      way up.
    attn_resolutions: image heights at which blocks are followed by attention.
    dropout: rate, in training.
    resamp_with_conv: whether resampling convolves.
    conditional: whether the network sees `cond`.
    num_labels: classes of a class-conditional network; 0 for none. Its label
      `num_labels` stands for no class.
    nonlinearity: 'swish', 'elu', 'relu' or 'lrelu'.
    centered: images are in [-1, 1]; else in [0, 1] and mapped there.
    dtype: 'float32' or 'bfloat16', for convolutions and matrix products.
    remat: recompute blocks in the backward pass: less memory, more time.
  """

  nf: int = 128
  ch_mult: Sequence[int] = (1, 2, 2, 2)
  num_res_blocks: int = 2
  attn_resolutions: Sequence[int] = (16,)
  dropout: float = 0.1
  resamp_with_conv: bool = True
  conditional: bool = True
  num_labels: int = 0
  nonlinearity: str = 'swish'
  centered: bool = True
  dtype: str = 'float32'
  remat: bool = False

  def __post_init__(self):
    layers.check_choices(
      self, nonlinearity=tuple(layers.ACTIVATIONS), dtype=layers.DTYPES
    )
    if self.num_labels:
      layers.check_choices(self, conditional=(True,))
    super().__post_init__()

  @nn.compact
  def __call__(self, x, cond, label=None, *, train):
    """Evaluates the network.

    Args:
      x: noisy images [B, H, W, C].
      cond: steps [B] of 0..999, integer or not.
      label: classes [B], of a class-conditional network; None for no class.
      train: whether dropout is active; it draws from the stream 'dropout'.

    Returns:
      float32 [B, H, W, C].

    Raises:
      ValueError: if the images cannot be halved len(ch_mult) - 1 times.
    """
    layers.check_divisible(x, 2 ** (len(self.ch_mult) - 1))
    act = layers.ACTIVATIONS[self.nonlinearity]
    dtype = jnp.dtype(self.dtype)
    channels = [self.nf * mult for mult in self.ch_mult]

    block = layers.numbered(
      layers.ResnetBlock,
      'ResnetBlockDDPM',
      remat=self.remat,
      act=act,
      dropout=self.dropout,
      train=train,
      dtype=dtype,
      nin_shortcut=True,
      num_groups=32,
    )
    attention = layers.numbered(
      layers.AttnBlock,
      'AttnBlock',
      remat=self.remat,
      dtype=dtype,
      num_groups=32,
    )

    temb = None
    if self.conditional:
      features = layers.positional_embedding(cond, self.nf)
      temb = layers.embed_noise(features, 4 * self.nf, act)
    if self.num_labels:
      temb = layers.add_label(temb, label, self.num_labels)
    if not self.centered:
      x = 2 * x - 1

    # Down: blocks at each resolution, their outputs kept for the way up.
    h = layers.conv(self.nf, 3, dtype=dtype)(x)
    hs = [h]
    for level, features in enumerate(channels):
      for _ in range(self.num_res_blocks):
        h = block(out_ch=features)(h, temb)
        if h.shape[1] in self.attn_resolutions:
          h = attention()(h)
        hs.append(h)
      if level != len(channels) - 1:
        h = layers.Downsample(self.resamp_with_conv, None, dtype)(h)
        hs.append(h)

    # Lowest resolution.
    h = block()(h, temb)
    h = attention()(h)
    h = block()(h, temb)

    # Up: each block also reads its counterpart's output.
    for level in reversed(range(len(channels))):
      for _ in range(self.num_res_blocks + 1):
        h = jnp.concatenate([h, hs.pop()], axis=-1)
        h = block(out_ch=channels[level])(h, temb)
      if h.shape[1] in self.attn_resolutions:
        h = attention()(h)
      if level != 0:
        h = layers.Upsample(self.resamp_with_conv, None, dtype)(h)

    h = act(layers.group_norm(h, dtype=dtype, num_groups=32))
    h = layers.conv(x.shape[-1], 3, init_scale=0.0, dtype=dtype)(h)
    return h.astype(jnp.float32)
