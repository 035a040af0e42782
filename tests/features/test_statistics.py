"""Features and statistics of datasets, with a small network for Inception's."""

import importlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evaluation
from features import inception, statistics


class Tiny(nn.Module):
  """In the place of `InceptionV3`: 5 features of a coarse grid."""

  with_logits: bool = True

  @nn.compact
  def __call__(self, x):
    x = x[:, ::50, ::50].reshape(len(x), -1)
    pool_3 = jnp.tanh(nn.Dense(5, name='Dense_0')(x))
    logits = nn.Dense(3, name='fc')(pool_3) if self.with_logits else None
    return {'pool_3': pool_3, 'logits': logits}


def tiny_params(with_logits=True):
  image = jnp.zeros((1, 299, 299, 3))
  variables = Tiny(with_logits).init(jax.random.key(0), image)
  return variables['params']


@pytest.fixture
def images():
  return np.random.default_rng(0).integers(0, 256, (23, 12, 10, 3), np.uint8)


@pytest.fixture
def extract(monkeypatch):
  monkeypatch.setattr(inception, 'InceptionV3', Tiny)
  return statistics.FeatureExtractor(tiny_params(), batch_size=8)


# --- Features -----------------------------------------------------------------


def test_any_number_of_images(extract, images):
  """Whole batches and a part of one, in order, with progress."""
  calls = []
  got = extract(images, progress=lambda *call: calls.append(call))
  assert got['pool_3'].shape == (23, 5) and got['logits'].shape == (23, 3)
  assert calls == [(8, 23), (16, 23), (23, 23)]
  for i in (0, 8, 22):
    one = extract(images[i : i + 1])
    np.testing.assert_allclose(one['pool_3'][0], got['pool_3'][i], atol=1e-6)
  x = inception.preprocess(images, 'tensorflow')
  want = Tiny().apply({'params': tiny_params()}, x)
  np.testing.assert_allclose(got['logits'], want['logits'], atol=1e-5)
  with pytest.raises(ValueError, match='no images'):
    extract(images[:0])
  with pytest.raises(ValueError, match='uint8'):
    extract(np.float32(images))


def test_weights_without_logits(monkeypatch, images):
  monkeypatch.setattr(inception, 'InceptionV3', Tiny)
  extract = statistics.FeatureExtractor(
    tiny_params(False), variant='pytorch_fid'
  )
  got = extract(images)
  assert got['pool_3'].shape == (23, 5) and got['logits'] is None


def test_unknown_variant_is_refused_at_once():
  with pytest.raises(ValueError, match='pytorch_fid'):
    statistics.FeatureExtractor({}, variant='torch')


EIGHT_DEVICES = """
import numpy as np, jax
from features import inception
from tests.features import test_statistics as t
from features import statistics
assert jax.device_count() == 8
inception.InceptionV3 = t.Tiny
images = np.random.default_rng(0).integers(0, 256, (23, 12, 10, 3), np.uint8)
extract = statistics.FeatureExtractor(t.tiny_params(), batch_size=10)
placed = []
apply = extract._apply
extract._apply = lambda p, x: placed.append(x.sharding) or apply(p, x)
np.save(SYS_PATH, extract(images)['pool_3'])
assert [len(s.device_set) for s in placed] == [8, 8], placed
"""


def test_eight_devices_share_a_batch(extract, images, tmp_path):
  """Batches of 10 become 16, two on each device; features stay the same."""
  path = str(tmp_path / 'features.npy')
  program = EIGHT_DEVICES.replace('SYS_PATH', repr(path))
  program = (
    'import jax; jax.config.update("jax_num_cpu_devices", 8)\n' + program
  )
  subprocess.run([sys.executable, '-c', program], check=True)
  np.testing.assert_allclose(
    np.load(path), extract(images)['pool_3'], atol=1e-6
  )


# --- Statistics ---------------------------------------------------------------


def test_stats_of_a_dataset(extract, images, tmp_path):
  """Moments, count, provenance; written and read back."""
  done = []
  stats = statistics.compute_stats(
    [images[:9], images[9:]], extract, num_features=6, progress=done.append
  )
  want = extract(images)['pool_3']
  np.testing.assert_allclose(stats.mu, want.mean(axis=0), atol=1e-6)
  np.testing.assert_allclose(stats.sigma, np.cov(want.T), atol=1e-6)
  assert done == [9, 23]
  assert (stats.count, stats.resolution) == (23, 12)
  assert stats.variant == 'tensorflow'
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
  """A user's own features have a Frechet distance too."""

  def mean_colour(x):
    return x.mean(axis=(1, 2))

  stats = statistics.compute_stats([images], mean_colour)
  assert stats.variant == 'mean_colour'
  moments = evaluation.Moments()
  moments.update(statistics.features_of(255 - images, mean_colour))
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


def test_an_extractor_by_name(tmp_path, monkeypatch, images):
  """'module:function' of the user's; an edited file is another extractor."""
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'mine', raising=False)
  file = tmp_path / 'mine.py'
  file.write_text('def red(images):\n  return images[..., 0].mean((1, 2))\n')
  extract = statistics.find_extractor('mine:red')
  with pytest.raises(ValueError, match=r'\[23, D\]'):
    statistics.features_of(images, extract)
  file.write_text('def red(x):\n  return x.mean((1, 2))[:, :1]\n')
  del sys.modules['mine']
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)
  importlib.invalidate_caches()
  again = statistics.find_extractor('mine:red')
  got = statistics.features_of(images, again)
  np.testing.assert_allclose(got[:, 0], images[..., 0].mean((1, 2)))
  name = statistics.identity_of(again)
  assert name.startswith('mine.red-') and name != statistics.identity_of(
    extract
  )
  for bad in ('mine', 'mine:blue', 'absent:red', ':'):
    with pytest.raises(ValueError, match='no module:function') as error:
      statistics.find_extractor(bad)
    assert '\n' not in str(error.value)


def test_identity_of_a_network_is_of_its_weights(monkeypatch):
  """Up to pool_3: the last layer changes no features."""
  monkeypatch.setattr(inception, 'InceptionV3', Tiny)
  identity = lambda params, **kwargs: statistics.identity_of(
    statistics.FeatureExtractor(params, **kwargs)
  )
  params = tiny_params()
  assert identity(params) == identity(tiny_params(False))
  assert identity(params) != identity(params, variant='pytorch_fid')
  changed = jax.tree.map(lambda x: x * 1.01, params)
  assert identity(params) != identity(changed)


def test_shards_merge_to_the_whole(images):
  """Also the fingerprint, which does not depend on order."""
  mean_colour = lambda x: x.mean(axis=(1, 2))
  whole = statistics.compute_stats([images], mean_colour)
  parts = [
    statistics.compute_stats([images[i::3][::-1]], mean_colour)
    for i in range(3)
  ]
  merged = statistics.merge_stats(parts)
  np.testing.assert_allclose(merged.mu, whole.mu)
  np.testing.assert_allclose(merged.sigma, whole.sigma)
  assert merged.fingerprint == whole.fingerprint and merged.count == 23
  assert len(merged.features) == 23
  changed = images.copy()
  changed[3, 4, 5, 0] ^= 1
  assert statistics.fingerprint(changed) != whole.fingerprint
  assert statistics.fingerprint(images[1:]) != whole.fingerprint


def test_statistics_of_others(tmp_path):
  """pytorch-fid, TTUR and EDM: mu, sigma. Song et al. 2021: pool_3."""
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
  stats = statistics.compute_stats([images], lambda x: x.mean(axis=(1, 2)))
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


# --- All metrics at once ------------------------------------------------------


@pytest.mark.filterwarnings('ignore:FID of')
def test_scores_of_samples():
  rng = np.random.default_rng(2)
  real, fake = rng.standard_normal((2, 1100, 4))
  stats = statistics.compute_stats(
    [np.uint8(rng.integers(0, 256, (1100, 2, 2, 1)))], lambda _: real
  )
  logits = rng.standard_normal((1100, 3))
  got = statistics.score_samples(
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
  """Too few for FID and KID, no logits, and no features in the reference."""
  rng = np.random.default_rng(3)
  real, fake = rng.standard_normal((100, 8)), rng.standard_normal((8, 8))
  stats = statistics.ReferenceStats(
    mu=real.mean(axis=0), sigma=np.cov(real.T), count=100, features=real
  )
  got = statistics.score_samples([{'pool_3': fake}], stats)
  assert 'at least 9' in got['fid'].note and '1000' in got['kid'].note
  assert 'pool_3' in got['is_10_splits'].note
  assert got['fid'].value is None and got['fid'].count == 8
  assert got['coverage'].value is not None
  bare = statistics.ReferenceStats(mu=stats.mu, sigma=stats.sigma)
  with pytest.warns(UserWarning, match='8 images'):
    got = statistics.score_samples([{'pool_3': fake}], bare, allow_few=True)
  assert got['fid'].value > 0
  assert 'no features' in got['recall'].note and got['kid'].value is None
