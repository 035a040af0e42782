"""Files that are written whole or not at all, and the cache folder."""

import os
import pathlib
import tempfile
import zipfile
from typing import Any

import numpy as np


def write_text(path, text):
  """Writes a file whole or not at all."""
  path = pathlib.Path(path)
  part = path.with_name(path.name + '.part')
  part.write_text(text)
  os.replace(part, path)


def save_npz(path: str | os.PathLike, **arrays: Any) -> None:
  """Writes an .npz, whole or not at all."""
  folder = os.path.dirname(os.path.abspath(path))
  os.makedirs(folder, exist_ok=True)
  with tempfile.NamedTemporaryFile(
    dir=folder, suffix='.part', delete=False
  ) as file:
    try:
      np.savez(file, **arrays)
      file.flush()
      os.fsync(file.fileno())
      os.replace(file.name, path)
    except BaseException:
      os.unlink(file.name)
      raise


def load_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads all arrays of an .npz; a damaged one is a ValueError."""
  try:
    with np.load(path, allow_pickle=False) as file:
      return dict(file)
  except FileNotFoundError:
    raise FileNotFoundError(f'There is no file {path}.') from None
  except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as e:
    raise ValueError(f'{path} is not a readable .npz file: {e}') from None


def cache_dir():
  """$SCORE_SDE_CACHE, or ~/.cache/score_sde."""
  default = pathlib.Path.home() / '.cache' / 'score_sde'
  return pathlib.Path(os.environ.get('SCORE_SDE_CACHE') or default)
