"""Tests of what subfolders mean: splits, classes, and what is left out."""

import os

import numpy as np
import pytest
from PIL import Image

from data import datasets
from tests.data.shared import config, values


def fill(root, *folders, start=0):
  """Write one solid image into every folder; return the number of images."""
  for i, name in enumerate(folders):
    (root / name).mkdir(parents=True, exist_ok=True)
    Image.new('L', (8, 8), start + i).save(root / name / f'{start + i}.png')
  return len(folders)


@pytest.fixture
def root(tmp_path):
  """Return a folder that the cache is not in."""
  (tmp_path / 'images').mkdir()
  return tmp_path / 'images'


def load(root, **changes):
  c = config('folder', root, num_channels=1, **changes)
  return datasets.load(c, 'train'), datasets.load(c, 'test')


@pytest.mark.parametrize(
  ('train', 'test'),
  [
    ('train', 'test'), ('train', 'valid'), ('Train', 'Test'), ('TRAIN', 'VAL'),
    ('training', 'testing'), ('training', 'validation'), ('train', 'dev'),
    ('train_images', 'test-images'), ('train2017', 'val2017'),
    ('TrainSet', 'TestSet'), ('training_data', 'eval'), ('train', 'holdout'),
  ],
)  # fmt: skip
@pytest.mark.parametrize('above', ['', 'pets', 'pets/images'])
def test_splits_in_any_spelling(train, test, above, tmp_path):
  root = tmp_path / above
  fill(root, f'{train}/cat', f'{train}/dog', f'{train}/dog')
  fill(root, f'{test}/cat', f'{test}/dog', start=100)
  ours, theirs = load(tmp_path)
  assert values(ours) == ([0, 1, 2], [0, 1, 1])
  assert values(theirs) == ([100, 101], [0, 1])
  assert ours.classes == theirs.classes == ('cat', 'dog')
  assert ours.num_classes == 2 and ours.notes == ()


def test_of_three_splits_the_test_set_is_used(root):
  fill(root, 'train/a', 'train/b')
  fill(root, 'val/a', 'val/b', 'extra/a', '.', start=50)
  fill(root, 'test/a', 'test/b', start=100)
  train, test = load(root)
  assert (values(train)[0], values(test)[0]) == ([0, 1], [100, 101])
  assert train.notes == test.notes
  assert train.notes == (
    'Left out: images in no split, 1 of extra, 1 of images beside folders, '
    '2 of val.',
  )


@pytest.mark.parametrize('name', ['train', 'Training', 'pets'])
def test_a_folder_alone_keeps_its_classes(name, tmp_path):
  fill(tmp_path, *[f'{name}/{c}' for c in ('cat', 'dog')] * 10)
  train, test = load(tmp_path)
  assert (len(train), len(test)) == (18, 2)
  (grey, label), (more_grey, more_label) = values(train), values(test)
  seen = dict(zip(grey + more_grey, label + more_label, strict=True))
  assert seen == {i: i % 2 for i in range(20)}
  assert train.classes == ('cat', 'dog')


@pytest.mark.parametrize(
  ('folders', 'found'),
  [
    (('train/a', 'dog/a'), 'has dog, train, which are not one split'),
    (('Train/a', 'training/a', 'test/a'), 'has Train, test, training, which'),
    (('train/a', 'test/a', 'testing/a'), 'has test, testing, train, which'),
    (('train/a', '.'), 'has images beside folders, train, which'),
    (('test/a', 'test/b'), r"split 'test' alone: .* data.path to .*/test$"),
    (('x/valid/a', 'x/valid/b'), r"split 'valid' alone: .*/x/valid$"),
    (('dev/a', 'prod/a'), 'has dev, prod, which'),
    (('cat/train', 'cat/test', 'dog/train', 'dog/test'), r'inside .*cat, dog'),
    (('trainA', 'trainB', 'testA', 'testB'), 'folders testA, testB, trainA'),
    (('tr/a', 'tr/b', 'te/a', 'te/b'), 'te, tr with the same folders a, b'),
    (('cats_train', 'cats_test'), 'folders cats_test, cats_train, whose names'),
  ],
)
def test_unclear_splits_are_refused_with_what_was_found(
  folders, found, tmp_path
):
  fill(tmp_path, *folders)
  with pytest.raises(ValueError, match=found) as error:
    load(tmp_path)
  assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)


def test_classes_whose_names_are_like_splits(tmp_path):
  """One such name, and no folder for the other split, is a class."""
  names = ['steam_train', 'valley', 'testament', 'trainer']
  fill(tmp_path, *names)
  assert load(tmp_path)[0].classes == tuple(sorted(names))
  split = tmp_path / 'split'
  fill(split, 'train/train', 'train/car', 'test/train', 'test/car')
  assert load(split)[0].classes == ('car', 'train')


def test_folders_that_end_in_numbers_keep_their_order(tmp_path):
  fill(tmp_path, 'class_10', 'class_9', 'class_1')
  train, _ = load(tmp_path)
  assert train.classes == ('class_1', 'class_9', 'class_10')


def test_numbered_folders_keep_their_order(tmp_path):
  fill(tmp_path, *[f'{i}' for i in range(12)])
  train, test = load(tmp_path)
  assert train.classes == tuple(str(i) for i in range(12))
  for dataset in (train, test):
    grey, label = values(dataset)
    assert grey == label
  fill(tmp_path / 'years', *[f'train/{i}' for i in (9, 10, 8)], 'test/8')
  assert load(tmp_path / 'years')[0].classes == ('8', '9', '10')


def test_what_is_left_out_is_said(root):
  fill(root, 'train/a', 'train/b', 'test/a', 'test/c')
  for name in ('x.GIF', 'y.gif', 'z.tif', 'train/a/notes.txt', 'LICENSE'):
    (root / name).write_bytes(b'anything')
  (root / '.hidden.gif').write_bytes(b'anything')
  Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(root / 'train/d.PNG')
  lines = datasets.describe(*load(root))
  assert lines == [
    'Data: 2 images of folder and 2 for tests; 3 classes: 0 a, 1 b, 2 c.',
    'Left out: 2 .gif, 1 without a suffix, 1 .txt, 1 16-bit .png, 1 .tif '
    '(.png, .jpg, .jpeg, .webp, .bmp with 8 bits are read).',
    'Classes in one split alone: b, c.',
  ]
  fill(root, 'train')
  assert datasets.describe(*load(root)) == [
    'Data: 3 images of folder and 2 for tests.',
    lines[1],
    'No classes: there are images beside folders: a, b, c, images beside '
    'folders.',
  ]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
  fill(tmp_path, 'a', 'b')
  scandir = os.scandir

  def refuse(path):
    if os.fspath(path).endswith('b'):
      raise PermissionError(13, 'Permission denied', os.fspath(path))
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  with pytest.raises(PermissionError, match='b'):
    load(tmp_path)


# --- Identity ---


def folder_of(root, images, suffix='bmp'):
  root.mkdir()
  for i, image in enumerate(images):
    Image.fromarray(image[..., 0]).save(root / f'{i:04d}.{suffix}')
  return root


@pytest.fixture
def images():
  return np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)


def fingerprints(root, **changes):
  return [dataset.fingerprint for dataset in load(root, **changes)]


def test_folders_of_equal_names_and_sizes_are_told_apart(images, tmp_path):
  a = folder_of(tmp_path / 'a', images)
  b = folder_of(tmp_path / 'b', 255 - images)
  for file in a.iterdir():
    stat = file.stat()
    assert (b / file.name).stat().st_size == stat.st_size
    os.utime(b / file.name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  first = fingerprints(a)
  assert not set(first) & set(fingerprints(b))
  assert fingerprints(a) == first
  # One takes the place of the other.
  a.rename(tmp_path / 'c')
  b.rename(a)
  assert not set(fingerprints(a)) & set(first)
  assert fingerprints(tmp_path / 'c') == first


def test_a_file_that_changes_in_place_changes_the_identity(images, tmp_path):
  root = folder_of(tmp_path / 'a', images)
  first = fingerprints(root)
  for file in root.iterdir():
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert not set(fingerprints(root)) & set(first)


def test_the_same_pixels_are_the_same_data(images, tmp_path):
  """Names, formats and folders do not matter, nor whether it is an array."""
  root = folder_of(tmp_path / 'a', images)
  first = fingerprints(root)
  assert fingerprints(folder_of(tmp_path / 'b', images, 'png')) == first
  np.savez(tmp_path / 'a.npz', images=images)
  np.save(tmp_path / 'a.npy', images)
  for name in ('a.npz', 'a.npy'):
    c = config('npz', tmp_path / name, num_channels=1)
    found = [datasets.load(c, split).fingerprint for split in ('train', 'test')]
    assert found == first
  assert not set(fingerprints(root, image_size=4)) & set(first)
  # Labels count.
  for i, file in enumerate(sorted(root.iterdir())):
    (root / 'ab'[i % 2]).mkdir(exist_ok=True)
    file.rename(root / 'ab'[i % 2] / file.name)
  assert not set(fingerprints(root)) & set(first)


@pytest.mark.parametrize(
  'damage', ['', '{', '[]', '{"fingerprint": 1, "notes": []}', '\0']
)
def test_a_damaged_marker_is_made_again(damage, images, tmp_path, monkeypatch):
  root = folder_of(tmp_path / 'a', images)
  first = fingerprints(root)
  markers = list((tmp_path / 'cache' / 'verified').iterdir())
  assert len(markers) == 2
  for marker in markers:
    marker.write_text(damage)
  assert fingerprints(root) == first


# --- Transparency ---


def transparent(mode):
  """Return an image that hides red under alpha 0 in its left half."""
  image = Image.new('RGBA', (8, 8), (255, 0, 0, 0))
  image.paste((0, 255, 0, 255), (4, 0, 8, 8))
  if mode == 'P':
    palette = Image.new('P', (8, 8))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.paste(1, (4, 0, 8, 8))
    palette.info['transparency'] = 0
    return palette
  if mode == 'RGB':
    opaque = image.convert('RGB')
    opaque.info['transparency'] = (255, 0, 0)
    return opaque
  return image.convert(mode)


@pytest.mark.parametrize('background', ['white', 'grey', 'black'])
@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'RGB'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_alpha_is_put_on_the_background(mode, background, channels, root):
  for i in range(2):
    image = transparent(mode)
    options = {k: v for k, v in image.info.items() if k == 'transparency'}
    image.save(root / f'{i}.png', **options)
  c = config('folder', root, 8, channels, background)
  train, test = datasets.load(c, 'train'), datasets.load(c, 'test')
  seen = train.fetch([0])[0]
  left, right = seen[:, :4], seen[:, 4:]
  lines = datasets.describe(train, test)
  if channels == 4:
    assert not left[..., 3].any() and (right[..., 3] == 255).all()
    assert len(lines) == 1
    return
  assert (left == {'white': 255, 'grey': 128, 'black': 0}[background]).all()
  green = (0, 255, 0) if channels == 3 and mode != 'LA' else (150,)
  assert (np.abs(right - np.int32(green)) <= 1).all()
  assert lines[1:] == [
    '1 files have transparent pixels or an alpha channel: they are put on '
    f'data.background={background!r}.'
  ]
  # It is known without decoding them again.
  again = datasets.load(c, 'train'), datasets.load(c, 'test')
  assert datasets.describe(*again) == lines
