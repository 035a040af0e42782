"""CIFAR-10 (Krizhevsky 2009): download, check and read its archives."""

import functools
import hashlib
import http.client
import io
import math
import pickle
import tarfile
import urllib.request
import zlib

import numpy as np

from runtime.files import atomic, cache_dir
from runtime.progress import Progress, say

URL = 'https://www.cs.toronto.edu/~kriz/'
# Both archives hold the same images. The first needs no unpickling.
MD5 = {
  'cifar-10-binary.tar.gz': 'c32a1d4ab5d03f1284b67883e8d87530',
  'cifar-10-python.tar.gz': 'c58f30108f718f92721af3b95e74349a',
}
BATCH = 10_000  # Images in each of the six files of CIFAR-10.
CLASSES = (
  'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse',
  'ship', 'truck',
)  # fmt: skip


def download(url, target, md5):
  """Download a file and check its content.

  Args:
    url: address of the file.
    target: path to write to. Nothing is written if the download fails.
    md5: hexadecimal MD5 hash of the content.

  Raises:
    ConnectionError: the download failed or the content is damaged.
  """
  received = hashlib.md5(usedforsecurity=False)
  try:
    with (
      atomic(target) as part,
      urllib.request.urlopen(url, timeout=60) as response,
      open(part, 'wb') as file,
    ):
      say(f'Downloading {url} to {target}.')
      size = math.ceil(int(response.headers.get('Content-Length') or 0) / 2**20)
      # Some servers do not tell the size.
      progress = Progress(target.name, size, 'MiB') if size else lambda n: None
      blocks = iter(functools.partial(response.read, 2**20), b'')
      for number, block in enumerate(blocks, start=1):
        received.update(block)
        file.write(block)
        progress(number)
      if received.hexdigest() != md5:
        raise OSError(f'it arrived damaged, md5 {received.hexdigest()}')
  except (OSError, http.client.HTTPException) as error:
    raise ConnectionError(
      f'cannot download {url} ({error}): put {target.name} (md5 {md5}) into '
      f'{target.parent}, or point data.path at a copy of it'
    ) from error


def archive():
  """Return the path of a CIFAR-10 archive in the cache folder.

  The archive is downloaded if there is none.

  Raises:
    ValueError: the archive in the cache folder is damaged.
    ConnectionError: the download failed.
  """
  for name, md5 in MD5.items():
    path = cache_dir() / name
    if path.exists():
      with path.open('rb') as f:
        if hashlib.file_digest(f, 'md5').hexdigest() != md5:
          raise ValueError(
            f'{path} is damaged (its md5 is not {md5}): delete it'
          )
      return path
  name = next(iter(MD5))
  download(URL + name, cache_dir() / name, MD5[name])
  return cache_dir() / name


class ArrayUnpickler(pickle.Unpickler):
  """Unpickle arrays and plain values; refuse everything else.

  An ordinary unpickler would run any code that a file asks for.
  """

  def find_class(self, module, name):
    """Return one of the three objects of NumPy that arrays consist of."""
    allowed = {
      '_reconstruct': np.empty(0).__reduce__()[0],
      'ndarray': np.ndarray,
      'dtype': np.dtype,
    }
    if module.partition('.')[0] != 'numpy' or name not in allowed:
      raise pickle.UnpicklingError(f'it wants to run {module}.{name}')
    return allowed[name]


def read_batch(name, content):
  """Return the images and labels of a batch file of CIFAR-10.

  Args:
    name: name of the file; the format follows from its suffix.
    content: bytes of the file.

  Returns:
    uint8 [10000, 32, 32, 3], and integers [10000] in [0, 9].

  Raises:
    ValueError: the content is not a batch of CIFAR-10.
  """
  try:
    if name.endswith('.bin'):
      records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3072)
      labels, pixels = records[:, 0], records[:, 1:]
    else:
      fields = ArrayUnpickler(io.BytesIO(content), encoding='bytes').load()
      labels, pixels = np.array(fields[b'labels']), fields[b'data']
    images = pixels.reshape(BATCH, 3, 32, 32).transpose(0, 2, 3, 1)
    if labels.shape != (BATCH,) or not np.all(labels < 10):
      raise ValueError('its labels are not 0..9')
  # Unpickling can raise almost any exception for a damaged file.
  except Exception as error:
    raise ValueError(f'{name} is not a CIFAR-10 batch: {error}') from error
  return np.ascontiguousarray(images), labels


def _archive_files(path, wanted):
  """Return the content of the wanted files of an archive or folder by name."""
  files = {}
  if path.is_dir():
    for file in path.rglob('*_batch*'):
      if file.name in wanted:
        files[file.name] = file.read_bytes()
    return files
  with tarfile.open(path) as tar:
    for member in tar:
      name = member.name.rpartition('/')[2]
      if member.isfile() and name in wanted:
        files[name] = tar.extractfile(member).read()
  return files


def read(path, split):
  """Return the images and labels of a split of CIFAR-10.

  Args:
    path: one of the two published archives, or the folder that it unpacks to.
    split: 'train' or 'test'.

  Returns:
    uint8 [N, 32, 32, 3] and integers [N].

  Raises:
    ValueError: files are missing or damaged.
  """
  stems = [f'data_batch_{i}' for i in range(1, 6)]
  stems = stems if split == 'train' else ['test_batch']
  try:
    files = _archive_files(path, {s + e for s in stems for e in ('', '.bin')})
  except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
    raise ValueError(f'{path} is not a whole archive: {error}') from error
  names = [stem if stem in files else f'{stem}.bin' for stem in stems]
  for name in names:
    if name not in files:
      raise ValueError(
        f'{path} has no {name}: it should be a CIFAR-10 archive, the folder '
        'that it unpacks to, or an .npz'
      )
  batches = [read_batch(name, files[name]) for name in names]
  images, labels = zip(*batches, strict=True)
  return np.concatenate(images), np.concatenate(labels)
