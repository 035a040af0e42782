"""Reading images from archives, arrays and folders.

`datasets` says what each data set consists of; this module reads it. All images
are uint8 [N, H, W, C]. Small sets of images stay in memory; images of others
are decoded in threads when they are read. PIL is imported at its first use.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import stat

import numpy as np

from data import conditions
from data.batches import Dataset, permutation
from data.pixels import fit_array, fit_image, uint8_images
from runtime.files import (
  Bounded,
  atomic,
  cache_dir,
  digest,
  digest_all,
  load_arrays,
  write_json,
)
from runtime.progress import Progress, say

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')
# Those of the suffixes, and no others: PIL runs a program to read PostScript.
_FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP')
ARRAY_SUFFIXES = ('.npz', '.npy')
MOST_CLASSES = 10_000_000  # The limit of config.model.num_labels.
# Decoded images stay in memory up to this number of bytes.
MEMORY_LIMIT = 2**31


def existing_path(config, what):
  """Return the path of a data set, which must exist.

  Args:
    config: section `data` of the config.
    what: what the path should lead to, for errors.

  Raises:
    ValueError: data.path is empty.
    FileNotFoundError: nothing exists at data.path.
  """
  if not config.path:
    raise ValueError(f'{config.dataset}: set data.path to {what}')
  path = pathlib.Path(config.path)
  if not path.exists():
    raise FileNotFoundError(
      f'{config.dataset}: data.path {path} does not exist; it should be {what}'
    )
  return path


def split_indices(size, split, num_test=None):
  """Return the sorted indices of a split of images that come without splits.

  Args:
    size: number of images.
    split: 'train', 'test', or 'all' for all indices.
    num_test: size of the test set, which is a fixed random subset; None for a
      tenth of the images.

  Raises:
    ValueError: there are fewer than two images to split.
  """
  if split == 'all':
    return np.arange(size)
  if size < 2:
    raise ValueError(
      'data.path has one image, which cannot be split into train and test: '
      'add more'
    )
  num_test = num_test or max(1, size // 10)
  order = permutation(size, 0, 0)
  return np.sort(order[:num_test] if split == 'test' else order[num_test:])


# --- Data sets in memory, and decoded when they are read ---


@functools.cache
def decoding_threads():
  """Return the threads that decode images, one for each processor."""
  return concurrent.futures.ThreadPoolExecutor(
    max_workers=os.cpu_count(), thread_name_prefix='decode'
  )


class DecodedImages:
  """Read images by decoding them in threads, only once if they fit in memory.

  It is the `read` of a `batches.Dataset`.
  """

  def __init__(self, decode, size, shape):
    """Reserve memory.

    Args:
      decode: function of an index that returns an image, uint8 of `shape`, and
        its label.
      size: number of images.
      shape: (H, W, C).
    """
    self.decode = decode
    self.keep = size * math.prod(shape) <= MEMORY_LIMIT
    if self.keep:
      self.images = np.empty((size, *shape), np.uint8)
      self.labels = np.zeros(size, np.int32)
      self.done = np.zeros(size, bool)

  def __call__(self, indices):
    """Return images, uint8 [n, H, W, C], and labels, int32 [n]."""
    pool = decoding_threads()
    if not self.keep:
      images, labels = zip(*pool.map(self.decode, indices), strict=True)
      return np.stack(images), np.array(labels, np.int32)
    missing = np.unique(indices[~self.done[indices]])
    decoded = pool.map(self.decode, missing)
    for i, (image, label) in zip(missing, decoded, strict=True):
      self.images[i], self.labels[i] = image, label
      # Set last, because other threads read the rows that are done.
      self.done[i] = True
    return self.images[indices], self.labels[indices]


def in_memory(config, images, labels, num_classes, classes=(), condition=None):
  """Return a Dataset of arrays.

  Args:
    config: section `data` of the config.
    images: uint8 [N, H, W, C]; they are resized to config.image_size.
    labels: integers [N].
    num_classes: number of classes, or 0.
    classes: their names, if they have any.
    condition: conditions [N, ...], or None.
  """
  images = fit_array(
    images,
    size=config.image_size,
    channels=config.num_channels,
    where=f'{config.dataset} {config.path}'.strip(),
  )
  labels = labels.astype(np.int32)
  given = {} if condition is None else {'condition': condition}
  return Dataset(
    name=config.dataset,
    size=len(images),
    read=lambda indices: (images[indices], labels[indices]),
    num_classes=num_classes,
    fingerprint=digest(images, labels, *given.values()),
    classes=classes,
    more=lambda indices: {k: v[indices] for k, v in given.items()},
  )


def fit_of(config):
  """Return what `pixels.fit_image` is told by a section `data`."""
  return {
    'size': config.image_size,
    'channels': config.num_channels,
    'background': config.background,
  }


def decoded(
  config,
  decode,
  size,
  *,
  files,
  choice,
  num_classes=0,
  classes=(),
  survey=None,
  keep=False,
):
  """Return a Dataset whose images are decoded when they are read.

  All images are decoded once to find its fingerprint, which is that of the same
  images in memory. So a damaged file stops a run early. The cache folder keeps
  the fingerprint for as long as no file changes. If it has the decoded images
  of this fingerprint as well, they are read in place of the files.

  Args:
    config: section `data` of the config.
    decode: function (index, **fit) -> (image, label), where `fit` holds the
      arguments of `pixels.fit_image`.
    size: number of images.
    files: paths of all files that the images are in.
    choice: what else the images and labels follow from; its `repr` counts.
    num_classes: number of classes, or 0.
    classes: their names, if they have any.
    survey: function that returns notes about the files; called when they are
      decoded.
    keep: whether decoded images are written into the cache folder.

  Raises:
    ValueError: an image is damaged or has more than 8 bits.
  """
  fit = fit_of(config)
  shape = (config.image_size, config.image_size, config.num_channels)
  read = DecodedImages(functools.partial(decode, **fit), size, shape)
  marker = marker_of(files, fit, choice)
  known = _verified(marker)
  if known is None or (
    keep and not kept_at(config, known['fingerprint']).exists()
  ):
    measure = functools.partial(_keep, config) if keep else _fingerprint
    known = {
      'fingerprint': measure(read, size, shape),
      'notes': known['notes'] if known else survey() if survey else [],
    }
    write_json(marker, known)
  notes, folder = known['notes'], kept_at(config, known['fingerprint'])
  if folder.exists():
    read = _kept(folder, known['fingerprint'], size, shape)
    notes = [*notes, f'Decoded images are read from {folder}.']
  return Dataset(
    name=config.dataset,
    size=size,
    read=read,
    num_classes=num_classes,
    fingerprint=known['fingerprint'],
    classes=tuple(classes),
    notes=tuple(notes),
  )


def marker_of(files, *more):
  """Return the path of a marker, another one when one of the files changes.

  The resolved path and inode tell files apart whose names, sizes and times are
  equal; the time of the last change of status cannot be set by copying.
  """
  import PIL

  def facts(path):
    s = os.stat(path)
    if not stat.S_ISREG(s.st_mode):  # To read a pipe can take forever.
      raise ValueError(f'{path} is no regular file: remove it')
    return s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns

  stats = [(os.path.realpath(path), *facts(path)) for path in files]
  # Another version of PIL can decode or resize to other pixels.
  key = digest(stats, PIL.__version__, *more)
  return cache_dir() / 'verified' / f'{key}.json'


def _verified(path):
  """Return what the cache folder knows of files, or None."""
  try:
    known = json.loads(path.read_text())
    return {
      'fingerprint': known['fingerprint'] + '',
      'notes': [note + '' for note in known['notes']],
    }
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return None


def _fingerprint(read, size, shape, file=None):
  """Return the digest of all images and labels, as `in_memory` does.

  Args:
    read: function of indices that returns images and labels.
    size: number of images.
    shape: (H, W, C).
    file: binary file that the images are written to; None for none.
  """
  labels = []

  def parts():
    yield f'uint8{(size, *shape)}'.encode()
    progress = Progress('checking images', size, 'images')
    # A part has at most 256 MiB, or 16 images.
    step = min(1024, max(16, 2**28 // math.prod(shape)))
    for start in range(0, size, step):
      images, some = read(np.arange(start, min(start + step, size)))
      labels.append(some)
      yield images.tobytes()
      if file:
        file.write(images.tobytes())
      progress(start + len(images))
    yield np.concatenate(labels)

  return digest_all(parts())


# --- Decoded images in the cache folder ---


def kept_at(config, fingerprint):
  """Return the folder that decoded images of a fingerprint are kept in."""
  name = config.dataset.replace('/', '_')
  return cache_dir() / f'decoded-{name}-{config.image_size}-{fingerprint}'


def _keep(config, read, size, shape):
  """Decode all images into the cache folder; return their fingerprint.

  The folder has images.npy, uint8 [N, H, W, C], and labels.npy, int32 [N]. Its
  name has the fingerprint, and nothing has this name before all is written.

  Raises:
    OSError: the disk has no room for it.
  """
  temporary = kept_at(config, f'of-{os.getpid()}')
  needed, labels = size * (math.prod(shape) + 4), np.empty(size, np.int32)
  cache_dir().mkdir(parents=True, exist_ok=True)
  if (free := shutil.disk_usage(cache_dir()).free) < needed:
    raise OSError(
      f'{config.dataset} has {needed / 2**30:.1f} GiB when decoded, but '
      f'{cache_dir()} has room for {free / 2**30:.1f}: set $SCORE_SDE_CACHE to '
      'a folder on another disk.'
    )

  def noted(indices):
    images, labels[indices] = read(indices)
    return images, labels[indices]

  with atomic(temporary) as part:
    part.mkdir()
    with open(part / 'images.npy', 'wb') as file:
      header = {'descr': '|u1', 'fortran_order': False, 'shape': (size, *shape)}
      np.lib.format.write_array_header_1_0(file, header)
      fingerprint = _fingerprint(noted, size, shape, file)
    np.save(part / 'labels.npy', labels)
  folder = kept_at(config, fingerprint)
  shutil.rmtree(folder, ignore_errors=True)
  temporary.rename(folder)
  marker = marker_of(sorted(folder.iterdir()))
  write_json(marker, {'fingerprint': fingerprint, 'notes': []})
  return fingerprint


def _kept(folder, fingerprint, size, shape):
  """Return the `read` of a Dataset of images that `_keep` has written.

  The files are mapped into memory, so that all processes of a host share the
  pages that the operating system has read. The digest of their content is
  computed once, and again if a file changes.

  Raises:
    ValueError: the content is not what the name of the folder says.
  """
  try:
    images = np.load(folder / 'images.npy', mmap_mode='r')
    labels = np.load(folder / 'labels.npy')
    if images.shape != (size, *shape) or labels.shape != (size,):
      raise ValueError(f'{images.shape} is not {(size, *shape)}')

    def read(indices):
      return np.asarray(images[indices]), labels[indices]

    marker = marker_of(sorted(folder.iterdir()))
    known = _verified(marker)
    if known is None:
      known = {'fingerprint': _fingerprint(read, size, shape), 'notes': []}
      write_json(marker, known)
    if known['fingerprint'] != fingerprint:
      raise ValueError(f'its fingerprint is {known["fingerprint"]}')
  except (ValueError, EOFError, FileNotFoundError) as error:
    raise ValueError(
      f'{folder} is damaged ({error}): python -m data cache --clear '
      f'{folder.name}'
    ) from error
  return read


def decoded_files(config, paths, labels=None, **classes):
  """Return a Dataset of files of images.

  Args:
    config: section `data` of the config.
    paths: paths of the files.
    labels: integers, one for each file; None for 0.
    **classes: num_classes and classes of `decoded`.
  """
  labels = [0] * len(paths) if labels is None else labels

  def decode(i, **fit):
    return decode_file(paths[i], **fit), labels[i]

  def survey():
    if config.num_channels == 4:
      return []
    count = sum(decoding_threads().map(has_alpha, paths))
    if not count:
      return []
    return [
      f'{count} files have transparent pixels or an alpha channel: they are '
      f'put on data.background={config.background!r}.'
    ]

  return decoded(
    config,
    decode,
    len(paths),
    files=paths,
    choice=labels,
    survey=survey,
    **classes,
  )


# --- Files of images ---


@contextlib.contextmanager
def _opened(path):
  """Yield a PIL image of a file, not yet decoded; name the file in errors."""
  from PIL import Image, UnidentifiedImageError

  try:
    with (
      open(path, 'rb') as file,
      Image.open(Bounded(file), formats=_FORMATS) as image,
    ):
      yield image
  except FileNotFoundError:  # Such as a link to nothing.
    raise FileNotFoundError(f'{path} does not exist: remove the link') from None
  except MemoryError:
    raise
  # PIL can raise almost any exception for a damaged file.
  except Exception as error:
    reason = ' '.join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
      reason = f'it is not in one of the formats {", ".join(_FORMATS)}'
    raise ValueError(
      f'{path} cannot be read as an image ({reason}): repair or remove it'
    ) from error


def file_size(path):
  """Return (height, width) of an image file without decoding it."""
  with _opened(path) as image:
    return image.height, image.width


def has_alpha(path):
  """Return whether an image file can have transparent pixels."""
  with _opened(path) as image:
    return image.has_transparency_data


def decode_file(path, **fit):
  """Return an image file as uint8 [size, size, channels].

  Args:
    path: path of the file.
    **fit: size, channels, crop and background; see `pixels.fit_image`.

  Raises:
    ValueError: the file is damaged or is not an image with 8 bits.
  """
  from PIL import ImageOps

  with _opened(path) as image:
    # PIL would drop the lower 8 bits of a colour.
    if image.format == 'PNG' and any(';16' in str(t[3]) for t in image.tile):
      raise ValueError('16-bit pixels are not 8 bits deep: convert it')
    return fit_image(ImageOps.exif_transpose(image), **fit)


# --- Arrays and folders ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
  """What a file of arrays holds of a split.

  Attributes:
    x: all examples of the array, [N, ...].
    where: its file and name, for errors.
    rows: rows [n] of x that are of the split; None for all.
    labels: integers [N], which are 0 without labels.
    num_classes: number of classes, which is 0 without labels.
    condition: conditions [N, ...], or None.
  """

  x: np.ndarray
  where: str
  rows: np.ndarray | None
  labels: np.ndarray
  num_classes: int
  condition: np.ndarray | None

  @property
  def size(self):
    """Number of examples of the split."""
    return len(self.x if self.rows is None else self.rows)

  def rows_of(self, indices):
    """Return the rows of x that examples of the split have."""
    return indices if self.rows is None else self.rows[indices]


def _whole_labels(array, where, size=None):
  """Return an array of labels as [N]; Keras' are [N, 1].

  Raises:
    ValueError: they are no whole numbers from 0, or not `size` of them.
  """
  labels = array[:, 0] if array.shape[1:] == (1,) else array
  whole = labels.dtype.kind in 'iu' and (
    labels.min(initial=0) >= 0 and labels.max(initial=0) < MOST_CLASSES
  )
  if labels.ndim != 1 or size not in (None, len(labels)) or not whole:
    raise ValueError(
      f'{where} is {array.dtype} {array.shape}, not {size or "N"} whole '
      f'numbers from 0 to {MOST_CLASSES - 1}'
    )
  return labels


def read_npz(path, split):
  """Return images, labels and number of classes, without conditions.

  Args and errors are those of `stored`.
  """
  return stored_images(path, split)[:3]


def stored(path, split, checked, names=('images', 'arr_0')):
  """Return what an .npz or .npy file holds of a split.

  The arrays are x_train and x_test, optionally with y_train and y_test,
  condition_train and condition_test; or one of `names`, optionally with labels
  and condition; or arr_0, optionally with arr_1, as in files of samples. An
  .npy holds examples alone. Where the file has no splits, a fixed tenth is the
  test set.

  Args:
    path: path of the file.
    split: 'train', 'test', or 'all' for all examples of a file without splits.
    checked: function of x and its name that returns it in the form that is
      needed, or raises ValueError.
    names: names of x in a file without splits.

  Returns:
    A `Stored`.

  Raises:
    ValueError: the file has other arrays, or arrays with other values.
  """
  arrays = load_arrays(path, map_above=MEMORY_LIMIT)
  if isinstance(arrays, np.ndarray):
    arrays = {names[0]: arrays}
  if f'x_{split}' in arrays:
    x, y, c = f'x_{split}', f'y_{split}', f'condition_{split}'
    ys = [k for k in ('y_train', 'y_test') if k in arrays]
  else:
    x = next((name for name in names if name in arrays), names[-1])
    y, c = 'arr_1' if x == 'arr_0' else 'labels', 'condition'
    ys = [y] if y in arrays else []
  if x not in arrays:
    splits = '' if split == 'all' else 'x_train and x_test, or '
    raise ValueError(
      f'{path} holds {sorted(arrays)}: name the {names[0]} {splits}'
      f'{", or ".join(names)}'
    )
  examples = checked(arrays[x], f'{path}:{x}')
  labels, condition = np.zeros(len(examples), np.int32), arrays.get(c)
  if y in arrays:
    labels = _whole_labels(arrays[y], f'{path}:{y}', len(examples))
  if condition is not None:
    condition = conditions.checked(condition, f'{path}:{c}', len(examples))
  ys = [_whole_labels(arrays[k], f'{path}:{k}') for k in ys]
  least = min((int(y.min()) for y in ys if y.size), default=0)
  if least and split == 'train':
    say(
      f'warning: {path} has no examples of classes below {least}: labels are '
      'counted from 0.'
    )
  whole = x.startswith('x_')
  return Stored(
    x=examples,
    where=f'{path}:{x}',
    rows=None if whole else split_indices(len(examples), split),
    labels=labels,
    num_classes=1 + int(max(y.max(initial=0) for y in ys)) if ys else 0,
    condition=condition,
  )


def stored_images(path, split):
  """Return what an .npz or .npy file of images holds.

  Args:
    path, split: as for `stored`, which says what the arrays are called.

  Returns:
    uint8 [N, H, W, C]; integers [N], which are 0 without labels; the number of
    classes, which is 0 without labels; and conditions [N, ...] or None.

  Raises:
    ValueError: the file has other arrays, or arrays with other values.
  """
  found = stored(path, split, uint8_images)
  parts = found.x, found.labels, found.condition
  images, labels, condition = (
    v if v is None or found.rows is None else v[found.rows] for v in parts
  )
  return images, labels, found.num_classes, condition


def files_below(root):
  """Return (images, others): sorted paths, relative to a folder, of all files.

  Others are files with other suffixes and PNG files with 16 bits, of which
  only the upper 8 could be kept. Hidden files and folders, and folders that
  begin with two underscores, are in neither. Symbolic links are followed.

  Raises:
    OSError: a folder cannot be read.
  """

  def refuse(error):
    raise error

  files, visited = [], set()
  for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
    real = os.path.realpath(folder)
    if real in visited:  # A link to a folder above would lead to a loop.
      folders.clear()
      continue
    visited.add(real)
    folders[:] = [f for f in folders if not f.startswith(('.', '__'))]
    files += [
      pathlib.Path(folder, name).relative_to(root)
      for name in names
      if not name.startswith('.')
    ]
  is_image = lambda file: (
    file.name.lower().endswith(IMAGE_SUFFIXES) and not _has_16_bits(root / file)
  )
  images = set(filter(is_image, files))
  return sorted(images), sorted(set(files) - images)


def _has_16_bits(path):
  """Return whether a file is a PNG with 16 bits, as its header says."""
  if path.suffix.lower() != '.png' or not path.is_file():
    return False  # To open a named pipe would wait for whoever writes to it.
  try:
    with path.open('rb') as file:
      header = file.read(25)
  except OSError:  # Whoever reads the whole file says so.
    return False
  return header.startswith(b'\x89PNG') and header[24:] == b'\x10'


def image_files(root):
  """Return the sorted paths, relative to a folder, of all images below it."""
  return files_below(root)[0]


def left_out(others):
  """Return notes about the files that `files_below` calls others."""

  def kind(file):
    suffix = file.suffix.lower()
    deep = '16-bit ' if suffix in IMAGE_SUFFIXES else ''
    return deep + suffix or 'without a suffix'

  counts = collections.Counter(map(kind, others))
  if not counts:
    return []
  found = ', '.join(f'{n} {suffix}' for suffix, n in counts.most_common(8))
  more = ', ...' if len(counts) > 8 else ''
  read = f'{", ".join(IMAGE_SUFFIXES)} with 8 bits are read'
  return [f'Left out: {found}{more} ({read}).']
