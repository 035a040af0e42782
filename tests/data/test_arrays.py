"""Arrays of numbers: reading, measuring and scaling them; what is refused."""

import numpy as np
import pytest

from data import __main__ as command_line
from data import arrays, batches, datasets, sources
from runtime.files import digest


def section(path, **keys):
  chosen = {'dataset': 'arrays', 'path': str(path), 'centered': True}
  return datasets.Data(**chosen, random_flip=False, **keys)


def signals(n=50, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, 6, 2)) * [1, 100] + [5, -300]


@pytest.mark.parametrize('compressed', [False, True])
@pytest.mark.parametrize('limit', [0, 2**31])
def test_splits_and_labels(tmp_path, monkeypatch, limit, compressed):
  """The same from memory and from the disk, in any order of the bytes."""
  monkeypatch.setattr(sources, 'MEMORY_LIMIT', limit)
  train, test = signals(), signals(7, seed=1)
  save = np.savez_compressed if compressed else np.savez
  save(
    tmp_path / 'a.npz',
    x_train=np.asfortranarray(train),
    x_test=test,
    y_train=np.arange(50) % 3,
    y_test=np.full((7, 1), 2),
    condition_train=train[:, 0],
    condition_test=test[:, 0],
  )
  config = section(tmp_path / 'a.npz')
  for split, x in (('train', train), ('test', test)):
    found = datasets.load(config, split)
    assert len(found) == len(x) and found.num_classes == 3
    on_disk = any('from the disk' in note for note in found.notes)
    assert on_disk == (limit == 0 and not compressed)
    batch = batches.train_batch(found, 3, batch_size=4, seed=0)
    index = batch['index']
    assert batch['image'].dtype == np.float32
    np.testing.assert_array_equal(batch['image'], np.float32(x[index]))
    np.testing.assert_array_equal(batch['condition'], np.float32(x[index, 0]))
    labels = index % 3 if split == 'train' else np.full(4, 2)
    np.testing.assert_array_equal(batch['label'], labels)
  labels = np.full(7, 2, np.int32)
  wanted = digest(np.float32(test), labels, np.float32(test[:, 0]))
  assert found.fingerprint == wanted


@pytest.mark.parametrize('name', ['signals', 'images', 'arr_0'])
def test_files_without_splits(tmp_path, name):
  """A fixed tenth is the test set; an .npy is the same."""
  x = np.arange(40).reshape(20, 2)
  np.savez(tmp_path / 'a.npz', **{name: x})
  np.save(tmp_path / 'a.npy', x)
  splits = [
    datasets.load(section(tmp_path / file), split)
    for file in ('a.npz', 'a.npy')
    for split in ('train', 'test')
  ]
  assert [len(split) for split in splits] == [18, 2, 18, 2]
  first = np.concatenate([s.fetch(np.arange(len(s)))[:, 0] for s in splits[:2]])
  np.testing.assert_array_equal(np.sort(first), x[:, 0])
  fingerprints = [split.fingerprint for split in splits]
  assert fingerprints[:2] == fingerprints[2:]


def test_mean_and_deviation(tmp_path, monkeypatch):
  """They are those of all training data, whatever the blocks are."""
  x = signals(101)
  np.savez(tmp_path / 'a.npz', x_train=x, x_test=x[:3])
  monkeypatch.setattr(arrays, 'BLOCK', 8 * 12 * 7)
  config = section(tmp_path / 'a.npz')
  found = arrays.complete(config)
  assert found['shape'] == (6, 2)
  np.testing.assert_allclose(found['mean'], x.mean((0, 1)), rtol=1e-12)
  np.testing.assert_allclose(found['std'], x.std((0, 1)), rtol=1e-12)
  # The cache folder keeps them, until the file changes.
  monkeypatch.setattr(arrays, '_measure', None)
  assert arrays.complete(config) == found
  given = arrays.complete(section(tmp_path / 'a.npz', std=(2.0,)))
  assert given == found | {'std': (2.0,)}
  monkeypatch.undo()
  np.savez(tmp_path / 'a.npz', x_train=x + 1, x_test=x[:3])
  moved = arrays.complete(section(tmp_path / 'a.npz'))['mean']
  np.testing.assert_allclose(moved, x.mean((0, 1)) + 1)


def test_scale():
  """It is undone, and its volume is the determinant of the map."""
  scale = arrays.Scale((1.0, 2.0), (3.0, 0.25))
  x = np.float32(signals(4))
  np.testing.assert_allclose(scale.undo(scale(x)), x, rtol=1e-5)
  columns = [scale.undo(row.reshape(3, 2)).ravel() for row in np.eye(6)]
  jacobian = np.stack(columns) - scale.undo(np.zeros((3, 2))).ravel()
  _, log_det = np.linalg.slogdet(jacobian)
  assert abs(scale.log_volume((3, 2)) - log_det) < 1e-6
  one = arrays.Scale((0.0,), (2.0,))
  assert abs(one.log_volume((3, 2)) - 6 * np.log(2)) < 1e-9
  assert arrays.Scale()(x) is x and arrays.Scale().log_volume((3, 2)) == 0


GOOD = signals(10)


def changed(at, value, x=GOOD):
  x = np.array(x)
  x[at] = value
  return x


@pytest.mark.parametrize(
  ('x', 'message'),
  [
    (np.zeros(10), r'x_train has shape \(10,\), not \[N, D\]'),
    (np.zeros((2,) * 6), r'has shape \(2, 2, 2, 2, 2, 2\), not'),
    (np.zeros((3, 0)), r'has shape \(3, 0\), not'),
    (np.zeros((0, 3)), 'x_train holds no examples'),
    (GOOD + 1j, 'is complex128: .* two channels for the parts'),
    (np.array([['a']]), 'is <U1: store floats or integers'),
    (changed((4, 2, 1), np.nan), 'not finite in float32, first in example 4'),
    (changed((9, 0, 0), 1e200), 'not finite in float32, first in example 9'),
    (changed(np.s_[..., 1], 0.1), r'channel 1 of .* does not vary \(it is 0.1'),
    (changed(np.s_[..., 0], GOOD[..., 0] + 1e7), 'channel 0 .* a constant'),
  ],
)
def test_arrays_that_are_refused(tmp_path, x, message):
  np.savez(tmp_path / 'a.npz', x_train=x, x_test=GOOD)
  with pytest.raises(ValueError, match=message):
    arrays.complete(section(tmp_path / 'a.npz'))


def test_splits_of_other_shapes(tmp_path):
  np.savez(tmp_path / 'a.npz', x_train=GOOD, x_test=GOOD[..., :1])
  config = section(tmp_path / 'a.npz', shape=(6, 2))
  message = r'x_test has examples of shape \(6, 1\), but config.data.shape is'
  with pytest.raises(ValueError, match=message):
    datasets.load(config, 'test')


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    ({'centered': False}, 'set data.centered=True'),
    ({'uniform_dequantization': True}, 'uniform_dequantization=False'),
    ({'random_flip': True, 'shape': (6, 2)}, 'not for signals'),
    ({'shape': (2,) * 5}, r'data.shape=\(2, 2, 2, 2, 2\) is not that of one'),
    (
      {'shape': (6, 2), 'mean': (1.0,) * 3},
      'mean has 3 numbers for 2 channels',
    ),
    ({'std': (0.0,)}, r'std=\(0.0,\) is not in \(0, inf\)'),
    ({'dataset': 'digits', 'std': (1.0,)}, "are for data.dataset='arrays'"),
  ],
)
def test_keys_that_are_refused(keys, message):
  chosen = {'dataset': 'arrays', 'centered': True, 'random_flip': False}
  with pytest.raises(ValueError, match=message):
    datasets.Data(**chosen | keys)


def test_sigma_max_is_in_units_of_the_deviation(tmp_path, capsys):
  x = np.array([[0.0, 0.0], [300.0, 4.0], [300.0, 0.0], [0.0, 4.0]])
  np.savez(tmp_path / 'a.npz', x_train=x, x_test=x)
  path = str(tmp_path / 'a.npz')
  command_line.main(['sigma_max', 'arrays', '--path', path])
  # The deviations are 150 and 2: the diagonal is (2, 2).
  assert 'sigma_max = 2.83, of all images' in capsys.readouterr().out
