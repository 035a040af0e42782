"""Helpers of the tests of data."""

import types

import numpy as np

from data import sources


def config(dataset, path='', image_size=8, num_channels=3, background='white'):
  """Return a section `data` with what reading images needs."""
  return types.SimpleNamespace(
    dataset=dataset,
    path=str(path),
    image_size=image_size,
    num_channels=num_channels,
    background=background,
  )


def numbered(size, shape=(2, 2, 1)):
  """Return a dataset whose image i has the value i and the label i % 3."""
  images = np.arange(size, dtype=np.uint8)[:, None, None, None]
  return sources.in_memory(
    config('numbered', image_size=shape[0], num_channels=shape[2]),
    np.broadcast_to(images, (size, *shape)),
    np.arange(size) % 3,
    num_classes=3,
  )


def values(dataset, tolerance=0):
  """Return the grey value of every image of a dataset, and its label.

  Args:
    dataset: solid images.
    tolerance: how much the pixels of an image can differ, as those of JPEG.
  """
  batch = dataset.batch(np.arange(len(dataset)))
  spread = np.ptp(batch['image'].astype(int), axis=(1, 2, 3)).max()
  assert spread <= tolerance
  return [int(v) for v in batch['image'][:, 0, 0, 0]], list(batch['label'])
