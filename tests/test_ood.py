"""Out-of-distribution scores: closed forms, sets, and the whole command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import evaluation
import experiment
import likelihood
import run_lib
import sde_lib
from commands import evaluate
from data import datasets, ood
from tests import tiny

D, N = 16, 2000


def seen_of(x):
  """Return what the exact model of N(0, I) says of x [N, D]."""
  nats = 0.5 * (x**2).sum(1) + 0.5 * D * np.log(2 * np.pi)
  sde = sde_lib.VPSDE()

  def score_fn(x, t):
    alpha, sigma = (sde_lib.expand(v, x) for v in sde.marginal(t))
    return -x / (alpha**2 + sigma**2)

  norms = likelihood.log_score_norms(
    score_fn, sde, jnp.float32(x), jnp.array([0.01, 0.3, 0.9])
  )
  return evaluation.Seen(nats, np.asarray(norms))


@pytest.fixture(scope='module')
def gaussians():
  """Return (train, test, {scale: seen}) of N(0, scale^2 I)."""
  x = np.random.default_rng(0).standard_normal((4, N, D)).astype(np.float32)
  others = {1.0: x[2], 1.2: 1.2 * x[3], 0.8: 0.8 * x[3]}
  return (
    seen_of(x[0]),
    seen_of(x[1]),
    {scale: seen_of(v) for scale, v in others.items()},
  )


def test_norms_of_the_exact_score(gaussians):
  """The variance of VP is 1, so the norm is alpha |x|."""
  train, *_ = gaussians
  square = 2 * train.nats - D * np.log(2 * np.pi)
  alpha, _ = sde_lib.VPSDE().marginal(jnp.array([0.01, 0.3, 0.9]))
  exact = 0.5 * np.log(square)[:, None] + np.log(alpha)
  np.testing.assert_allclose(train.norms, exact, atol=1e-4)


@pytest.mark.parametrize('scale', [1.0, 1.2, 0.8])
@pytest.mark.parametrize('score', evaluation.OOD_SCORES)
def test_auroc_of_gaussians(gaussians, scale, score):
  """AUROCs of scaled Gaussians; those of equal ones are 1/2.

  The squares of the radii are chi^2 of D degrees of freedom, so the likelihood
  has P(F_DD > 1 / scale^2). The other scores are functions of the radius: its
  distance from a mean, and -log of the density of its logarithm, to which the
  mixture comes close. Their AUROCs are integrals over quantiles.
  """
  train, test, others = gaussians
  function = evaluation.OOD_SCORES[score]
  found = evaluation.auroc(
    function(train, test), function(train, others[scale])
  )
  law = stats.chi2(D)
  square = law.ppf((np.arange(20_000) + 0.5) / 20_000)
  if score == 'likelihood':
    exact = stats.f(D, D).sf(1 / scale**2)
  else:
    of = {
      'typicality': lambda s: np.abs(s - D),
      'score_norms': lambda s: -law.logpdf(s) - np.log(s),
    }[score]
    inside, outside = np.sort(of(square)), of(scale**2 * square)
    exact = np.searchsorted(inside, outside).mean() / len(inside)
  # The mixture is fitted to a sample.
  slack = 0.02 if score == 'score_norms' else 0.0
  assert abs(found.value - exact) < 4 * found.std_error + slack
  assert 0.003 < found.std_error < 0.02
  if scale == 1:
    assert abs(found.value - 0.5) < 4 * found.std_error


def test_auroc_by_hand():
  """Ties count one half; the error is DeLong's, from two variances."""
  found = evaluation.auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
  assert found.value == 3.5 / 4
  # Shares of pairs: outside (3/4, 1), inside (1, 3/4); each variance is 1/32.
  assert np.isclose(found.std_error, np.sqrt(2 * (1 / 32) / 2))
  with pytest.raises(ValueError, match='two examples'):
    evaluation.auroc(np.array([0.0]), np.array([1.0, 2.0]))
  with pytest.raises(ValueError, match='not finite'):
    evaluation.auroc(np.array([0.0, np.nan]), np.array([1.0, 2.0]))


def test_std_error_is_the_spread_of_repetitions():
  rng = np.random.default_rng(0)
  found = [
    evaluation.auroc(rng.standard_normal(60), 1 + rng.standard_normal(80))
    for _ in range(300)
  ]
  spread = np.std([v.value for v in found])
  assert abs(np.mean([v.std_error for v in found]) / spread - 1) < 0.15


def digits():
  return tiny.get_config().data


def test_sets_of_images(tmp_path):
  data, test = digits(), datasets.load(digits(), 'test')
  every = ood.some_of(test, 100).fetch(range(100))
  found = {
    name: ood.load(data, name, test, 100).fetch(range(100)) for name in ood.SETS
  }
  assert (found['rotated'][:, 0, :, 0] == every[:, :, -1, 0]).all()
  assert (found['inverted'] == 255 - every).all()
  noise = np.float64(found['noised']) - every
  assert 0.2 < noise.std() / every.std() < 0.5  # Clipping takes some of it.
  np.save(tmp_path / 'mine.npy', every)
  mine = ood.load(data, str(tmp_path / 'mine.npy'), test, 60)
  assert len(mine) == 60 and mine.fetch([0]).shape == (1, 8, 8, 1)


def test_sets_of_points():
  data = experiment.load_config(tiny.ROOT / 'configs/toy/rings_vp.py').data
  test = datasets.load(data, 'test')
  x = ood.some_of(test, 200).fetch(range(200))
  mean = x.mean(0)
  y = ood.load(data, 'rotated', test, 200).fetch(range(200)) - mean
  assert np.allclose(((x - mean) * y).sum(1), 0, atol=1e-5)
  y = ood.load(data, 'inverted', test, 200).fetch(range(200))
  assert np.allclose(x + y, 2 * mean, atol=1e-5)
  y = ood.load(data, 'noised', test, 4000).fetch(range(4000))
  assert np.allclose(y.std(0) / x.std(0), np.sqrt(1.25), rtol=0.1)
  assert len(ood.load(data, 'toy/checkerboard', test, 200)) == 200


def test_bad_sets(tmp_path):
  data, test = digits(), datasets.load(digits(), 'test')
  np.save(tmp_path / 'few.npy', test.fetch(range(20)))
  for name, text in {
    'rotatd': "did you mean 'rotated'",
    'toy/rings': 'neither a path',
    'digits': 'neither a path',
    str(tmp_path / 'none.npz'): 'neither a path',
    str(tmp_path / 'few.npy'): 'at least 50 examples',
  }.items():
    with pytest.raises((ValueError, FileNotFoundError), match=text):
      ood.load(data, name, test, 100)


@pytest.mark.slow
def test_command(tmp_path):
  """A run of points is told from another set; the same set is not."""
  config = tiny.points()
  config.training.n_iters = 4
  config.eval.update(enable_sampling=False, enable_loss=False, ood_images=60)
  config.eval.update(batch_size=64, ood=('noised', 'toy/checkerboard'))
  config.sampling.update(rtol=1e-1, atol=1e-1)
  run_lib.train(config, tmp_path)
  evaluate.evaluate(config, tmp_path)
  (result,) = json.loads((tmp_path / 'eval/results.json').read_text())
  names = {
    f'auroc_{score}_{name}'
    for score in evaluation.OOD_SCORES
    for name in ('noised', 'checkerboard')
  }
  assert names <= set(result)
  assert all(0 <= result[name]['value'] <= 1 for name in names)
  assert [*(tmp_path / 'eval').glob('step_4-*/ood.png')]
