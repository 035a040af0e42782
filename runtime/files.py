"""Atomic writes, the cache folder, and digests of content."""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Write a file or a folder completely or not at all.

  The body of the `with` statement writes to a temporary path in the same
  folder. When the body ends, the content is flushed to disk and renamed to
  `path`, which replaces a file or an empty folder of that name. When the body
  raises, what it wrote is removed and `path` stays as it was.

  Args:
    path: path of the result. Missing parent folders are made.

  Yields:
    The temporary path, at which nothing exists yet. Its suffix is `.part`, so a
    writer that derives the format from the suffix must be told the format.

  Example:
    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with atomic(folder / 'a.txt') as part:
    ...   _ = part.write_text('text')
    >>> [path.name for path in folder.iterdir()]
    ['a.txt']
  """
  path = pathlib.Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise NotADirectoryError(
      f'{path} cannot be written: {_file_above(path)} is a file.'
    ) from None
  # The random part of the name keeps several processes apart.
  part = path.with_name(f'{path.name}.{secrets.token_hex(4)}.part')
  try:
    with naming(path):
      yield part
      for file in part.rglob('*') if part.is_dir() else [part]:
        _flush(file)
    os.replace(part, path)
  except BaseException:
    if part.is_dir():
      shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Name the file in an error that does not: a full disk does not say whose."""
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename is not None:
      raise
    reason = os.strerror(error.errno)
    raise OSError(f'{path} cannot be written: {reason}.') from error


def _file_above(path):
  """Return what is above a path and is no folder."""
  return next(p for p in path.parents if os.path.lexists(p) and not p.is_dir())


def check_output(folder: str | os.PathLike) -> None:
  """Raise OSError unless a folder, or a new file, can be written.

  What takes long should find this out first. Nothing is left behind.

  Example:
    >>> check_output('/proc/results')
    Traceback (most recent call last):
      ...
    OSError: /proc/results cannot be written: No such file or directory.
  """
  folder = pathlib.Path(folder)
  above = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
  if not above.is_dir():
    raise NotADirectoryError(
      f'{folder} cannot be written: {above} is no folder.'
    )
  try:
    with tempfile.TemporaryFile(dir=above) as file:
      file.write(b'0')
  except OSError as error:
    raise OSError(f'{folder} cannot be written: {error.strerror}.') from None


def _flush(path):
  """Flush a file to disk, so that a crash of the machine cannot empty it."""
  if path.is_file():
    with open(path, 'rb') as file:
      os.fsync(file.fileno())


def write_text(path: str | os.PathLike, text: str) -> None:
  """Write a text file atomically."""
  with atomic(path) as part:
    part.write_text(text)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Write a value as strict JSON atomically; see `to_json`."""
  write_text(path, to_json(value, indent=1) + '\n')


def to_json(value: Any, **options: Any) -> str:
  """Return a value as strict JSON, which has finite numbers only.

  NaN stands for what is not known, and becomes null. The infinities become the
  strings 'inf' and '-inf', which `float` reads.

  Args:
    value: nested dicts, lists and tuples of texts, numbers and None.
    **options: of `json.dumps`.

  Example:
    >>> to_json({'a': (float('nan'), float('inf'), 1.0)})
    '{"a": [null, "inf", 1.0]}'
  """
  return json.dumps(_strict(value), allow_nan=False, **options)


def _strict(value):
  if isinstance(value, dict):
    return {key: _strict(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [_strict(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None if math.isnan(value) else str(value)
  return value


def save_npz(path: str | os.PathLike, **arrays: Any) -> None:
  """Write an .npz file of named arrays atomically."""
  with atomic(path) as part, open(part, 'wb') as file:
    np.savez(file, **arrays)


def load_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Return all arrays of an .npz file by their names.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, or is no .npz of plain arrays.
  """
  arrays = load_arrays(path, 'a readable .npz file')
  if isinstance(arrays, np.ndarray):
    raise ValueError(f'{path} is an .npy, not an .npz of named arrays.')
  return arrays


# What may be reserved without thought.
SMALL = 2**16


class Bounded:
  """A binary stream that reserves no more memory than it has bytes.

  Readers of formats ask for as many bytes as a file says, a damaged file says
  anything, and a stream of Python reserves what it is asked for.
  """

  def __init__(self, stream):
    self._stream, at = stream, stream.tell()
    self._size = stream.seek(0, os.SEEK_END)
    stream.seek(at)

  def read(self, size=-1):
    """Return the next bytes: `size` of them, or as many as there are."""
    if size is not None and 0 <= size <= SMALL:  # Without asking where it is.
      return self._stream.read(size)
    left = max(self._size - self._stream.tell(), 0)
    whole = size is None or size < 0
    return self._stream.read(left if whole else min(size, left))

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def __iter__(self):
    return iter(self._stream)


def load_arrays(
  path: str | os.PathLike,
  what: str = 'an .npz of plain arrays, or an .npy',
  map_above: float = math.inf,
) -> np.ndarray | dict[str, np.ndarray]:
  """Return the arrays of an .npz file by their names, or that of an .npy file.

  Memory is reserved for what is in the file, not for what its header says.

  Args:
    path: path of the file.
    what: what the file should be, for errors.
    map_above: arrays of more bytes are mapped into memory, read-only, where the
      file holds them uncompressed, as `np.save` and `np.savez` write them.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, or holds other objects than plain arrays.
  """
  try:
    if pathlib.Path(path).is_fifo():  # To read a pipe can take forever.
      raise ValueError('it is a pipe')
    with open(path, 'rb') as stream:
      file, size = Bounded(stream), os.fstat(stream.fileno()).st_size
      if not zipfile.is_zipfile(file):
        file.seek(0)
        return _read_array(file, size, path, 0, map_above)
      arrays = {}
      with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
          # Deflate makes data at most 1032 times smaller.
          if info.file_size > 1032 * size:
            raise ValueError(f'{info.filename} is larger than the file can be')
          start = None
          if info.compress_type == zipfile.ZIP_STORED:
            # Behind a header of 30 bytes, a name and more.
            file.seek(info.header_offset + 26)
            lengths = struct.unpack('<HH', file.read(4))
            start = info.header_offset + 30 + sum(lengths)
          with archive.open(info) as member:
            name = info.filename.removesuffix('.npy')
            arrays[name] = _read_array(
              member, info.file_size, path, start, map_above
            )
      return arrays
  except FileNotFoundError:
    raise FileNotFoundError(f'There is no file {path}.') from None
  except Exception as error:  # A damaged file can raise nearly any type.
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise ValueError(f'{path} is not {what}: {reason:.200}') from None


def _read_array(stream, size, path, start, map_above):
  """Return the array of an .npy stream that has `size` bytes.

  The stream begins at byte `start` of the file at `path`; None if it is
  compressed there. For `map_above` see `load_arrays`.
  """
  header = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }[np.lib.format.read_magic(stream)]
  shape, by_columns, dtype = header(stream)
  if dtype.hasobject:
    raise ValueError('it holds Python objects, which are not read')
  num_bytes = math.prod(shape) * dtype.itemsize
  if num_bytes > size - stream.tell():
    raise ValueError(f'an array of {shape} {dtype} is cut short')
  if num_bytes > map_above and start is not None:
    order, offset = 'F' if by_columns else 'C', start + stream.tell()
    return np.memmap(path, dtype, 'r', offset, shape, order)
  stream.seek(0)
  return np.lib.format.read_array(stream, allow_pickle=False)


def not_local(path: str | os.PathLike) -> str:
  """Return what is wrong with a path that is an address, else ''.

  The text continues 'PATH '. No file is read from or written to an object
  store: orbax could, but all other files are written through the file system.

  Example:
    >>> not_local('gs://bucket/run')[:13], not_local('/mnt/bucket/run')
    ('is an address', '')
  """
  # A pathlib.Path has one slash. Drives of Windows have one letter.
  if not re.match(r'[a-zA-Z][\w.+-]+:/', os.fspath(path)):
    return ''
  return (
    'is an address, not a path: mount the bucket (gcsfuse, s3fs) or use NFS, '
    'and give the path there.'
  )


def check_local(path: str | os.PathLike) -> None:
  """Raise ValueError for a path that is the address of an object store."""
  if wrong := not_local(path):
    raise ValueError(f'{path} {wrong}')


def cache_dir() -> pathlib.Path:
  """Return the cache folder: $SCORE_SDE_CACHE, else ~/.cache/score_sde."""
  check_local(os.environ.get('SCORE_SDE_CACHE', ''))
  default = pathlib.Path.home() / '.cache' / 'score_sde'
  chosen = pathlib.Path(os.environ.get('SCORE_SDE_CACHE') or default)
  return chosen.expanduser()


def make_cache_dir() -> None:
  """Make the cache folder.

  Raises:
    OSError: it cannot be made, or nothing can be written there.
  """
  folder = cache_dir()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  except OSError as error:
    raise OSError(
      f'The cache folder {folder} cannot be made or written '
      f'({error.strerror}): set $SCORE_SDE_CACHE to another folder.'
    ) from None


def digest(*parts: Any) -> str:
  """Return 16 hexadecimal digits that identify the content of the parts.

  Args:
    *parts: arrays, which count with dtype, shape and values; bytes, which count
      as they are; and other objects, which count with their `repr`.

  Example:
    >>> digest(np.arange(3), 'name') == digest(np.arange(3), 'name')
    True
  """
  return digest_all(parts)


def digest_all(parts: Iterable[Any]) -> str:
  """Return the `digest` of parts that need not be in memory together."""
  whole = hashlib.sha256()
  for part in parts:
    if isinstance(part, np.ndarray):
      whole.update(f'{part.dtype}{part.shape}'.encode())
      whole.update(np.ascontiguousarray(part))
    elif isinstance(part, bytes):
      whole.update(part)
    else:
      whole.update(repr(part).encode())
  return whole.hexdigest()[:16]
