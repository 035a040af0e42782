"""Writes a dataset of tensorflow-datasets as array_record, once.

  python -m data prepare NAME --data_dir DIR

The only code here that needs TensorFlow: the builders of tensorflow-datasets
do. What they write, `datasets` reads without it.
"""

import importlib.util
import os
import types
from unittest import mock


def from_lmdb(path):
  """(key, value) pairs of a data.mdb as a tf.data.Dataset of strings.

  In place of the function of that name in tensorflow-io, by which the builder
  of LSUN reads, and which no TensorFlow after 2.16 can load.
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
  """Downloads and writes the builder `name`; returns the folder written.

  Args:
    manual_dir: where the user has put what cannot be downloaded (CelebA-HQ).
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
