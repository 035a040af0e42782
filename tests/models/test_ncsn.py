"""Test NCSN and NCSNv2: what their outputs mean, training and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import experiment
import losses
import models
import sde_lib
from configs.base import annealed, compose, ncsn, ncsnv2, ve
from data import datasets
from models import score
from runtime import options

LEVELS, STEPS = 4, 10
VE = sde_lib.VESDE(sigma_min=0.1, sigma_max=1.0)


@pytest.mark.parametrize(
  ('conditioning', 'sde', 'want'),
  [
    ('sigma', VE, lambda t, sigma: sigma / sigma),
    ('time', sde_lib.VPSDE(), lambda t, sigma: -999 * t / sigma),
    ('ddpm_label', sde_lib.DDPM(), lambda t, sigma: -999 * t / sigma),
    ('smld_label', VE, lambda t, sigma: (1 - t) * 3 / sigma),
    ('ncsn_label', VE, lambda t, sigma: (1 - t) * 3),
  ],
)
def test_score_by_conditioning(conditioning, sde, want):
  """Use a network that returns what it is told of the noise level."""
  net = lambda x, cond: jnp.broadcast_to(cond[:, None], x.shape)
  t = jnp.array([1.0, 2 / 3])
  if conditioning == 'ddpm_label':
    t = jnp.array([1.0, 666 / 999])
  levels = 1000 if conditioning == 'ddpm_label' else LEVELS
  told = conditioning_of(conditioning, levels)
  got = score.make_score_fn(net, sde, told)(jnp.ones((2, 3)), t)
  _, sigma = sde.marginal(t)
  want = jnp.broadcast_to(want(t, sigma)[:, None], (2, 3))
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('name', ['ncsn', 'ncsnv2'])
def test_loss_is_of_the_paper(name):
  """Compare with sigma^2 |s(x) + (x - x0) / sigma^2|^2 / 2.

  It is Eq. 5 and 6 of Song & Ermon 2019; the network is 1 everywhere.
  """
  config = tiny(name)
  x0, z = jnp.full((LEVELS, 8, 8, 1), 0.5), jnp.ones((LEVELS, 8, 8, 1))
  t = jnp.linspace(0, 1, LEVELS)
  conditioning = config.model.conditioning
  net = lambda x, cond: jnp.ones_like(x)
  got = losses.denoising_loss(
    score.make_score_fn(net, VE, conditioning_of(conditioning, LEVELS)),
    VE,
    x0,
    t,
    z,
    weighting=losses.Variance(),
    reduction=losses.half_sum,
  )
  _, sigma = VE.marginal(t)
  estimate = 1 if name == 'ncsn' else 1 / sigma
  want = 64 * sigma**2 * (estimate + 1 / sigma) ** 2 / 2
  np.testing.assert_allclose(got, want, rtol=1e-5)


def conditioning_of(name, levels):
  return options.build(
    score.CONDITIONINGS,
    {'conditioning': name},
    'conditioning',
    num_scales=levels,
  )


def tiny(name):
  preset = {'ncsn': ncsn, 'ncsnv2': ncsnv2}[name]
  return compose(
    ve,
    preset,
    annealed(LEVELS, snr=0.35, steps=STEPS),
    {
      'data.dataset': 'digits',
      'data.image_size': 8,
      'data.num_channels': 1,
      'sde.sigma_min': 0.1,
      'sde.sigma_max': 1.0,
      'model.nf': 4,
      'optim.lr': 1e-2,
    },
  )


def draw_params(model):
  """Draw as PyTorch does, in numpy, which takes less time than compiling."""
  uniform = np.random.default_rng(0).uniform

  def draw(path, like):
    if path[-1] == 'embedding':  # These are gamma, alpha and beta.
      return np.tile(np.repeat([1, 1, 0], like.shape[1] // 3), (LEVELS, 1))
    if path[-1] in ('gamma', 'alpha', 'beta'):
      return np.full(like.shape, path[-1] != 'beta')
    bound = np.prod(like.shape[:-1]) ** -0.5
    return uniform(-bound, bound, like.shape)

  flat = traverse_util.flatten_dict(model.abstract_params())
  drawn = {path: np.float32(draw(path, like)) for path, like in flat.items()}
  return traverse_util.unflatten_dict(drawn)


@pytest.mark.parametrize(('name', 'depths'), [('ncsn', 1), ('ncsnv2', 2)])
def test_trains_and_samples(name, depths, monkeypatch):
  """Take few depths: tests of the released networks have all of them."""
  whole = models.MODELS[name]
  shallow = type('Shallow', (whole,), {'levels': whole.levels[:depths]})
  monkeypatch.setitem(models.MODELS, name, shallow)
  config = tiny(name)
  model = experiment.build(config)
  images = datasets.load(config.data, 'train').fetch(np.arange(256))
  batches = np.split(images, 16)
  optimizer = model.optimizer

  @jax.jit
  def step(params, state, rng, images):
    batch = {'image': images, 'label': jnp.zeros(len(images), jnp.int32)}
    mean_loss = lambda params: model.loss(params, rng, batch).mean()
    loss, grads = jax.value_and_grad(mean_loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  params = draw_params(model)
  state, history = jax.jit(optimizer.init)(params), []
  for i in range(64):
    rng = jax.random.key(i)
    params, state, loss = step(params, state, rng, batches[i % 16])
    history.append(float(loss))
  assert np.isfinite(history).all()
  # A score of zero everywhere has a loss of 64 / 2.
  assert np.mean(history[-16:]) < 0.6 * 32, history
  samples = jax.jit(model.make_sample(4))(params, jax.random.key(1))
  drawn = samples.x
  assert drawn.shape == (4, 8, 8, 1) and np.isfinite(drawn).all()
  assert int(samples.nfe) == LEVELS * STEPS + config.sampling.final_denoise


@pytest.mark.parametrize('name', ['ddpm_label', 'smld_label', 'ncsn_label'])
def test_labels_need_the_number_of_levels(name):
  with pytest.raises(ValueError, match=f"'{name}' .* set training.num_scales"):
    conditioning_of(name, 0)


def test_conditionings_check_their_options():
  with pytest.raises(ValueError, match='EDMFourier: sigma_data=-1.0'):
    score.EDMFourier(sigma_data=-1.0)
  with pytest.raises(ValueError, match='SMLDLabel: num_scales=-1'):
    score.SMLDLabel(num_scales=-1)
