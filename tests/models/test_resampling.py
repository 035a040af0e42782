"""Compare FIR resampling with its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import resampling


def image(seed, size):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(2, size, size, 3)), jnp.float32)


def upfirdn(x, taps, *, up, down, pad):
  """Insert zeros, pad, convolve and keep every down-th, along each axis."""
  filter_1d = np.asarray(taps, np.float64) / np.sum(taps)

  def along(row):
    stuffed = np.zeros(len(row) * up)
    stuffed[::up] = row * up
    return np.convolve(np.pad(stuffed, pad), filter_1d, 'valid')[::down]

  for axis in range(x.ndim):
    x = np.apply_along_axis(along, axis, x)
  return x


def correlate(x, kernel, *, stride):
  """Return the valid cross-correlation with a kernel of as many axes."""
  windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape)
  every = (slice(None, None, stride),) * x.ndim
  return np.tensordot(windows, kernel, x.ndim)[every]


@pytest.mark.parametrize('space', [(6, 8), (8,), (2, 6, 4)])
@pytest.mark.parametrize(
  'taps', [(1, 3, 3, 1), (1, 1), (1, 2, 3, 4), (1, 2, 1)]
)
def test_resampling_is_upfirdn(taps, space):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=space), rng.normal(size=(3,) * len(space))
  image = jnp.asarray(x, jnp.float32)[None, ..., None]
  weight = jnp.asarray(kernel, jnp.float32)[..., None, None]
  extra = len(taps) - 2
  after = extra // 2
  before = extra - after

  @jax.jit
  def resample(image, weight):
    return (
      resampling.upsample(image, taps),
      resampling.downsample(image, taps),
      resampling.upsample_conv(image, weight, taps),
      resampling.downsample_conv(image, weight, taps),
    )

  wide_up = upfirdn(x, taps, up=2, down=1, pad=(before + 2, after + 1))
  wide_down = upfirdn(x, taps, up=1, down=1, pad=(before + 1, after + 1))
  expected = (
    upfirdn(x, taps, up=2, down=1, pad=(before + 1, after)),
    upfirdn(x, taps, up=1, down=2, pad=(before, after)),
    correlate(wide_up, kernel, stride=1),
    correlate(wide_down, kernel, stride=2),
  )
  for actual, value in zip(resample(image, weight), expected, strict=True):
    np.testing.assert_allclose(actual[0, ..., 0], value, atol=5e-6)


def test_upsampling_is_the_adjoint_of_downsampling():
  x, y = image(0, 8), image(1, 16)
  up = resampling.upsample(x, (1, 3, 3, 1))
  down = resampling.downsample(y, (1, 3, 3, 1))
  np.testing.assert_allclose((up * y).sum(), 4 * (x * down).sum(), rtol=1e-5)


def test_plain_resampling_repeats_and_averages():
  x = image(0, 4)
  repeated = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
  np.testing.assert_allclose(resampling.upsample(x, (1, 1)), repeated)
  np.testing.assert_allclose(resampling.downsample(repeated, (1, 1)), x)
