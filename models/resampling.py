"""Resampling of images by a factor of two with a short FIR filter.

Aliasing-free resampling (Zhang 2019, "Making convolutional networks
shift-invariant again") as StyleGAN2 does it (Karras et al. 2020, Section 4)
and NCSN++ after it (Song et al. 2021, Appendix H). The two-dimensional filter
is the outer product of `taps` with itself, normalised to sum to one; outside
the image there are zeros. The taps (1, 3, 3, 1) are the paper's; the taps
(1, 1) give plain resampling, that is nearest neighbours and 2x2 means.

Each axis is filtered in its polyphase form, one weighted slice of the input per
tap, which saves the multiplications by inserted zeros.
"""

import jax
import jax.numpy as jnp


def upsample(x, taps):
  """Double height and width of x [B, H, W, C], keeping the mean."""
  return _upsample(x, taps, tail=0)


def downsample(x, taps):
  """Halve height and width of x [B, H, W, C], keeping the mean."""
  return _downsample_axis(_downsample_axis(x, taps, axis=1), taps, axis=2)


def upsample_conv(x, kernel, taps):
  """Upsample the image with its surroundings, and convolve: [B, 2H, 2W, O].

  Args:
    x: [B, H, W, I], surrounded by zeros.
    kernel: [K, K, I, O] with K odd.
    taps: the filter.
  """
  # Beyond the border the convolution reads the tail of the filter, not zeros.
  tail = kernel.shape[0] // 2
  return _valid_conv(_upsample(x, taps, tail=tail), kernel, stride=1)


def downsample_conv(x, kernel, taps):
  """Filter, then convolve every second pixel: [B, H / 2, W / 2, O].

  Args:
    x: [B, H, W, I], surrounded by zeros; H and W even.
    kernel: [K, K, I, O] with K odd.
    taps: the filter.
  """
  padding = len(taps) - 2 + kernel.shape[0] - 1
  for axis in (1, 2):
    size = x.shape[axis] + kernel.shape[0] - 2
    x = _pad(x, axis, (padding + 1) // 2, padding // 2)
    x = sum(
      weight * jax.lax.slice_in_dim(x, i, i + size, axis=axis)
      for i, weight in enumerate(_normalised(taps))
    )
  return _valid_conv(x, kernel, stride=2)


def _normalised(taps):
  """Return the weights of a correlation: the filter reversed, of sum one."""
  return [tap / sum(taps) for tap in reversed(taps)]


def _pad(x, axis, before, after):
  """Add rows of zeros along one axis; negative numbers crop."""
  config = [(0, 0, 0)] * x.ndim
  config[axis] = (before, after, 0)
  return jax.lax.pad(x, jnp.zeros((), x.dtype), config)


def _upsample(x, taps, *, tail):
  """Double height and width, with `tail` more pixels beyond each border."""
  rows = [
    jnp.stack(_phases(y, taps, axis=2, tail=tail), axis=3)
    for y in _phases(x, taps, axis=1, tail=tail)
  ]
  y = jnp.stack(rows, axis=2)  # [B, H, 2, W, 2, C]
  batch, height, _, width, _, channels = y.shape
  return y.reshape(batch, 2 * height, 2 * width, channels)


def _phases(x, taps, *, axis, tail):
  """Return the even and the odd pixels of x upsampled along one axis."""
  before = (len(taps) - 1) // 2 + 1 + tail
  # Output 2i + phase is the sum of w[j] x[(2i + phase + j - before) / 2] over
  # those j that give an integer index.
  phases = []
  for phase in (0, 1):
    total = 0
    for j, weight in enumerate(_normalised(taps)):
      shift, odd = divmod(phase + j - before, 2)
      if not odd:
        total = total + 2 * weight * _pad(x, axis, -shift, tail + shift)
    phases.append(total)
  return phases


def _downsample_axis(x, taps, *, axis):
  """Halve one axis."""
  size = x.shape[axis]
  padding = len(taps) - 2
  padded = _pad(x, axis, (padding + 1) // 2, padding // 2)
  return sum(
    weight * jax.lax.slice_in_dim(padded, i, i + size - 1, stride=2, axis=axis)
    for i, weight in enumerate(_normalised(taps))
  )


def _valid_conv(x, kernel, *, stride):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding='VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
