"""Tests of data sets of tensorflow-datasets, with tiny ones in their place."""

import io
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from data import datasets, prepare
from tests.data.shared import config, values


def prepare_by_hand(data_dir, name, splits, size, labelled):
  """Write a tiny array_record dataset under the name of a real one.

  Args:
    splits: {name: number of images}; image i of a split is solid grey i.
    size: (width, height) of the images.
  """
  import tensorflow_datasets as tfds

  builder_name, _, builder_config = name.partition('/')
  features = {'image': tfds.features.Image()}
  if labelled:
    features['label'] = tfds.features.ClassLabel(num_classes=10)

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = builder_name
    VERSION = tfds.core.Version('3.1.0')
    BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(name=n, version='3.1.0')
      for n in [builder_config]
      if n
    ]

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {k: self._generate_examples(n) for k, n in splits.items()}

    def _generate_examples(self, count):
      for i in range(count):
        file = io.BytesIO()
        image = Image.new('RGB', size)
        middle = (size[0] - 140) // 2, (size[1] - 140) // 2
        image.paste((i, i, i), (*middle, middle[0] + 140, middle[1] + 140))
        image.save(file, 'PNG')
        file.seek(0)
        example = {'image': file, 'label': i % 10}
        yield i, {key: example[key] for key in features}

  builder = Tiny(data_dir=data_dir, file_format='array_record')
  builder.download_and_prepare()


@pytest.mark.parametrize(
  ('dataset', 'name', 'size', 'test', 'labelled'),
  [
    ('svhn', 'svhn_cropped', (32, 32), 'test', True),
    ('celeba', 'celeb_a', (178, 218), 'validation', False),
    (
      'lsun/church_outdoor',
      'lsun/church_outdoor',
      (140, 150),
      'validation',
      False,
    ),
  ],
)
def test_prepared_datasets(dataset, name, size, test, labelled, tmp_path):
  splits = {'train': 12, test: 3}
  prepare_by_hand(tmp_path, name, splits, size, labelled)
  c = config(dataset, tmp_path, image_size=16)
  train, held_out = datasets.load(c, 'train'), datasets.load(c, 'test')
  assert (len(train), len(held_out)) == (12, 3)
  grey, labels = values(train)
  assert sorted(grey) == list(range(12))
  assert labels == [g % 10 * labelled for g in grey]
  assert train.num_classes == 10 * labelled
  assert train.fetch([0]).shape == (1, 16, 16, 3)
  fingerprints = {train.fingerprint, held_out.fingerprint}
  fingerprints |= {
    datasets.load(config(dataset, tmp_path), 'train').fingerprint
  }
  assert len(fingerprints) == 3
  assert datasets.load(c, 'train').fingerprint == train.fingerprint


def test_celeba_hq_comes_in_powers_of_two(tmp_path, monkeypatch):
  prepare_by_hand(tmp_path, 'celeb_a_hq/16', {'train': 10}, (16, 16), False)
  tiny = prepare.Prepared('celeb_a_hq/{size}', 'train[:7]', 'train[7:]')
  monkeypatch.setitem(datasets.DATASETS, 'celeba_hq', tiny)
  for size in (12, 16):
    c = config('celeba_hq', tmp_path, image_size=size)
    train, test = datasets.load(c, 'train'), datasets.load(c, 'test')
    assert sorted(values(train)[0] + values(test)[0]) == list(range(10))
    assert len(train) == 7 and train.fingerprint != test.fingerprint
  with pytest.raises(FileNotFoundError, match='--image_size 17'):
    datasets.load(config('celeba_hq', tmp_path, 17), 'train')


def test_an_unprepared_dataset_names_the_command(tmp_path):
  message = (
    f'celeba is not prepared in {tmp_path}; once, run: '
    f'python -m data prepare celeba --data_dir {tmp_path}'
  )
  with pytest.raises(FileNotFoundError, match=message):
    datasets.load(config('celeba', tmp_path), 'train')
  with pytest.raises(FileNotFoundError, match='cache/tensorflow_datasets'):
    datasets.load(config('celeba'), 'train')


def test_no_tensorflow_and_nothing_slow_is_imported(tmp_path):
  prepare_by_hand(
    tmp_path, 'svhn_cropped', {'train': 4, 'test': 1}, (32, 32), True
  )
  program = """if True:
    import sys, types
    from data import datasets
    slow = {'PIL', 'sklearn', 'tensorflow_datasets'} & set(sys.modules)
    assert not slow, slow
    c = types.SimpleNamespace(
        dataset='svhn', path=sys.argv[1], image_size=32, num_channels=3,
        background='white')
    assert datasets.load(c, 'train').fetch([0, 1]).shape == (2, 32, 32, 3)
    assert 'tensorflow_datasets' in sys.modules
    assert 'tensorflow' not in sys.modules
  """
  subprocess.run(
    [sys.executable, '-c', program, str(tmp_path)],
    check=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
