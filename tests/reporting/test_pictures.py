"""Pictures of arrays: what they show can be told from their pixels."""

import numpy as np
import pytest
from PIL import Image

from reporting import pictures


def grey(path):
  return np.asarray(Image.open(path).convert('L'))


@pytest.mark.parametrize(
  'shape', [(1,), (2,), (3,), (9, 1), (9, 3), (4, 5, 2), (3, 4, 5, 1)]
)
def test_samples_of_any_shape(tmp_path, shape):
  x = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
  pictures.save_samples(tmp_path / 'a.png', x)
  picture = grey(tmp_path / 'a.png')
  assert picture.min() < 160 and picture.max() == 255


@pytest.mark.parametrize('shape', [(1,), (3,), (9, 2), (4, 5, 2), (3, 4, 5, 1)])
def test_trajectories_of_any_shape(tmp_path, shape):
  """The strip has a column for each state, and the film a frame."""
  x = np.random.default_rng(0).normal(size=(3, 5, *shape)).astype(np.float32)
  pictures.save_trajectory(tmp_path / 'a.png', x)
  height, width = grey(tmp_path / 'a.png').shape
  rows = 5 if len(shape) > 2 else 1
  across, down = shape[-2] if rows > 1 else 1, shape[-3] if rows > 1 else 1
  assert abs(width / height / (3 * across / (rows * down)) - 1) < 0.05
  with Image.open(tmp_path / 'a.gif') as film:
    assert film.n_frames == 3


def test_each_channel_has_its_own_grey_levels(tmp_path):
  """Channels of different units are seen alike, and beside each other."""
  ramp = np.linspace(0, 1, 64).reshape(1, 8, 8)
  images = np.stack([ramp, 1e6 * ramp, 1 - ramp], -1)
  levels = pictures.as_grey(images)
  np.testing.assert_array_equal(levels[..., 0], levels[..., 1])
  np.testing.assert_allclose(levels[..., 0], 255.0 - levels[..., 2], atol=1)
  assert levels.min() == 0 and levels.max() == 255
  pictures.save_samples(tmp_path / 'a.png', images)
  picture = grey(tmp_path / 'a.png')
  tiles = picture[:, : len(picture)], picture[:, -len(picture) :]
  assert tiles[0][0, 0] == 0 and tiles[1][0, 0] == 255


def test_histograms_and_spectra_differ_where_the_data_do(tmp_path):
  x = np.random.default_rng(0).normal(size=(50, 8, 2))
  spectrum = np.arange(5) / 8, np.ones((5, 2))
  for name, other in (('same', x), ('other', x + 3)):
    pictures.save_histograms(tmp_path / f'{name}.png', other, x)
  assert (grey(tmp_path / 'same.png') != grey(tmp_path / 'other.png')).any()
  pictures.save_spectra(tmp_path / 's.png', spectrum, spectrum)
  assert grey(tmp_path / 's.png').min() < 160
