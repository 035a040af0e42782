"""Resampling of data by a factor of two with a short FIR filter.

Aliasing-free resampling (Zhang 2019, "Making convolutional networks
shift-invariant again") as StyleGAN2 does it (Karras et al. 2020, Section 4)
and NCSN++ after it (Song et al. 2021, Appendix H). Data are [B, *space, C] with
one to three axes of space. The filter is the outer product of `taps` with
itself over these axes, normalised to sum to one; outside the data there are
zeros. The taps (1, 3, 3, 1) are the paper's; the taps (1, 1) give plain
resampling, that is nearest neighbours and means of neighbours.

Each axis is filtered in its polyphase form, one weighted slice of the input per
tap, which saves the multiplications by inserted zeros.
"""

import jax
import jax.numpy as jnp


def _axes(x):
  """Return the axes of space of x [B, *space, C]."""
  return range(1, x.ndim - 1)


def upsample(x, taps):
  """Double the axes of space of x [B, *space, C], keeping the mean."""
  return _upsample(x, taps, tail=0)


def downsample(x, taps):
  """Halve the axes of space of x [B, *space, C], keeping the mean."""
  for axis in _axes(x):
    x = _downsample_axis(x, taps, axis=axis)
  return x


def upsample_conv(x, kernel, taps):
  """Upsample the data with their surroundings, and convolve: [B, *2 space, O].

  Args:
    x: [B, *space, I], surrounded by zeros.
    kernel: [K, ..., I, O] with K odd, for each axis of space.
    taps: the filter.
  """
  # Beyond the border the convolution reads the tail of the filter, not zeros.
  tail = kernel.shape[0] // 2
  return _valid_conv(_upsample(x, taps, tail=tail), kernel, stride=1)


def downsample_conv(x, kernel, taps):
  """Filter, then convolve at every second place: [B, *space / 2, O].

  Args:
    x: [B, *space, I], surrounded by zeros; axes of space of even size.
    kernel: [K, ..., I, O] with K odd, for each axis of space.
    taps: the filter.
  """
  padding = len(taps) - 2 + kernel.shape[0] - 1
  for axis in _axes(x):
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
  """Double the axes of space, with `tail` more values beyond each border."""

  def phases(y, axis):
    """Return y with an axis of size 2 behind each from `axis` on."""
    if axis == x.ndim - 1:
      return y
    both = _phases(y, taps, axis=axis, tail=tail)
    return jnp.stack([phases(y, axis + 1) for y in both], axis=axis + 1)

  y = phases(x, 1)  # Of images [B, H, 2, W, 2, C].
  space = (2 * size for size in y.shape[1:-1:2])
  return y.reshape(len(x), *space, x.shape[-1])


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
  axes = 'DHW'[5 - x.ndim :]
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride,) * len(axes),
    padding='VALID',
    dimension_numbers=(f'N{axes}C', f'{axes}IO', f'N{axes}C'),
  )
