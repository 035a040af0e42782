"""sources: every way to read images, and every way for it to fail."""

import io
import pathlib
import pickle
import struct
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

from data import datasets, sources


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('SCORE_SDE_CACHE', str(tmp_path / 'cache'))


def config(dataset, path='', image_size=8, num_channels=3):
  return types.SimpleNamespace(
    dataset=dataset,
    path=str(path),
    image_size=image_size,
    num_channels=num_channels,
  )


# --- Decoding ---


def test_fit_image_crops_the_centre_and_antialiases():
  wide = np.zeros((8, 24, 3), np.uint8)
  wide[:, 8:16] = [10, 200, 30]  # the centre square
  wide[:, :8] = 255
  fit = sources.fit_image(Image.fromarray(wide), size=8, channels=3)
  np.testing.assert_array_equal(fit, wide[:, 8:16])
  stripes = np.tile(np.array([0, 255], np.uint8), (32, 16))
  for size in (4, 8):
    fit = sources.fit_image(Image.fromarray(stripes), size=size, channels=1)
    assert fit.shape == (size, size, 1)
    assert np.all(np.abs(fit[1:-1, 1:-1].astype(int) - 127.5) < 8)


def test_fit_image_bicubic_overshoot_does_not_wrap():
  edge = np.zeros((300, 300), np.uint8)
  edge[:, 150:] = 255
  fit = sources.fit_image(Image.fromarray(edge), size=200, channels=1)
  row = fit[100, :, 0].astype(int)
  assert np.all(np.diff(row) >= 0) and row[0] == 0 and row[-1] == 255


def test_fit_image_agrees_with_a_float_resize():
  values = np.random.default_rng(0).integers(0, 256, (97, 61), np.uint8)
  fit = sources.fit_image(Image.fromarray(values), size=32, channels=1)
  square = Image.fromarray(values[18:79].astype(np.float32))
  exact = square.resize((32, 32), Image.Resampling.BILINEAR)
  error = fit[..., 0] - np.clip(np.asarray(exact), 0, 255)
  assert np.abs(error).max() <= 1 and abs(error.mean()) < 0.05


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_fit_image_channels(channels):
  for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'):
    image = Image.new('RGB', (5, 9), 'white').convert(mode)
    fit = sources.fit_image(image, size=4, channels=channels)
    assert fit.shape == (4, 4, channels) and fit.min() == 255


@pytest.mark.parametrize('limit', [0, 2**31])
def test_decoded_images_with_and_without_memory(limit, monkeypatch):
  monkeypatch.setattr(sources, 'MEMORY_LIMIT', limit)
  calls = []

  def decode(i):
    calls.append(i)
    return np.full((2, 2, 1), i, np.uint8), i + 1

  read = sources.DecodedImages(decode, 9, (2, 2, 1))
  for indices in ([3, 3, 8], [8, 0]):
    images, labels = read(np.array(indices))
    assert images.shape == (len(indices), 2, 2, 1)
    np.testing.assert_array_equal(images[:, 1, 1, 0], indices)
    np.testing.assert_array_equal(labels, np.array(indices) + 1)
    assert labels.dtype == np.int32
  assert sorted(calls) == ([0, 3, 8] if limit else [0, 3, 3, 8, 8])


# --- CIFAR-10 ---


def short_string(value):
  return b'U' + bytes([len(value)]) + value


def python2_pickle(pixels, labels):
  """The bytes that Python 2 wrote for {'data': uint8 [N, 3072], 'labels'}."""
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
  """{name: bytes} as published, and images [6 * batch, 32, 32, 3], labels."""
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
  monkeypatch.setattr(sources, 'CIFAR10_BATCH', 20)


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
  md5 = sources.hashlib.md5(archive.read_bytes()).hexdigest()
  monkeypatch.setitem(sources.CIFAR10_MD5, archive.name, md5)
  monkeypatch.setattr(sources, 'CIFAR10_URL', archive.parent.as_uri() + '/')
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


# --- The user's own images ---


def save(path, value, size=(12, 9), mode='RGB', **options):
  """Writes a solid image of a grey value; makes its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('L', size, value).convert(mode).save(path, **options)


def values(dataset):
  """The grey value of every image of a dataset, and its label."""
  batch = dataset.batch(np.arange(len(dataset)))
  assert np.ptp(batch['image'].astype(int), axis=(1, 2, 3)).max() <= 2  # JPEG
  return [int(v) for v in batch['image'][:, 0, 0, 0]], list(batch['label'])


def test_folder_of_any_images_at_any_depth(tmp_path):
  names = ['a.png', 'b.JPG', 'c/d.webp', 'c/e/f.jpeg', 'c/g.bmp', 'h.png']
  for i, name in enumerate(names):
    save(tmp_path / name, 40 * i, size=(30 + i, 20))
  (tmp_path / 'notes.txt').write_text('not an image')
  save(tmp_path / '.trash' / 'x.png', 255)
  save(tmp_path / '__MACOSX' / 'x.png', 255)
  save(tmp_path / '._a.png', 255)
  (tmp_path / 'c' / 'loop').symlink_to(tmp_path)
  c = config('folder', tmp_path, image_size=16)
  train, test = datasets.load(c, 'train'), datasets.load(c, 'test')
  assert (len(train), len(test)) == (5, 1) and train.num_classes == 0
  seen = values(train)[0] + values(test)[0]
  np.testing.assert_allclose(sorted(seen), 40 * np.arange(6), atol=2)
  again = datasets.load(c, 'train')
  assert again.fingerprint == train.fingerprint != test.fingerprint
  save(tmp_path / 'c' / 'd.webp', 77, size=(50, 50))
  assert datasets.load(c, 'train').fingerprint != train.fingerprint


def test_folder_with_splits_and_classes(tmp_path):
  for split, base in (('train', 0), ('val', 100), ('other', 200)):
    for i, name in enumerate(('dog/1.png', 'cat/2.png', 'dog/x/3.png')):
      save(tmp_path / split / name, base + i)
  c = config('folder', tmp_path, num_channels=1)
  train, test = datasets.load(c, 'train'), datasets.load(c, 'test')
  assert values(train) == ([1, 0, 2], [0, 1, 1])  # by name: cat, dog, dog
  assert values(test) == ([101, 100, 102], [0, 1, 1])
  assert train.num_classes == test.num_classes == 2
  whole = config('folder', tmp_path / 'train', num_channels=1)
  train, test = datasets.load(whole, 'train'), datasets.load(whole, 'test')
  (grey, label), (more_grey, more_label) = values(train), values(test)
  class_of = dict(zip(grey + more_grey, label + more_label, strict=True))
  assert class_of == {0: 1, 1: 0, 2: 1}


def test_ffhq_holds_out_its_last_seventh(tmp_path):
  for i in range(14):
    save(tmp_path / f'{i // 5:05d}' / f'{i:05d}.png', i, size=(8, 8))
  c = config('ffhq', tmp_path)
  assert values(datasets.load(c, 'train')) == (list(range(12)), [0] * 12)
  assert values(datasets.load(c, 'test')) == ([12, 13], [0, 0])
  assert datasets.load(c, 'train').num_classes == 0


@pytest.mark.parametrize('suffix', ['png', 'jpg'])
def test_a_damaged_image_is_named_before_training(suffix, tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
  paths = [tmp_path / f'{i}.{suffix}' for i in range(20)]
  for path in paths:
    Image.fromarray(noise).save(path)
  c = config('folder', tmp_path)
  datasets.load(c, 'train')
  bad = sorted(paths)[sources.split_indices(20, 'train')[7]]
  content = bad.read_bytes()
  for damage in (content[: len(content) // 2], b'', bytes(len(content))):
    bad.write_bytes(damage)
    with pytest.raises(ValueError, match=f'{bad.name} cannot be read .*remove'):
      datasets.load(c, 'train')
  bad.write_bytes(content)
  assert len(datasets.load(c, 'train')) == 18


def test_images_are_checked_once(tmp_path, monkeypatch):
  for i in range(20):
    save(tmp_path / f'{i}.png', i)
  c = config('folder', tmp_path)
  datasets.load(c, 'train')
  monkeypatch.setattr(sources, 'decode_file', None)  # would fail
  assert len(datasets.load(c, 'train')) == 18


def test_sixteen_bit_images_are_refused(tmp_path):
  for i in range(2):
    deep = np.full((8, 8), 40_000, np.uint16)
    Image.fromarray(deep).save(tmp_path / f'{i}.png')
  with pytest.raises(ValueError, match='png cannot be read .* not 8 bits deep'):
    datasets.load(config('folder', tmp_path), 'train')


def test_a_folder_without_images_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError, match='folder: 0 images .png, jpg'):
    datasets.load(config('folder', tmp_path), 'train')


def test_photographs_are_turned_upright(tmp_path):
  pixels = np.zeros((8, 8), np.uint8)
  pixels[:4] = 200
  exif = Image.Exif()
  exif[0x0112] = 3  # orientation: half a turn
  for i in range(2):
    Image.fromarray(pixels).save(tmp_path / f'{i}.png', exif=exif)
  c = config('folder', tmp_path, num_channels=1)
  image = datasets.load(c, 'train').fetch([0])[0, :, :, 0]
  np.testing.assert_array_equal(image, pixels[::-1])


@pytest.mark.parametrize('keys', [('images', 'labels'), ('arr_0', 'arr_1')])
def test_npz_without_splits(keys, tmp_path):
  images = np.arange(30, dtype=np.uint8)[:, None, None, None]
  images = np.broadcast_to(images, (30, 8, 8, 3))
  labels = np.arange(30) % 4
  np.savez(tmp_path / 'a.npz', **dict(zip(keys, (images, labels), strict=True)))
  c = config('npz', tmp_path / 'a.npz')
  train, test = datasets.load(c, 'train'), datasets.load(c, 'test')
  assert (len(train), len(test), train.num_classes) == (27, 3, 4)
  seen = {}
  for dataset in (train, test):
    seen |= dict(zip(*values(dataset), strict=True))
  assert seen == {i: i % 4 for i in range(30)}


def test_npz_of_floats_and_of_grey_images(tmp_path):
  levels = np.linspace(0, 1, 256)
  x = np.broadcast_to(levels[:, None, None], (256, 8, 8))
  np.savez(tmp_path / 'a.npz', x_train=x, x_test=x[:2])
  c = config('npz', tmp_path / 'a.npz', num_channels=1)
  assert values(datasets.load(c, 'train')) == (list(range(256)), [0] * 256)
  assert datasets.load(c, 'train').num_classes == 0
  assert len(datasets.load(c, 'test')) == 2
  resized = datasets.load(config('npz', tmp_path / 'a.npz', 4, 1), 'train')
  assert resized.fetch([0, 9]).shape == (2, 4, 4, 1)
  whole_numbers = {'images': (x * 255).round().astype(np.int64)}
  np.savez(tmp_path / 'b.npz', **whole_numbers)
  assert (
    len(datasets.load(config('npz', tmp_path / 'b.npz', 8, 1), 'test')) == 25
  )


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    ({'images': np.full((4, 8, 8, 3), -0.5)}, r'float64 in \[-0.5, 0\]: use'),
    ({'images': np.full((4, 8, 8, 3), np.nan)}, r'in \[nan, nan\]: use uint8'),
    ({'images': np.full((4, 8, 8, 3), 200.0)}, r'in \[0, 200\]: use uint8'),
    ({'images': np.full((4, 8, 8, 3), 300)}, r'int64 in \[0, 300\]'),
    ({'images': np.zeros((4, 3, 8, 8))}, r'shape \(4, 3, 8, 8\), not \[N, H'),
    ({'images': np.zeros((4, 192))}, r'shape \(4, 192\), not \[N, H, W, C\]'),
    (
      {'images': np.zeros((4, 8, 8, 4))},
      '4 channels .* data.num_channels is 3',
    ),
    ({'images': np.zeros((1, 8, 8, 3))}, 'cannot be split'),
    ({'pictures': np.zeros(3)}, r"holds \['pictures'\]: name the images"),
    ({'x_train': np.zeros((0, 8, 8, 3))}, 'holds no images'),
    ({'images': np.array([None])}, 'not an .npz of plain arrays'),
    (
      {'images': np.zeros((4, 8, 8, 3)), 'labels': np.zeros((4, 10), int)},
      r'labels is int64 \(4, 10\), not 4 whole numbers',
    ),
    (
      {'images': np.zeros((4, 8, 8, 3)), 'labels': np.arange(-1, 3)},
      'numbers from 0',
    ),
  ],
)
def test_a_bad_npz_is_one_clear_line(arrays, message, tmp_path):
  np.savez(tmp_path / 'a.npz', **arrays)
  with pytest.raises(ValueError, match=message):
    datasets.load(config('npz', tmp_path / 'a.npz'), 'train')


def test_no_npz_at_all(tmp_path):
  (tmp_path / 'a.npz').write_bytes(b'PK not really')
  with pytest.raises(ValueError, match='a.npz is not an .npz of plain arrays'):
    datasets.load(config('npz', tmp_path / 'a.npz'), 'train')
