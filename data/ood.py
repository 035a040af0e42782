"""Data sets from elsewhere, for out-of-distribution scores.

Sets of the table `SETS` are the test set, changed. Others are data sets of
`datasets.DATASETS` that need no path, and files or folders of the user.
"""

import pathlib
import types

import numpy as np

from data import batches, datasets, toy
from runtime import options

KEY = 'config.eval.ood'
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
      f'{KEY}=rotated is for square pictures and points in the plane, not for '
      f'data of shape {x.shape[1:]}.'
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


def _others(data):
  """Return the names of data sets of the same kind that need no path."""
  if tuple(data.shape) == (2,):
    names = set(toy.DISTRIBUTIONS)
  elif data.shape:
    names = set()
  else:
    names = set(datasets.DATASETS) - set(toy.DISTRIBUTIONS) - NEED_PATH
  return sorted(names - {data.dataset})


def _found(data, name, test_set):
  """Return the Dataset of a name or path, not yet changed if in `SETS`."""
  path, others = pathlib.Path(name).expanduser(), _others(data)
  if name in SETS:
    return test_set
  if name in others:
    plain = {'dataset': name, 'path': '', 'mean': (), 'std': ()}
    return datasets.load(types.SimpleNamespace(**{**data, **plain}), 'test')
  if not path.exists():
    hint = options.suggestion(name, [*SETS, *others])
    raise ValueError(f'{KEY}: {name!r} is neither a path nor a set: {hint}')
  if data.shape:
    x, _ = datasets.user_arrays(data, path, key=KEY)
    return batches.unlabelled(x, name)
  return datasets.user_images(data, path, key=KEY)


def load(data, chosen, test_set):
  """Return {name: Dataset} of all that is compared, without labels.

  They are 'train' and 'test' of the run's own data, and each of config.eval.ood
  by the last part of its path, or name.

  Args:
    data: section `data` of the config of the run.
    chosen: section `eval`.
    test_set: Dataset of test examples.

  Returns:
    Of each at most `chosen.ood_images` examples; {} if `chosen.ood` is empty.

  Raises:
    ValueError, FileNotFoundError: there is no such set, its examples have
      another shape or are too few, or two have one name.
  """
  if not chosen.ood:
    return {}
  found = {'train': (datasets.load(data, 'train'), None)}
  found['test'] = test_set, None
  for name in chosen.ood:
    short = pathlib.Path(name).stem
    if short in found:
      raise ValueError(
        f'{KEY}: results would have two sets called {short!r}; rename one '
        "('train' and 'test' are the run's own)."
      )
    found[short] = _found(data, name, test_set), SETS.get(name)
  sets = {}
  for short, (dataset, change) in found.items():
    if len(dataset) < FEWEST:
      raise ValueError(
        f'{KEY} needs at least {FEWEST} examples of each set, but {short!r} '
        f'has {len(dataset)}.'
      )
    x = batches.some_of(dataset, chosen.ood_images)
    if change:
      x = change(np.random.default_rng(0), x)
    sets[short] = batches.unlabelled(np.ascontiguousarray(x), short)
  return sets
