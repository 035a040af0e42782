"""The table of data sets, and the section `data` of a config.

`DATASETS` maps a name to a function (config, split) -> `batches.Dataset`, where
`config` is the section `data` (see `Data`) and `split` is 'train' or 'test'. A
new data set is one function here and one line in the table. Functions of
`DECODED`, whose images are decoded when they are read, have an argument `keep`.

Images cross to the device as uint8; there `pixels.preprocess` makes them the
input of the model. TensorFlow is needed only to prepare the data sets of
tensorflow-datasets, once:

  python -m data prepare celeba --data_dir DIR
"""

import collections
import dataclasses
import functools
import pathlib
import re
import types

import numpy as np

from data import arrays, batches, cifar, pixels, sources, toy
from data.prepare import Prepared
from runtime import options
from runtime.options import Options, option
from runtime.progress import say

# --- Arrays and points ---


def cifar10(config, split):
  """Return CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images, 10 classes.

  data.path is one of the two published archives, the folder that it unpacks
  to, or an .npz file. Without a path, the archive is downloaded into the cache
  folder.
  """
  if config.path:
    path = sources.existing_path(
      config, 'a CIFAR-10 archive, its folder, or an .npz'
    )
  else:
    path = cifar.archive()
  if path.suffix in sources.ARRAY_SUFFIXES:
    images, labels, _ = sources.read_npz(path, split)
  else:
    images, labels = cifar.read(path, split)
  return sources.in_memory(config, images, labels, 10, cifar.CLASSES)


def npz(config, split):
  """Return the images of an .npz or .npy file; see `sources.stored`."""
  path = sources.existing_path(config, 'an .npz of images')
  images, labels, classes, condition = sources.stored_images(path, split)
  return sources.in_memory(config, images, labels, classes, condition=condition)


def digits(config, split):
  """Return scikit-learn's handwritten digits: 8x8 pixels, grey, 10 classes.

  There are 1500 training images and 297 test images.
  """
  from sklearn.datasets import load_digits

  data = load_digits()
  members = sources.split_indices(len(data.images), split, num_test=297)
  images = np.floor(data.images / 16 * 255 + 0.5).astype(np.uint8)
  images, labels = images[members, ..., None], data.target[members]
  return sources.in_memory(config, images, labels, 10, tuple('0123456789'))


def _check_points(config):
  """Raise ValueError for settings with which points cannot be used."""
  if tuple(config.shape) != (2,) or config.centered or config.std:
    raise ValueError(
      f'{config.dataset} needs data.shape=(2,), data.centered=False and no '
      'data.mean and data.std'
    )


def points(config, split):
  """Return points of a distribution of `toy`: float32 [N, 2], no labels.

  There are 100,000 training points and 4,000 test points, which are always the
  same.
  """
  _check_points(config)
  seed, n = {'train': (0, 100_000), 'test': (1, 4000)}[split]
  rng = np.random.default_rng(seed)
  x = toy.DISTRIBUTIONS[config.dataset].sample(rng, n).astype(np.float32)
  return batches.unlabelled(x, config.dataset)


# --- Folders of images ---


# What a folder or file of a split can be called, in lower case. Some have
# another word behind it: train_images, val2017, TestSet.
_SPLITS = {
  'train': 'train|training|trainset|trn',
  'test': 'test|testing|tst',
  'val': 'val|valid|validate|validation|dev|devel|development|eval|evaluation'
  '|holdout|heldout',
}
_BEHIND = r'(set|data|split|images?|imgs?|pictures?|photos?|files?)?'


def _split_of(name):
  """Return 'train', 'test' or 'val' for the name of a split, else None."""
  letters = re.sub('[^a-z]', '', name.lower())
  for split, words in _SPLITS.items():
    if re.fullmatch(f'({words}){_BEHIND}', letters):
      return split
  return None


def _hints_at(name):
  """Return the splits whose words are in a name, as in trainA and test_cats."""
  return {
    'train' if split == 'train' else 'test'
    for split, words in _SPLITS.items()
    if re.search(rf'(?<![a-z])({words})[a-z]?(?![a-z])', name.lower())
  }


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a folder is divided into splits.

  Attributes:
    depth: number of folders above those that can name classes.
    train, test: paths of the images of the splits; None if the folder has no
      splits.
    notes: lines about images that are in no split.
  """

  depth: int
  train: list[pathlib.Path] | None = None
  test: list[pathlib.Path] | None = None
  notes: list[str] = dataclasses.field(default_factory=list)


# Stands for the images that are beside folders, not in one.
_BESIDE = 'images beside folders'


def _folders(files, depth):
  """Return the names of the folders at a depth that images are in."""
  return {
    f.parts[depth] if len(f.parts) > depth + 1 else _BESIDE for f in files
  }


def _inner_folders(files, depth):
  """Return {name of a folder at a depth: names of the folders in it}."""
  inner = collections.defaultdict(set)
  for file in files:
    if len(file.parts) > depth + 1:
      inner[file.parts[depth]] |= _folders([file], depth + 1)
  return inner


def _listed(names):
  """Return names as text, at most twelve of them."""
  names = sorted(names)
  return ', '.join([*names[:12], *(['...'] if len(names) > 12 else [])])


def _check_no_splits(root, files, depth, found):
  """Raise ValueError if folders that are no splits look like some."""
  for below in range(depth + 1, max(len(file.parts) for file in files)):
    inner = {_split_of(name) for name in _folders(files, below)} - {None}
    if 'train' in inner and len(inner) > 1:
      raise ValueError(
        f'{root} has splits inside of other folders ({found}): move train and '
        'test to the top, with the folders of classes in them'
      )
  hints = {h for name in _folders(files, depth) for h in _hints_at(name)}
  if len(hints) > 1:
    raise ValueError(
      f'{root} has the folders {found}, whose names look like splits: name '
      'the splits train and test, and rename folders of classes'
    )
  inner = _inner_folders(files, depth)
  (same, *others) = inner.values() or [set()]
  if others and len(same) > 1 and all(other == same for other in others):
    raise ValueError(
      f'{root} has the folders {found} with the same folders {_listed(same)} '
      'in each, so it is not clear which of them are classes: name splits '
      'train and test, or put the images of each class into one folder'
    )


def find_layout(root, files):
  """Return the Layout of a folder of images.

  A folder that holds everything is skipped, so that train/ alone is no split.

  Args:
    root: the folder, for errors.
    files: paths of the images in it.

  Raises:
    ValueError: folders look like splits, but it is not clear which they are.
  """
  depth, tops = 0, _folders(files, 0)
  while len(tops) == 1 and _BESIDE not in tops:
    (only,) = tops
    if _split_of(only) in ('test', 'val'):
      raise ValueError(
        f'{root} has the split {only!r} alone: add a folder train, or set '
        f'data.path to {root.joinpath(*files[0].parts[: depth + 1])}'
      )
    depth += 1
    tops = _folders(files, depth)
  named = collections.defaultdict(list)
  for name in sorted(tops - {_BESIDE}):
    named[_split_of(name)].append(name)
  train, held_out = named['train'], named['test'] or named['val']
  if not train and not held_out:
    _check_no_splits(root, files, depth, _listed(tops))
    return Layout(depth)
  if len(train) != 1 or len(held_out) != 1:
    splits = [name for some in (*named.values(),) for name in some]
    taken = _listed(set(splits) - set(named[None]))
    raise ValueError(
      f'{root} has {_listed(tops)}, which are not one split for training and '
      f'one for tests (named like splits: {taken}): name the splits train and '
      'test, and rename folders of classes, to class_dev, say'
    )
  members = {name: [] for name in tops}
  for file in files:
    top = file.parts[depth] if len(file.parts) > depth + 1 else _BESIDE
    members[top].append(file)
  train, test = members.pop(train[0]), members.pop(held_out[0])
  left = [f'{len(some)} of {name}' for name, some in sorted(members.items())]
  notes = [f'Left out: images in no split, {", ".join(left)}.'] if left else []
  return Layout(depth + 1, train, test, notes)


def class_order(names):
  """Return names of classes in order: by number if they differ in it alone.

  Example:
    >>> class_order({'10', '9', '1'}), class_order({'class_10', 'class_9'})
    (['1', '9', '10'], ['class_9', 'class_10'])
    >>> class_order({'b', 'a10', 'a9'})
    ['a10', 'a9', 'b']
  """
  found = {name: re.fullmatch(r'(\D*)(\d+)(\D*)', name) for name in names}
  if all(found.values()):
    around = {(match[1], match[3]) for match in found.values()}
    if len(around) == 1:
      return sorted(names, key=lambda name: (int(found[name][2]), name))
  return sorted(names)


def folder(config, split, *, labelled=True, last_seventh=False, keep=False):
  """Return the images of a folder, at any depth.

  Subfolders whose names say train and test (or validation), in any spelling,
  are the splits. Without them, a fixed random tenth of the images is the test
  set. Within a split the first level of subfolders names the classes if there
  are two or more of them and every image lies in one.

  Args:
    config: section `data` of the config.
    split: 'train' or 'test'.
    labelled: whether subfolders can name classes.
    last_seventh: whether the last seventh of the images by name is the test
      set, as the authors of FFHQ split it. (The paper trains on all images.)
    keep: see `sources.decoded`.

  Raises:
    FileNotFoundError: there are fewer than two images.
    ValueError: data.path is empty, an image is damaged, or it is not clear
      which folders are splits.
  """
  root = sources.existing_path(config, 'a folder of images')
  if not root.is_dir():
    raise ValueError(f'{config.dataset}: data.path {root} is no folder')
  files, others = sources.files_below(root)
  if len(files) < 2:
    notes = ''.join(f'. {note}' for note in sources.left_out(others))
    raise FileNotFoundError(
      f'{config.dataset}: {len(files)} images (png, jpg, webp, bmp) in or '
      f'below {root}; 2 or more are needed{notes}'
    )
  layout = find_layout(root, files)
  notes = (*layout.notes, *sources.left_out(others))
  if layout.train:
    members = layout.test if split == 'test' else layout.train
    files = layout.train + layout.test
  elif last_seventh:
    end = len(files) * 6 // 7
    members = files[end:] if split == 'test' else files[:end]
  else:
    members = [files[i] for i in sources.split_indices(len(files), split)]

  depth = layout.depth
  names = _folders(files, depth) if labelled else set()
  if _BESIDE in names:
    if len(names) > 2:
      notes += (f'No classes: there are {_BESIDE}: {_listed(names)}.',)
    names = set()
  names = class_order(names) if len(names) > 1 else []
  if names and layout.train:
    both = _folders(layout.train, depth) & _folders(layout.test, depth)
    if single := [name for name in names if name not in both]:
      notes += (f'Classes in one split alone: {_listed(single)}.',)
  number = {name: i for i, name in enumerate(names)}
  found = sources.decoded_files(
    config,
    [root / file for file in members],
    [number.get(file.parts[depth], 0) for file in members],
    num_classes=len(names),
    classes=names,
    keep=keep,
  )
  return dataclasses.replace(found, notes=(*notes, *found.notes))


def user_images(config, path, *, key='--samples', exact=True):
  """Return all images of a folder or an .npz or .npy file of the user.

  Args:
    config: section `data` of the config.
    path: path of the folder or file.
    key: what gave the path, for errors.
    exact: whether the images must have the size of the config, because scores
      depend on how images are resized. Otherwise they are cropped and resized
      as those of data sets are.

  Raises:
    FileNotFoundError: there are no images at the path.
    ValueError: the images have another size or are damaged.
  """
  path = pathlib.Path(path)
  size = config.image_size
  config = types.SimpleNamespace(
    dataset=key,
    path=str(path),
    image_size=size,
    num_channels=config.num_channels,
    background=config.background,
  )

  def check_size(shape, where):
    if exact and tuple(shape) != (size, size):
      raise ValueError(
        f'{where} is {shape[0]}x{shape[1]}, but data.image_size is {size}: '
        'only images of one size can be compared, so resize them first'
      )

  if path.suffix.lower() in sources.IMAGE_SUFFIXES and path.is_file():
    raise ValueError(
      f'{key} {path} is an image: name the folder that it is in, or an .npz.'
    )
  if path.is_file():
    images, labels, _ = sources.read_npz(path, 'all')
    check_size(images.shape[1:3], path)
    return sources.in_memory(config, images, labels, num_classes=0)
  files, others = sources.files_below(path) if path.is_dir() else ([], [])
  if not files:
    raise FileNotFoundError(
      f'{key} {path} is neither an .npz nor a folder with images in it.'
    )
  paths = [path / file for file in files]
  if exact:
    for file in paths:
      check_size(sources.file_size(file), file)
  found = sources.decoded_files(config, paths)
  for note in (*sources.left_out(others), *found.notes):
    say(f'{key}: {note}')
  return found


def user_arrays(config, path, *, key='--samples'):
  """Return all arrays of an .npz or .npy file of the user.

  Args:
    config: section `data` of the config.
    path: path of the file.
    key: what gave the path, for errors.

  Returns:
    float32 [N, *space, C], and their fingerprint.

  Raises:
    FileNotFoundError, ValueError: there is no such file, or its arrays have
      another shape or cannot be used.
  """
  section = types.SimpleNamespace(
    dataset=key, path=str(path), shape=config.shape
  )
  found = arrays.arrays(section, 'all')
  return found.fetch(np.arange(len(found))), found.fingerprint


# --- The table ---

# The paper evaluates CelebA and LSUN on 'validation'. It trains on all of
# CelebA-HQ; here the last 3,000 images are kept for tests.
DECODED = {
  'svhn': Prepared('svhn_cropped'),
  'celeba': Prepared('celeb_a', test='validation', crop=140),
  'lsun/bedroom': Prepared('lsun/bedroom', test='validation'),
  'lsun/church_outdoor': Prepared('lsun/church_outdoor', test='validation'),
  'celeba_hq': Prepared(
    'celeb_a_hq/{size}', train='train[:27000]', test='train[27000:]'
  ),
  'ffhq': functools.partial(folder, labelled=False, last_seventh=True),
  'folder': folder,
}
DATASETS = {
  'cifar10': cifar10,
  **DECODED,
  'npz': npz,
  'arrays': arrays.arrays,
  'digits': digits,
  **dict.fromkeys(toy.DISTRIBUTIONS, points),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Options):
  """The section `data` of a config: a data set, and how the model sees it.

  Example:
    >>> Data(dataset='digits', image_size=8, num_channels=1).centered
    False
  """

  dataset: str = option('cifar10', 'Data set.', choices=tuple(DATASETS))
  path: str = option(
    '',
    'File or folder of the data; empty for the default place in the cache '
    'folder.',
    path=True,
    marks=(),
  )
  image_size: int = option(
    32, 'Height and width of the images, in pixels.', '[1, 10000]'
  )
  num_channels: int = option(
    3,
    'Channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA).',
    choices=tuple(pixels.MODES),
  )
  background: str = option(
    'white',
    'What shows through transparent pixels of files that are read with 1 or 3 '
    'channels.',
    choices=tuple(pixels.BACKGROUNDS),
    # The fingerprint of the data depends on it, where it matters.
    marks=(),
  )
  shape: tuple[int, ...] = option(
    (),
    'Shape of an example that is no 8-bit image: (D,), (L, C), (H, W, C) or '
    '(D, H, W, C); empty for images, and for that of the arrays.',
    '[1, 1e7]',
    formerly='data.dims',
  )
  mean: tuple[float, ...] = option(
    (),
    'What is subtracted from each channel of arrays, or from all; empty for '
    'the mean of the training data.',
    '(-inf, inf)',
  )
  std: tuple[float, ...] = option(
    (),
    'What each channel of arrays is divided by then; empty for the standard '
    'deviation of the training data.',
    '(0, inf)',
  )
  condition_shape: tuple[int, ...] = option(
    (),
    'Shape of the condition of an example, for model.condition; empty for that '
    'in the data.',
    '[1, 1e7]',
  )
  condition_mean: tuple[float, ...] = option(
    (),
    'What is subtracted from each channel of conditions, or from all; empty to '
    'find it in the training data.',
    '(-inf, inf)',
  )
  condition_std: tuple[float, ...] = option(
    (),
    'What each channel of conditions is divided by then, or all; empty to find '
    'it in the training data.',
    '(0, inf)',
  )
  random_flip: bool = option(
    True, 'Mirror training images left to right with probability 1/2.'
  )
  augment: float = option(
    0.0,
    'Probability of each change of training images of which the network is '
    'told (Karras et al. 2022, App. F.2), which include mirroring; 0 for none.',
    '[0, 1]',
  )
  uniform_dequantization: bool = option(
    False, 'Add uniform noise of one grey level to the images.'
  )
  centered: bool = option(
    False, 'Give images to the model in [-1, 1]; otherwise in [0, 1].'
  )
  on_device: bool = option(
    False,
    'Hold all training data in the memory of every device, for small sets.',
    marks=(),
  )

  def __post_init__(self):
    super().__post_init__()
    if self.dataset in toy.DISTRIBUTIONS:
      _check_points(self)
    elif self.dataset == 'arrays':
      arrays.check(self)
    elif self.shape or self.mean or self.std:
      raise ValueError(
        f'data.shape={self.shape}, data.mean and data.std are for '
        f"data.dataset='arrays': leave them empty with {self.dataset!r}."
      )
    if self.augment and self.random_flip:
      raise ValueError(
        f'data.augment={self.augment} mirrors images and tells the network of '
        'it: set data.random_flip=False.'
      )


def example_shape(config):
  """Return the shape of an example, [*space, C], that a section describes."""
  size = config.image_size
  return tuple(config.shape) or (size, size, config.num_channels)


def load(config, split, *, keep=False):
  """Return the Dataset that a config names.

  Whatever is wrong with the config or the files is one line of an error here,
  before training begins.

  Args:
    config: section `data` of the config; see `Data`.
    split: 'train' or 'test'.
    keep: whether to write the decoded images into the cache folder.

  Raises:
    ValueError: a value in the config is not possible, or a file is damaged; or
      there is nothing to decode.
    FileNotFoundError: the data do not exist or are not prepared.
    ConnectionError: the data cannot be downloaded.
  """
  if config.dataset not in DATASETS:
    hint = options.suggestion(config.dataset.lower(), DATASETS)
    raise ValueError(f'unknown data.dataset {config.dataset!r}: {hint}')
  if split not in ('train', 'test'):
    raise ValueError(f"unknown split {split!r}: use 'train' or 'test'")
  if config.num_channels not in pixels.MODES:
    raise ValueError(
      f'data.num_channels {config.num_channels} is not 1, 3 or 4'
    )
  if not keep:
    return DATASETS[config.dataset](config, split)
  if config.dataset not in DECODED:
    raise ValueError(
      f'{config.dataset} is held in memory as a whole: it needs no cache'
    )
  return DECODED[config.dataset](config, split, keep=True)


def describe(train, test):
  """Return lines about a data set, for people.

  Args:
    train, test: the Datasets of its splits.
  """
  unit = arrays.kind(train.fetch([0]).shape[1:])
  first = f'Data: {len(train)} {unit} of {train.name} and {len(test)} for tests'
  if train.num_classes:
    names = train.classes or ('',) * train.num_classes
    # A name that is just the number is not said twice.
    listed = [
      str(i) if name in ('', str(i)) else f'{i} {name}'
      for i, name in enumerate(names)
    ]
    if len(listed) > 20:
      listed = [*listed[:10], '...', *listed[-3:]]
    first += f'; {train.num_classes} classes: {", ".join(listed)}'
  if 'condition' in (given := train.more(np.arange(1))):
    first += f'; each has a condition {given["condition"].shape[1:]}'
  notes = [note for note in train.notes if note in test.notes]
  for which, of in (('training', train), ('tests', test)):
    notes += [f'Of {which}: {n}' for n in of.notes if n not in notes]
  return [f'{first}.', *notes]
