"""The table of data sets, and the section `data` of a config.

`DATASETS` maps a name to a function (config, split) -> `batches.Dataset`, where
`config` is the section `data` (see `Data`) and `split` is 'train' or 'test'. A
new data set is one function here and one line in the table.

Images cross to the device as uint8; there `pixels.preprocess` makes them the
input of the model. TensorFlow is needed only to prepare the data sets of
tensorflow-datasets, once:

  python -m data prepare celeba --data_dir DIR
"""

import dataclasses
import functools
import pathlib
import types

import numpy as np

from data import cifar, pixels, sources, toy
from data.batches import Dataset
from data.prepare import Prepared
from runtime import options
from runtime.files import digest
from runtime.options import Options, option

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
  if path.suffix == '.npz':
    images, labels, _ = sources.read_npz(path, split)
  else:
    images, labels = cifar.read(path, split)
  return sources.in_memory(config, images, labels, num_classes=10)


def npz(config, split):
  """Return the images of an .npz file of the user; see `sources.read_npz`."""
  path = sources.existing_path(config, 'an .npz of images')
  return sources.in_memory(config, *sources.read_npz(path, split))


def digits(config, split):
  """Return scikit-learn's handwritten digits: 8x8 pixels, grey, 10 classes.

  There are 1500 training images and 297 test images.
  """
  from sklearn.datasets import load_digits

  data = load_digits()
  members = sources.split_indices(len(data.images), split, num_test=297)
  images = np.floor(data.images / 16 * 255 + 0.5).astype(np.uint8)
  images, labels = images[members, ..., None], data.target[members]
  return sources.in_memory(config, images, labels, num_classes=10)


def _check_points(config):
  """Raise ValueError for settings with which points cannot be used."""
  if config.dims != 2 or config.centered:
    raise ValueError(
      f'{config.dataset} needs data.dims=2 and data.centered=False'
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
  labels = np.zeros(n, np.int32)
  return Dataset(
    name=config.dataset,
    size=n,
    read=lambda indices: (x[indices], labels[indices]),
    num_classes=0,
    fingerprint=digest(x),
  )


# --- Folders of images ---


def _split_files(files, split, last_seventh):
  """Return the files of a split, all files, and the depth of class folders."""
  tops = {file.parts[0] for file in files if len(file.parts) > 1}
  test = next((t for t in ('test', 'val', 'validation') if t in tops), None)
  if 'train' in tops and test:
    files = [file for file in files if file.parts[0] in ('train', test)]
    chosen = test if split == 'test' else 'train'
    return [file for file in files if file.parts[0] == chosen], files, 1
  if last_seventh:
    end = len(files) * 6 // 7
    return files[end:] if split == 'test' else files[:end], files, 0
  chosen = sources.split_indices(len(files), split)
  return [files[i] for i in chosen], files, 0


def folder(config, split, *, labelled=True, last_seventh=False):
  """Return the images of a folder, at any depth.

  Subfolders train and test (or val, validation) are the splits. Without them, a
  fixed random tenth of the images is the test set. Within a split the first
  level of subfolders names the classes if there are two or more of them and
  every image lies in one.

  Args:
    config: section `data` of the config.
    split: 'train' or 'test'.
    labelled: whether subfolders can name classes.
    last_seventh: whether the last seventh of the images by name is the test
      set, as the authors of FFHQ split it. (The paper trains on all images.)

  Raises:
    FileNotFoundError: there are fewer than two images.
    ValueError: data.path is empty, or an image is damaged.
  """
  root = sources.existing_path(config, 'a folder of images')
  files = sources.image_files(root)
  if len(files) < 2:
    raise FileNotFoundError(
      f'{config.dataset}: {len(files)} images (png, jpg, webp, bmp) in or '
      f'below {root}; 2 or more are needed'
    )
  members, files, depth = _split_files(files, split, last_seventh)
  paths = [root / file for file in members]
  sources.verify_files(paths)

  names = {file.parts[depth] for file in files}
  if not labelled or any(len(file.parts) < depth + 2 for file in files):
    names = set()
  number = {name: i for i, name in enumerate(sorted(names))}
  labels = [number.get(file.parts[depth], 0) for file in members]

  def decode(i, **fit):
    return sources.decode_file(paths[i], **fit), labels[i]

  sizes = [(file.as_posix(), (root / file).stat().st_size) for file in members]
  num_classes = len(names) if len(names) > 1 else 0
  return sources.decoded(config, decode, len(paths), num_classes, sizes)


def user_images(config, path):
  """Return all images of a folder or an .npz file, to be scored.

  Args:
    config: section `data` of the config.
    path: path of the folder or file. The images must have the size of the
      config, since scores depend on how images are resized.

  Raises:
    FileNotFoundError: there are no images at the path.
    ValueError: the images have another size or are damaged.
  """
  path = pathlib.Path(path).expanduser()
  size = config.image_size
  config = types.SimpleNamespace(
    dataset='--samples',
    path=str(path),
    image_size=size,
    num_channels=config.num_channels,
  )

  def check_size(shape, where):
    if tuple(shape) != (size, size):
      raise ValueError(
        f'{where} is {shape[0]}x{shape[1]}, but data.image_size is {size}: '
        'only images of one size can be compared, so resize them first'
      )

  if path.suffix == '.npz' and path.is_file():
    images, labels, _ = sources.read_npz(path, 'all')
    check_size(images.shape[1:3], path)
    return sources.in_memory(config, images, labels, num_classes=0)
  files = sources.image_files(path) if path.is_dir() else []
  if not files:
    raise FileNotFoundError(
      f'--samples {path} is neither an .npz nor a folder with images in it.'
    )
  paths = [path / file for file in files]
  sources.verify_files(paths)
  for file in paths:
    check_size(sources.file_size(file), file)
  decode = lambda i, **fit: (sources.decode_file(paths[i], **fit), 0)
  stats = [(str(f), p.stat()) for f, p in zip(files, paths, strict=True)]
  identity = [(f, s.st_size, s.st_mtime_ns) for f, s in stats]
  return sources.decoded(config, decode, len(paths), 0, identity)


# --- The table ---

# The paper evaluates CelebA and LSUN on 'validation'. It trains on all of
# CelebA-HQ; here the last 3,000 images are kept for tests.
DATASETS = {
  'cifar10': cifar10,
  'svhn': Prepared('svhn_cropped'),
  'celeba': Prepared('celeb_a', test='validation', crop=140),
  'lsun/bedroom': Prepared('lsun/bedroom', test='validation'),
  'lsun/church_outdoor': Prepared('lsun/church_outdoor', test='validation'),
  'celeba_hq': Prepared(
    'celeb_a_hq/{size}', train='train[:27000]', test='train[27000:]'
  ),
  'ffhq': functools.partial(folder, labelled=False, last_seventh=True),
  'folder': folder,
  'npz': npz,
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
    marks=(),
  )
  image_size: int = option(
    32, 'Height and width of the images, in pixels.', '[1, inf)'
  )
  num_channels: int = option(
    3,
    'Channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA).',
    choices=tuple(pixels.MODES),
  )
  dims: int = option(
    0, 'Coordinates of a point, where the data are no images.', '[0, inf)'
  )
  random_flip: bool = option(
    True, 'Mirror training images left to right with probability 1/2.'
  )
  uniform_dequantization: bool = option(
    False, 'Add uniform noise of one grey level to the images.'
  )
  centered: bool = option(
    False, 'Give images to the model in [-1, 1]; otherwise in [0, 1].'
  )

  def __post_init__(self):
    super().__post_init__()
    if self.dataset in toy.DISTRIBUTIONS:
      _check_points(self)


def load(config, split):
  """Return the Dataset that a config names.

  Whatever is wrong with the config or the files is one line of an error here,
  before training begins.

  Args:
    config: section `data` of the config; see `Data`.
    split: 'train' or 'test'.

  Raises:
    ValueError: a value in the config is not possible, or a file is damaged.
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
  return DATASETS[config.dataset](config, split)
