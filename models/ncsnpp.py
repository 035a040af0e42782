"""NCSN++ and DDPM++ (Song et al. 2021, Section 4.1 and Appendix H).

One U-Net with options: NCSN++ has FIR resampling, a residual input pyramid
and Fourier features of log sigma; DDPM++ has plain resampling, no pyramid and
sinusoidal features of time. The high-resolution models have image pyramids at
input and output in place of the residual one.
"""

import jax.numpy as jnp

from models import fields, layers, resampling
from models.unet import UNet
from runtime.options import option


class NCSNpp(UNet):
  """U-Net of residual blocks; the defaults are the paper's VE CIFAR-10 model.

  The output is not divided by sigma. `cond` is sigma with Fourier features,
  else steps in 0..999, integer or not.

  Example:
    >>> NCSNpp(nf=64, fir=False, embedding_type='positional').ch_mult
    (1, 2, 2, 2)
  """

  num_res_blocks: int = fields.num_res_blocks(4)
  centered: bool = fields.centered(False)
  fir: bool = option(
    True, 'Whether resampling filters, rather than repeats and averages.'
  )
  fir_kernel: tuple[int, ...] = option(
    (1, 3, 3, 1), 'Taps of the separable resampling filter.', '[1, 1000]'
  )
  skip_rescale: bool = option(
    True, 'Whether sums of two branches are divided by sqrt(2).'
  )
  resblock_type: str = option(
    'biggan',
    "Kind of residual blocks; those of 'biggan' also resample.",
    choices=('biggan', 'ddpm'),
  )
  progressive: str = option(
    'none',
    "Output pyramid: sums of images ('output_skip') or of features.",
    choices=('none', 'output_skip', 'residual'),
  )
  progressive_input: str = option(
    'residual',
    "Input pyramid: of images ('input_skip') or of features.",
    choices=('none', 'input_skip', 'residual'),
  )
  progressive_combine: str = option(
    'sum', "How 'input_skip' joins features.", choices=('sum', 'cat')
  )
  embedding_type: str = fields.embedding_type('fourier')
  init_scale: float = option(
    0.0, 'Variance scale of the last layer of each branch.', '[0, inf)'
  )
  fourier_scale: float = fields.fourier_scale(16.0)
  conv_size: int = option(
    3, 'Kernel size of the first and last convolutions.', '[1, 1000]'
  )

  @property
  def taps(self):
    """The resampling filter, or None for nearest neighbours and means."""
    return tuple(self.fir_kernel) if self.fir else None

  @property
  def _biggan(self):
    return self.resblock_type == 'biggan'

  def block_style(self):
    name = 'BigGANpp' if self._biggan else 'DDPMpp'
    return f'ResnetBlock{name}', {
      'taps': self.taps or (1, 1),
      'nin_shortcut': not self._biggan,
      **self.attention_style()[1],
    }

  def attention_style(self):
    return 'AttnBlockpp', {
      'init_scale': self.init_scale,
      'skip_rescale': self.skip_rescale,
    }

  def noise_features(self, cond):
    if self.embedding_type == 'positional':
      return super().noise_features(cond)
    project = layers.GaussianFourierProjection(self.nf, self.fourier_scale)
    return project(jnp.log(cond.astype(jnp.float32)))

  def halve(self, h, temb, block):
    if self._biggan:
      return block(resample=resampling.downsample)(h, temb)
    return super().halve(h, temb, block)

  def double(self, h, temb, block):
    if self._biggan:
      return block(resample=resampling.upsample)(h, temb)
    return super().double(h, temb, block)

  def join_input(self, pyramid, h):
    dtype = jnp.dtype(self.dtype)
    if self.progressive_input == 'input_skip':
      pyramid = layers.Downsample(False, self.taps, dtype)(pyramid)
      h = layers.Combine(self.progressive_combine, dtype)(pyramid, h)
    elif self.progressive_input == 'residual':
      halve = layers.Downsample(True, self.taps, dtype, out_ch=h.shape[-1])
      h = layers.merge(halve(pyramid), h, rescale=self.skip_rescale)
      pyramid = h
    return pyramid, h

  def join_output(self, pyramid, h, channels):
    dtype, lowest = jnp.dtype(self.dtype), pyramid is None
    if self.progressive == 'output_skip':
      if not lowest:
        pyramid = layers.Upsample(False, self.taps, dtype)(pyramid)
      image = self.head(h, channels, self.init_scale).astype(jnp.float32)
      pyramid = image if lowest else pyramid + image
    elif self.progressive == 'residual':
      if lowest:
        return self.head(h, h.shape[-1], 1.0), h
      double = layers.Upsample(True, self.taps, dtype, out_ch=h.shape[-1])
      h = layers.merge(double(pyramid), h, rescale=self.skip_rescale)
      pyramid = h
    return pyramid, h

  def finish(self, pyramid, h, channels):
    if self.progressive == 'output_skip':
      return pyramid
    return super().finish(pyramid, h, channels)
