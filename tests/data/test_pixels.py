"""Tests of pixel values: cropping, ranges, flips, rounding and distances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data import datasets, pixels
from tests.data.shared import config


def test_fit_image_crops_the_centre_and_antialiases():
  wide = np.zeros((8, 24, 3), np.uint8)
  wide[:, 8:16] = [10, 200, 30]  # the centre square
  wide[:, :8] = 255
  fit = pixels.fit_image(Image.fromarray(wide), size=8, channels=3)
  np.testing.assert_array_equal(fit, wide[:, 8:16])
  stripes = np.tile(np.array([0, 255], np.uint8), (32, 16))
  for size in (4, 8):
    fit = pixels.fit_image(Image.fromarray(stripes), size=size, channels=1)
    assert fit.shape == (size, size, 1)
    assert np.all(np.abs(fit[1:-1, 1:-1].astype(int) - 127.5) < 8)


def test_fit_image_bicubic_overshoot_does_not_wrap():
  edge = np.zeros((300, 300), np.uint8)
  edge[:, 150:] = 255
  fit = pixels.fit_image(Image.fromarray(edge), size=200, channels=1)
  row = fit[100, :, 0].astype(int)
  assert np.all(np.diff(row) >= 0) and row[0] == 0 and row[-1] == 255


def test_fit_image_agrees_with_a_float_resize():
  values = np.random.default_rng(0).integers(0, 256, (97, 61), np.uint8)
  fit = pixels.fit_image(Image.fromarray(values), size=32, channels=1)
  square = Image.fromarray(values[18:79].astype(np.float32))
  exact = square.resize((32, 32), Image.Resampling.BILINEAR)
  error = fit[..., 0] - np.clip(np.asarray(exact), 0, 255)
  assert np.abs(error).max() <= 1 and abs(error.mean()) < 0.05


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_fit_image_channels(channels):
  for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'):
    image = Image.new('RGB', (5, 9), 'white').convert(mode)
    fit = pixels.fit_image(image, size=4, channels=channels)
    assert fit.shape == (4, 4, channels) and fit.min() == 255


def test_preprocess_ranges():
  rng = jax.random.key(0)
  image = np.array([0, 128, 255], np.uint8).reshape(1, 1, 3, 1)
  image = np.tile(image, (64, 1, 1, 1))

  def run(**kwargs):
    options = {'random_flip': False, 'uniform_dequantization': False}
    fn = lambda rng, x: pixels.preprocess(rng, x, **(options | kwargs))
    x = jax.jit(fn)(rng, image)
    assert x.dtype == jnp.float32
    return np.asarray(x)

  exact = np.array([0, 128 / 255, 1])
  np.testing.assert_allclose(run(centered=False)[5, 0, :, 0], exact, atol=1e-6)
  np.testing.assert_allclose(
    run(centered=True)[5, 0, :, 0], 2 * exact - 1, atol=1e-6
  )
  noise = run(centered=False, uniform_dequantization=True) * 256 - image
  assert np.all(noise >= 0) and np.all(noise <= 1)
  assert abs(noise.mean() - 0.5) < 0.1 and noise.std() > 0.25
  x = np.linspace(0, 1, 5)
  for centered in (True, False):
    y = pixels.scaler(x, centered=centered)
    assert y.min() == (-1 if centered else 0) and y.max() == 1
    back = pixels.inverse_scaler(y, centered=centered)
    np.testing.assert_allclose(back, x)


def test_flips_are_seeded_and_mirror_left_to_right():
  image = np.zeros((200, 3, 4, 1), np.uint8)
  image[:, 0, 0] = 255
  options = {'uniform_dequantization': False, 'centered': False}
  run = lambda seed, flip: np.asarray(
    pixels.preprocess(jax.random.key(seed), image, random_flip=flip, **options)
  )
  x = run(0, True)
  np.testing.assert_array_equal(x, run(0, True))
  assert np.any(x != run(1, True))
  flipped = x[:, 0, 3, 0] == 1
  np.testing.assert_array_equal(flipped, x[:, 0, 0, 0] == 0)
  assert 70 < flipped.sum() < 130 and np.all(x[:, 1:] == 0)
  assert np.all(run(0, False)[:, 0, 0, 0] == 1)


def test_samples_round_half_up():
  x = np.array([-0.2, 0, 0.4 / 255, 0.5 / 255, 1.5 / 255, 254.6 / 255, 1.3])
  half_up = pixels.to_uint8(x)
  assert half_up.dtype == np.uint8
  assert list(half_up) == [0, 0, 0, 1, 2, 255, 255]
  truncated = pixels.to_uint8(x, rounding='truncate')
  assert list(truncated) == [0, 0, 0, 0, 1, 254, 255]
  levels = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(pixels.to_uint8(levels / 255), levels)
  with pytest.raises(ValueError, match='NaN'):
    pixels.to_uint8([0.0, np.nan])
  with pytest.raises(ValueError, match="rounding 'up' is not one of"):
    pixels.to_uint8(x, rounding='up')


def test_sigma_max_is_the_largest_distance():
  dataset = datasets.load(config('digits', num_channels=1), 'train')
  x = dataset.fetch(np.arange(1500)).reshape(1500, -1) / 255
  largest = max(np.linalg.norm(x - row, axis=1).max() for row in x)
  assert pixels.sigma_max(dataset) == pytest.approx(largest, rel=1e-5)
  assert pixels.sigma_max(dataset, num_images=20) < 0.99 * largest
