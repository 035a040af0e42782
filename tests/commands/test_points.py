"""Models of points, from a config to numbers and pictures; figures."""

import copy
import dataclasses
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import special

import evaluation
import experiment
import run_lib
import sampling
import sde_lib
from commands import evaluate, points, stats, trained
from configs.base import arrays, compose, ddpmpp, edm, vp
from data import datasets, toy
from examples import paper_figures
from reporting import plane
from runtime.devices import make_layout
from tests.exact import GAUSSIAN

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / 'configs/toy').glob('*.py'))


def load(name):
  return experiment.load_config(ROOT / 'configs' / 'toy' / f'{name}.py')


def picture(path):
  """Return the grey levels of a PNG, of which some are dark, some light."""
  pixels = np.asarray(Image.open(path).convert('L'))
  assert pixels.min() < 80 and pixels.max() == 255
  return pixels


@pytest.mark.parametrize('name', CONFIGS)
def test_config(name):
  """It can run, its points have a law, and its docstring is the command."""
  config = load(name)
  experiment.build(config)
  assert config.data.dataset in toy.DISTRIBUTIONS
  text = (ROOT / 'configs/toy' / f'{name}.py').read_text()
  command = text.split('"""')[1].split('\n\n')[1].replace('\\\n', '').split()
  assert command[:2] == ['python', 'main.py']
  assert command[-1] == f'configs/toy/{name}.py'


def test_trains_and_evaluates(tmp_path, monkeypatch):
  """A model trained for seconds is nearly the true density."""
  config = load('mixture_ve')
  config.training.update(n_iters=900, batch_size=256)
  config.training.checkpoint_freq = config.training.snapshot_freq = 900
  # As many as in the picture of training, so that they share a program.
  config.eval.update(num_samples=2048, batch_size=2048)
  config.sampling.update(num_steps=60, rtol=1e-2, atol=1e-2, corrector='none')
  grid = plane.grid  # Pictures with fewer points.
  monkeypatch.setattr(plane, 'grid', lambda half, n: grid(half, n // 3))
  run_lib.train(config, tmp_path)
  picture(tmp_path / 'samples' / 'step_900.png')
  evaluate.evaluate(config, tmp_path)
  (result,) = json.loads((tmp_path / 'eval/results.json').read_text())
  value = lambda name: result[name]['value']
  assert result['count'] == 2048
  assert 0 < value('test_loss') < 0.7
  # Negative log-likelihoods of the test points: of the model, and true.
  assert abs(value('nats') - value('true_nats')) < 0.1
  law = toy.DISTRIBUTIONS['toy/mixture']
  x = datasets.load(config.data, 'test').fetch(range(4000))
  np.testing.assert_allclose(value('true_nats'), -law.logp(x).mean(), rtol=1e-5)
  # An error of 0.02 of the weights of the modes gives 1 and 0.05.
  assert value('true_sliced_wasserstein') < value('sliced_wasserstein') < 1.5
  assert abs(value('energy_distance')) < 0.1
  (folder,) = (tmp_path / 'eval').glob('step_900-*')
  for name in ('score_field', 'density', 'trajectories'):
    picture(folder / f'{name}.png')
  saved = np.load(folder / 'samples_2048.npz')
  assert saved['points'].shape == (2048, 2)


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


def test_quantiles_are_those_of_numpy():
  x, levels = (
    np.random.default_rng(0).normal(size=(50, 3)),
    np.linspace(0, 1, 71),
  )
  want = np.quantile(x, levels, axis=0)
  np.testing.assert_allclose(evaluation._quantiles(x, levels), want, rtol=1e-12)


@pytest.mark.parametrize('method', ['ula', 'mala', 'annealed_langevin'])
def test_langevin_samplers(method):
  """Langevin samplers of the table have the moments of a marginal."""
  sde = sde_lib.VESDE(sigma_min=0.3, sigma_max=3.0)
  z = sde.prior_sample(jax.random.key(0), (4000, 2))
  options = {'eps': 1e-6, 'step_size': 0.01, 'final_denoise': False}
  options['num_steps'] = 10 if method == 'annealed_langevin' else 300
  if method == 'annealed_langevin':
    options['corrector_steps'] = 30
  sampler = sampling.SAMPLERS[method](**options)
  samples = jax.jit(
    lambda rng, z: sampler(rng, GAUSSIAN.score_fn(sde), sde, z)
  )(jax.random.key(1), z)
  assert int(samples.nfe) == {'mala': 1801}.get(method, 300)
  x = np.asarray(samples.x)
  error = 4 / np.sqrt(len(x))
  variance = GAUSSIAN.variance + 0.3**2
  np.testing.assert_allclose(x.mean(0), GAUSSIAN.mean, atol=error)
  bias = 0 if method == 'mala' else 0.02 / variance.min()
  atol = error * np.sqrt(2) + bias
  np.testing.assert_allclose(x.var(0) / variance, 1, atol=atol)


def test_figure_of_the_flow(tmp_path):
  """In one dimension the ODE does not change quantiles."""
  numbers = paper_figures.make('ode', tmp_path)
  assert numbers == json.loads((tmp_path / 'ode.json').read_text())
  assert numbers['largest_change_of_quantile'] < 1e-4
  picture(tmp_path / 'ode.png')


def test_figure_of_the_sdes(tmp_path):
  """Forward and reverse paths end in the right marginals."""
  numbers = paper_figures.make('sde', tmp_path)
  bound = 1.63 / np.sqrt(numbers['count'])  # of probability 0.01
  assert numbers['kolmogorov_distance_forward'] < bound
  assert numbers['kolmogorov_distance_reverse'] < bound
  picture(tmp_path / 'sde.png')


@pytest.mark.slow
def test_figures_of_the_first_paper(tmp_path):
  numbers = paper_figures.make('low_density', tmp_path)
  dense = numbers['relative_squared_error_where_dense']
  assert 10 * dense < numbers['relative_squared_error_elsewhere']
  numbers = paper_figures.make('modes', tmp_path)
  weights, error = numbers['weight_of_upper_mode'], numbers['std_error']
  assert abs(weights['annealed Langevin dynamics'] - 0.8) < 3 * error
  assert abs(weights['Langevin dynamics'] - 0.8) > 20 * error
  numbers = paper_figures.make('manifold', tmp_path)
  bare, noisy = numbers['sigma=0.0'], numbers['sigma=0.1']
  assert bare['std_of_late_losses'] > 100 * noisy['std_of_late_losses']
  for name in ('low_density', 'modes', 'manifold'):
    picture(tmp_path / f'{name}.png')


class Zero(nn.Module):
  """A network that returns 0: with EDM's scales exact for scaled Gaussians."""

  def __call__(self, x, cond, *, train):
    return jnp.zeros_like(x)


def own_features(x):
  """Return features of signals: some numbers of each, of deviation 1."""
  return x[:, :2].reshape(len(x), -1) / [0.1, 70, 0.1, 70]


@pytest.fixture(scope='module')
def signals(tmp_path_factory):
  """A run on Gaussian signals in two units, and its test set."""
  folder = tmp_path_factory.mktemp('signals')
  x = np.random.default_rng(0).normal([5, -3000], [0.1, 70], (600, 8, 2))
  np.savez(folder / 'x.npz', x_train=x[:400], x_test=x[400:])
  config = compose(
    vp, ddpmpp, edm, arrays(str(folder / 'x.npz')),
    {
      'model.ch_mult': (1,), 'model.attn_resolutions': (),
      'eval.num_samples': 400, 'eval.batch_size': 200,
      'eval.extractor': f'{__name__}:own_features',
      'sampling.num_steps': 12,
    },
  )  # fmt: skip
  model = dataclasses.replace(experiment.build(config), network=Zero())
  run = trained.Run(
    model=model, workdir=folder, step=1, params={}, layout=make_layout()
  )
  return run, datasets.load(model.config.data, 'test')


def test_arrays_are_evaluated(signals, tmp_path, monkeypatch):
  """An exact model is as far from the test data as the training data are."""
  monkeypatch.setenv('SCORE_SDE_CACHE', str(tmp_path / 'cache'))
  run, test_set = signals
  judge = evaluate.Judge.of(run.model.config, tmp_path, 400)
  result = points.evaluator(test_set, judge)(run, tmp_path)
  assert result['count'] == 400 and result['nfe'] > 10
  value = lambda name: result[name]['value']
  # Distances are those of 16 numbers of deviation 1, whatever the units.
  assert (
    0.5 < value('sliced_wasserstein') / value('true_sliced_wasserstein') < 2
  )
  assert abs(value('energy_distance') - value('true_energy_distance')) < 0.02
  assert value('fid') < 0.2
  saved = np.load(tmp_path / 'samples_400.npz')['signals']
  np.testing.assert_allclose(saved.mean((0, 1)), [5, -3000], rtol=0.005)
  np.testing.assert_allclose(saved.std((0, 1)), [0.1, 70], rtol=0.15)
  for name in ('samples', 'test_data', 'histograms', 'spectra'):
    picture(tmp_path / f'{name}.png')


def test_arrays_of_a_user_are_scored(signals, tmp_path, capsys):
  run, test_set = signals
  config = copy.deepcopy(run.model.config)
  config.eval.extractor = ''
  x = test_set.fetch(np.arange(200))
  np.save(tmp_path / 'mine.npy', x + np.float32([0.1, 0]))
  evaluate.evaluate_images(config, tmp_path, tmp_path / 'mine.npy')
  assert 'No FID, KID or Inception Score' in capsys.readouterr().out
  (path,) = tmp_path.glob('eval/mine.npy-*.json')
  result = json.loads(path.read_text())
  assert result['count'] == 200 and 'fid' not in result
  # A shift by 1 of half of the numbers: the root of the mean of half a square.
  shift = result['sliced_wasserstein']['value']
  assert abs(shift - np.sqrt(0.5)) < 0.1
  np.save(tmp_path / 'short.npy', x[:, :7])
  with pytest.raises(ValueError, match='short.npy.* examples of shape .7, 2.'):
    evaluate.evaluate_images(config, tmp_path, tmp_path / 'short.npy')
  with pytest.raises(ValueError, match='No FID.*config.eval.extractor'):
    stats.stats(config, tmp_path)


@pytest.mark.parametrize('dims', [1, 3, 40])
def test_distances_in_any_dimension(dims):
  """Of a shift s the mean square over directions is |s|^2 / dims."""
  x, y = np.random.default_rng(0).normal(size=(2, 300, dims))
  shift = np.full(dims, 3.0)
  sliced = evaluation.sliced_wasserstein(x, x + shift, directions=800)
  np.testing.assert_allclose(sliced, 3.0, rtol=0.1)
  assert evaluation.sliced_wasserstein(x, y) < 0.3
  # Of distributions far apart: 2 |s| - 2 E|x - x'|, |x - x'|^2 ~ 2 chi^2.
  far = evaluation.energy_distance(x, y + 100 * shift)
  width = 2 * np.exp(
    special.gammaln((dims + 1) / 2) - special.gammaln(dims / 2)
  )
  wanted = 2 * 300 * np.sqrt(dims) - 2 * width
  np.testing.assert_allclose(
    far, wanted, atol=0.05 * width + 0.5 * np.sqrt(dims)
  )
  few = evaluation.energy_distance(x, y)
  pairs = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=-1).sum()
  wanted = 2 * pairs(x, y) / 300**2
  wanted -= (pairs(x, x) + pairs(y, y)) / (300 * 299)
  np.testing.assert_allclose(few, wanted, atol=1e-6)


@pytest.mark.parametrize('space', [(16,), (8, 4), (4, 6, 8)])
def test_power_spectrum(space):
  """White noise has its variance at all frequencies, a wave one frequency."""
  x = np.random.default_rng(0).normal(size=(400, *space, 2)) * [1, 3]
  frequency, power = evaluation.power_spectrum(x)
  np.testing.assert_allclose(frequency, np.arange(len(power)) / max(space))
  np.testing.assert_allclose(power / [1, 9], 1, atol=0.3)
  n = space[-1]
  wave = np.cos(2 * np.pi * 2 * np.arange(n) / n)
  wave = np.broadcast_to(wave, (1, *space))[..., None]
  _, power = evaluation.power_spectrum(wave)
  (place,) = np.nonzero(power[:, 0] > 1e-9)
  assert frequency[place] == 2 / n
