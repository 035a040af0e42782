"""Atomic writes, the cache folder, and digests of content."""

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import zipfile
from collections.abc import Iterator
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
  path.parent.mkdir(parents=True, exist_ok=True)
  # The random part of the name keeps several processes apart.
  part = path.with_name(f'{path.name}.{secrets.token_hex(4)}.part')
  try:
    yield part
    for file in part.rglob('*') if part.is_dir() else [part]:
      _flush(file)
    os.replace(part, path)
  except BaseException:
    if part.is_dir():
      shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    raise


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
  """Write a value as JSON atomically."""
  write_text(path, json.dumps(value, indent=1) + '\n')


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
  try:
    with np.load(path, allow_pickle=False) as file:
      return dict(file)
  except FileNotFoundError:
    raise FileNotFoundError(f'There is no file {path}.') from None
  except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as e:
    raise ValueError(f'{path} is not a readable .npz file: {e}') from None


def cache_dir() -> pathlib.Path:
  """Return the cache folder: $SCORE_SDE_CACHE, else ~/.cache/score_sde."""
  default = pathlib.Path.home() / '.cache' / 'score_sde'
  return pathlib.Path(os.environ.get('SCORE_SDE_CACHE') or default)


def digest(*parts: Any) -> str:
  """Return 16 hexadecimal digits that identify the content of the parts.

  Args:
    *parts: arrays, which count with dtype, shape and values; bytes, which count
      as they are; and other objects, which count with their `repr`.

  Example:
    >>> digest(np.arange(3), 'name') == digest(np.arange(3), 'name')
    True
  """
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
