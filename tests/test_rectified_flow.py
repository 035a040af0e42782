"""Test the rectified flow against its published form (Liu et al. 2023)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import experiment
import losses
import sampling
import sde_lib
from models import score as score_lib
from solvers import grids, predictors
from tests.exact import MIXTURE, Mixture

FLOW = sde_lib.RectifiedFlow()
STEPS = 20


def velocity(x, t):
  """Return E[z - x_0 | x_t = x] of the mixture, from responsibilities.

  It needs no score: x_0 and z given x and a component are Gaussian.
  """
  weights, means = np.asarray(MIXTURE.weights), np.asarray(MIXTURE.means)
  variance = (1 - t) ** 2 * MIXTURE.std**2 + t**2
  delta = x[:, None] - (1 - t) * means
  log_p = np.log(weights) - 0.5 * np.sum(delta**2, -1) / variance
  p = np.exp(log_p - log_p.max(1, keepdims=True))
  p = (p / p.sum(1, keepdims=True))[..., None]
  x0 = means + (1 - t) * MIXTURE.std**2 / variance * delta
  z = t / variance * delta
  return np.sum(p * (z - x0), axis=1)


def network_score(x, t):
  """Return the score of a network whose output is the exact velocity."""

  def net(x, cond):
    exact = lambda x, t: np.float32(velocity(np.float64(x), float(t[0]) / 999))
    return jax.pure_callback(
      exact, jax.ShapeDtypeStruct(x.shape, x.dtype), x, cond
    )

  return score_lib.make_score_fn(net, FLOW, score_lib.Velocity())(x, t)


def published(z, *, heun):
  """Return x at t = 0 by x - dt v on an even grid from 1 to 0, in float64.

  The last step is Euler's, as in Karras et al. (2022).
  """
  x, t = np.float64(z), np.linspace(1, 0, STEPS + 1)
  for now, after in zip(t[:-1], t[1:], strict=True):
    v = velocity(x, now)
    if heun and after:
      v = 0.5 * (v + velocity(x + (after - now) * v, after))
    x = x + (after - now) * v
  return x


@pytest.mark.parametrize('method', ['euler', 'flow_heun'])
def test_sampling_equals_the_published_form(method):
  z = FLOW.prior_sample(jax.random.key(0), (64, 2))
  options = {'num_steps': STEPS, 'eps': 1 / STEPS}
  if method == 'euler':
    euler = predictors.EulerMaruyama(probability_flow=True)
    sampler = sampling.PC(predictor=euler, **options)
  else:
    sampler = sampling.SAMPLERS[method](**options)
  found = sampler(jax.random.key(1), network_score, FLOW, z)
  want = published(z, heun=method == 'flow_heun')
  assert found.nfe == (STEPS if method == 'euler' else 2 * STEPS - 1)
  # At t = 1 the velocity is that of t = 0.999, and passes through the score.
  np.testing.assert_allclose(found.x, want, atol=3e-4)
  assert np.abs(published(z, heun=True) - published(z, heun=False)).max() > 0.02


def test_ddim_is_eulers_method_below_the_last_level():
  t = np.float32([0.9, 0.5, 0.2, 0.1])
  ddim = sampling.SAMPLERS['ddim']().plan(FLOW, t)
  # x + h v with v = (x - D) / t.
  want = np.stack([t[1:] / t[:-1], 1 - t[1:] / t[:-1]], 1)
  np.testing.assert_allclose(ddim.move, want, rtol=1e-6)


def test_the_network_is_the_drift_at_all_times():
  """Check that going to the score and back loses nothing, at t = 1 either."""
  x, v = jax.random.normal(jax.random.key(0), (2, 6, 3))
  t = jnp.float32([1e-5, 0.1, 0.5, 0.99, 0.999, 1.0])
  told = []
  net = lambda x, cond: told.append(cond) or v
  score = score_lib.make_score_fn(net, FLOW, score_lib.Velocity())(x, t)
  np.testing.assert_allclose(FLOW.ode_drift(x, t, score), v, atol=2e-4)
  np.testing.assert_allclose(told[0], 999 * t)
  assert np.isfinite(FLOW.denoise(x, t, score)).all()


@pytest.mark.parametrize('sde', [FLOW, sde_lib.VPSDE(), sde_lib.EDM()])
def test_velocity_weighting_is_the_squared_error_of_the_velocity(sde):
  """Compare with || v - u ||^2, u = alpha' x_0 + sigma' z (z - x_0 here)."""
  rng = np.random.default_rng(0)
  x0, z, v = (jnp.float32(rng.normal(size=(7, 2))) for _ in range(3))
  t = jnp.float32(np.linspace(0.05, 0.95, 7))
  score_fn = score_lib.make_score_fn(
    lambda x, cond: v, sde, score_lib.Velocity()
  )
  found = losses.denoising_loss(
    score_fn, sde, x0, t, z, weighting=losses.Velocity(), reduction=losses.mean
  )
  slope = [
    jax.vmap(jax.grad(lambda t, i=i: sde.marginal(t)[i]))(t) for i in (0, 1)
  ]
  target = slope[0][:, None] * x0 + slope[1][:, None] * z
  np.testing.assert_allclose(found, jnp.mean((v - target) ** 2, 1), rtol=2e-4)
  if sde is FLOW:
    np.testing.assert_allclose(target, z - x0, rtol=1e-6)


def test_logit_normal_times():
  times = losses.LogitNormal(logit_mean=-0.5, logit_std=0.8)
  t, weight = times(jax.random.key(0), FLOW, 5000, 1e-5)
  logit = np.log(t) - np.log1p(-np.float64(t))
  assert (
    scipy.stats.kstest(logit, scipy.stats.norm(-0.5, 0.8).cdf).pvalue > 0.01
  )
  assert (weight == 1).all()
  assert np.min(times(jax.random.key(0), FLOW, 5000, 0.3)[0]) == np.float32(0.3)


@pytest.mark.parametrize(
  'method', ['ode', 'flow_heun', 'dpmpp_2m', 'sde_dpmpp']
)
def test_samples_of_a_gaussian_have_its_variance(method):
  data = Mixture(means=((0.0, 0.0),) * 2)
  z = FLOW.prior_sample(jax.random.key(0), (4000, 2))
  options = {} if method == 'ode' else {'num_steps': 50, 'eps': 0.02}
  if method == 'dpmpp_2m':
    options['grid'] = grids.LogSNR()
  sampler = sampling.SAMPLERS[method](final_denoise=False, **options)
  sample = jax.jit(lambda rng, z: sampler(rng, data.score_fn(FLOW), FLOW, z).x)
  x = sample(jax.random.key(1), z)
  alpha, sigma = FLOW.marginal(sampler.eps)
  want = np.hypot(alpha * data.std, sigma)
  tolerance = 0.03 if method == 'sde_dpmpp' else 0.005
  # Deterministic solvers scale the draw; the others have sampling error.
  np.testing.assert_allclose(x.std() / z.std(), want, rtol=tolerance)


def test_more_steps_than_noise_levels_are_refused():
  sampler = sampling.SAMPLERS['ddim'](num_steps=3000)
  with pytest.raises(ValueError, match='num_steps=3000 is too many'):
    sampler(None, lambda x, t: -x, FLOW, jnp.zeros((1, 2)))


def test_a_chain_has_no_velocity():
  chain = sde_lib.DDPM(num_scales=100)
  with pytest.raises(ValueError, match="'velocity' needs a process in cont"):
    score_lib.make_score_fn(lambda x, c: x, chain, score_lib.Velocity())


def test_a_small_flow_runs():
  config = experiment.load_config('configs/flow/cifar10_ddpmpp.py')
  with config.unlocked():
    config.data.update(image_size=8)
    config.model.update(nf=8, ch_mult=(1,), attn_resolutions=())
    config.model.num_res_blocks = 1
  model = experiment.build(config)
  assert isinstance(model.loss_fn.weighting, losses.Velocity)
  assert dataclasses.replace(model.sampler).continuous
