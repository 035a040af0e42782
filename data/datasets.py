"""The datasets, and batches of them as a pure function of the step.

`DATASETS` is the one table: a name, and a function (config, split) -> Dataset,
where `split` is 'train' or 'test', and `config`, the section `config.data`, has
dataset (the name), image_size, num_channels and path ('': the default place).

Images cross to the device as uint8; there `preprocess` draws flips and
dequantisation from a jax rng. So a batch depends on seed and step only: on no
state, and not on the number of hosts. Only the first command needs TensorFlow:

  python -m data prepare celeba --data_dir DIR
  python -m data sigma_max cifar10
"""

import collections
import concurrent.futures
import dataclasses
import difflib
import functools
import io
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from data import sources, toy
from data.sources import Dataset, fingerprint, permutation
from runtime.files import cache_dir

# --- Where images come from ---


def in_memory(config, images, labels, num_classes):
  """A Dataset of arrays: uint8 [N, H, W, C] and whole numbers [N]."""
  images = sources.fit_array(
    images,
    size=config.image_size,
    channels=config.num_channels,
    where=f'{config.dataset} {config.path}'.strip(),
  )
  labels = labels.astype(np.int32)
  return Dataset(
    name=config.dataset,
    size=len(images),
    read=lambda indices: (images[indices], labels[indices]),
    num_classes=num_classes,
    fingerprint=fingerprint(images, labels),
  )


def decoded(config, decode, size, num_classes, identity):
  """A Dataset decoded when read; decode: (index, **fit) -> (image, label).

  `fit` is what `sources.fit_image` needs to know; `identity` is hashed.
  """
  fit = {'size': config.image_size, 'channels': config.num_channels}
  shape = (config.image_size, config.image_size, config.num_channels)
  decode = functools.partial(decode, **fit)
  return Dataset(
    name=config.dataset,
    size=size,
    read=sources.DecodedImages(decode, size, shape),
    num_classes=num_classes,
    fingerprint=fingerprint(fit, identity),
  )


def cifar10(config, split):
  """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images, 10 classes.

  data.path is one of the two published archives, the folder that one of them
  unpacks to, or an .npz; '' downloads the archive into the cache directory.
  """
  if config.path:
    path = sources.existing_path(
      config, 'a CIFAR-10 archive, its folder, or an .npz'
    )
  else:
    path = sources.cifar10_archive()
  if path.suffix == '.npz':
    images, labels, _ = sources.read_npz(path, split)
  else:
    images, labels = sources.read_cifar10(path, split)
  return in_memory(config, images, labels, num_classes=10)


def npz(config, split):
  """Images in an .npz of the user's own; see `sources.read_npz`."""
  path = sources.existing_path(config, 'an .npz of images')
  return in_memory(config, *sources.read_npz(path, split))


def digits(config, split):
  """Scikit-learn's handwritten digits: 8x8 grey, 1500 and 297, 10 classes."""
  from sklearn.datasets import load_digits

  data = load_digits()
  members = sources.split_indices(len(data.images), split, num_test=297)
  images = np.floor(data.images / 16 * 255 + 0.5).astype(np.uint8)
  images, labels = images[members, ..., None], data.target[members]
  return in_memory(config, images, labels, num_classes=10)


def points(config, split):
  """Float32 points [N, 2] of `toy_data`: 100,000 and 4,000, always the same.

  There are no labels.
  """
  if config.dims != 2 or config.centered:
    raise ValueError(
      f'{config.dataset} needs data.dims=2 and data.centered=False'
    )
  seed, n = {'train': (0, 100_000), 'test': (1, 4000)}[split]
  rng = np.random.default_rng(seed)
  x = toy.DISTRIBUTIONS[config.dataset].sample(rng, n).astype(np.float32)
  labels = np.zeros(n, np.int32)
  return Dataset(
    name=config.dataset,
    size=n,
    read=lambda indices: (x[indices], labels[indices]),
    num_classes=0,
    fingerprint=fingerprint(x),
  )


def folder(config, split, *, labelled=True, last_seventh=False):
  """A folder of images, at any depth.

  With subfolders train/ and test/ (or val/, validation/) those are the splits.
  Else a fixed random tenth of the images is the test set; or, for FFHQ, whose
  authors split it so, the `last_seventh` by name (the paper trains on all).
  Within a split the first level of subfolders names the classes, if there are
  two or more and every image lies in one.
  """
  root = sources.existing_path(config, 'a folder of images')
  files = sources.image_files(root)
  if len(files) < 2:
    raise FileNotFoundError(
      f'{config.dataset}: {len(files)} images (png, jpg, webp, bmp) in or '
      f'below {root}; 2 or more are needed'
    )
  tops = {file.parts[0] for file in files if len(file.parts) > 1}
  test = next((t for t in ('test', 'val', 'validation') if t in tops), None)
  depth = 0  # of the folders that name classes
  if 'train' in tops and test:
    depth = 1
    files = [file for file in files if file.parts[0] in ('train', test)]
    chosen = test if split == 'test' else 'train'
    members = [file for file in files if file.parts[0] == chosen]
  elif last_seventh:
    end = len(files) * 6 // 7
    members = files[end:] if split == 'test' else files[:end]
  else:
    chosen = sources.split_indices(len(files), split)
    members = [files[i] for i in chosen]
  paths = [root / file for file in members]
  sources.verify_files(paths)

  names = {file.parts[depth] for file in files}
  if not labelled or any(len(file.parts) < depth + 2 for file in files):
    names = {}
  number = {name: i for i, name in enumerate(sorted(names))}
  labels = [number.get(file.parts[depth], 0) for file in members]

  def decode(i, **fit):
    return sources.decode_file(paths[i], **fit), labels[i]

  sizes = [(file.as_posix(), (root / file).stat().st_size) for file in members]
  num_classes = len(names) if len(names) > 1 else 0
  return decoded(config, decode, len(paths), num_classes, sizes)


def anyones(config, path):
  """All images of an .npz or a folder, to be scored against config.data.

  They must have its size: a score would depend on how they are resized.
  """
  path = pathlib.Path(path).expanduser()
  config = config.copy_and_resolve_references()
  config.update(dataset='--samples', path=str(path))
  size = config.image_size

  def check_size(shape, where):
    if tuple(shape) != (size, size):
      raise ValueError(
        f'{where} is {shape[0]}x{shape[1]}, but data.image_size is {size}: '
        'scores compare images of one size, so resize them yourself'
      )

  if path.suffix == '.npz' and path.is_file():
    images, labels, _ = sources.read_npz(path, 'all')
    check_size(images.shape[1:3], path)
    return in_memory(config, images, labels, num_classes=0)
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
  return decoded(config, decode, len(paths), 0, identity)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A dataset of tensorflow-datasets, prepared once as array_record.

  data.path is the data_dir it was prepared in, `builder` its name there, with
  {size} for the least power of two that image_size fits in. `train` and `test`
  name its splits; `crop` is the side of the central square to cut out first.
  """

  builder: str
  train: str = 'train'
  test: str = 'test'
  crop: int | None = None

  def where(self, config):
    """(data_dir, full name of the builder)."""
    default = cache_dir() / 'tensorflow_datasets'
    size = 1 << (config.image_size - 1).bit_length()
    path = pathlib.Path(config.path or default).expanduser()
    return path, self.builder.format(size=size)

  def __call__(self, config, split):
    import tensorflow_datasets as tfds
    from PIL import Image

    data_dir, name = self.where(config)
    command = (
      f'python -m data prepare {config.dataset} --data_dir {data_dir} '
      f'--image_size {config.image_size}'
    )
    versions = [
      info.parent for info in (data_dir / name).glob('*/dataset_info.json')
    ]
    if not versions:
      raise FileNotFoundError(
        f'{config.dataset} is not prepared in {data_dir}; once, run: {command}'
      )
    newest = max(versions, key=lambda v: [int(n) for n in v.name.split('.')])
    builder = tfds.builder_from_directory(newest)
    split = self.train if split == 'train' else self.test
    try:
      records = builder.as_data_source(
        split, decoders={'image': tfds.decode.SkipDecoding()}
      )
    except NotImplementedError as error:
      raise ValueError(
        f'{newest} is not array_record; delete it and, once, run: {command}'
      ) from error

    def decode(i, **fit):
      record = records[i]
      with Image.open(io.BytesIO(record['image'])) as image:
        image = sources.fit_image(image, crop=self.crop, **fit)
      return image, record.get('label', 0)

    features = builder.info.features
    classes = features['label'].num_classes if 'label' in features else 0
    shards = builder.info.splits[split.partition('[')[0]].shard_lengths
    identity = (builder.info.full_name, split, shards, self.crop)
    return decoded(config, decode, len(records), classes, identity)


# A new dataset is one function above and one line here. The paper evaluates
# CelebA and LSUN on 'validation'. It trains on all of CelebA-HQ; here the last
# 3,000 images are held out.
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


def load(config, split):
  """The Dataset of config.data for split 'train' or 'test'.

  Whatever is wrong with the config or the files raises one clear line here,
  before training begins: ValueError, FileNotFoundError or ConnectionError.
  """
  if config.dataset not in DATASETS:
    close = difflib.get_close_matches(config.dataset.lower(), DATASETS, n=1)
    hint = (
      f'did you mean {close[0]!r}?' if close else f'use one of {[*DATASETS]}'
    )
    raise ValueError(f'unknown data.dataset {config.dataset!r}: {hint}')
  if split not in ('train', 'test'):
    raise ValueError(f"unknown split {split!r}: use 'train' or 'test'")
  if config.num_channels not in sources.MODES:
    raise ValueError(
      f'data.num_channels {config.num_channels} is not 1, 3 or 4'
    )
  return DATASETS[config.dataset](config, split)


# --- Batches ---


def _rows(batch_size, process_index, process_count):
  """The rows of a global batch that belong to a process."""
  if batch_size % process_count:
    raise ValueError(
      f'batch size {batch_size} must divide by the {process_count} processes'
    )
  local = batch_size // process_count
  return np.arange(process_index * local, (process_index + 1) * local)


def train_batch(
  dataset, step, *, batch_size, seed, process_index=0, process_count=1
):
  """This process's rows of the training batch of a step.

  Epochs are fresh random orders of all images, laid end to end and cut into
  batches, so no image is dropped. The rows of all processes, in order, are the
  same global batch for any number of processes.

  Returns {'image': uint8 [b, H, W, C], 'label': int32 [b], 'index': int64 [b]}
  with b = batch_size / process_count; batch_size is that of the global batch.
  """
  rows = _rows(batch_size, process_index, process_count)
  epochs, places = np.divmod(step * batch_size + rows, len(dataset))
  indices = np.empty_like(places)
  for epoch in np.unique(epochs):
    order = permutation(len(dataset), seed, int(epoch))
    indices[epochs == epoch] = order[places[epochs == epoch]]
  return dataset.batch(indices)


def prefetch(fetch, steps, depth=2):
  """Yields (step, fetch(step)) in order, fetching `depth` steps ahead.

  An exception in fetch is raised in place of its step. When the consumer
  stops, the fetches under way are finished and the rest are cancelled.
  """
  steps = iter(steps)
  pool = concurrent.futures.ThreadPoolExecutor(max_workers=depth)
  pending = collections.deque()
  try:
    while True:
      for step in itertools.islice(steps, depth + 1 - len(pending)):
        pending.append((step, pool.submit(fetch, step)))
      if not pending:
        return
      step, batch = pending.popleft()
      yield step, batch.result()
  finally:
    pool.shutdown(cancel_futures=True)


def eval_batches(
  dataset, *, batch_size, process_index=0, process_count=1, start=0
):
  """Yields this process's rows of batches that hold every image once, in order.

  There are ceil(size / batch_size) batches, of which the first `start` are left
  out. The last is filled up with copies of the last image, whose 'mask' is 0
  and whose 'index' counts on; so all batches of all processes are equal in
  number and shape. They hold what `train_batch` returns and 'mask' float32 [b].
  """
  rows = _rows(batch_size, process_index, process_count)

  def fetch(number):
    index = number * batch_size + rows
    batch = dataset.batch(np.minimum(index, len(dataset) - 1))
    mask = (index < len(dataset)).astype(np.float32)
    return batch | {'index': index, 'mask': mask}

  numbers = range(start, math.ceil(len(dataset) / batch_size))
  for _, batch in prefetch(fetch, numbers):
    yield batch


# --- Pixels ---


def scaler(x, *, centered):
  """[0, 1] to the range of the model: [-1, 1] if centered."""
  return 2 * x - 1 if centered else x


def inverse_scaler(x, *, centered):
  """The range of the model to [0, 1]."""
  return (x + 1) / 2 if centered else x


def preprocess(rng, image, *, random_flip, uniform_dequantization, centered):
  """uint8 [B, H, W, C] to the float32 input of the model; runs under jit.

  Floats are no images but points [B, D], which the model sees as they are.

  Args:
    rng: draws the flips and the noise of the whole global batch.
    random_flip: mirror each image left to right with probability 1/2.
    uniform_dequantization: (x + u) / 256 with u ~ U[0, 1), not x / 255.
    centered: to [-1, 1], else to [0, 1].
  """
  if jnp.issubdtype(image.dtype, jnp.floating):
    return image
  flip_rng, noise_rng = jax.random.split(rng)
  x = image.astype(jnp.float32)
  if random_flip:
    flip = jax.random.bernoulli(flip_rng, shape=(x.shape[0], 1, 1, 1))
    x = jnp.where(flip, x[:, :, ::-1], x)
  if uniform_dequantization:
    x = (x + jax.random.uniform(noise_rng, x.shape)) / 256
  else:
    x = x / 255
  return scaler(x, centered=centered)


def to_uint8(x, rounding='half_up'):
  """Samples, clipped to [0, 1], as uint8 in numpy.

  'half_up' rounds to nearest; 'truncate', as the paper's release, darkens.
  """
  offsets = {'half_up': 0.5, 'truncate': 0.0}
  if rounding not in offsets:
    raise ValueError(f'rounding {rounding!r} is not one of {[*offsets]}')
  x = np.asarray(x, np.float32)
  if np.isnan(x).any():
    raise ValueError('samples contain NaN: they are no image')
  return np.floor(np.clip(x, 0, 1) * 255 + offsets[rounding]).astype(np.uint8)


def sigma_max(dataset, *, num_images=None, seed=0):
  """Largest Euclidean distance between two images, of values in [0, 1].

  The sigma_max of Song & Ermon 2020 (NCSNv2), Technique 1. A random subset of
  `num_images` gives a lower bound. Of points, likewise, as they are.
  """
  chosen = np.sort(permutation(len(dataset), seed, 0)[:num_images])
  x = dataset.fetch(chosen).reshape(len(chosen), -1)
  unit = 255 if x.dtype == np.uint8 else 1
  block = min(1024, max(16, 2**25 // x.shape[1]))  # at most 128 MiB, or 16
  parts = [x[i : i + block] for i in range(0, len(x), block)]
  largest = 0.0
  for i, part in enumerate(parts):
    a = part.astype(np.float32) / unit
    a_norm = np.sum(a * a, axis=1)
    for other in parts[i:]:
      b = other.astype(np.float32) / unit
      squared = a_norm[:, None] + np.sum(b * b, axis=1) - 2 * (a @ b.T)
      largest = max(largest, float(squared.max()))
  return math.sqrt(largest)
