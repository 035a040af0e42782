"""NCSN and NCSNv2 as wholes: what their outputs mean, training, sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import experiment
import losses
import sde_lib
from configs.base import annealed, compose, ncsn, ncsnv2, ve
from data import datasets
from models import score

LEVELS, STEPS = 4, 10
VE = sde_lib.VESDE(sigma_min=0.1, sigma_max=1.0, num_scales=LEVELS)


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
  """Of a network that repeats what it is told of the noise level."""
  net = lambda x, cond: jnp.broadcast_to(cond[:, None], x.shape)
  t = jnp.array([1.0, 2 / 3])
  if conditioning == 'ddpm_label':
    t = jnp.array([1.0, 666 / 999])
  got = score.make_score_fn(net, sde, conditioning)(jnp.ones((2, 3)), t)
  _, sigma = sde.marginal(t)
  want = jnp.broadcast_to(want(t, sigma)[:, None], (2, 3))
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('name', ['ncsn', 'ncsnv2'])
def test_loss_is_of_the_paper(name):
  """Song & Ermon 2019, Eq. 5, 6: sigma^2 |s(x) + (x - x0) / sigma^2|^2 / 2.

  Of a network of ones.
  """
  config = tiny(name)
  x0, z = jnp.full((LEVELS, 8, 8, 1), 0.5), jnp.ones((LEVELS, 8, 8, 1))
  t = jnp.linspace(0, 1, LEVELS)
  conditioning = config.model.conditioning
  net = lambda x, cond: jnp.ones_like(x)
  got = losses.denoising_loss(
    score.make_score_fn(net, VE, conditioning),
    VE,
    x0,
    t,
    z,
    weighting='variance',
    reduction='half_sum',
  )
  _, sigma = VE.marginal(t)
  estimate = 1 if name == 'ncsn' else 1 / sigma
  want = 64 * sigma**2 * (estimate + 1 / sigma) ** 2 / 2
  np.testing.assert_allclose(got, want, rtol=1e-5)


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
      'optim.lr': 3e-3,
    },
  )


def draw_params(config):
  """As PyTorch does; in numpy, since compiling initialisers takes longer."""
  uniform = np.random.default_rng(0).uniform

  def draw(path, like):
    if path[-1] == 'embedding':  # gamma, alpha, beta
      return np.tile(np.repeat([1, 1, 0], like.shape[1] // 3), (LEVELS, 1))
    if path[-1] in ('gamma', 'alpha', 'beta'):
      return np.full(like.shape, path[-1] != 'beta')
    bound = np.prod(like.shape[:-1]) ** -0.5
    return uniform(-bound, bound, like.shape)

  flat = traverse_util.flatten_dict(experiment.abstract_params(config))
  drawn = {path: np.float32(draw(path, like)) for path, like in flat.items()}
  return traverse_util.unflatten_dict(drawn)


@pytest.mark.parametrize('name', ['ncsn', 'ncsnv2'])
def test_trains_and_samples(name):
  config = tiny(name)
  images = datasets.load(config.data, 'train').fetch(np.arange(256))
  batches = np.split(images, 8)
  loss_fn = experiment.make_loss_fn(config, train=True)
  optimizer = experiment.make_optimizer(config)

  @jax.jit
  def step(params, state, rng, images):
    batch = {'image': images, 'label': jnp.zeros(len(images), jnp.int32)}
    mean_loss = lambda params: loss_fn(params, rng, batch).mean()
    loss, grads = jax.value_and_grad(mean_loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  params = draw_params(config)
  state, history = optimizer.init(params), []
  for i in range(96):
    rng = jax.random.key(i)
    params, state, loss = step(params, state, rng, batches[i % 8])
    history.append(float(loss))
  assert np.isfinite(history).all()
  # A score of zero everywhere has a loss of 64 / 2.
  assert np.mean(history[-16:]) < 0.6 * 32, history
  sample = jax.jit(experiment.make_sampler(config, batch_size=4))
  drawn, nfe, _ = sample(params, jax.random.key(1))
  assert drawn.shape == (4, 8, 8, 1) and np.isfinite(drawn).all()
  assert int(nfe) == LEVELS * STEPS + config.sampling.final_denoise
