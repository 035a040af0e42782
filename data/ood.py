"""Data sets from elsewhere, for out-of-distribution scores.

Sets of the table `SETS` are the test set, changed. Others are data sets of
`datasets.DATASETS` that need no path, and files or folders of the user.
"""

import pathlib
import types

import numpy as np

from data import batches, datasets, toy
from data.batches import Dataset
from runtime import options
from runtime.files import digest

# With fewer examples, an AUROC says little.
FEWEST = 50
NEED_PATH = {'npz', 'arrays', 'folder', 'ffhq'}


def rotated(rng, x):
  """Return pictures turned by 90 degrees; points turned around their mean.

  Example:
    >>> rotated(None, np.float32([[1, 0], [-1, 0]])).tolist()
    [[0.0, 1.0], [0.0, -1.0]]
  """
  del rng
  if x.ndim == 4 and x.shape[1] == x.shape[2]:
    return np.rot90(x, axes=(1, 2))
  if x.shape[1:] != (2,):
    raise ValueError(
      'config.eval.ood=rotated is for square pictures and points in the plane, '
      f'not for data of shape {x.shape[1:]}.'
    )
  mean = x.mean(0)
  return (x - mean)[:, ::-1] * np.float32([-1, 1]) + mean


def noised(rng, x):
  """Return data with normal noise of half their standard deviation."""
  axes = None if x.dtype == np.uint8 else tuple(range(x.ndim - 1))
  noise = 0.5 * x.std(axes) * rng.standard_normal(x.shape)
  if x.dtype != np.uint8:
    return (x + noise).astype(np.float32)
  return np.clip(np.rint(x + noise), 0, 255).astype(np.uint8)


def inverted(rng, x):
  """Return negatives of images; other data mirrored at their mean.

  Example:
    >>> inverted(None, np.uint8([[[[0]], [[55]]]])).ravel().tolist()
    [255, 200]
  """
  del rng
  if x.dtype == np.uint8:
    return 255 - x
  return 2 * x.mean(tuple(range(x.ndim - 1))) - x


# change(numpy Generator, examples of the test set) -> examples.
SETS = {'rotated': rotated, 'noised': noised, 'inverted': inverted}


def some_of(dataset, count):
  """Return a Dataset of `count` examples, a fixed random subset, or of all.

  Raises:
    ValueError: there are fewer than `FEWEST`.
  """
  if len(dataset) < FEWEST:
    raise ValueError(
      f'config.eval.ood needs at least {FEWEST} examples of each set, but '
      f'{dataset.name} has {len(dataset)}.'
    )
  members = batches.permutation(len(dataset), 0, 0)[:count]
  return _held(dataset.name, dataset.fetch(np.sort(members)))


def _held(name, x):
  """Return a Dataset of arrays x without labels."""
  x, labels = np.ascontiguousarray(x), np.zeros(len(x), np.int32)
  return Dataset(
    name=name,
    size=len(x),
    read=lambda indices: (x[indices], labels[indices]),
    num_classes=0,
    fingerprint=digest(x),
  )


def _of_user(data, path):
  """Return the Dataset of a file or folder of the user."""
  key = 'config.eval.ood'
  if not data.shape:
    return datasets.user_images(data, path, key=key)
  return _held(str(path), datasets.user_arrays(data, path, key=key)[0])


def _others(data):
  """Return the names of data sets of the same kind that need no path."""
  if tuple(data.shape) == (2,):
    names = set(toy.DISTRIBUTIONS)
  elif data.shape:
    names = set()
  else:
    names = set(datasets.DATASETS) - set(toy.DISTRIBUTIONS) - NEED_PATH
  return sorted(names - {data.dataset})


def load(data, name, test_set, count):
  """Return a Dataset of at most `count` examples from elsewhere.

  Args:
    data: section `data` of the config of the run.
    name: of `SETS`, of a data set that needs no path, or a path.
    test_set: Dataset that sets of `SETS` are made of.
    count: number of examples.

  Raises:
    ValueError, FileNotFoundError: there is no such set, or its examples have
      another shape or are too few.
  """
  if name in SETS:
    some = some_of(test_set, count)
    x = some.fetch(np.arange(len(some)))
    return _held(name, SETS[name](np.random.default_rng(0), x))
  path, others = pathlib.Path(name).expanduser(), _others(data)
  if path.exists():
    return some_of(_of_user(data, path), count)
  if name in others:
    plain = {'dataset': name, 'path': '', 'mean': (), 'std': ()}
    section = types.SimpleNamespace(**{**data, **plain})
    return some_of(datasets.load(section, 'test'), count)
  hint = options.suggestion(name, [*SETS, *others])
  raise ValueError(
    f'config.eval.ood: {name!r} is neither a path nor another set: {hint}'
  )
