"""Conditions in files, their scale, and those of users."""

import numpy as np
import pytest

import experiment
from data import conditions, datasets
from tests import tiny

X = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones(
  (8, 8, 1), 'u1'
)
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(3, 2, (20, 5))


def saved(path, **arrays):
  np.savez(path, **arrays)
  return tiny.get_config(data__dataset='npz', data__path=str(path))


def split(condition):
  return {
    'x_train': X[:15], 'condition_train': condition[:15],
    'x_test': X[15:], 'condition_test': condition[15:],
  }  # fmt: skip


def facts(config):
  train = datasets.load(config.data, 'train')
  return conditions.measure(train, (8, 8, 1))


def test_vectors_are_standardised_by_the_training_data(tmp_path):
  config = saved(tmp_path / 'a.npz', **split(VECTORS))
  found = facts(config)
  assert found['condition_shape'] == (5,)
  for key, function in (('mean', np.mean), ('std', np.std)):
    np.testing.assert_allclose(
      found[f'condition_{key}'], function(np.float32(VECTORS[:15]), 0), 1e-6
    )
  batch = datasets.load(config.data, 'test').batch([2, 0])
  np.testing.assert_array_equal(
    batch['condition'], np.float32(VECTORS[[17, 15]])
  )
  assert batch['condition'].dtype == np.float32


def test_8_bit_images_are_seen_as_images_are(tmp_path):
  found = facts(saved(tmp_path / 'a.npz', **split(255 - X)))
  assert found['condition_mean'] == found['condition_std'] == (127.5,)
  # Floats are not, nor are vectors of uint8.
  found = facts(saved(tmp_path / 'b.npz', **split(np.float64(255 - X))))
  np.testing.assert_allclose(found['condition_mean'], [248.0])
  found = facts(saved(tmp_path / 'c.npz', **split(255 - X[:, 0, 0])))
  np.testing.assert_allclose(found['condition_mean'], [248.0])


def test_moments_do_not_depend_on_the_blocks(tmp_path, monkeypatch):
  config = saved(tmp_path / 'a.npz', **split(RNG.normal(5, 1, (20, 8, 8, 2))))
  whole = facts(config)
  monkeypatch.setattr(conditions, 'BLOCK', 500)
  parts = facts(config)
  for key, value in whole.items():
    np.testing.assert_allclose(parts[key], value, rtol=1e-12)


def test_files_without_splits(tmp_path):
  """Conditions stay with their images, and count for the fingerprint."""
  config = saved(tmp_path / 'a.npz', images=X, condition=np.arange(20) * 3.0)
  prints = []
  for name in ('train', 'test'):
    found = datasets.load(config.data, name)
    prints.append(found.fingerprint)
    batch = found.batch(np.arange(len(found)))
    np.testing.assert_array_equal(
      batch['condition'][:, 0], 3 * np.float32(batch['image'][:, 0, 0, 0])
    )
  other = saved(tmp_path / 'b.npz', images=X, condition=np.arange(20) * 2.0)
  for name, known in zip(('train', 'test'), prints, strict=True):
    assert datasets.load(other.data, name).fingerprint != known
  plain = datasets.load(saved(tmp_path / 'c.npz', images=X).data, 'test')
  assert 'condition' not in plain.batch([0])


@pytest.mark.parametrize(
  ('condition', 'text'),
  [
    (VECTORS[:19], 'condition_test has 4 conditions for 5 examples'),
    (np.where(VECTORS > 6, np.nan, VECTORS), 'not finite'),
    (VECTORS * 1e39, 'not finite'),
    (VECTORS.astype(complex), 'complex128: store floats'),
    (VECTORS[:, :0], 'holds no condition'),
    (np.pad(VECTORS, [(0, 0), (0, 1)]), 'channel 5 of the training .* vary'),
  ],
)
def test_bad_conditions(tmp_path, condition, text):
  config = saved(tmp_path / 'a.npz', **split(condition))
  with pytest.raises(ValueError, match=text):
    facts(config), datasets.load(config.data, 'test')


def test_the_config_keeps_what_was_found(tmp_path):
  config = saved(tmp_path / 'a.npz', **split(VECTORS))
  config.model = {**config.model, 'condition': 'vector'}
  done = experiment.completed(config)
  assert config.data.condition_shape == ()
  assert done.data.condition_shape == (5,) and len(done.data.condition_std) == 5
  assert experiment.completed(done) is done
  # A run keeps its own, whatever the data are now.
  experiment.claim(done, tmp_path / 'run')
  other = saved(tmp_path / 'a.npz', **split(VECTORS + 1))
  other.model = config.model
  again = experiment.completed(other, tmp_path / 'run')
  assert again.data.condition_mean == done.data.condition_mean
  given = tiny.get_config(
    data__condition_mean=(0.0,), data__condition_std=(1.0,)
  )
  given.data.update(dataset='npz', path=config.data.path)
  given.model = config.model
  assert experiment.completed(given).data.condition_mean == (0.0,)


DATA = datasets.Data(
  condition_shape=(2,), condition_mean=(0.0,), condition_std=(1.0,)
)


def test_conditions_of_users(tmp_path):
  one = conditions.fitted([1, 2], DATA, 'condition', 3)
  assert one.dtype == np.float32 and one.tolist() == [[1.0, 2.0]] * 3
  np.save(tmp_path / 'a.npy', np.ones((4, 2)))
  assert conditions.read(str(tmp_path / 'a.npy'), DATA).shape == (4, 2)
  np.savez(tmp_path / 'b.npz', x_test=X, condition_test=np.zeros((4, 2)))
  assert conditions.read(str(tmp_path / 'b.npz'), DATA).shape == (4, 2)
  np.savez(tmp_path / 'c.npz', a=X, b=X)
  with pytest.raises(ValueError, match="no array condition, but .'a', 'b'"):
    conditions.read(str(tmp_path / 'c.npz'), DATA)
  for array, text in (
    (np.zeros((4, 3)), r'shape \(4, 3\).* \[N, 2\]'),
    (np.zeros((3, 2)), '3 conditions for 4 examples'),
    (np.full((4, 2), np.inf), 'not finite'),
    (np.float32(0), 'shape'),
  ):
    with pytest.raises(ValueError, match=text):
      conditions.fitted(array, DATA, 'condition', 4)
  eight = datasets.Data(
    condition_shape=(2,), condition_mean=(127.5,), condition_std=(127.5,)
  )
  with pytest.raises(ValueError, match='whole numbers from 0 to 255'):
    conditions.fitted(np.full((4, 2), 0.5), eight, 'condition', 4)
