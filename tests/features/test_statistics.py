"""Tests of moments and of statistics of data sets."""

import itertools

import jax
import numpy as np
import pytest

import evaluation
from features import extract as extract_lib
from features import statistics
from features.statistics import Moments


def moments_of(features):
  """Return the moments of features [N, D]."""
  moments = Moments()
  moments.update(features)
  return moments


# --- Moments ------------------------------------------------------------------


def test_moments_equal_numpy_in_any_order_of_batches():
  """Data far from the origin would lose digits in sums of squares."""
  x = np.random.default_rng(5).standard_normal((100, 3)) + 1e6
  batches = np.split(x, [1, 30, 30, 77])  # One is empty.
  for order in itertools.islice(itertools.permutations(batches), 0, 120, 17):
    left, right = Moments(), Moments()
    for batch in order[:2]:
      left.update(batch)
    for batch in order[2:]:
      right.update(batch)
    left.merge(right)
    assert left.count == 100
    np.testing.assert_allclose(left.mu, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(left.sigma, np.cov(x.T), rtol=1e-7, atol=1e-9)


def test_merging_leaves_the_other_alone():
  x = np.random.default_rng(6).standard_normal((20, 3))
  total, other = Moments(), moments_of(x)
  total.merge(other)
  total.update(x)
  np.testing.assert_allclose(other.sigma, np.cov(x.T))
  assert (total.count, other.count) == (40, 20)


def test_moments_are_resumed_from_disk(tmp_path):
  x = np.random.default_rng(7).standard_normal((20, 3))
  moments = moments_of(x[:8])
  moments.save(tmp_path / 'moments.npz')
  Moments().save(tmp_path / 'empty.npz')
  resumed = Moments.load(tmp_path / 'moments.npz')
  resumed.update(x[8:])
  np.testing.assert_allclose(resumed.sigma, np.cov(x.T))
  empty = Moments.load(tmp_path / 'empty.npz')
  empty.update(x)
  np.testing.assert_allclose(empty.sigma, np.cov(x.T))
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'empty.npz',
    'moments.npz',
  ]


def test_bad_features_and_files_are_refused(tmp_path):
  moments = moments_of(np.ones((4, 3)))
  with pytest.raises(ValueError, match='not finite'):
    moments.update(np.full((2, 3), np.nan))
  with pytest.raises(ValueError, match='do not mix'):
    moments.update(np.ones((2, 4)))
  with pytest.raises(ValueError, match=r'\[N, D\]'):
    moments.update(np.ones(3))
  assert moments.count == 4
  with pytest.raises(ValueError, match='use more'):
    _ = moments_of(np.ones((1, 3))).sigma
  with pytest.raises(FileNotFoundError, match=r'absent\.npz'):
    Moments.load(tmp_path / 'absent.npz')
  (tmp_path / 'bad.npz').write_bytes(b'PK\x03\x04 cut')
  with pytest.raises(ValueError, match=r'bad\.npz'):
    Moments.load(tmp_path / 'bad.npz')
  np.savez(tmp_path / 'other.npz', x=1)
  with pytest.raises(ValueError, match='holds no moments'):
    Moments.load(tmp_path / 'other.npz')


# --- Statistics ---------------------------------------------------------------


def test_stats_of_a_dataset(extract, images, tmp_path):
  """Moments, count and origin are right, also after writing and reading."""
  done = []
  stats = statistics.compute_stats(
    [images[:9], images[9:]],
    extract,
    fingerprint='abc',
    num_features=6,
    progress=done.append,
  )
  want = extract(images)['pool_3']
  np.testing.assert_allclose(stats.mu, want.mean(axis=0), atol=1e-6)
  np.testing.assert_allclose(stats.sigma, np.cov(want.T), atol=1e-6)
  assert done == [9, 23]
  assert (stats.count, stats.resolution) == (23, 12)
  assert (stats.variant, stats.fingerprint) == ('tensorflow', 'abc')
  rows = {row.tobytes() for row in want}
  assert len(stats.features) == 6
  assert all(
    np.isclose(want, f, atol=1e-6).all(1).any() for f in stats.features
  )
  assert len(rows) == 23
  stats.save(tmp_path / 'stats.npz')
  again = statistics.load_stats(tmp_path / 'stats.npz')
  jax.tree.map(np.testing.assert_array_equal, vars(again), vars(stats))
  assert [p.name for p in tmp_path.iterdir()] == ['stats.npz']


def test_any_function_is_an_extractor(images):
  """Features of a user's function have a Frechet distance too."""

  def mean_colour(x):
    return x.mean(axis=(1, 2))

  stats = statistics.compute_stats([images], mean_colour)
  assert stats.variant == 'mean_colour'
  moments = Moments()
  moments.update(extract_lib.features_of(255 - images, mean_colour))
  with pytest.warns(UserWarning, match='23 images'):
    got = evaluation.fid(moments, stats)
  shift = (255 - 2 * stats.mu) ** 2
  assert got.value == pytest.approx(shift.sum(), rel=1e-6)
  with pytest.raises(ValueError, match=r'shape \(1, 4\) from 23'):
    statistics.compute_stats([images], lambda x: np.ones((1, 4)))
  with pytest.raises(ValueError, match='no images'):
    statistics.compute_stats([], mean_colour)
  with pytest.raises(ValueError, match='height'):
    statistics.compute_stats([images, images[:, :5]], mean_colour)


def test_shards_merge_to_the_whole(images):
  """Statistics of parts merge; those of different data sets are refused."""
  mean_colour = lambda x: x.mean(axis=(1, 2))
  of = lambda x, name: statistics.compute_stats(
    [x], mean_colour, fingerprint=name
  )
  whole = of(images, 'a')
  parts = [of(images[i::3][::-1], 'a') for i in range(3)]
  merged = statistics.merge_stats(parts)
  np.testing.assert_allclose(merged.mu, whole.mu)
  np.testing.assert_allclose(merged.sigma, whole.sigma)
  assert merged.fingerprint == whole.fingerprint and merged.count == 23
  assert len(merged.features) == 23
  for other in (of(images, 'b'), of(images[:, :5], 'a')):
    with pytest.raises(ValueError, match='different data sets'):
      statistics.merge_stats([whole, other])


def test_statistics_of_others(tmp_path):
  """Files of other projects have mu and sigma, or pool_3."""
  x = np.random.default_rng(1).standard_normal((30, 4)).astype(np.float32)
  np.savez(tmp_path / 'a.npz', mu=x.mean(axis=0), sigma=np.cov(x.T))
  np.savez(tmp_path / 'b.npz', pool_3=x)
  a, b = (statistics.load_stats(tmp_path / f'{n}.npz') for n in 'ab')
  np.testing.assert_allclose(a.mu, b.mu, rtol=1e-5)
  np.testing.assert_allclose(a.sigma, b.sigma, rtol=1e-5)
  assert (a.count, b.count) == (None, 30)
  assert a.features is None and b.features.shape == (30, 4)
  with pytest.warns(UserWarning, match='30 images'):
    assert evaluation.fid(b, a).value == pytest.approx(0, abs=1e-5)
  with pytest.warns(UserWarning, match='do not say their variant'):
    statistics.check_compatible(a, variant='tensorflow')


def test_a_wrong_reference_is_an_error_not_a_number(images, tmp_path):
  stats = statistics.compute_stats(
    [images], lambda x: x.mean(axis=(1, 2)), fingerprint='1'
  )
  good = {
    'variant': stats.variant,
    'resolution': 12,
    'fingerprint': stats.fingerprint,
  }
  statistics.check_compatible(stats, **good)
  bad = {'variant': 'tensorflow', 'resolution': 32, 'fingerprint': '0'}
  for name, value in bad.items():
    with pytest.raises(ValueError, match=f'{name} .* not {value}'):
      statistics.check_compatible(stats, **(good | {name: value}))
  np.savez(tmp_path / 'x.npz', images=images)
  with pytest.raises(ValueError, match='it has images'):
    statistics.load_stats(tmp_path / 'x.npz')
  np.savez(tmp_path / 'y.npz', mu=np.ones(3), sigma=np.ones((2, 2)))
  with pytest.raises(ValueError, match='no reference statistics'):
    statistics.load_stats(tmp_path / 'y.npz')
  np.savez(tmp_path / 'z.npz', mu=np.array([print], object), sigma=1)
  with pytest.raises(ValueError, match=r'z\.npz is not a readable'):
    statistics.load_stats(tmp_path / 'z.npz')


@pytest.mark.parametrize('name', ['mu', 'sigma', 'features'])
def test_statistics_that_are_not_finite(tmp_path, name):
  arrays = {'mu': np.zeros(2), 'sigma': np.eye(2), 'features': np.ones((3, 2))}
  arrays[name] = arrays[name] + np.nan
  np.savez(tmp_path / 'a.npz', **arrays)
  with pytest.raises(ValueError, match=r'a.npz .*not all finite numbers'):
    statistics.load_stats(tmp_path / 'a.npz')


@pytest.mark.parametrize(
  'changes',
  [
    {'sigma': -np.eye(2)},
    {'sigma': np.triu(np.ones((2, 2)))},
    {'features': np.ones((5, 3))},
    {'count': np.asarray(-3)},
    {'count': np.asarray(2.5)},
  ],
  ids=str,
)
def test_statistics_that_cannot_be(tmp_path, changes):
  whole = {'mu': np.zeros(2), 'sigma': np.eye(2), 'count': np.asarray(5)}
  np.savez(tmp_path / 'a.npz', **whole)
  assert statistics.load_stats(tmp_path / 'a.npz').count == 5
  np.savez(tmp_path / 'a.npz', **whole | changes)
  with pytest.raises(ValueError, match=r'a.npz .*no covariance, count'):
    statistics.load_stats(tmp_path / 'a.npz')


def test_features_of_a_single_image_are_no_reference(tmp_path):
  np.savez(tmp_path / 'a.npz', pool_3=np.zeros((1, 3)))
  with pytest.raises(ValueError, match=r'a.npz .*1 images have no covariance'):
    statistics.load_stats(tmp_path / 'a.npz')
