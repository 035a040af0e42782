"""Tests of metrics: closed forms, torch-fidelity 0.4.0, pytorch-fid 0.3.0.

The numbers of the other projects were computed by

  from torch_fidelity import metric_fid, metric_isc, metric_kid
  real, fake, logits = (torch.from_numpy(x) for x in make_clouds())
  s = [metric_fid.fid_features_to_statistics(x) for x in (fake, real)]
  metric_fid.fid_statistics_to_metric(*s, False)
  fid_score.calculate_frechet_distance(  # of pytorch_fid
    fake.numpy().mean(0), np.cov(fake.T), real.numpy().mean(0), np.cov(real.T))
  metric_kid.kid_features_to_metric(
    fake, real, kid_subsets=20, kid_subset_size=100, rng_seed=2020)
  metric_isc.isc_features_to_metric(logits, splits=10, shuffle=False)
"""

import numpy as np
import pytest

import evaluation
from features import statistics
from features.statistics import Moments


def moments_of(features):
  """Return the moments of features [N, D]."""
  moments = Moments()
  moments.update(features)
  return moments


def random_covariance(rng, dims, rank):
  """Return a random covariance [dims, dims] of a given rank."""
  factor = rng.standard_normal((dims, rank))
  return factor @ factor.T / rank


# --- Frechet distance ---------------------------------------------------------


def test_frechet_distance_of_commuting_gaussians():
  """With common eigenvectors, tr (S1 S2)^(1/2) = sum sqrt(l1 l2)."""
  rng = np.random.default_rng(0)
  basis, _ = np.linalg.qr(rng.standard_normal((20, 20)))
  l1, l2 = rng.gamma(1, size=(2, 20))
  mu1, mu2 = rng.standard_normal((2, 20))
  got = evaluation.frechet_distance(
    mu1, basis * l1 @ basis.T, mu2, basis * l2 @ basis.T
  )
  want = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(l1) - np.sqrt(l2)) ** 2).sum()
  assert got == pytest.approx(want, rel=1e-10)


def test_frechet_distance_of_pairs_in_general():
  """For 2x2, tr sqrt(A) = sqrt(tr A + 2 sqrt(det A)) gives a closed form."""
  rng = np.random.default_rng(1)
  s1, s2 = random_covariance(rng, 2, 3), random_covariance(rng, 2, 3)
  product = s1 @ s2
  root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
  zero = np.zeros(2)
  got = evaluation.frechet_distance(zero, s1, zero, s2)
  assert got == pytest.approx(np.trace(s1 + s2) - 2 * root, rel=1e-10)
  assert got == pytest.approx(evaluation.frechet_distance(zero, s2, zero, s1))


@pytest.mark.parametrize('rank', [0, 1, 7, 30])
def test_frechet_distance_of_singular_covariances(rank):
  """With fewer images than dimensions it is finite, and 0 from itself."""
  rng = np.random.default_rng(2)
  mu = rng.standard_normal(30)
  singular = random_covariance(rng, 30, rank) if rank else np.zeros((30, 30))
  full = random_covariance(rng, 30, 60)
  got = evaluation.frechet_distance(mu, singular, mu, full)
  assert np.isfinite(got) and got > 0
  itself = evaluation.frechet_distance(mu, singular, mu, singular)
  assert itself == pytest.approx(0, abs=1e-6)


def test_fid_of_gaussian_clouds():
  """The distance of many points is that of their Gaussians."""
  rng = np.random.default_rng(3)
  a = rng.standard_normal((100_000, 4))
  b = 1.5 * rng.standard_normal((100_000, 4)) + 0.5
  got = evaluation.fid(moments_of(a), moments_of(b))
  assert got.value == pytest.approx(4 * (0.5**2 + 0.5**2), rel=0.01)
  assert got.count == 100_000 and got.note == ''


@pytest.mark.parametrize('mean, scale', [(0.0, 1.5), (0.7, 1.0), (0.3, 0.8)])
def test_standard_error_of_fid_in_closed_form(mean, scale):
  """In one dimension FID = (m1 - m2)^2 + (s1 - s2)^2.

  Its variance over samples of a Gaussian is (4 (m1 - m2)^2 s1^2 +
  2 (s1 - s2)^2 s1^2) / N.
  """
  rng = np.random.default_rng(3)
  x = mean + scale * rng.standard_normal((100_000, 1))
  reference = moments_of(rng.standard_normal((100_000, 1)))
  got = evaluation.fid(moments_of(x), reference, features=x)
  want = scale * np.sqrt((4 * mean**2 + 2 * (scale - 1) ** 2) / 100_000)
  assert got.std_error == pytest.approx(want, rel=0.02)


@pytest.mark.filterwarnings('ignore:FID of')
def test_standard_error_of_fid_is_that_of_repetitions():
  """Also for correlated and skewed features, and with a part of them."""
  rng = np.random.default_rng(11)
  mix = rng.standard_normal((16, 16)) / 4
  reference = moments_of(rng.gamma(1, size=(20_000, 16)) @ mix)
  found = []
  for _ in range(60):
    x = 1.3 * rng.gamma(1, size=(600, 16)) @ mix + 0.2
    found.append(evaluation.fid(moments_of(x), reference, features=x[:400]))
  spread = np.std([metric.value for metric in found], ddof=1)
  got = np.mean([metric.std_error for metric in found])
  assert got == pytest.approx(spread, rel=0.2)  # 60 give the spread to 9%.
  few = evaluation.fid(
    moments_of(x[:9]), reference, features=x[:9], allow_few=True
  )
  assert few.std_error is None


def test_standard_error_of_one_inception_score():
  """The standard error is the spread of repetitions."""
  rng = np.random.default_rng(12)
  found = [
    evaluation.inception_score(2 * rng.standard_normal((500, 10)), splits=1)
    for _ in range(100)
  ]
  spread = np.std([metric.value for metric in found], ddof=1)
  got = np.mean([metric.std_error for metric in found])
  assert got == pytest.approx(spread, rel=0.2)


def test_fid_says_when_images_are_few():
  features = np.random.default_rng(4).standard_normal((40, 20))
  reference = moments_of(features)
  with pytest.raises(ValueError, match='20 images .* at least 21'):
    evaluation.fid(moments_of(features[:20]), reference)
  with pytest.warns(UserWarning, match='biased upwards'):
    got = evaluation.fid(moments_of(features[:20]), reference, allow_few=True)
  assert got.count == 20 and np.isfinite(got.value)
  with pytest.warns(UserWarning):
    got = evaluation.fid(reference, reference)
  assert '40 images' in got.note
  with pytest.raises(ValueError, match='19 features'):
    evaluation.fid(moments_of(features[:, :19]), reference)


# --- Equal to torch-fidelity on the same features and subsets -----------------


def make_clouds():
  """Return features of real images, features of samples, and logits."""
  rng = np.random.default_rng(0)
  real = rng.gamma(2.0, 1.0, (400, 16))
  fake = rng.gamma(2.2, 0.9, (400, 16))
  return real, fake, 4 * rng.standard_normal((400, 20))


@pytest.fixture(scope='module')
def clouds():
  return make_clouds()


@pytest.mark.filterwarnings('ignore:FID of')
@pytest.mark.parametrize(
  'theirs',
  [0.9204768957620146, 0.9204768957619862],
  ids=['torch-fidelity', 'pytorch-fid'],
)
def test_fid_equals_that_of_others(clouds, theirs):
  real, fake, _ = clouds
  got = evaluation.fid(moments_of(fake), moments_of(real))
  assert got.value == pytest.approx(theirs, rel=1e-10)


def test_kid_equals_torch_fidelity(clouds):
  """A subset of all images is the same in both projects."""
  real, fake, _ = clouds
  got = evaluation.kid(real, fake, subsets=1, subset_size=400)
  assert got.value == pytest.approx(0.22516885660365915, rel=1e-8)
  assert got.std_error is None


def test_kid_equals_torch_fidelity_on_its_subsets(clouds):
  """The same seed draws the same subsets in both projects."""
  real, fake, _ = clouds
  got = evaluation.kid(real, fake, subsets=20, subset_size=100, seed=2020)
  assert got.value == pytest.approx(-0.1329879713518352, rel=1e-10)
  assert got.std == pytest.approx(1.6263958620666754, rel=1e-10)


@pytest.mark.parametrize(
  'splits, value, std',
  [(1, 8.198115203941198, None), (10, 7.23849152861244, 0.5726296045499054)],
)
def test_inception_score_equals_torch_fidelity(clouds, splits, value, std):
  got = evaluation.inception_score(clouds[2], splits=splits)
  assert got.value == pytest.approx(value, rel=1e-10)
  assert got.std == (std and pytest.approx(std, rel=1e-8))
  assert got.count == 400


def test_precision_and_recall_equal_torch_fidelity(clouds):
  real, fake, _ = clouds
  got = evaluation.precision_recall(real, fake)
  assert got['precision'].value == pytest.approx(0.885)
  assert got['recall'].value == pytest.approx(0.8075)


# --- What metrics mean --------------------------------------------------------


def test_kid_is_unbiased_and_knows_its_error():
  """It is 0 within its error for one distribution, and larger for two."""
  rng = np.random.default_rng(8)
  a, b = rng.standard_normal((2, 1000, 8))
  same = evaluation.kid(a, b, subsets=50, subset_size=100)
  assert abs(same.value) < 5 * same.std_error < 0.1
  # Of 1000 images, ten subsets are disjoint; 49 / 50 is in `std` for ddof.
  assert same.std_error == pytest.approx(same.std * np.sqrt(50 / 49 / 10))
  far = evaluation.kid(a, b + 0.5, subsets=50, subset_size=100)
  assert far.value > 10 * far.std_error
  assert same == evaluation.kid(a, b, subsets=50, subset_size=100)
  assert same != evaluation.kid(a, b, subsets=50, subset_size=100, seed=1)
  with pytest.raises(ValueError, match='1000 real and 99'):
    evaluation.kid(a, b[:99], subset_size=100)


def test_inception_score_of_certain_and_clueless_classifiers():
  """The score is the number of classes, or 1."""
  certain = 1e3 * np.eye(8)[np.arange(80) % 8]
  assert evaluation.inception_score(certain, splits=1).value == pytest.approx(8)
  clueless = np.ones((80, 8))
  assert evaluation.inception_score(clueless).value == pytest.approx(1)
  missing = evaluation.inception_score(None)
  assert missing.value is None and 'pool_3' in missing.note
  with pytest.raises(ValueError, match='split'):
    evaluation.inception_score(certain[:5])


def test_neighbours_against_all_pairs():
  """The results are those of the definitions, for blocks of any size."""
  rng = np.random.default_rng(9)
  real, fake = rng.standard_normal((50, 3)), rng.standard_normal((40, 3)) + 0.7
  distances = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=-1)
  radius = lambda x, k: np.sort(distances(x, x), axis=1)[:, k]
  inside = distances(fake, real) <= radius(real, 3)
  got = evaluation.precision_recall(real, fake)
  assert got['precision'].value == pytest.approx(inside.any(axis=1).mean())
  recalled = distances(real, fake) <= radius(fake, 3)
  assert got['recall'].value == pytest.approx(recalled.any(axis=1).mean())
  inside = distances(fake, real) <= radius(real, 5)
  got = evaluation.density_coverage(real, fake)
  assert got['density'].value == pytest.approx(inside.sum() / (5 * 40))
  assert got['coverage'].value == pytest.approx(inside.any(axis=0).mean())
  blocks = evaluation._squared_distances(fake, real, block=7)
  np.testing.assert_allclose(
    np.concatenate(list(blocks)), distances(fake, real) ** 2, atol=1e-12
  )
  with pytest.raises(ValueError, match='3-th'):
    evaluation.precision_recall(real[:3], fake)


def test_neighbours_of_modes():
  """Samples of one of two modes have precision 1 and recall 1/2."""
  rng = np.random.default_rng(10)
  real = (
    rng.standard_normal((400, 2)) + [[9, 0]] * (np.arange(400) % 2)[:, None]
  )
  fake = rng.standard_normal((400, 2))
  got = evaluation.precision_recall(real, fake)
  got |= evaluation.density_coverage(real, fake)
  assert got['precision'].value > 0.9 and got['density'].value > 0.8
  assert 0.4 < got['recall'].value < 0.55
  assert 0.3 < got['coverage'].value < 0.55
  assert 0 < got['recall'].std_error < 0.03


# --- All metrics at once ------------------------------------------------------


@pytest.mark.filterwarnings('ignore:FID of')
def test_scores_of_samples():
  rng = np.random.default_rng(2)
  real, fake = rng.standard_normal((2, 1100, 4))
  stats = statistics.compute_stats(
    [np.uint8(rng.integers(0, 256, (1100, 2, 2, 1)))], lambda _: real
  )
  logits = rng.standard_normal((1100, 3))
  got = evaluation.score_samples(
    [
      {'pool_3': fake[:300], 'logits': logits[:300]},
      {'pool_3': fake[300:], 'logits': logits[300:]},
    ],
    stats,
  )
  assert all(metric.value is not None for metric in got.values())
  assert got['fid'].value < 0.05 and abs(got['kid'].value) < 0.01
  assert got['precision'].value > 0.8 and got['is_10_splits'].std > 0
  assert {metric.count for metric in got.values()} == {1100}


def test_scores_that_cannot_be_had_say_why():
  """Too few images, no logits, or no features of the reference."""
  rng = np.random.default_rng(3)
  real, fake = rng.standard_normal((100, 8)), rng.standard_normal((8, 8))
  stats = statistics.ReferenceStats(
    mu=real.mean(axis=0), sigma=np.cov(real.T), count=100, features=real
  )
  got = evaluation.score_samples([{'pool_3': fake}], stats)
  assert 'at least 9' in got['fid'].note and '1000' in got['kid'].note
  assert 'pool_3' in got['is_10_splits'].note
  assert got['fid'].value is None and got['fid'].count == 8
  assert got['coverage'].value is not None
  bare = statistics.ReferenceStats(mu=stats.mu, sigma=stats.sigma)
  with pytest.warns(UserWarning, match='8 images'):
    got = evaluation.score_samples([{'pool_3': fake}], bare, allow_few=True)
  assert got['fid'].value > 0
  assert 'no features' in got['recall'].note and got['kid'].value is None


# --- Distances of points ------------------------------------------------------


def test_distances_of_shifted_points():
  """A shift by (3, 4) has a sliced distance of 5 / sqrt(2)."""
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((2, 3000, 2))
  np.testing.assert_allclose(
    evaluation.sliced_wasserstein(x, x + np.array([3.0, 4.0])),
    np.sqrt(12.5),
    rtol=1e-6,
  )
  assert evaluation.sliced_wasserstein(x, y) < 0.1
  assert abs(evaluation.energy_distance(x, y)) < 0.01
  # Of normal distributions far apart: 2 E|x - y| - 2 E|x - x'|.
  far = evaluation.energy_distance(x, y + np.array([100.0, 0.0]))
  np.testing.assert_allclose(far, 2 * 100 - 2 * np.sqrt(np.pi), rtol=2e-3)


# --- Few images, sure classes, and what cannot be had -------------------------


def test_inception_score_of_sure_classes_that_are_not_all_there():
  """0 log 0 is 0: nine sure classes of ten have the score 9."""
  for sure in (1e4, np.inf):
    logits = np.where(np.eye(10)[np.arange(90) % 9] > 0, 0.0, -sure)
    for splits in (1, 10):
      got = evaluation.inception_score(logits, splits=splits)
      assert got.value == pytest.approx(9) and got.std_error is not None
  assert evaluation.inception_score(logits[:1], splits=1).std_error is None


@pytest.mark.filterwarnings('ignore:FID of')
@pytest.mark.parametrize('count', [1, 2, 3, 4, 5, 6, 7, 10, 11])
def test_each_metric_has_a_value_or_a_note(count):
  """None of them takes the others with it."""
  rng = np.random.default_rng(count)
  real, fake = rng.standard_normal((100, 3)), rng.standard_normal((count, 3))
  stats = statistics.ReferenceStats(
    mu=real.mean(axis=0), sigma=np.cov(real.T), count=100, features=real
  )
  batch = {'pool_3': fake, 'logits': rng.standard_normal((count, 4))}
  for allow_few in (False, True):
    got = evaluation.score_samples([batch], stats, allow_few=allow_few)
    assert len(got) == 8
    for name, metric in got.items():
      assert (metric.value is None) != (metric.note == '') or name == 'fid'
      for number in (metric.value, metric.std_error, metric.std):
        assert number is None or np.isfinite(number), name
    there = {name for name, metric in got.items() if metric.value is not None}
    assert ('precision' in there) == ('recall' in there) == (count > 3)
    assert ('density' in there) == ('coverage' in there) == (count > 5)
    assert 'is_1_split' in there and ('is_10_splits' in there) == (count >= 10)
    assert ('fid' in there) == (count > 3 or (allow_few and count > 1))
  assert got['kid'].note.endswith(f'only 100 real and {count} generated.')


def test_kid_says_how_many_there_are():
  """Of the samples only as many are kept as the reference has features."""
  rng = np.random.default_rng(0)
  real, fake = rng.standard_normal((11, 3)), rng.standard_normal((16, 3))
  stats = statistics.ReferenceStats(
    mu=real.mean(axis=0), sigma=np.cov(real.T), count=11, features=real
  )
  with pytest.warns(UserWarning, match='FID of 11'):
    got = evaluation.score_samples([{'pool_3': fake}], stats)
  assert 'only 11 real and 16 generated' in got['kid'].note
  note = got['is_1_split'].note
  assert 'logits' in note and 'pytorch' not in note and 'eval.' not in note
  with pytest.warns(UserWarning, match='FID of 11'):
    got = evaluation.score_samples(
      [{'pool_3': fake}], stats, logits_hint='my:net can return them'
    )
  assert got['is_1_split'].note.endswith('(pool_3); my:net can return them.')


def test_standard_error_of_one_value_is_not_known():
  assert evaluation.standard_error(np.array([3.0])) is None
  assert evaluation.standard_error(np.array([1.0, 3.0])) == pytest.approx(1)


def test_distances_of_one_point():
  one, many = np.zeros((1, 2)), np.ones((5, 2))
  (got,) = evaluation.attempted(
    ('energy_distance',), 1, evaluation.energy_distance, one, many
  ).values()
  assert got.value is None and 'single point' in got.note
  assert np.isfinite(evaluation.sliced_wasserstein(one, many))
