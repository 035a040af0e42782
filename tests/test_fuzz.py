"""Damaged files: thousands of mutations of small valid files of every format.

Each is read or refused with a documented exception whose one line names the
file. Nothing hangs, reserves much memory, or runs what the file contains.
"""

import io
import json
import os
import pathlib
import pickle
import random
import sys
import time
import tracemalloc
import warnings
import zipfile
import zlib

import flax.linen as nn
import flax.serialization
import numpy as np
import pytest
from PIL import Image

import experiment
from checkpoints import formats, workdir
from configs import schema
from data import cifar, sources
from features import statistics, weights
from runtime import files, torch_file
from tests import golden, tiny

DOCUMENTED = ValueError, OSError  # FileNotFoundError is one.
SECONDS, BYTES = 5, 2**28  # What one file may take at most.
TRACED = 3  # Of as many files, memory is measured for one: that is slow.


class Layer(nn.Module):
  """A network of one layer, whose files are small."""

  @nn.compact
  def __call__(self, x, cond, *, train):
    return nn.Dense(2)(x) * cond[:, None]


PARAMS = {'Dense_0': {'kernel': np.ones((2, 2)), 'bias': np.ones(2)}}


# --------------------------------------------------------------- valid files


def _npz(**arrays):
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def _npy(array):
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def _image(name, mode='RGB'):
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(file, name)
  return file.getvalue()


def _released(params=PARAMS):
  moments = {
    'Dense_0': {
      name: {'grad_ema': value, 'grad_sq_ema': value}
      for name, value in params['Dense_0'].items()
    }
  }
  state = {'step': 3, 'param_states': moments}
  return flax.serialization.msgpack_serialize(
    {
      'step': 3,
      'params_ema': params,
      'optimizer': {'target': params, 'state': state},
    }
  )


def _exported():
  path = pathlib.Path(os.environ['FUZZ_FOLDER'], 'whole.safetensors')
  config = json.dumps(experiment.json_of(tiny.get_config()))
  formats.export(path, config, PARAMS, 3, ('cat', 'dog'))
  return path.read_bytes()


def _batch():
  labels, data = [3, 7], np.zeros((2, 3072), np.uint8)
  return pickle.dumps({b'labels': labels, b'data': data}, 3)


def _checkpoint(path):
  formats.load(path, Layer(), (1, 2))


def _safetensors(path):
  _checkpoint(path)
  schema.check(schema.from_dict(formats.exported_config(path)))


def _image_file(path):
  sources.file_size(path)
  image = sources.decode_file(path, size=4, channels=3)
  assert image.shape == (4, 4, 3) and image.dtype == np.uint8


def _config(path):
  schema.check(experiment.load_config(path))


def _run_config(path):
  """As the config.json of a workdir."""
  folder = path.with_name('run')
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_bytes(path.read_bytes())
  try:
    schema.check(schema.from_dict(workdir.read_config(folder)))
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None


def _images(path):
  images, labels, _ = sources.read_npz(path, 'train')
  assert images.dtype == np.uint8 and len(images) == len(labels)


def _cifar(path):
  cifar.read_batch(path.name, path.read_bytes())


def _stored(name):
  return lambda: (golden.DATA / name).read_bytes()


def _pictures():
  labels = np.arange(5)
  return _npz(images=np.zeros((5, 4, 4, 3), np.uint8), labels=labels)


# Format: (name of the file, its valid content, its reader, mutations).
FORMATS = {
  'torch_zip': ('a.pth', _stored('torch_zip.pth'), torch_file.load, 400),
  'torch_legacy': ('a.pth', _stored('torch_legacy.pth'), torch_file.load, 400),
  'torch_script': ('a.pt', _stored('torch_script.pt'), torch_file.load, 300),
  'msgpack': ('checkpoint_3', _released, _checkpoint, 500),
  'safetensors': ('a.safetensors', _exported, _safetensors, 300),
  'npz': ('a.npz', _pictures, _images, 400),
  'npy': (
    'a.npy',
    lambda: _npy(np.zeros((5, 4, 4, 3), np.uint8)),
    _images,
    300,
  ),
  'statistics': (
    'a.npz',
    lambda: _npz(mu=np.zeros(2), sigma=np.eye(2), count=np.asarray(5)),
    statistics.load_stats,
    300,
  ),
  'arrays': ('a.npz', lambda: _npz(a=np.ones(3)), files.load_npz, 200),
  'weights': (
    'a.npz',
    lambda: _npz(a=np.ones(3)),
    lambda path: weights.load_weights(path),
    200,
  ),
  'png': ('a.png', lambda: _image('png', 'RGBA'), _image_file, 400),
  'jpeg': ('a.jpg', lambda: _image('jpeg'), _image_file, 400),
  'bmp': ('a.bmp', lambda: _image('bmp'), _image_file, 400),
  'webp': ('a.webp', lambda: _image('webp'), _image_file, 300),
  'cifar': ('data_batch_1', _batch, _cifar, 400),
  'config': (
    'config.json',
    lambda: json.dumps(experiment.json_of(tiny.get_config())).encode(),
    _config,
    300,
  ),
  'run_config': (
    'config.json',
    lambda: json.dumps(experiment.json_of(tiny.get_config())).encode(),
    _run_config,
    250,
  ),
}


# ----------------------------------------------------------------- mutations


def _truncate(rng, data):
  return data[: rng.randrange(len(data))]


def _flip(rng, data):
  """Flip a few bits."""
  changed = bytearray(data)
  for _ in range(rng.randint(1, 4)):
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  return bytes(changed)


def _extreme(rng, data):
  """Set a few neighbours to the largest or smallest value: sizes, offsets."""
  at, width = rng.randrange(len(data)), rng.choice((1, 2, 4, 8))
  value = rng.choice((b'\x00', b'\x7f', b'\x80', b'\xff'))
  return data[:at] + value * width + data[at + width :]


def _part(rng, data):
  return sorted(rng.choices(range(len(data)), k=2))


def _splice(rng, data):
  """Write one part of the file over another."""
  start, stop = _part(rng, data)
  at = rng.randrange(len(data))
  return data[:at] + data[start:stop] + data[at + stop - start :]


def _repeat(rng, data):
  start, stop = _part(rng, data)
  return data[:stop] + data[start:stop] * rng.randint(1, 3) + data[stop:]


def _remove(rng, data):
  start, stop = _part(rng, data)
  return data[:start] + data[stop:]


def _text(rng, data):
  """Replace a value of a text by another one."""
  words = b'{} [] null NaN -1 1e999 "a" [[1]] 99999999999999999999'.split()
  parts = data.split(b', ')
  at = rng.randrange(len(parts))
  parts[at] = parts[at].partition(b': ')[0] + b': ' + rng.choice(words)
  return b', '.join(parts)


MUTATIONS = _truncate, _flip, _flip, _extreme, _extreme, _splice, _repeat
MUTATIONS += _remove, _text


def _deflated(data):
  """Return a zip archive of the same files that is compressed."""
  file = io.BytesIO()
  with (
    zipfile.ZipFile(io.BytesIO(data)) as old,
    zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as new,
  ):
    for name in old.namelist():
      new.writestr(name, old.read(name))
  return file.getvalue()


def _refused(reader, path, traced):
  """Read a file; return the error, or None. Check what it took."""
  begun, error = time.monotonic(), None
  if traced:
    tracemalloc.start()
  try:
    reader(path)
  except DOCUMENTED as problem:
    error = problem
  finally:
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  assert taken < BYTES
  assert time.monotonic() - begun < SECONDS
  return error


@pytest.fixture
def no_calls(monkeypatch):
  """Fail if a file starts a process, or makes or removes a file."""
  calls = []

  def watch(event, arguments):
    if event in ('os.system', 'subprocess.Popen', 'os.mkdir', 'os.remove'):
      calls.append((event, arguments))

  active = [watch]
  sys.addaudithook(lambda *args: [hook(*args) for hook in active])
  yield calls
  active.clear()


@pytest.mark.parametrize('name', FORMATS)
def test_damaged_files(name, tmp_path, monkeypatch, no_calls):
  monkeypatch.setenv('FUZZ_FOLDER', str(tmp_path))
  monkeypatch.setattr(cifar, 'BATCH', 2)
  file_name, content, reader, count = FORMATS[name]
  path, data = tmp_path / file_name, content()
  path.write_bytes(data)
  if name != 'weights':  # Real ones are large.
    reader(path)
  seed = zlib.crc32(name.encode())
  refused = 0
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    for i in range(count):
      rng, mutated = random.Random(seed + i), data
      for _ in range(rng.randint(1, 2)):
        if mutated:
          mutated = rng.choice(MUTATIONS)(rng, mutated)
      path.write_bytes(mutated)
      del no_calls[:]
      error = _refused(reader, path, traced=i % TRACED == 0)
      calls = [c for c in no_calls if str(tmp_path / 'run') != str(c[1][0])]
      assert not calls, (name, i)
      if error is not None:
        refused += 1
        line = str(error)
        assert len(line.splitlines()) == 1, (name, i, line)
        assert file_name in line or line.startswith('config.'), (name, i)
  assert refused > count / 4


def test_a_small_archive_of_large_arrays(tmp_path):
  """What is unpacked is not larger than what the header of an array says."""
  path = tmp_path / 'a.npz'
  path.write_bytes(_deflated(_npz(a=np.zeros(2**20, np.uint8))))
  assert path.stat().st_size < 2**12
  assert files.load_npz(path)['a'].size == 2**20


def test_there_are_thousands():
  assert sum(count for *_, count in FORMATS.values()) >= 5000
