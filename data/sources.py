"""Reading images: decoding, cropping, archives, arrays and folders.

Below `datasets`, which says what each dataset is made of. Images are uint8
[N, H, W, C] throughout. Small sets of images live in memory; others are
decoded in threads when asked for. PIL is imported when first used.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import http.client
import io
import math
import os
import pathlib
import pickle
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from runtime.files import cache_dir

CIFAR10_URL = 'https://www.cs.toronto.edu/~kriz/'
# Both archives hold the same images. The first needs no unpickling.
CIFAR10_MD5 = {
  'cifar-10-binary.tar.gz': 'c32a1d4ab5d03f1284b67883e8d87530',
  'cifar-10-python.tar.gz': 'c58f30108f718f92721af3b95e74349a',
}
CIFAR10_BATCH = 10_000  # images in each of its six files
IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # of PIL, by number of channels
MEMORY_LIMIT = 2**31  # bytes of decoded images kept in memory, else redecode


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
  """Labelled uint8 images in a fixed order, read by index.

  Attributes:
    name: its key in `datasets.DATASETS`.
    size: number of images.
    read: indices [n] -> (images uint8 [n, H, W, C], labels int32 [n]).
    num_classes: 0 if there are no labels (they are then all 0).
    fingerprint: hash of what the dataset holds at this resolution. It is the
      same on every machine, and it changes when the images do.
  """

  name: str
  size: int
  read: Callable
  num_classes: int
  fingerprint: str

  def __len__(self):
    return self.size

  def fetch(self, indices):
    """Images, uint8 [n, H, W, C], at indices [n]."""
    return self.read(np.asarray(indices))[0]

  def batch(self, indices):
    """{'image', 'label' int32 [n], 'index' int64 [n]} at indices [n]."""
    indices = np.asarray(indices, np.int64)
    images, labels = self.read(indices)
    return {'image': images, 'label': labels, 'index': indices}


def fingerprint(*parts):
  """64-bit hash, in hexadecimal, of arrays and of the repr of all else."""
  digest = hashlib.sha256()
  for part in parts:
    if isinstance(part, np.ndarray):
      digest.update(f'{part.dtype}{part.shape}'.encode())
      digest.update(np.ascontiguousarray(part))
    else:
      digest.update(repr(part).encode())
  return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def permutation(size, seed, epoch):
  """A random order of range(size), a pure function of (size, seed, epoch).

  It sorts the raw stream of a counter-based generator, which NumPy promises
  never to change; the shuffling methods of its generators may.
  """
  raw = np.random.Philox(key=[seed, epoch]).random_raw(size)
  order = np.argsort(raw, kind='stable')
  order.flags.writeable = False
  return order


def split_indices(size, split, num_test=None):
  """Sorted indices of 'train', 'test' or 'all' where there is no split.

  A fixed random tenth of the images (or `num_test`) is the test set.
  """
  if split == 'all':
    return np.arange(size)
  if size < 2:
    raise ValueError('one image cannot be split into train and test: add more')
  num_test = num_test or max(1, size // 10)
  order = permutation(size, 0, 0)
  return np.sort(order[:num_test] if split == 'test' else order[num_test:])


def progress(items, total, what, every=5.0):
  """Yields from `items`, printing a line on stderr every few seconds."""
  last = time.monotonic()
  for done, item in enumerate(items, start=1):
    yield item
    if time.monotonic() - last > every:
      last = time.monotonic()
      share = f' ({100 * done / total:.0f}%)' if total else ''
      print(f'{what}: {done}{share}', file=sys.stderr, flush=True)


# --- Images: decode, crop, resize ---


def fit_image(image, *, size, channels, crop=None):
  """Centre-crops a PIL image to a square and resizes it.

  As the paper's pipeline: the square is `crop` pixels wide, or the short side;
  the filter is antialiased, bilinear up to 128 pixels and bicubic above. Values
  are rounded to nearest, and overshoot is clipped.

  Returns:
    uint8 [size, size, channels].
  """
  from PIL import Image

  if image.mode.startswith(('I', 'F')):
    raise ValueError(f'{image.mode} pixels are not 8 bits deep: convert it')
  image = image.convert(MODES[channels])
  width, height = image.size
  side = min(crop or width, width, height)
  left, top = (width - side) // 2, (height - side) // 2
  # Cropped first: resize(box=...) would filter in pixels from beyond the box.
  image = image.crop((left, top, left + side, top + side))
  smooth = (
    Image.Resampling.BILINEAR if size <= 128 else Image.Resampling.BICUBIC
  )
  image = image.resize((size, size), smooth)
  return np.asarray(image).reshape(size, size, channels)


def fit_array(images, *, size, channels, where):
  """Checks uint8 [N, H, W, C], and crops and resizes it if need be."""
  from PIL import Image

  if images.shape[-1] != channels:
    raise ValueError(
      f'{where} has images with {images.shape[-1]} channels (last axis of '
      f'{images.shape}), but data.num_channels is {channels}'
    )
  if images.shape[1:3] == (size, size):
    return images
  fit = functools.partial(fit_image, size=size, channels=channels)
  squeezed = images[..., 0] if channels == 1 else images
  return np.stack([fit(Image.fromarray(image)) for image in squeezed])


@functools.cache
def decoding_threads():
  return concurrent.futures.ThreadPoolExecutor(
    max_workers=os.cpu_count(), thread_name_prefix='decode'
  )


class DecodedImages:
  """Reads images by decoding them in threads, each once if memory allows.

  decode: index -> (image uint8 of `shape`, label).
  """

  def __init__(self, decode, size, shape):
    self.decode = decode
    self.keep = size * math.prod(shape) <= MEMORY_LIMIT
    if self.keep:
      self.images = np.empty((size, *shape), np.uint8)
      self.labels = np.zeros(size, np.int32)
      self.done = np.zeros(size, bool)

  def __call__(self, indices):
    pool = decoding_threads()
    if not self.keep:
      images, labels = zip(*pool.map(self.decode, indices), strict=True)
      return np.stack(images), np.array(labels, np.int32)
    missing = np.unique(indices[~self.done[indices]])
    decoded = pool.map(self.decode, missing)
    for i, (image, label) in zip(missing, decoded, strict=True):
      self.images[i], self.labels[i] = image, label
      self.done[i] = True  # last: other threads read only rows that are whole
    return self.images[indices], self.labels[indices]


def existing_path(config, what):
  """config.path as a Path, which must exist."""
  if not config.path:
    raise ValueError(f'{config.dataset}: set data.path to {what}')
  path = pathlib.Path(config.path).expanduser()
  if not path.exists():
    raise FileNotFoundError(
      f'{config.dataset}: data.path {path} does not exist; it should be {what}'
    )
  return path


# --- CIFAR-10 ---


def download(url, target, md5):
  """Downloads url to target, whole and with the right hash or not at all."""
  target.parent.mkdir(parents=True, exist_ok=True)
  digest = hashlib.md5(usedforsecurity=False)
  descriptor, part = tempfile.mkstemp(dir=target.parent)
  try:
    with (
      open(descriptor, 'wb') as file,
      urllib.request.urlopen(url, timeout=60) as response,
    ):
      size = int(response.headers.get('Content-Length') or 0)
      print(f'downloading {url} to {target}', file=sys.stderr, flush=True)
      blocks = iter(functools.partial(response.read, 2**20), b'')
      for block in progress(blocks, size / 2**20, f'{target.name}, MiB'):
        digest.update(block)
        file.write(block)
    if digest.hexdigest() != md5:
      raise OSError(f'it arrived damaged, md5 {digest.hexdigest()}')
    os.replace(part, target)
  except (OSError, http.client.HTTPException) as error:
    raise ConnectionError(
      f'cannot download {url} ({error}): put {target.name} (md5 {md5}) into '
      f'{target.parent}, or point data.path at a copy of it'
    ) from error
  finally:
    pathlib.Path(part).unlink(missing_ok=True)


def cifar10_archive():
  """The archive in the cache directory, downloaded if there is none."""
  for name, md5 in CIFAR10_MD5.items():
    path = cache_dir() / name
    if path.exists():
      with path.open('rb') as f:
        if hashlib.file_digest(f, 'md5').hexdigest() != md5:
          raise ValueError(
            f'{path} is damaged (its md5 is not {md5}): delete it'
          )
      return path
  name = next(iter(CIFAR10_MD5))
  download(CIFAR10_URL + name, cache_dir() / name, CIFAR10_MD5[name])
  return cache_dir() / name


class CifarUnpickler(pickle.Unpickler):
  """Reads arrays and plain values; a file that asks for more is refused."""

  def find_class(self, module, name):
    allowed = {
      '_reconstruct': np.empty(0).__reduce__()[0],
      'ndarray': np.ndarray,
      'dtype': np.dtype,
    }
    if module.partition('.')[0] != 'numpy' or name not in allowed:
      raise pickle.UnpicklingError(f'it wants to run {module}.{name}')
    return allowed[name]


def cifar10_batch(name, content):
  """(images uint8 [10000, 32, 32, 3], labels [10000]) of one batch file."""
  try:
    if name.endswith('.bin'):
      records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3072)
      labels, pixels = records[:, 0], records[:, 1:]
    else:
      fields = CifarUnpickler(io.BytesIO(content), encoding='bytes').load()
      labels, pixels = np.array(fields[b'labels']), fields[b'data']
    images = pixels.reshape(CIFAR10_BATCH, 3, 32, 32).transpose(0, 2, 3, 1)
    if labels.shape != (CIFAR10_BATCH,) or not np.all(labels < 10):
      raise ValueError('its labels are not 0..9')
  # Unpickling a damaged file can raise nearly anything.
  except Exception as error:
    raise ValueError(f'{name} is not a CIFAR-10 batch: {error}') from error
  return np.ascontiguousarray(images), labels


def read_cifar10(path, split):
  """(images uint8 [N, 32, 32, 3], labels [N]) of an archive or its folder."""
  stems = [f'data_batch_{i}' for i in range(1, 6)]
  stems = stems if split == 'train' else ['test_batch']
  wanted = {stem + end for stem in stems for end in ('', '.bin')}
  files = {}
  try:
    if path.is_dir():
      for file in path.rglob('*_batch*'):
        if file.name in wanted:
          files[file.name] = file.read_bytes()
    else:
      with tarfile.open(path) as tar:
        for member in tar:
          name = member.name.rpartition('/')[2]
          if member.isfile() and name in wanted:
            files[name] = tar.extractfile(member).read()
  except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
    raise ValueError(f'{path} is not a whole archive: {error}') from error
  names = [stem if stem in files else f'{stem}.bin' for stem in stems]
  for name in names:
    if name not in files:
      raise ValueError(
        f'{path} has no {name}: it should be a CIFAR-10 archive, the folder '
        'that it unpacks to, or an .npz'
      )
  batches = [cifar10_batch(name, files[name]) for name in names]
  images, labels = zip(*batches, strict=True)
  return np.concatenate(images), np.concatenate(labels)


# --- The user's own images ---


def uint8_images(array, where):
  """uint8 [N, H, W, C] from uint8, whole numbers 0..255 or floats in [0, 1]."""
  if array.ndim == 3:
    array = array[..., None]
  if array.ndim != 4 or array.shape[-1] not in MODES:
    raise ValueError(
      f'{where} has shape {array.shape}, not [N, H, W, C] with 1, 3 or 4 '
      'channels'
    )
  if array.dtype == np.uint8:
    return array
  low, high = array.min(initial=0), array.max(initial=0)
  if array.dtype.kind in 'iu' and low >= 0 and high <= 255:
    return array.astype(np.uint8)
  if array.dtype.kind == 'f' and low >= 0 and high <= 1:
    return np.floor(array * 255 + 0.5).astype(np.uint8)
  raise ValueError(
    f'{where} is {array.dtype} in [{low:g}, {high:g}]: use uint8, or floats '
    'in [0, 1]'
  )


def read_npz(path, split):
  """(images uint8 [N, H, W, C], labels [N], num_classes) of an .npz.

  Keys are x_train, x_test and optionally y_train, y_test; or images and
  optionally labels; or arr_0 and optionally arr_1, as files of samples have.
  Without a split of its own, a fixed tenth of the file is the test set.
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
  """Sorted paths, relative to root, of the images in it and below it."""
  files, visited = [], set()
  for folder, folders, names in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    if real in visited:  # a link that leads back up
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


def file_size(path):
  """(height, width) of an image file, from its head."""
  from PIL import Image

  with Image.open(path) as image:
    return image.height, image.width


def decode_file(path, **fit):
  """One image file as uint8 [H, W, C]; `fit` goes to `fit_image`."""
  from PIL import Image, ImageOps

  try:
    with Image.open(path) as image:
      return fit_image(ImageOps.exif_transpose(image), **fit)
  # A damaged file makes PIL raise nearly anything.
  except Exception as error:
    raise ValueError(
      f'{path} cannot be read as an image ({error}): mend or remove it'
    ) from error


def verify_files(paths):
  """Decodes every file once, so that a bad one stops a run before it starts.

  Success is remembered in the cache directory until a file changes.
  """
  stats = [path.stat() for path in paths]
  known = fingerprint(
    [
      (str(p), s.st_size, s.st_mtime_ns)
      for p, s in zip(paths, stats, strict=True)
    ]
  )
  marker = cache_dir() / 'verified' / known
  if marker.exists():
    return
  check = functools.partial(decode_file, size=1, channels=3)
  results = decoding_threads().map(check, paths)
  for _ in progress(results, len(paths), 'checking images'):
    pass
  marker.parent.mkdir(parents=True, exist_ok=True)
  marker.touch()
