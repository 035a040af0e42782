"""Tests of the table of data sets, and of the section `data`."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from data import datasets, pixels
from tests.data.shared import config


def test_digits():
  c = config('digits', num_channels=1)
  train, test = datasets.load(c, 'train'), datasets.load(c, 'test')
  assert (len(train), len(test)) == (1500, 297) and train.num_classes == 10
  images = train.fetch(np.arange(1500))
  assert images.shape == (1500, 8, 8, 1) and images.max() == 255
  assert len(np.unique(images)) == 17
  assert np.bincount(train.batch(np.arange(1500))['label']).min() > 130
  assert np.bincount(test.batch(np.arange(297))['label']).min() > 15
  assert train.fingerprint == datasets.load(c, 'train').fingerprint
  assert train.fingerprint != test.fingerprint
  both = np.concatenate([images, test.fetch(np.arange(297))])
  from sklearn.datasets import load_digits

  assert abs(both.mean() - load_digits().images.mean() * 255 / 16) < 0.1
  large = datasets.load(config('digits', '', 32, 1), 'test')
  assert large.fetch(np.arange(5)).shape == (5, 32, 32, 1)


def test_load_refuses_what_it_does_not_know():
  with pytest.raises(ValueError, match="'CIFAR10': did you mean 'cifar10'"):
    datasets.load(config('CIFAR10'), 'train')
  with pytest.raises(ValueError, match="'imagenet': use one of cifar10, svhn"):
    datasets.load(config('imagenet'), 'train')
  with pytest.raises(ValueError, match="unknown split 'valid'"):
    datasets.load(config('digits', num_channels=1), 'valid')
  with pytest.raises(ValueError, match='num_channels 2 is not 1, 3 or 4'):
    datasets.load(config('digits', num_channels=2), 'train')
  with pytest.raises(ValueError, match='1 channels .* data.num_channels is 3'):
    datasets.load(config('digits'), 'train')


@pytest.mark.parametrize('dataset', ['folder', 'ffhq', 'npz', 'cifar10'])
def test_a_wrong_path_is_one_clear_line(dataset, tmp_path):
  with pytest.raises(FileNotFoundError, match='none does not exist; it should'):
    datasets.load(config(dataset, tmp_path / 'none'), 'train')
  if dataset != 'cifar10':
    with pytest.raises(ValueError, match=f'{dataset}: set data.path to an? '):
      datasets.load(config(dataset), 'train')


def test_fingerprints_never_change():
  """Files of statistics are found by the fingerprint of their data set."""
  of = lambda c, split: datasets.load(c, split).fingerprint
  grey = config('digits', num_channels=1)
  assert of(grey, 'train') == '6189fb130c18d865'
  assert of(grey, 'test') == '93d3e299cee82393'
  rings = datasets.Data(dataset='toy/rings', shape=(2,))
  assert of(rings, 'test') == '14bfd195025461fa'


def test_user_images(tmp_path):
  """All images are read in the order of their names, without classes."""
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
  np.savez(tmp_path / 'a.npz', arr_0=images)
  for i, image in enumerate(images):
    Image.fromarray(image).save(tmp_path / f'{i}.png')
  section = datasets.Data(dataset='digits', image_size=8)
  for path in (tmp_path / 'a.npz', tmp_path):
    found = datasets.user_images(section, path)
    assert (len(found), found.num_classes) == (3, 0)
    np.testing.assert_array_equal(found.fetch(range(3)), images)
  changed = images.copy()
  changed[2, 4, 5, 0] ^= 1
  before = datasets.user_images(section, tmp_path / 'a.npz').fingerprint
  np.savez(tmp_path / 'a.npz', arr_0=changed)
  assert datasets.user_images(section, tmp_path / 'a.npz').fingerprint != before
  with pytest.raises(FileNotFoundError, match='none is neither an .npz nor a'):
    datasets.user_images(section, tmp_path / 'none')
  larger = dataclasses.replace(section, image_size=16)
  for path in (tmp_path / 'a.npz', tmp_path):
    with pytest.raises(ValueError, match='is 8x8, but data.image_size is 16'):
      datasets.user_images(larger, path)


def test_user_images_of_another_size(tmp_path):
  """They are cropped and resized where scores do not depend on it."""
  image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  np.save(tmp_path / 'a.npy', image[None])
  (tmp_path / 'photos').mkdir()
  Image.fromarray(image).save(tmp_path / 'photos' / 'a.png')
  section = datasets.Data(dataset='digits', image_size=8)
  wanted = pixels.fit_image(Image.fromarray(image), size=8, channels=3)
  for path in (tmp_path / 'a.npy', tmp_path / 'photos'):
    found = datasets.user_images(section, path, key='images', exact=False)
    np.testing.assert_array_equal(found.fetch([0])[0], wanted)
    with pytest.raises(ValueError, match='is 20x30, but data.image_size is 8'):
      datasets.user_images(section, path)
  with pytest.raises(FileNotFoundError, match='^images .*none is neither an '):
    datasets.user_images(section, tmp_path / 'none', key='images')


# --- The section ---


def test_defaults_of_the_section():
  """Those of the paper's CIFAR-10 under a variance exploding process."""
  assert dataclasses.asdict(datasets.Data()) == {
    'dataset': 'cifar10',
    'path': '',
    'image_size': 32,
    'num_channels': 3,
    'background': 'white',
    'shape': (),
    'mean': (),
    'std': (),
    'condition_shape': (),
    'condition_mean': (),
    'condition_std': (),
    'random_flip': True,
    'uniform_dequantization': False,
    'centered': False,
    'on_device': False,
    'augment': 0.0,
  }


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'dataset': 'cifar'},
      "dataset='cifar' is unknown: did you mean 'cifar10'",
    ),
    ({'path': None}, 'path=None is not of type str'),
    ({'image_size': 0}, r'image_size=0 is not in \[1, 10000\]'),
    ({'image_size': 32.0}, 'image_size=32.0 is not of type int'),
    ({'num_channels': 2}, 'num_channels=2 is unknown: use one of 1, 3, 4'),
    (
      {'background': 'whit'},
      "background='whit' is unknown: did you mean 'white'",
    ),
    ({'shape': (-1,)}, r'shape=\(-1,\) is not in \[1, 1e7\]'),
    ({'centered': 1}, 'centered=1 is not of type bool'),
    ({'dataset': 'toy/rings'}, r'needs data.shape=\(2,\), data.centered=False'),
  ],
)
def test_values_of_the_section_are_checked(changes, message):
  with pytest.raises(ValueError, match=message):
    datasets.Data(**changes)
