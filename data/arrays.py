"""Arrays of numbers as data: vectors, signals, images of any kind, volumes.

An example is [*space, C], with no to three spatial axes and C channels. The
model sees (x - mean) / std, with one mean and one standard deviation for each
channel: those of the training data, or given ones. They are keys of the config,
so that a run keeps them. A density of what the model sees becomes one of the
data with the determinant of this map: log p(x) = log p((x - mean) / std) minus
the sum of log std over the dimensions of an example.
"""

import dataclasses
import json
import math

import numpy as np

from data import sources
from data.batches import Dataset
from runtime.files import digest_all, write_json
from runtime.progress import Progress

# What examples are called, by their number of spatial axes.
KINDS = 'points', 'signals', 'images', 'volumes'
SHAPES = '[N, D], [N, L, C], [N, H, W, C] or [N, D, H, W, C]'
# float32 has to tell values apart that differ by a thousandth of std.
LARGEST_MEAN = 1e4  # In units of std.
BLOCK = 2**26  # Bytes that are measured at once.


def kind(shape):
  """Return what examples of a shape are called, such as 'signals'."""
  return KINDS[len(shape) - 1]


@dataclasses.dataclass(frozen=True)
class Scale:
  """The map from data to what the model sees, and back.

  Attributes:
    mean, std: numbers for each channel, or one for all; empty for no scaling.

  Example:
    >>> scale = Scale((1.0, 0.0), (2.0, 0.5))
    >>> scale(np.ones((1, 2))).tolist(), scale.undo(np.ones((1, 2))).tolist()
    ([[0.0, 2.0]], [[3.0, 0.5]])
  """

  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()

  def _along(self, x):
    """Return (mean, std) with as many axes as x."""
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (np.float32(v).reshape(shape) for v in (self.mean, self.std))

  def __call__(self, x):
    """Return data [..., C] as the model sees them."""
    if not self.std:
      return x
    mean, std = self._along(x)
    return (x - mean) / std

  def undo(self, x):
    """Return what the model sees, [..., C], in units of the data."""
    if not self.std:
      return x
    mean, std = self._along(x)
    return x * std + mean

  def log_volume(self, shape):
    """Return log |det d x / d model's x| for an example of a shape, in nats."""
    each = np.log(self.std).sum() * (shape[-1] / max(len(self.std), 1))
    return float(each * math.prod(shape[:-1]))


def check(config):
  """Raise ValueError for a section `data` that does not suit arrays."""
  if not config.centered or config.uniform_dequantization:
    raise ValueError(
      "data.dataset='arrays' is scaled by mean and deviation: set "
      'data.centered=True and data.uniform_dequantization=False.'
    )
  if (config.random_flip or config.augment) and len(config.shape) not in (0, 3):
    raise ValueError(
      f'data.random_flip and data.augment are for images, not for '
      f'{kind(config.shape)}: set data.random_flip=False and data.augment=0.'
    )
  if len(config.shape) > len(KINDS):
    raise ValueError(
      f'data.shape={config.shape} is not that of one of {SHAPES}'
    )
  for key in ('mean', 'std'):
    given, wanted = len(getattr(config, key)), config.shape[-1:]
    if wanted and given not in (0, 1, *wanted):
      raise ValueError(
        f'data.{key} has {given} numbers for {wanted[0]} channels: give one '
        'for each, or one for all.'
      )


# ------------------------------------------------------------------- reading


def _checked(array, where):
  """Return an array of examples; raise ValueError if it cannot be one."""
  if not 2 <= array.ndim <= 5 or 0 in array.shape[1:]:
    raise ValueError(f'{where} has shape {array.shape}, not {SHAPES}')
  if not len(array):
    raise ValueError(f'{where} holds no examples')
  if array.dtype.kind not in 'biuf':
    hint = ' with two channels for the parts' if array.dtype.kind == 'c' else ''
    raise ValueError(
      f'{where} is {array.dtype}: store floats or integers{hint}'
    )
  return array


def _measure(stored, labels):
  """Return fingerprint, mean and std of examples, in one pass over them.

  Args:
    stored: a `sources.Stored`.
    labels: int32 [n].

  Raises:
    ValueError: a value is not finite in float32.
  """
  count, mean, square = 0, 0.0, 0.0
  low, high = np.inf, -np.inf
  size, shape = stored.size, stored.x.shape[1:]

  def parts():
    nonlocal count, mean, square, low, high
    yield f'float32{(size, *shape)}'.encode()
    progress = Progress('checking data', size, kind(shape))
    step = max(1, BLOCK // (8 * math.prod(shape)))
    for start in range(0, size, step):
      some = np.arange(start, min(start + step, size))
      rows = stored.rows_of(some)
      x = stored.x[rows]
      with np.errstate(over='ignore'):
        seen = np.asarray(x, np.float32)
      bad = ~np.isfinite(seen).reshape(len(x), -1).all(1)
      if bad.any():
        first = rows[np.argmax(bad)]
        raise ValueError(
          f'{stored.where} has values that are not finite in float32, first in '
          f'example {first}: remove such examples, or fill the gaps'
        )
      yield seen.tobytes()
      flat = np.asarray(x, np.float64).reshape(-1, shape[-1])
      # Chan et al. 1979, as `features.statistics.Moments`.
      part, total = flat.mean(0), count + len(flat)
      square += ((flat - part) ** 2).sum(0)
      square += (part - mean) ** 2 * (count * len(flat) / total)
      mean, count = mean + (part - mean) * (len(flat) / total), total
      low, high = np.minimum(low, flat.min(0)), np.maximum(high, flat.max(0))
      progress(start + len(x))
    yield labels
    if stored.condition is not None:
      yield np.asarray(stored.condition[stored.rows_of(np.arange(size))])

  fingerprint = digest_all(parts())
  std = np.where(low == high, 0.0, np.sqrt(square / count))
  return {
    'fingerprint': fingerprint,
    'mean': mean.tolist(),
    'std': std.tolist(),
  }


def _facts(path, split, stored, labels):
  """Return what `_measure` does; the cache folder keeps it for a file."""
  marker = sources.marker_of([path], 'arrays', split)
  try:
    known = json.loads(marker.read_text())
    return {
      'fingerprint': known['fingerprint'] + '',
      **{key: [float(v) for v in known[key]] for key in ('mean', 'std')},
    }
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    found = _measure(stored, labels)
    write_json(marker, found)
    return found


def _stored(config, split):
  """Return (a `sources.Stored`, labels int32 [n], facts) of a split."""
  path = sources.existing_path(config, 'an .npz or .npy of arrays')
  stored = sources.stored(path, split, _checked, (*KINDS, 'arr_0'))
  shape, wanted = stored.x.shape[1:], tuple(config.shape)
  if wanted and wanted != shape:
    raise ValueError(
      f'{stored.where} has examples of shape {shape}, but config.data.shape is '
      f'{wanted}: they have to be of one shape'
    )
  labels = stored.labels[stored.rows_of(np.arange(stored.size))]
  labels = labels.astype(np.int32)
  return stored, labels, _facts(path, split, stored, labels)


def complete(config):
  """Return shape, mean and std of the training data, where they are not given.

  Args:
    config: section `data` of a config.

  Returns:
    {'shape', 'mean', 'std'}: tuples; those of the config that are not empty
    stay.

  Raises:
    FileNotFoundError, ValueError: the data cannot be used, or a channel cannot
      be scaled because it has one value only.
  """
  stored, _, facts = _stored(config, 'train')
  shape = stored.x.shape[1:]
  mean, std = facts['mean'], facts['std']
  for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
    if not s and not config.std:
      raise ValueError(
        f'channel {channel} of {stored.where} does not vary (it is {m:g} '
        'everywhere): remove it, or give data.mean and data.std'
      )
    if s and abs(m) > LARGEST_MEAN * s:
      raise ValueError(
        f'channel {channel} of {stored.where} has mean {m:g} and deviation '
        f'{s:g}, which float32 cannot tell apart: subtract a constant first'
      )
  found = {'shape': shape, 'mean': tuple(mean), 'std': tuple(std)}
  return {
    key: tuple(getattr(config, key)) or value for key, value in found.items()
  }


def arrays(config, split):
  """Return the arrays of an .npz or .npy file; see `sources.stored`.

  Files of more than `sources.MEMORY_LIMIT` bytes that are not compressed are
  read where they are needed, not into memory.
  """
  stored, labels, facts = _stored(config, split)

  def read(indices):
    x = stored.x[stored.rows_of(indices)]
    return np.asarray(x, np.float32), labels[indices]

  def more(indices):
    if stored.condition is None:
      return {}
    return {'condition': stored.condition[stored.rows_of(indices)]}

  notes = []
  if isinstance(stored.x, np.memmap):
    notes = [f'{stored.where} is read from the disk as it is needed.']
  return Dataset(
    name=config.dataset,
    size=stored.size,
    read=read,
    more=more,
    num_classes=stored.num_classes,
    fingerprint=facts['fingerprint'],
    notes=tuple(notes),
  )
