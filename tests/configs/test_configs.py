"""Every file of `configs/`: its size, its numbers, and that it runs."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiment
import models
import sde_lib
from solvers.grids import GRIDS

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(
  str(path.relative_to(ROOT / 'configs').with_suffix(''))
  for path in (ROOT / 'configs').glob('*/**/*.py')
  if path.parent.name != 'toy'  # See tests/commands/test_points.py.
)
# Millions of parameters of the models that the paper releases, and of NCSN++
# without the Fourier features and their share of the first dense layer.
MILLIONS = {
  've/cifar10_ncsnpp_continuous': 62.76,
  've/cifar10_ncsnpp_deep_continuous': 107.59,
  've/cifar10_ncsnpp': 62.69,
  'vp/cifar10_ncsnpp_continuous': 62.69,
  'vp/cifar10_ddpmpp': 61.80,
  'vp/cifar10_ddpmpp_continuous': 61.80,
  'vp/cifar10_ddpmpp_deep_continuous': 106.63,
  'subvp/cifar10_ddpmpp_continuous': 61.80,
  'vp/cifar10_ddpmpp_conditional': 61.81,  # 11 label embeddings of 512
  've/cifar10_classifier': 38.91,
  'subvp/cifar10_ddpmpp_deep_continuous': 106.63,
  'vp/ddpm/cifar10': 35.22,
  'vp/ddpm/cifar10_continuous': 35.22,
  'subvp/cifar10_ddpm_continuous': 35.22,
  've/cifar10_ddpm': 35.22,
  've/ffhq_256_ncsnpp_continuous': 65.57,
  've/celebahq_256_ncsnpp_continuous': 65.57,
  've/bedroom_ncsnpp_continuous': 65.57,
  've/church_ncsnpp_continuous': 65.57,
  've/ffhq_ncsnpp_continuous': 105.79,
  've/celebahq_ncsnpp_continuous': 105.79,
  'edm/cifar10_ddpmpp': 55.73,
  'edm/cifar10_ect': 55.73,
  'edm/cifar10_thirty_minutes': 39.40,
}
# As released: sigma_max or beta_max, levels (0: continuous time), sampling
# steps, signal-to-noise ratio, batch, thousands of iterations, EMA rate.
RELEASED = {
  'subvp/cifar10_ddpm_continuous': (20, 0, 1000, 0.16, 128, 1300, 0.9999),
  'subvp/cifar10_ddpmpp_continuous': (20, 0, 1000, 0.16, 128, 1300, 0.9999),
  'subvp/cifar10_ddpmpp_deep_continuous': (20, 0, 1000, 0.16, 128, 950, 0.9999),
  'subvp/cifar10_ncsnpp_continuous': (20, 0, 1000, 0.16, 128, 1300, 0.9999),
  'subvp/cifar10_ncsnpp_deep_continuous': (20, 0, 1000, 0.16, 128, 950, 0.9999),
  've/bedroom_ncsnpp_continuous': (378, 0, 2000, 0.075, 64, 2400, 0.999),
  've/celeba_ncsnpp': (90, 1000, 1000, 0.17, 128, 1300, 0.999),
  've/celebahq_256_ncsnpp_continuous': (348, 0, 2000, 0.075, 64, 2400, 0.999),
  've/celebahq_ncsnpp_continuous': (1348, 0, 2000, 0.15, 8, 2400, 0.9999),
  've/church_ncsnpp_continuous': (380, 0, 2000, 0.075, 64, 2400, 0.999),
  've/cifar10_ddpm': (50, 1000, 1000, 0.16, 128, 1300, 0.999),
  've/cifar10_ncsnpp': (50, 1000, 1000, 0.16, 128, 1300, 0.999),
  've/cifar10_ncsnpp_continuous': (50, 0, 1000, 0.16, 128, 950, 0.999),
  've/cifar10_ncsnpp_deep_continuous': (50, 0, 1000, 0.16, 128, 950, 0.999),
  've/ffhq_256_ncsnpp_continuous': (348, 0, 2000, 0.075, 64, 2400, 0.999),
  've/ffhq_ncsnpp_continuous': (1348, 0, 2000, 0.15, 8, 2400, 0.9999),
  've/ncsn/celeba': (1, 10, 10, 0.316, 128, 1300, 0.0),
  've/ncsn/celeba_124': (90, 500, 500, 0.128, 128, 1300, 0.0),
  've/ncsn/celeba_1245': (90, 500, 500, 0.128, 128, 1300, 0.999),
  've/ncsn/celeba_5': (1, 10, 10, 0.316, 128, 1300, 0.999),
  've/ncsn/cifar10': (1, 10, 10, 0.316, 128, 1300, 0.0),
  've/ncsn/cifar10_124': (50, 232, 232, 0.176, 128, 1300, 0.0),
  've/ncsn/cifar10_1245': (50, 232, 232, 0.176, 128, 1300, 0.999),
  've/ncsn/cifar10_5': (1, 10, 10, 0.316, 128, 1300, 0.999),
  've/ncsnv2/bedroom': (190, 1086, 1086, 0.095, 128, 2400, 0.9999),
  've/ncsnv2/celeba': (90, 500, 500, 0.128, 128, 1300, 0.999),
  've/ncsnv2/cifar10': (50, 232, 232, 0.176, 128, 1300, 0.999),
  'vp/cifar10_ddpmpp': (20, 1000, 1000, 0.16, 128, 1300, 0.9999),
  'vp/cifar10_ddpmpp_continuous': (20, 0, 1000, 0.16, 128, 1300, 0.9999),
  'vp/cifar10_ddpmpp_deep_continuous': (20, 0, 1000, 0.16, 128, 950, 0.9999),
  'vp/cifar10_ncsnpp': (20, 1000, 1000, 0.16, 128, 1300, 0.9999),
  'vp/cifar10_ncsnpp_continuous': (20, 0, 1000, 0.16, 128, 1300, 0.9999),
  'vp/cifar10_ncsnpp_deep_continuous': (20, 0, 1000, 0.16, 128, 950, 0.9999),
  'vp/ddpm/bedroom': (20, 1000, 1000, 0.075, 64, 2400, 0.9999),
  'vp/ddpm/celebahq': (20, 1000, 1000, 0.075, 64, 2400, 0.9999),
  'vp/ddpm/church': (20, 1000, 1000, 0.075, 64, 2400, 0.9999),
  'vp/ddpm/cifar10': (20, 1000, 1000, 0.16, 128, 1300, 0.9999),
  'vp/ddpm/cifar10_continuous': (20, 0, 1000, 0.16, 128, 1300, 0.9999),
  'vp/ddpm/cifar10_unconditional': (20, 1000, 1000, 0.16, 128, 1300, 0.9999),
  'edm/cifar10_ddpmpp': (80, 0, 18, 0.16, 512, 390, 0.99929),
  'edm/cifar10_ddpmpp_conditional': (80, 0, 18, 0.16, 512, 390, 0.99929),
  'edm/cifar10_ncsnpp': (80, 0, 18, 0.16, 512, 390, 0.99929),
  'edm/cifar10_ect': (80, 0, 1000, 0.16, 128, 200, 0.9999),
}


def load(name):
  return experiment.load_config(ROOT / 'configs' / f'{name}.py')


def reduced(config):
  """Return the config at 16 pixels, with two levels of the same width."""
  with config.unlocked():
    config.data.image_size = 16
    config.training.batch_size = 2
    if config.model.name in models.CLASSIFIERS:
      config.model.update(blocks_per_group=1, channel_multiplier=1)
      return config
    config.model.nf = 32  # DDPM's GroupNorm has 32 groups.
    if 'ch_mult' in config.model:
      config.model.update(ch_mult=(1, 1), num_res_blocks=1)
      config.model.update(attn_resolutions=(8,), dropout=0.1)
    if 'num_classes' in config.model:
      config.model.num_classes = config.training.num_scales = 10
      config.sampling.num_steps = 10
  return config


def fake_score_fn(self, params, **options):
  """Stand in for Experiment.score_fn: a score that costs nothing."""
  del self, params, options
  return lambda x, t, *label: -x


@pytest.mark.parametrize('name', CONFIGS)
def test_full_size(name, monkeypatch):
  """The network has its size, and the sampler suits the process."""
  model = experiment.build(load(name))
  shapes = jax.tree.leaves(model.abstract_params())
  size = sum(shape.size for shape in shapes)
  if name in MILLIONS:
    assert round(size / 1e6, 2) == MILLIONS[name]
  else:
    assert 30e6 < size < 115e6
  if model.is_classifier:
    with pytest.raises(ValueError, match='draws no samples'):
      model.make_sample(2)
    return
  monkeypatch.setattr(experiment.Experiment, 'score_fn', fake_score_fn)
  images, *_ = jax.eval_shape(model.make_sample(2), None, jax.random.key(0))
  assert images.shape == model.shape(2)


def test_released_are_all_there():
  paper = {n for n in RELEASED if n.split('/')[0] in ('ve', 'vp', 'subvp')}
  assert paper <= set(CONFIGS) and len(paper) == 39


@pytest.mark.parametrize('name', RELEASED)
def test_numbers(name):
  config = load(name)
  noise = config.sde.get('sigma_max', config.sde.get('beta_max'))
  got = (
    noise,
    config.training.num_scales,
    config.sampling.num_steps,
    config.sampling.snr,
    config.training.batch_size,
    config.training.n_iters // 1000,
    config.training.ema_rate,
  )
  assert got == RELEASED[name]
  assert config.data.centered == (not name.startswith('ve/'))


@pytest.mark.parametrize('name', CONFIGS)
def test_file(name):
  """The command in the docstring is that of the file; the body is short."""
  text = (ROOT / 'configs' / f'{name}.py').read_text()
  _, docstring, body = text.split('"""')
  command = docstring.split('\n\n')[1].replace('\\\n', '').split()
  assert command[-1] == f'configs/{name}.py'
  assert ' '.join(command[:4]) == 'python main.py --mode train'
  assert len([line for line in body.splitlines() if line]) <= 10


# Losses of reduced models: many files differ only in size, data and rates.
SEEN = {}


@pytest.mark.parametrize('name', CONFIGS)
def test_reduced_forward(name):
  """Losses are finite; not compiled as a whole, since layers are alike."""
  model = experiment.build(reduced(load(name)))
  parts = model.network, model.conditioning, model.sde, model.loss_fn
  key = *parts, model.shape(2), model.config.data.augment
  if key not in SEEN:
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(
      lambda s: np.asarray(0.1 * draw(size=s.shape), s.dtype),
      model.abstract_params(),
    )
    draw = np.random.default_rng(1).integers
    image, label = draw(0, 256, model.shape(2), np.uint8), np.zeros(2, np.int32)
    batch = {'image': image, 'label': label}
    SEEN[key] = np.asarray(model.loss(params, jax.random.key(0), batch))
  loss = SEEN[key]
  assert loss.shape == (2,) and np.isfinite(loss).all() and (loss > 0).all()


def grid_name(grid):
  """Return the name of a time grid in a config."""
  return {type_: name for name, type_ in GRIDS.items()}[type(grid)]


METHODS = [
  ('ode', {}, 'quickstart'),
  ('adaptive_sde', {}, 've/cifar10_ncsnpp_continuous'),
  ('heun', {'s_churn': 40.0, 'grid': 'edm'}, 've/cifar10_ncsnpp'),
  ('dpmpp_3s', {'grid': 'log_snr'}, 'vp/ddpm/cifar10'),
  ('unipc', {'order': 3}, 'subvp/cifar10_ncsnpp_continuous'),
  ('sde_dpmpp', {}, 'vp/ddpm/cifar10'),
]


@pytest.mark.parametrize('method,options,name', METHODS)
def test_any_sampler_on_any_config(method, options, name, monkeypatch):
  """Any sampler takes a given z, guidance and frames."""
  config = load(name)
  config.sampling.update(method=method, num_steps=12, **options)
  model, seen = experiment.build(config), []
  for key, value in options.items():
    option = getattr(model.sampler, key)
    assert (grid_name(option) if key == 'grid' else option) == value
  monkeypatch.setattr(experiment.Experiment, 'score_fn', fake_score_fn)

  def guide(score_fn, sde, *, push):
    seen.append(sde)
    return lambda x, t: score_fn(x, t) + push

  sample, shape = model.make_sample(2, guide=guide, frames=3), model.shape(2)
  z, push = jnp.zeros(shape), jnp.zeros(shape)
  result = jax.eval_shape(sample, None, jax.random.key(0), z, push=push)
  first = [v.shape for v in result[:5]]
  assert first == [shape, (), (), (3, *shape), (3,)]
  assert isinstance(seen[0], sde_lib.SDE)


def test_bad_sampling_options_are_named():
  config = load('quickstart')
  bad = {'method': 'dpm', 'grid': 'even', 'frames': 1, 'num_steps': 0}
  for key, value in bad.items():
    wrong = config.copy_and_resolve_references()
    wrong.sampling[key] = value
    with pytest.raises(ValueError, match=f'sampling.{key}={value!r}'):
      experiment.build(wrong)
  # Options of the solvers are checked as well, before a long training.
  for method, key, value in [('unipc', 'order', 4), ('heun', 's_churn', -1.0)]:
    wrong = config.copy_and_resolve_references()
    wrong.sampling.update({'method': method, key: value})
    with pytest.raises(ValueError, match=f'sampling.{key}={value}'):
      experiment.build(wrong)
