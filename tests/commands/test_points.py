"""Models of points, from a config to numbers and pictures; figures."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

import evaluation
import experiment
import run_lib
import sampling
import sde_lib
from commands import evaluate
from data import datasets, toy
from examples import paper_figures
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


def test_trains_and_evaluates(tmp_path):
  """A model trained for seconds is nearly the true density."""
  config = load('mixture_ve')
  config.training.n_iters = 600
  config.training.checkpoint_freq = config.training.snapshot_freq = 600
  config.eval.update(num_samples=2000, batch_size=2000)
  config.sampling.update(num_steps=60, rtol=1e-2, atol=1e-2)
  run_lib.train(config, tmp_path)
  picture(tmp_path / 'samples' / 'step_600.png')
  evaluate.evaluate(config, tmp_path)
  (result,) = json.loads((tmp_path / 'eval/results.json').read_text())
  value = lambda name: result[name]['value']
  assert result['count'] == 2000
  assert 0 < value('test_loss') < 0.7
  # Negative log-likelihoods of the test points: of the model, and true.
  assert abs(value('nats') - value('true_nats')) < 0.1
  law = toy.DISTRIBUTIONS['toy/mixture']
  x = datasets.load(config.data, 'test').fetch(range(4000))
  np.testing.assert_allclose(value('true_nats'), -law.logp(x).mean(), rtol=1e-5)
  # An error of 0.02 of the weights of the modes gives 1 and 0.05.
  assert value('true_sliced_wasserstein') < value('sliced_wasserstein') < 1.5
  assert abs(value('energy_distance')) < 0.1
  (folder,) = (tmp_path / 'eval').glob('step_600-*')
  for name in ('score_field', 'density', 'trajectories'):
    picture(folder / f'{name}.png')
  saved = np.load(folder / 'samples_2000.npz')
  assert saved['points'].shape == (2000, 2)


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
