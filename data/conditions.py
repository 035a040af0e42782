"""Conditions: arrays [N, ...] that belong to the examples of a data set.

The model sees (c - mean) / std, with one mean and one standard deviation for
each channel (the last axis), or one for all. They are keys of the config, so
that a run keeps them. Conditions that are 8-bit images are seen in [-1, 1], as
networks see images; others have those of the training data.
"""

import numpy as np

from runtime.files import load_arrays

# Mean and deviation of 8-bit images, which map them to [-1, 1].
EIGHT_BIT = 127.5
# Values that are measured at once.
BLOCK = 2**23


def checked(array, where, size=None):
  """Return an array of conditions as [N, ..., C]; numbers [N] become [N, 1].

  Args:
    array: uint8, or whatever float32 can hold.
    where: its name, for errors.
    size: N; None for any.

  Returns:
    uint8 if the array is, else float32.

  Raises:
    ValueError: it has another length, or values that are no finite numbers.
  """
  if array.ndim == 1:
    array = array[:, None]
  if array.dtype.kind not in 'biuf':
    raise ValueError(f'{where} is {array.dtype}: store floats or integers')
  if not array.ndim or 0 in array.shape:
    raise ValueError(f'{where} has shape {array.shape}: it holds no condition')
  if size not in (None, len(array)):
    raise ValueError(
      f'{where} has {len(array)} conditions for {size} examples: store one for '
      'each, in the same order'
    )
  if array.dtype == np.uint8:
    return array
  with np.errstate(over='ignore'):
    array = array.astype(np.float32)
  bad = ~np.isfinite(array).reshape(len(array), -1).all(1)
  if bad.any():
    raise ValueError(
      f'{where} has values that are not finite in float32, first in condition '
      f'{np.argmax(bad)}: remove such examples, or fill the gaps'
    )
  return array


def check_present(dataset):
  """Raise ValueError if a Dataset has no conditions."""
  if 'condition' not in dataset.more(np.arange(1)):
    raise ValueError(
      f'config.model.condition needs conditions, and data.dataset='
      f'{dataset.name!r} has none for this split: store condition_train and '
      "condition_test beside x_train and x_test, and use data.dataset='npz' or "
      "'arrays'"
    )


def measure(dataset, data_shape):
  """Return what a config keeps of the conditions of a training set.

  Args:
    dataset: a `batches.Dataset` with conditions.
    data_shape: shape of an example of the data.

  Returns:
    {'condition_shape', 'condition_mean', 'condition_std'}: tuples.

  Raises:
    ValueError: there are no conditions, or a channel has one value only.
  """
  check_present(dataset)
  first = dataset.more(np.arange(1))['condition']
  shape = first.shape[1:]
  if first.dtype == np.uint8 and len(shape) == len(data_shape) > 1:
    mean, std = (EIGHT_BIT,), (EIGHT_BIT,)
  else:
    mean, std = _moments(dataset, max(1, BLOCK // first.size))
  return {
    'condition_shape': shape,
    'condition_mean': mean,
    'condition_std': std,
  }


def _moments(dataset, step):
  """Return mean and standard deviation of each channel, `step` rows a time."""

  def average(function):
    total = 0.0
    for start in range(0, len(dataset), step):
      rows = np.arange(start, min(start + step, len(dataset)))
      c = np.float64(dataset.more(rows)['condition'])
      total += function(c.reshape(len(rows), -1, c.shape[-1])).mean(1).sum(0)
    return total / len(dataset)

  mean = average(lambda c: c)
  std = np.sqrt(average(lambda c: (c - mean) ** 2))
  # Rounding leaves a little of a constant.
  constant = std <= 1e-6 * np.abs(mean)
  if constant.any():
    channel = int(np.argmax(constant))
    raise ValueError(
      f'channel {channel} of the training conditions does not vary (it is '
      f'{mean[channel]:g} everywhere): remove it, or set config.data.'
      'condition_mean and config.data.condition_std'
    )
  return tuple(mean.tolist()), tuple(std.tolist())


def fitted(array, config, where, count=None):
  """Return user-supplied conditions [N, ...], float32, for a model.

  Args:
    array: conditions in units of the training data: [N, ...], or one for all.
    config: section `data` of the model's config.
    where: what they are called in errors.
    count: N; None for any, if the array is no single condition.

  Raises:
    ValueError: they have another shape, length or type, or are not finite.
  """
  array, shape = np.asarray(array), tuple(config.condition_shape)
  if count and array.shape == shape:
    array = np.broadcast_to(array, (count, *shape))
  if array.ndim:
    array = checked(array, where, count)
  if array.shape[1:] != shape:
    raise ValueError(
      f'{where} has shape {array.shape}, but the model was trained with '
      f'conditions of shape {shape}: use an array [N, '
      f'{", ".join(map(str, shape))}].'
    )
  if set(config.condition_mean) == {EIGHT_BIT} and (
    np.any(array % 1) or array.min() < 0 or array.max() > 255
  ):
    raise ValueError(
      f'{where} is in [{array.min():g}, {array.max():g}], but the model was '
      'trained with 8-bit conditions: use whole numbers from 0 to 255.'
    )
  return np.asarray(array, np.float32)


def read(path, config):
  """Return the conditions [N, ...], float32, of a file for a model.

  The file is an .npy, or an .npz with an array `condition` (that of
  `--mode sample`), `condition_test`, or a single one.

  Args:
    path: of the file.
    config: section `data` of the model's config.

  Raises:
    FileNotFoundError, ValueError: there is no such file, or it cannot be used.
  """
  where = f'config.control.condition={path!r}'
  found = load_arrays(path)
  if isinstance(found, dict):
    names = [k for k in ('condition', 'condition_test') if k in found]
    names = names or [*found]
    if not names or (len(found) > 1 and not names[0].startswith('condition')):
      raise ValueError(f'{where} has no array condition, but {sorted(found)}.')
    found = found[names[0]]
  return fitted(found, config, where)
