"""Out-of-distribution scores: closed forms, sets, and the whole command."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

import evaluation
import experiment
import likelihood
import run_lib
import sde_lib
from commands import evaluate
from commands import ood as ood_command
from commands.trained import Run
from data import batches, datasets, ood
from runtime.devices import make_layout
from tests import tiny

D, N = 16, 1000


def seen_of(x, times=(0.3,)):
  """Return what the exact model of N(0, I) says of x [N, D]."""
  nats = 0.5 * (x**2).sum(1) + 0.5 * D * np.log(2 * np.pi)
  sde = sde_lib.VPSDE()

  def score_fn(x, t):
    alpha, sigma = (sde_lib.expand(v, x) for v in sde.marginal(t))
    return -x / (alpha**2 + sigma**2)

  norms = likelihood.log_score_norms(
    score_fn, sde, jnp.float32(x), jnp.array(times)
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


def test_norms_of_the_exact_score():
  """The variance of VP is 1, so the norm is alpha |x|."""
  x, times = np.random.default_rng(0).standard_normal((50, D)), (0.1, 0.9)
  alpha, _ = sde_lib.VPSDE().marginal(jnp.array(times))
  exact = np.log(np.linalg.norm(x, axis=1))[:, None] + np.log(alpha)
  np.testing.assert_allclose(seen_of(x, times).norms, exact, atol=1e-4)


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
  assert found.value == 3.5 / 4 and found.count == 2
  # Shares of pairs: outside (3/4, 1), inside (1, 3/4); each variance is 1/32.
  assert np.isclose(found.std_error, np.sqrt(2 * (1 / 32) / 2))
  with pytest.raises(ValueError, match='two examples'):
    evaluation.auroc(np.array([0.0]), np.array([1.0, 2.0]))
  with pytest.raises(ValueError, match='not finite'):
    evaluation.auroc(np.array([0.0, np.nan]), np.array([1.0, 2.0]))


def test_auroc_of_other_programs():
  """With ties: scikit-learn's area, and scipy's statistic over all pairs."""
  rng = np.random.default_rng(0)
  inside, outside = rng.integers(0, 9, 70), rng.integers(3, 12, 50)
  found = evaluation.auroc(inside, outside).value
  labels = np.repeat([0, 1], [70, 50])
  area = roc_auc_score(labels, np.concatenate([inside, outside]))
  pairs = stats.mannwhitneyu(outside, inside).statistic / (70 * 50)
  np.testing.assert_allclose(found, [area, pairs], rtol=1e-12)


def test_auroc_of_shifted_gaussians():
  """It is Phi(d / sqrt(2)), and the error is the spread of repetitions."""
  rng = np.random.default_rng(0)
  found = [
    evaluation.auroc(rng.standard_normal(60), 1 + rng.standard_normal(80))
    for _ in range(300)
  ]
  values = [v.value for v in found]
  mean, spread = np.mean(values), np.std(values)
  assert abs(mean - stats.norm.cdf(1 / np.sqrt(2))) < 4 * spread / np.sqrt(300)
  assert abs(np.mean([v.std_error for v in found]) / spread - 1) < 0.15


def sets_of(data, count, *names):
  """Return (examples of the test set, [those of each set])."""
  test = datasets.load(data, 'test')
  chosen = types.SimpleNamespace(ood=names, ood_images=count)
  sets = [v.fetch(range(len(v))) for v in ood.load(data, chosen, test).values()]
  assert (sets[1] == batches.some_of(test, count)).all()
  return sets[1], sets[2:]


def test_sets_of_images(tmp_path):
  data = tiny.get_config().data
  x, (turned, noisy, negative) = sets_of(data, 100, *ood.SETS)
  assert (turned[:, 0, :, 0] == x[:, :, -1, 0]).all()
  assert (negative == 255 - x).all()
  noise = np.float64(noisy) - x
  assert 0.2 < noise.std() / x.std() < 0.5  # Clipping takes some of it.
  np.save(tmp_path / 'mine.npy', x)
  _, (mine,) = sets_of(data, 60, str(tmp_path / 'mine.npy'))
  assert mine.shape == (60, 8, 8, 1) and mine.dtype == np.uint8


def test_sets_of_points():
  data = tiny.points().data
  x, sets = sets_of(data, 4000, *ood.SETS, 'toy/checkerboard')
  turned, noisy, mirrored, board = sets
  mean = x.mean(0)
  inner = ((x - mean) * (turned - mean)).sum(1)
  np.testing.assert_allclose(inner, 0, atol=1e-5)
  np.testing.assert_allclose(x + mirrored, 2 * mean + 0 * x, atol=1e-5)
  assert np.allclose(noisy.std(0) / x.std(0), np.sqrt(1.25), rtol=0.05)
  assert len(board) == 4000 and board.dtype == np.float32


def test_sets_of_signals(tmp_path):
  """Noise and mirrors are per channel, in units of the data."""
  x = np.random.default_rng(0).standard_normal((900, 8, 2))
  np.save(tmp_path / 'x.npy', x * [1, 50] + [0, 900])
  data = tiny.get_config(
    data__dataset='arrays', data__path=str(tmp_path / 'x.npy'),
    data__shape=(8, 2),
  ).data  # fmt: skip
  x, (noisy, mirrored) = sets_of(data, 90, 'noised', 'inverted')
  mean, std = x.mean((0, 1)), x.std((0, 1))
  assert np.allclose((noisy - x).std((0, 1)) / std, 0.5, rtol=0.1)
  assert np.allclose(x + mirrored, 2 * mean + 0 * x, rtol=1e-4, atol=1e-3)
  with pytest.raises(ValueError, match='square pictures and points'):
    sets_of(data, 90, 'rotated')
  np.save(tmp_path / 'long.npy', x[:, :6])
  with pytest.raises(ValueError, match='examples of shape'):
    sets_of(data, 90, str(tmp_path / 'long.npy'))


def points(**more):
  return tiny.points(
    eval__ood=('noised', 'toy/checkerboard'), eval__ood_images=100,
    eval__batch_size=64, eval__enable_sampling=False, eval__enable_loss=False,
    **more,
  )  # fmt: skip


def names():
  return {
    f'auroc_{score}_{name}'
    for score in evaluation.OOD_SCORES
    for name in ('noised', 'checkerboard')
  }


def test_evaluator(tmp_path):
  """Scores of a given density are put together as they should be."""
  model, layout = experiment.build(points()), make_layout()
  data, chosen = model.config.data, model.config.eval
  sets = ood.load(data, chosen, datasets.load(data, 'test'))
  of_set = {
    name: np.sum(v.fetch(range(len(v))) ** 2, axis=1)
    for name, v in sets.items()
  }
  nats = lambda run, folder, dataset: of_set[dataset.name]
  params = model.init_params(jax.random.key(0))
  run = Run(model=model, workdir=tmp_path, step=0, params=params, layout=layout)
  found = ood_command.evaluator(model, sets, layout, nats)(run, tmp_path)
  assert set(found) == names()
  for name in ('noised', 'checkerboard'):
    assert found[f'auroc_likelihood_{name}']['count'] == 100
    away = {k: abs(v - of_set['train'].mean()) for k, v in of_set.items()}
    for score, of in (('likelihood', of_set), ('typicality', away)):
      area = evaluation.auroc(of['test'], of[name])
      assert found[f'auroc_{score}_{name}'] == dataclasses.asdict(area)
  assert (tmp_path / 'ood.png').is_file()


@pytest.mark.slow
def test_command(tmp_path, capsys):
  """The whole command on a run of points."""
  config = points(training__n_iters=4, sampling__rtol=0.1, sampling__atol=0.1)
  run_lib.train(config, tmp_path)
  evaluate.evaluate(config, tmp_path)
  (result,) = json.loads((tmp_path / 'eval/results.json').read_text())
  assert names() <= set(result)
  assert all(0 <= result[name]['value'] <= 1 for name in names())
  assert [*(tmp_path / 'eval').glob('step_4-*/ood.png')]
  assert 'auroc_typicality_checkerboard' in capsys.readouterr().out
