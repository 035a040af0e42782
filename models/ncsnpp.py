"""NCSN++ and DDPM++ (Song et al. 2021, Section 4.1 and Appendix H).

One U-Net with options: NCSN++ has FIR resampling, a residual input pyramid
and Fourier features of log sigma; DDPM++ plain resampling, no pyramid and
sinusoidal features of time. The high-resolution models add image pyramids at
input and output in place of the residual one.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from models import layers, resampling


class NCSNpp(nn.Module):
  """U-Net of residual blocks; the defaults are the paper's VE CIFAR-10 model.

  Attributes:
    nf: channels at the highest resolution.
    ch_mult: multiples of nf, one per resolution, from the highest.
    num_res_blocks: blocks per resolution on the way down; one more on the
      way up.
    attn_resolutions: image heights at which blocks are followed by attention.
    dropout: rate, in training.
    resamp_with_conv: whether resampling between DDPM blocks convolves.
    conditional: whether the network sees `cond`.
    num_labels: classes of a class-conditional network; 0 for none. Its label
      `num_labels` stands for no class.
    fir: filter when resampling, rather than nearest neighbour and means.
    fir_kernel: taps of the separable filter.
    skip_rescale: divide sums of two branches by sqrt(2).
    resblock_type: 'biggan' (resamples within blocks) or 'ddpm'.
    progressive: output pyramid: 'none', 'output_skip' (sums of images) or
      'residual' (sums of features).
    progressive_input: input pyramid: 'none', 'input_skip' or 'residual'.
    progressive_combine: how 'input_skip' joins features: 'sum' or 'cat'.
    embedding_type: 'fourier' (cond is sigma) or 'positional' (cond is a step
      of 0..999, integer or not).
    init_scale: variance scale of the last layer of each branch; 0 is allowed.
    fourier_scale: standard deviation of the Fourier frequencies.
    conv_size: kernel size of the first and last convolutions.
    nonlinearity: 'swish', 'elu', 'relu' or 'lrelu'.
    centered: images are in [-1, 1]; else in [0, 1] and mapped there.
    dtype: 'float32' or 'bfloat16', for convolutions and matrix products.
    remat: recompute blocks in the backward pass: less memory, more time.
  """

  nf: int = 128
  ch_mult: Sequence[int] = (1, 2, 2, 2)
  num_res_blocks: int = 4
  attn_resolutions: Sequence[int] = (16,)
  dropout: float = 0.1
  resamp_with_conv: bool = True
  conditional: bool = True
  num_labels: int = 0
  fir: bool = True
  fir_kernel: Sequence[int] = (1, 3, 3, 1)
  skip_rescale: bool = True
  resblock_type: str = 'biggan'
  progressive: str = 'none'
  progressive_input: str = 'residual'
  progressive_combine: str = 'sum'
  embedding_type: str = 'fourier'
  init_scale: float = 0.0
  fourier_scale: float = 16.0
  conv_size: int = 3
  nonlinearity: str = 'swish'
  centered: bool = False
  dtype: str = 'float32'
  remat: bool = False

  def __post_init__(self):
    layers.check_choices(
      self,
      resblock_type=('biggan', 'ddpm'),
      progressive=('none', 'output_skip', 'residual'),
      progressive_input=('none', 'input_skip', 'residual'),
      progressive_combine=('sum', 'cat'),
      embedding_type=('fourier', 'positional'),
      nonlinearity=tuple(layers.ACTIVATIONS),
      dtype=layers.DTYPES,
    )
    if self.num_labels:
      layers.check_choices(self, conditional=(True,))
    super().__post_init__()

  @nn.compact
  def __call__(self, x, cond, label=None, *, train):
    """Evaluates the network, not divided by sigma.

    Args:
      x: noisy images [B, H, W, C].
      cond: noise levels [B], see `embedding_type`.
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
    taps = tuple(self.fir_kernel) if self.fir else None
    channels = [self.nf * mult for mult in self.ch_mult]
    lowest = len(channels) - 1

    biggan = self.resblock_type == 'biggan'
    block = layers.numbered(
      layers.ResnetBlock,
      'ResnetBlockBigGANpp' if biggan else 'ResnetBlockDDPMpp',
      remat=self.remat,
      act=act,
      dropout=self.dropout,
      train=train,
      dtype=dtype,
      taps=taps or (1, 1),
      nin_shortcut=not biggan,
      skip_rescale=self.skip_rescale,
      init_scale=self.init_scale,
    )
    attention = layers.numbered(
      layers.AttnBlock,
      'AttnBlockpp',
      remat=self.remat,
      dtype=dtype,
      init_scale=self.init_scale,
      skip_rescale=self.skip_rescale,
    )

    def down(h, temb):
      if biggan:
        return block(resample=resampling.downsample)(h, temb)
      return layers.Downsample(self.resamp_with_conv, taps, dtype)(h)

    def up(h, temb):
      if biggan:
        return block(resample=resampling.upsample)(h, temb)
      return layers.Upsample(self.resamp_with_conv, taps, dtype)(h)

    def out(h, features, init_scale):
      h = act(layers.group_norm(h, dtype=dtype))
      size = self.conv_size
      return layers.conv(features, size, init_scale=init_scale, dtype=dtype)(h)

    temb = self._noise_embedding(cond, act) if self.conditional else None
    if self.num_labels:
      temb = layers.add_label(temb, label, self.num_labels)
    if not self.centered:
      x = 2 * x - 1

    # Down: blocks at each resolution, their outputs kept for the way up.
    in_pyramid = x
    h = layers.conv(self.nf, self.conv_size, dtype=dtype)(x)
    hs = [h]
    for level, features in enumerate(channels):
      for _ in range(self.num_res_blocks):
        h = block(out_ch=features)(h, temb)
        if h.shape[1] in self.attn_resolutions:
          h = attention()(h)
        hs.append(h)
      if level != lowest:
        h = down(h, temb)
        if self.progressive_input == 'input_skip':
          in_pyramid = layers.Downsample(False, taps, dtype)(in_pyramid)
          h = layers.Combine(self.progressive_combine, dtype)(in_pyramid, h)
        elif self.progressive_input == 'residual':
          halve = layers.Downsample(True, taps, dtype, out_ch=h.shape[-1])
          h = layers.merge(halve(in_pyramid), h, rescale=self.skip_rescale)
          in_pyramid = h
        hs.append(h)

    # Lowest resolution.
    h = block()(h, temb)
    h = attention()(h)
    h = block()(h, temb)

    # Up: each block also reads its counterpart's output.
    out_pyramid = None
    for level in reversed(range(len(channels))):
      for _ in range(self.num_res_blocks + 1):
        h = jnp.concatenate([h, hs.pop()], axis=-1)
        h = block(out_ch=channels[level])(h, temb)
      if h.shape[1] in self.attn_resolutions:
        h = attention()(h)
      if self.progressive == 'output_skip':
        if level != lowest:
          out_pyramid = layers.Upsample(False, taps, dtype)(out_pyramid)
        image = out(h, x.shape[-1], self.init_scale).astype(jnp.float32)
        out_pyramid = image if level == lowest else out_pyramid + image
      elif self.progressive == 'residual':
        if level == lowest:
          out_pyramid = out(h, h.shape[-1], 1.0)
        else:
          double = layers.Upsample(True, taps, dtype, out_ch=h.shape[-1])
          h = layers.merge(double(out_pyramid), h, rescale=self.skip_rescale)
          out_pyramid = h
      if level != 0:
        h = up(h, temb)

    if self.progressive == 'output_skip':
      return out_pyramid
    return out(h, x.shape[-1], self.init_scale).astype(jnp.float32)

  def _noise_embedding(self, cond, act):
    """[B] to [B, 4 nf], in float32."""
    if self.embedding_type == 'fourier':
      project = layers.GaussianFourierProjection(self.nf, self.fourier_scale)
      features = project(jnp.log(cond.astype(jnp.float32)))
    else:
      features = layers.positional_embedding(cond, self.nf)
    return layers.embed_noise(features, 4 * self.nf, act)
