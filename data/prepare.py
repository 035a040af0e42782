"""Data sets of tensorflow-datasets: written once as array_record, then read.

  python -m data prepare NAME --data_dir DIR

Only `prepare` needs TensorFlow, because the builders of tensorflow-datasets do.
`Prepared` reads without TensorFlow what they have written.
"""

import dataclasses
import importlib.util
import io
import os
import pathlib
import types
from unittest import mock

from data import pixels, sources
from runtime.files import cache_dir


def from_lmdb(path):
  """Return the pairs (key, value) of an LMDB file as a tf.data.Dataset.

  The builder of LSUN reads with the function of this name in tensorflow-io,
  which works with no TensorFlow after 2.16. This function replaces it.

  Args:
    path: path of a data.mdb file.
  """
  import lmdb
  import tensorflow as tf

  def pairs():
    with (
      lmdb.open(os.path.dirname(path), readonly=True, lock=False) as database,
      database.begin() as transaction,
    ):
      yield from transaction.cursor()

  string = tf.TensorSpec((), tf.string)
  return tf.data.Dataset.from_generator(
    pairs, output_signature=(string, string)
  )


def prepare(name, data_dir, manual_dir=None):
  """Download and write a data set; return the folder that was written.

  Args:
    name: full name of the builder in tensorflow-datasets.
    data_dir: folder for the data sets of tensorflow-datasets.
    manual_dir: folder of the files that the user has to download (CelebA-HQ).

  Raises:
    ModuleNotFoundError: TensorFlow or another package is not installed.
  """
  needed = ['tensorflow', *(['lmdb'] if name.startswith('lsun/') else [])]
  if any(importlib.util.find_spec(module) is None for module in needed):
    raise ModuleNotFoundError(
      'preparing a dataset, and nothing else, needs TensorFlow: '
      'pip install tensorflow-cpu lmdb'
    )
  import tensorflow_datasets as tfds

  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  reader = types.SimpleNamespace(
    IODataset=types.SimpleNamespace(from_lmdb=from_lmdb)
  )
  with mock.patch.object(tfds.core.lazy_imports, 'tensorflow_io', reader):
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
    )
  return builder.data_dir


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Load a data set of tensorflow-datasets that was prepared as array_record.

  data.path is the folder in which it was prepared, the `data_dir` of
  tensorflow-datasets; without a path, a folder in the cache folder.

  Attributes:
    builder: its name in tensorflow-datasets. '{size}' stands for the smallest
      power of two that is at least data.image_size.
    train: name of the training split.
    test: name of the test split.
    crop: side of the central square that is cut out first, in pixels; None for
      the shorter side.

  Example:
    >>> config = types.SimpleNamespace(path='/data', image_size=200)
    >>> Prepared('celeb_a_hq/{size}').where(config)[1]
    'celeb_a_hq/256'
  """

  builder: str
  train: str = 'train'
  test: str = 'test'
  crop: int | None = None

  def where(self, config):
    """Return the data_dir and the full name of the builder."""
    default = cache_dir() / 'tensorflow_datasets'
    size = 1 << (config.image_size - 1).bit_length()
    return pathlib.Path(config.path or default), self.builder.format(size=size)

  def __call__(self, config, split, keep=False):
    """Return the Dataset of a split, 'train' or 'test'; see `sources.decoded`.

    Raises:
      FileNotFoundError: the data set is not prepared.
      ValueError: the data set is prepared in another format.
    """
    from PIL import Image

    builder, command = self._find(config)
    split = self.train if split == 'train' else self.test
    records = self._records(builder, split, command)

    def decode(i, **fit):
      record = records[i]
      with Image.open(io.BytesIO(record['image'])) as image:
        image = pixels.fit_image(image, crop=self.crop, **fit)
      return image, record.get('label', 0)

    features = builder.info.features
    label = {**features}.get('label')
    folder = pathlib.Path(builder.data_dir)
    return sources.decoded(
      config,
      decode,
      len(records),
      files=sorted(path for path in folder.rglob('*') if path.is_file()),
      choice=(builder.info.full_name, split, self.crop),
      num_classes=label.num_classes if label else 0,
      classes=label.names if label else (),
      keep=keep,
    )

  def _find(self, config):
    """Return the builder of the newest version, and the command to prepare."""
    import tensorflow_datasets as tfds

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
    return tfds.builder_from_directory(newest), command

  def _records(self, builder, split, command):
    """Return the encoded records of a split, to be read by index."""
    import tensorflow_datasets as tfds

    try:
      return builder.as_data_source(
        split, decoders={'image': tfds.decode.SkipDecoding()}
      )
    except NotImplementedError as error:
      raise ValueError(
        f'{builder.data_dir} is not array_record; delete it and, once, run: '
        f'{command}'
      ) from error
