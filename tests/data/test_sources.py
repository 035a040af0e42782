"""Tests of reading images: every way to read them, and every way to fail."""

import functools
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from data import __main__ as command_line
from data import datasets, sources
from tests.data import shared
from tests.data.shared import config

values = functools.partial(shared.values, tolerance=2)  # For JPEG files.


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


def save(path, value, size=(12, 9), mode='RGB', **options):
  """Write a solid image of a grey value, and make its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('L', size, value).convert(mode).save(path, **options)


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


def test_sixteen_bit_images_are_left_out(tmp_path):
  """Without two others there is nothing to train on."""
  for i in range(2):
    deep = np.full((8, 8), 40_000, np.uint16)
    Image.fromarray(deep).save(tmp_path / f'{i}.png')
  with pytest.raises(FileNotFoundError, match='0 images.*out: 2 16-bit .png'):
    datasets.load(config('folder', tmp_path), 'train')


def test_sixteen_bit_colours_are_no_images(tmp_path):
  """PIL would read them as 8 bits without a word."""

  def chunk(kind, content):
    checked = kind + content
    size, check = len(content), zlib.crc32(checked)
    return size.to_bytes(4) + checked + check.to_bytes(4)

  header = (8).to_bytes(4) * 2 + bytes([16, 2, 0, 0, 0])
  rows = zlib.compress((b'\0' + b'\x12\x34' * 24) * 8)
  png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
  png += chunk(b'IDAT', rows) + chunk(b'IEND', b'')
  for i in range(2):
    (tmp_path / f'{i}.png').write_bytes(png)
  assert sources.image_files(tmp_path) == []
  with pytest.raises(ValueError, match='png cannot be read .* not 8 bits deep'):
    sources.decode_file(tmp_path / '0.png', size=8, channels=3)


def test_only_formats_of_the_suffixes_are_read(tmp_path):
  """PostScript would run a program; a GIF would lose its other frames."""
  for kind in ('GIF', 'TIFF', 'EPS'):
    folder = tmp_path / kind
    folder.mkdir()
    for i in range(2):
      Image.new('RGB', (8, 8)).save(folder / f'{i}.png', format=kind)
    with pytest.raises(ValueError, match='png cannot be read as an image'):
      datasets.load(config('folder', folder), 'train')


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
    ({'images': np.zeros((0, 8, 8))}, 'images holds no images'),
    ({'images': np.zeros((4, 0, 8, 3))}, r'shape \(4, 0, 8, 3\), not'),
    ({'images': np.float64(1.0)}, r'shape \(\), not'),
    ({'images': np.full((4, 8, 8, 3), np.inf)}, r'in \[0, inf\]: use uint8'),
    ({'images': np.ones((4, 8, 8, 3), bool)}, 'is bool: use uint8'),
    ({'images': np.full((4, 8, 8, 3), 'a')}, 'is <U1: use uint8'),
    ({'images': np.ones((4, 8, 8, 3), complex)}, 'is complex128: use uint8'),
    (
      {'images': np.zeros((4, 8, 8, 3)), 'labels': np.full(4, np.nan)},
      r'labels is float64 \(4,\), not 4 whole numbers',
    ),
    (
      {
        'x_train': np.zeros((4, 8, 8, 3)),
        'y_train': np.zeros((4, 1), int),
        'y_test': np.full(4, np.nan),
      },
      r'y_test is float64 \(4,\), not N whole numbers',
    ),
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


@pytest.mark.parametrize('content', [b'PK not really', b'', b'\x93NUMPY\x01'])
@pytest.mark.parametrize('suffix', ['npz', 'npy'])
def test_no_npz_at_all(suffix, content, tmp_path):
  path = tmp_path / f'a.{suffix}'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f'{path} is not an .npz of plain array'):
    datasets.load(config('npz', path), 'train')


def test_npy_of_images(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
  np.save(tmp_path / 'a.npy', images)
  for name in ('npz', 'cifar10'):
    c = config(name, tmp_path / 'a.npy')
    train, test = datasets.load(c, 'train'), datasets.load(c, 'test')
    assert (len(train), len(test)) == (18, 2)
  found = datasets.user_images(datasets.Data(image_size=8), tmp_path / 'a.npy')
  np.testing.assert_array_equal(found.fetch(range(20)), images)
  np.save(tmp_path / 'b.npy', np.array([None]))
  with pytest.raises(ValueError, match='b.npy is not an .npz of plain arrays'):
    datasets.load(config('npz', tmp_path / 'b.npy'), 'train')


def test_labels_of_keras(tmp_path):
  images = np.zeros((12, 8, 8, 3), np.uint8)
  labels = np.arange(12)[:, None] % 5
  np.savez(tmp_path / 'a.npz', x_train=images, y_train=labels,
           x_test=images[:5], y_test=labels[:5].astype(np.uint8))  # fmt: skip
  for split, count in (('train', 12), ('test', 5)):
    found = datasets.load(config('npz', tmp_path / 'a.npz'), split)
    assert found.num_classes == 5
    assert list(values(found)[1]) == [i % 5 for i in range(count)]


# --- Decoded images in the cache folder ---


@pytest.fixture
def classes(tmp_path):
  """Return a folder of two classes of ten images, and its section `data`."""
  for i in range(20):
    save(tmp_path / 'set' / 'ab'[i % 2] / f'{i}.png', 10 * i)
  return tmp_path / 'set', config('folder', tmp_path / 'set')


def cache(root):
  command_line.main(['cache', 'folder', '--path', str(root), '--image_size=8'])


def kept(tmp_path):
  return sorted((tmp_path / 'cache').glob('decoded*'))


def everything(c):
  """Return name, images, labels, fingerprint and classes of both splits."""
  found = [datasets.load(c, split) for split in ('train', 'test')]
  pairs = [split.read(np.arange(len(split))) for split in found]
  facts = [(s.fingerprint, s.classes, s.num_classes) for s in found]
  return [np.asarray(v).tolist() for pair in pairs for v in pair], facts


def test_a_cached_set_is_the_same_and_is_not_decoded(
  classes, tmp_path, monkeypatch, capsys
):
  root, c = classes
  before = everything(c)
  shutil.rmtree(tmp_path / 'cache')
  count, decode = [], sources.decode_file
  monkeypatch.setattr(
    sources, 'decode_file', lambda *a, **k: count.append(a) or decode(*a, **k)
  )
  monkeypatch.setattr(sources, 'MEMORY_LIMIT', 0)
  cache(root)
  assert '18 images for train are in' in capsys.readouterr().out
  assert len(count) == 20  # Checked and written in one pass.
  cache(root)
  after = everything(c)
  assert len(count) == 20
  assert after == before
  assert len(kept(tmp_path)) == 2
  train = datasets.load(c, 'train')
  assert train.notes == (f'Decoded images are read from {folder_of(train)}.',)
  mapped = np.load(folder_of(train) / 'images.npy', mmap_mode='r')
  np.testing.assert_array_equal(mapped, train.fetch(np.arange(18)))


def folder_of(train):
  return sources.kept_at(config('folder'), train.fingerprint)


def test_a_stale_cache_is_not_used(classes, tmp_path):
  root, c = classes
  cache(root)
  for file in root.rglob('*.png'):  # All, because the split is random.
    save(file, 255)
  found = datasets.load(c, 'train')
  assert set(values(found)[0]) == {255} and not found.notes
  cache(root)
  assert datasets.load(c, 'train').notes
  assert len(kept(tmp_path)) == 4
  # Another size or another background is another set.
  smaller = config('folder', root, image_size=4)
  assert not datasets.load(smaller, 'train').notes


@pytest.mark.parametrize('damage', ['pixel', 'cut', 'labels', 'missing'])
def test_a_damaged_cache_is_refused(damage, classes, tmp_path):
  root, c = classes
  cache(root)
  folder = folder_of(datasets.load(c, 'train'))
  path = folder / ('labels.npy' if damage == 'labels' else 'images.npy')
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  if damage == 'missing':
    path.unlink()
  else:
    path.write_bytes(content[:-9] if damage == 'cut' else content)
  clear = f'cache --clear {folder.name}'
  with pytest.raises(ValueError, match=f'decoded-.* is damaged .*{clear}'):
    datasets.load(c, 'train')
  command_line.main(clear.split())
  assert not datasets.load(c, 'train').notes


def test_an_interrupted_cache_leaves_nothing(classes, tmp_path, monkeypatch):
  root, c = classes

  def save_fails(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(sources.np, 'save', save_fails)
  with pytest.raises(SystemExit, match='^error: .*No space left'):
    cache(root)
  assert not kept(tmp_path)
  full = shutil._ntuple_diskusage(1, 1, 0)
  monkeypatch.setattr(sources.shutil, 'disk_usage', lambda path: full)
  with pytest.raises(SystemExit, match=r'^error: .*SCORE_SDE_CACHE to'):
    cache(root)


def test_a_set_in_memory_needs_no_cache(tmp_path):
  with pytest.raises(SystemExit, match='^error: digits is held in memory'):
    command_line.main(
      ['cache', 'digits', '--image_size', '8', '--num_channels', '1']
    )
  with pytest.raises(SystemExit, match='^error: --clear does not go with'):
    command_line.main(['cache', 'digits', '--clear'])
