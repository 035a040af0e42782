"""datasets: the same batches everywhere, and no image lost."""

import io
import pathlib
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data import __main__ as command_line
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


def numbered(size, shape=(2, 2, 1)):
  """A dataset whose image i holds i and whose label is i % 3."""
  images = np.arange(size, dtype=np.uint8)[:, None, None, None]
  return datasets.in_memory(
    config('numbered', image_size=shape[0], num_channels=shape[2]),
    np.broadcast_to(images, (size, *shape)),
    np.arange(size) % 3,
    num_classes=3,
  )


# --- Batches ---


@pytest.mark.parametrize('process_count', [1, 2, 4])
@pytest.mark.parametrize('batch_size', [8, 28])
def test_processes_together_hold_the_same_batch(process_count, batch_size):
  dataset = numbered(11)  # batches cross the ends of epochs
  for step in range(7):
    whole = datasets.train_batch(dataset, step, batch_size=batch_size, seed=3)
    parts = [
      datasets.train_batch(
        dataset,
        step,
        batch_size=batch_size,
        seed=3,
        process_index=i,
        process_count=process_count,
      )
      for i in range(process_count)
    ]
    for key, value in whole.items():
      np.testing.assert_array_equal(
        value, np.concatenate([part[key] for part in parts])
      )
    np.testing.assert_array_equal(whole['image'][:, 0, 0, 0], whole['index'])
    np.testing.assert_array_equal(whole['label'], whole['index'] % 3)
    assert whole['image'].dtype == np.uint8
    assert whole['label'].dtype == np.int32
    assert whole['index'].dtype == np.int64


def test_every_epoch_is_a_fresh_permutation():
  dataset = numbered(11)
  stream = np.concatenate(
    [
      datasets.train_batch(dataset, step, batch_size=4, seed=5)['index']
      for step in range(11)
    ]
  )
  epochs = stream.reshape(4, 11)
  np.testing.assert_array_equal(np.sort(epochs), [np.arange(11)] * 4)
  assert len({tuple(epoch) for epoch in epochs}) == 4
  other = datasets.train_batch(dataset, 0, batch_size=4, seed=6)['index']
  assert list(other) != list(stream[:4])


def test_a_step_needs_no_earlier_step():
  first = [
    datasets.train_batch(numbered(50), step, batch_size=8, seed=1)
    for step in range(20)
  ]
  sources.permutation.cache_clear()
  resumed = datasets.train_batch(numbered(50), 17, batch_size=8, seed=1)
  np.testing.assert_array_equal(resumed['index'], first[17]['index'])


def test_the_order_never_changes():
  """Runs resume, and splits hold, across versions of NumPy and machines."""
  assert list(sources.permutation(8, 0, 0)) == [0, 2, 1, 5, 4, 3, 6, 7]
  assert list(sources.permutation(8, 1, 2)) == [4, 2, 0, 6, 1, 5, 7, 3]


@pytest.mark.parametrize('process_count', [1, 2])
@pytest.mark.parametrize('size', [1, 7, 8, 9, 16])
def test_evaluation_sees_every_image_once(size, process_count):
  dataset = numbered(size)
  batches = [
    list(
      datasets.eval_batches(
        dataset,
        batch_size=8,
        process_index=i,
        process_count=process_count,
      )
    )
    for i in range(process_count)
  ]
  assert {len(b) for b in batches} == {-(-size // 8)}
  flat = [b for of_process in batches for b in of_process]
  assert {b['image'].shape for b in flat} == {(8 // process_count, 2, 2, 1)}
  seen = np.concatenate([b['image'][b['mask'] == 1, 0, 0, 0] for b in flat])
  np.testing.assert_array_equal(np.sort(seen), np.arange(size))
  index = np.concatenate([b['index'] for b in flat])
  np.testing.assert_array_equal(np.sort(index), np.arange(len(index)))
  assert flat[0]['mask'].dtype == np.float32


def test_evaluation_resumes():
  dataset = numbered(21)
  whole = list(datasets.eval_batches(dataset, batch_size=4))
  rest = list(datasets.eval_batches(dataset, batch_size=4, start=3))
  assert len(rest) == len(whole) - 3
  for a, b in zip(whole[3:], rest, strict=True):
    np.testing.assert_array_equal(a['index'], b['index'])


def test_batch_must_divide_by_processes():
  with pytest.raises(ValueError, match='batch size 9 .* 2 processes'):
    datasets.train_batch(numbered(9), 0, batch_size=9, seed=0, process_count=2)


def test_prefetch_keeps_order_and_stays_ahead():
  started = []
  stream = datasets.prefetch(lambda s: started.append(s) or s * s, range(9))
  assert next(stream) == (0, 0)
  assert max(started) <= 2  # two ahead, no more
  assert list(stream) == [(s, s * s) for s in range(1, 9)]


def test_prefetch_raises_where_it_failed_and_leaves_no_thread():
  before = set(threading.enumerate())

  def fetch(step):
    if step == 3:
      raise OSError('disk gone')
    return step

  seen = []
  with pytest.raises(OSError, match='disk gone'):
    for step, _ in datasets.prefetch(fetch, iter(range(100))):
      seen.append(step)
  assert seen == [0, 1, 2]
  for _ in (stream := datasets.prefetch(lambda s: s, range(100))):
    break
  stream.close()
  assert set(threading.enumerate()) <= before


# --- Pixels ---


def test_preprocess_ranges():
  rng = jax.random.key(0)
  image = np.array([0, 128, 255], np.uint8).reshape(1, 1, 3, 1)
  image = np.tile(image, (64, 1, 1, 1))

  def run(**kwargs):
    options = {'random_flip': False, 'uniform_dequantization': False}
    fn = lambda rng, x: datasets.preprocess(rng, x, **(options | kwargs))
    x = jax.jit(fn)(rng, image)
    assert x.dtype == jnp.float32
    return np.asarray(x)

  exact = np.array([0, 128 / 255, 1])
  np.testing.assert_allclose(run(centered=False)[5, 0, :, 0], exact, atol=1e-6)
  np.testing.assert_allclose(
    run(centered=True)[5, 0, :, 0], 2 * exact - 1, atol=1e-6
  )
  noise = run(centered=False, uniform_dequantization=True) * 256 - image
  assert np.all(noise >= 0) and np.all(noise <= 1)
  assert abs(noise.mean() - 0.5) < 0.1 and noise.std() > 0.25
  x = np.linspace(0, 1, 5)
  for centered in (True, False):
    y = datasets.scaler(x, centered=centered)
    assert y.min() == (-1 if centered else 0) and y.max() == 1
    back = datasets.inverse_scaler(y, centered=centered)
    np.testing.assert_allclose(back, x)


def test_flips_are_seeded_and_mirror_left_to_right():
  image = np.zeros((200, 3, 4, 1), np.uint8)
  image[:, 0, 0] = 255
  options = {'uniform_dequantization': False, 'centered': False}
  run = lambda seed, flip: np.asarray(
    datasets.preprocess(
      jax.random.key(seed), image, random_flip=flip, **options
    )
  )
  x = run(0, True)
  np.testing.assert_array_equal(x, run(0, True))
  assert np.any(x != run(1, True))
  flipped = x[:, 0, 3, 0] == 1
  np.testing.assert_array_equal(flipped, x[:, 0, 0, 0] == 0)
  assert 70 < flipped.sum() < 130 and np.all(x[:, 1:] == 0)
  assert np.all(run(0, False)[:, 0, 0, 0] == 1)


def test_samples_round_half_up():
  x = np.array([-0.2, 0, 0.4 / 255, 0.5 / 255, 1.5 / 255, 254.6 / 255, 1.3])
  half_up = datasets.to_uint8(x)
  assert half_up.dtype == np.uint8
  assert list(half_up) == [0, 0, 0, 1, 2, 255, 255]
  truncated = datasets.to_uint8(x, rounding='truncate')
  assert list(truncated) == [0, 0, 0, 0, 1, 254, 255]
  levels = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(datasets.to_uint8(levels / 255), levels)
  with pytest.raises(ValueError, match='NaN'):
    datasets.to_uint8([0.0, np.nan])
  with pytest.raises(ValueError, match="rounding 'up' is not one of"):
    datasets.to_uint8(x, rounding='up')


def test_sigma_max_is_the_largest_distance(capsys):
  dataset = datasets.load(config('digits', num_channels=1), 'train')
  x = dataset.fetch(np.arange(1500)).reshape(1500, -1) / 255
  largest = max(np.linalg.norm(x - row, axis=1).max() for row in x)
  assert datasets.sigma_max(dataset) == pytest.approx(largest, rel=1e-5)
  assert datasets.sigma_max(dataset, num_images=20) < 0.99 * largest
  sizes = ['--image_size', '8', '--num_channels', '1']
  command_line.main(['sigma_max', 'digits', *sizes])
  assert f'sigma_max = {largest:.2f}, of all images' in capsys.readouterr().out
  with pytest.raises(SystemExit, match='^error: .*gone.npz does not exist'):
    command_line.main(['sigma_max', 'npz', '--path', 'gone.npz'])


# --- The table ---


def test_digits():
  c = config('digits', num_channels=1)
  train, test = datasets.load(c, 'train'), datasets.load(c, 'test')
  assert (len(train), len(test)) == (1500, 297) and train.num_classes == 10
  images = train.fetch(np.arange(1500))
  assert images.shape == (1500, 8, 8, 1) and images.max() == 255
  assert len(np.unique(images)) == 17
  assert np.bincount(train.batch(np.arange(1500))['label']).min() > 130
  assert np.bincount(test.batch(np.arange(297))['label']).min() > 15
  assert train.fingerprint == datasets.load(c, 'train').fingerprint
  assert train.fingerprint != test.fingerprint
  both = np.concatenate([images, test.fetch(np.arange(297))])
  from sklearn.datasets import load_digits

  assert abs(both.mean() - load_digits().images.mean() * 255 / 16) < 0.1
  large = datasets.load(config('digits', '', 32, 1), 'test')
  assert large.fetch(np.arange(5)).shape == (5, 32, 32, 1)


def test_load_refuses_what_it_does_not_know():
  with pytest.raises(ValueError, match="'CIFAR10': did you mean 'cifar10'"):
    datasets.load(config('CIFAR10'), 'train')
  with pytest.raises(ValueError, match=r"'imagenet': use one of \['cifar10'"):
    datasets.load(config('imagenet'), 'train')
  with pytest.raises(ValueError, match="unknown split 'valid'"):
    datasets.load(config('digits', num_channels=1), 'valid')
  with pytest.raises(ValueError, match='num_channels 2 is not 1, 3 or 4'):
    datasets.load(config('digits', num_channels=2), 'train')
  with pytest.raises(ValueError, match='1 channels .* data.num_channels is 3'):
    datasets.load(config('digits'), 'train')


@pytest.mark.parametrize('dataset', ['folder', 'ffhq', 'npz', 'cifar10'])
def test_a_wrong_path_is_one_clear_line(dataset, tmp_path):
  with pytest.raises(FileNotFoundError, match='none does not exist; it should'):
    datasets.load(config(dataset, tmp_path / 'none'), 'train')
  if dataset != 'cifar10':
    with pytest.raises(ValueError, match=f'{dataset}: set data.path to an? '):
      datasets.load(config(dataset), 'train')


# --- Datasets of tensorflow-datasets ---


def values(dataset):
  """The grey value of every image of a dataset, and its label."""
  batch = dataset.batch(np.arange(len(dataset)))
  assert np.ptp(batch['image'].astype(int), axis=(1, 2, 3)).max() == 0
  return [int(v) for v in batch['image'][:, 0, 0, 0]], list(batch['label'])


def prepare_by_hand(data_dir, name, splits, size, labelled):
  """Writes a tiny array_record dataset under the name of a real one.

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
  tiny = datasets.Prepared('celeb_a_hq/{size}', 'train[:7]', 'train[7:]')
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


def test_preparing_alone_needs_tensorflow(monkeypatch):
  import importlib.util

  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(SystemExit, match='^error: .* pip install tensorflow-cpu'):
    command_line.main(['prepare', 'svhn'])
  with pytest.raises(SystemExit, match='digits needs no preparation'):
    command_line.main(['prepare', 'digits'])


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
        dataset='svhn', path=sys.argv[1], image_size=32, num_channels=3)
    assert datasets.load(c, 'train').fetch([0, 1]).shape == (2, 32, 32, 3)
    assert 'tensorflow_datasets' in sys.modules
    assert 'tensorflow' not in sys.modules
  """
  subprocess.run(
    [sys.executable, '-c', program, str(tmp_path)],
    check=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
