"""Reading images from archives, arrays and folders.

`datasets` says what each data set consists of; this module reads it. All images
are uint8 [N, H, W, C]. Small sets of images stay in memory; images of others
are decoded in threads when they are read. PIL is imported at its first use.
"""

import concurrent.futures
import functools
import math
import os
import pathlib
import zipfile

import numpy as np

from data.batches import Dataset, permutation
from data.pixels import fit_array, fit_image, uint8_images
from runtime.files import cache_dir, digest
from runtime.progress import Progress

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')
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
  path = pathlib.Path(config.path).expanduser()
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
    raise ValueError('one image cannot be split into train and test: add more')
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


def in_memory(config, images, labels, num_classes):
  """Return a Dataset of arrays.

  Args:
    config: section `data` of the config.
    images: uint8 [N, H, W, C]; they are resized to config.image_size.
    labels: integers [N].
    num_classes: number of classes, or 0.
  """
  images = fit_array(
    images,
    size=config.image_size,
    channels=config.num_channels,
    where=f'{config.dataset} {config.path}'.strip(),
  )
  labels = labels.astype(np.int32)
  return Dataset(
    name=config.dataset,
    size=len(images),
    read=lambda indices: (images[indices], labels[indices]),
    num_classes=num_classes,
    fingerprint=digest(images, labels),
  )


def decoded(config, decode, size, num_classes, identity):
  """Return a Dataset whose images are decoded when they are read.

  Args:
    config: section `data` of the config.
    decode: function (index, **fit) -> (image, label), where `fit` holds the
      size and channels of `pixels.fit_image`.
    size: number of images.
    num_classes: number of classes, or 0.
    identity: what identifies the files; its `repr` goes into the fingerprint.
  """
  fit = {'size': config.image_size, 'channels': config.num_channels}
  shape = (config.image_size, config.image_size, config.num_channels)
  decode = functools.partial(decode, **fit)
  return Dataset(
    name=config.dataset,
    size=size,
    read=DecodedImages(decode, size, shape),
    num_classes=num_classes,
    fingerprint=digest(fit, identity),
  )


# --- Files of images ---


def file_size(path):
  """Return (height, width) of an image file without decoding it."""
  from PIL import Image

  with Image.open(path) as image:
    return image.height, image.width


def decode_file(path, **fit):
  """Return an image file as uint8 [size, size, channels].

  Args:
    path: path of the file.
    **fit: size, channels and crop; see `pixels.fit_image`.

  Raises:
    ValueError: the file is damaged or is not an image with 8 bits.
  """
  from PIL import Image, ImageOps

  try:
    with Image.open(path) as image:
      return fit_image(ImageOps.exif_transpose(image), **fit)
  # PIL can raise almost any exception for a damaged file.
  except Exception as error:
    raise ValueError(
      f'{path} cannot be read as an image ({error}): repair or remove it'
    ) from error


# --- Arrays and folders ---


def read_npz(path, split):
  """Return the images, labels and number of classes of an .npz file.

  The arrays are x_train and x_test, optionally with y_train and y_test; or
  images, optionally with labels; or arr_0, optionally with arr_1, as in files
  of samples. Where the file has no splits, a fixed tenth is the test set.

  Args:
    path: path of the file.
    split: 'train', 'test', or 'all' for all images of a file without splits.

  Returns:
    uint8 [N, H, W, C]; integers [N], which are 0 without labels; and the number
    of classes, which is 0 without labels.

  Raises:
    ValueError: the file has other arrays, or arrays with other values.
  """
  try:
    with np.load(path, allow_pickle=False) as data:
      arrays = {key: data[key] for key in data.files}
  except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
    raise ValueError(
      f'{path} is not an .npz of plain arrays: {error}'
    ) from error
  if f'x_{split}' in arrays:
    x, y = f'x_{split}', f'y_{split}'
    ys = [arrays[k] for k in ('y_train', 'y_test') if k in arrays]
  else:
    x, y = ('images', 'labels') if 'images' in arrays else ('arr_0', 'arr_1')
    ys = [arrays[y]] if y in arrays else []
  if x not in arrays:
    raise ValueError(
      f'{path} holds {sorted(arrays)}: name the images x_train and x_test, or '
      'images, or arr_0'
    )
  images = uint8_images(arrays[x], f'{path}:{x}')
  if not len(images):
    raise ValueError(f'{path}:{x} holds no images')
  labels = arrays.get(y, np.zeros(len(images), np.int32))
  whole = labels.dtype.kind in 'iu' and labels.min(initial=0) >= 0
  if labels.shape != images.shape[:1] or not whole:
    raise ValueError(
      f'{path}:{y} is {labels.dtype} {labels.shape}, not {len(images)} whole '
      'numbers from 0'
    )
  if not x.startswith('x_'):
    members = split_indices(len(images), split)
    images, labels = images[members], labels[members]
  num_classes = 1 + int(max(y.max(initial=0) for y in ys)) if ys else 0
  return images, labels, num_classes


def image_files(root):
  """Return the sorted paths, relative to a folder, of all images below it.

  Hidden files and folders, and folders that begin with two underscores, are
  left out. Symbolic links are followed.
  """
  files, visited = [], set()
  for folder, folders, names in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    if real in visited:  # A link to a folder above would lead to a loop.
      folders.clear()
      continue
    visited.add(real)
    folders[:] = [f for f in folders if not f.startswith(('.', '__'))]
    files += [
      pathlib.Path(folder, name).relative_to(root)
      for name in names
      if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith('.')
    ]
  return sorted(files)


def verify_files(paths):
  """Decode every image file once, so that a damaged one stops a run early.

  Success is recorded in the cache folder; it holds until a file changes.

  Args:
    paths: paths of the files.

  Raises:
    ValueError: a file is damaged or is not an image with 8 bits.
  """
  stats = [(str(path), path.stat()) for path in paths]
  known = digest([(path, s.st_size, s.st_mtime_ns) for path, s in stats])
  marker = cache_dir() / 'verified' / known
  if marker.exists():
    return
  check = functools.partial(decode_file, size=1, channels=3)
  progress = Progress('checking images', len(paths), 'images')
  results = decoding_threads().map(check, paths)
  for done, _ in enumerate(results, start=1):
    progress(done)
  marker.parent.mkdir(parents=True, exist_ok=True)
  marker.touch()
