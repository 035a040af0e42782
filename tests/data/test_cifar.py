"""Tests of CIFAR-10: every form of its files, and every way to fail."""

import hashlib
import io
import pathlib
import pickle
import struct
import tarfile

import numpy as np
import pytest

from data import cifar, datasets
from tests.data.shared import config


def short_string(value):
  return b'U' + bytes([len(value)]) + value


def python2_pickle(pixels, labels):
  """Return what Python 2 wrote for {'data': uint8 [N, 3072], 'labels'}."""
  array = (
    b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85'
    + short_string(b'b')
    + b'\x87R(K\x01'
    + b'M'
    + struct.pack('<H', len(pixels))
    + b'M\x00\x0c\x86'
    + b'cnumpy\ndtype\n'
    + short_string(b'u1')
    + b'K\x00K\x01\x87R(K\x03'
    + short_string(b'|')
    + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89'
    + b'T'
    + struct.pack('<i', pixels.nbytes)
    + pixels.tobytes()
    + b'tb'
  )
  numbers = b''.join(b'K' + bytes([label]) for label in labels)
  return (
    b'\x80\x02}('
    + short_string(b'data')
    + array
    + short_string(b'labels')
    + b'](%be' % numbers
    + b'u.'
  )


def cifar_files(kind, batch=20):
  """Return published files as {name: bytes}, and their images and labels."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (6 * batch, 32, 32, 3), np.uint8)
  labels = rng.integers(0, 10, 6 * batch).astype(np.uint8)
  pixels = images.transpose(0, 3, 1, 2).reshape(-1, 3072)
  files = {}
  names = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
  for i, name in enumerate(names):
    rows = slice(i * batch, (i + 1) * batch)
    if kind == 'bin':
      records = np.concatenate([labels[rows, None], pixels[rows]], axis=1)
      files[f'{name}.bin'] = records.tobytes()
    else:
      files[name] = python2_pickle(pixels[rows], labels[rows])
  return files, images, labels


def write_tar(path, files):
  with tarfile.open(path, 'w:gz') as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(f'cifar-10-batches/{name}')
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def small_batches(monkeypatch):
  monkeypatch.setattr(cifar, 'BATCH', 20)


@pytest.mark.parametrize('kind', ['bin', 'py'])
def test_cifar10_from_archive_folder_and_npz(kind, tmp_path, small_batches):
  files, images, labels = cifar_files(kind)
  write_tar(tmp_path / 'a.tar.gz', files)
  (tmp_path / 'unpacked' / 'inner').mkdir(parents=True)
  for name, content in files.items():
    (tmp_path / 'unpacked' / 'inner' / name).write_bytes(content)
  np.savez(
    tmp_path / 'a.npz',
    x_train=images[:100],
    y_train=labels[:100],
    x_test=images[100:],
    y_test=labels[100:],
  )
  expected = {'train': slice(0, 100), 'test': slice(100, 120)}
  for split, rows in expected.items():
    fingerprints = set()
    for source in ('a.tar.gz', 'unpacked', 'unpacked/inner', 'a.npz'):
      c = config('cifar10', tmp_path / source, image_size=32)
      dataset = datasets.load(c, split)
      batch = dataset.batch(np.arange(len(dataset)))
      np.testing.assert_array_equal(batch['image'], images[rows])
      np.testing.assert_array_equal(batch['label'], labels[rows])
      assert dataset.num_classes == 10
      fingerprints.add(dataset.fingerprint)
    assert len(fingerprints) == 1
  small = datasets.load(config('cifar10', tmp_path / 'a.npz', 16), 'test')
  assert small.fetch([0]).shape == (1, 16, 16, 3)
  assert small.fingerprint not in fingerprints


def test_cifar10_damage_is_one_clear_line(tmp_path, small_batches):
  path = tmp_path / 'a.tar.gz'
  c = config('cifar10', path, image_size=32)
  files, _, _ = cifar_files('bin')
  write_tar(path, files)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match='a.tar.gz is not a whole archive'):
    datasets.load(c, 'train')
  path.write_bytes(b'<html>Not found</html>' * 100)
  with pytest.raises(ValueError, match='a.tar.gz is not a whole archive'):
    datasets.load(c, 'train')
  write_tar(path, {k: v for k, v in files.items() if 'batch_4' not in k})
  with pytest.raises(ValueError, match='has no data_batch_4.bin: it should'):
    datasets.load(c, 'train')
  assert len(datasets.load(c, 'test')) == 20
  write_tar(path, files | {'data_batch_2.bin': files['test_batch.bin'][:-1]})
  with pytest.raises(ValueError, match='data_batch_2.bin is not a CIFAR-10'):
    datasets.load(c, 'train')
  write_tar(path, files | {'data_batch_2.bin': b'\xff' * 20 * 3073})
  with pytest.raises(ValueError, match='data_batch_2.bin .* not 0..9'):
    datasets.load(c, 'train')


def test_cifar10_pickles_run_no_code(tmp_path, small_batches):
  class Attack:
    def __reduce__(self):
      return pathlib.Path.touch, (tmp_path / 'attacked',)

  files, _, _ = cifar_files('py')
  files['data_batch_1'] = pickle.dumps({b'data': Attack(), b'labels': []})
  write_tar(tmp_path / 'a.tar.gz', files)
  with pytest.raises(ValueError, match='data_batch_1 .* it wants to run'):
    datasets.load(config('cifar10', tmp_path / 'a.tar.gz', 32), 'train')
  assert not (tmp_path / 'attacked').exists()


def test_cifar10_is_downloaded_once_and_whole(
  tmp_path, small_batches, monkeypatch
):
  files, images, _ = cifar_files('bin')
  archive = tmp_path / 'site' / 'cifar-10-binary.tar.gz'
  archive.parent.mkdir()
  write_tar(archive, files)
  md5 = hashlib.md5(archive.read_bytes()).hexdigest()
  monkeypatch.setitem(cifar.MD5, archive.name, md5)
  monkeypatch.setattr(cifar, 'URL', archive.parent.as_uri() + '/')
  c = config('cifar10', image_size=32)
  cache = tmp_path / 'cache'

  good = archive.read_bytes()
  archive.write_bytes(good[:-1])
  with pytest.raises(ConnectionError, match='arrived damaged'):
    datasets.load(c, 'train')
  assert not list(cache.iterdir())

  archive.write_bytes(good)
  dataset = datasets.load(c, 'train')
  np.testing.assert_array_equal(dataset.fetch(np.arange(100)), images[:100])
  archive.unlink()
  assert [f.name for f in cache.iterdir()] == [archive.name]
  assert datasets.load(c, 'train').fingerprint == dataset.fingerprint

  (cache / archive.name).write_bytes(good[:-1])
  with pytest.raises(ValueError, match='gz is damaged .*: delete it'):
    datasets.load(c, 'train')
  (cache / archive.name).unlink()
  message = f'put cifar-10-binary.tar.gz .md5 {md5}. into {cache}, or point'
  with pytest.raises(ConnectionError, match=message):
    datasets.load(c, 'train')
  assert not list(cache.iterdir())
