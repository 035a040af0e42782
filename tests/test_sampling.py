"""Samplers on data whose score is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sampling
import sde_lib
from solvers import grids, predictors
from tests.exact import GAUSSIAN, MIXTURE, Mixture

SDES = [
  sde_lib.VESDE(sigma_min=0.01, sigma_max=6.0),
  sde_lib.VPSDE(),
  sde_lib.SubVPSDE(),
  sde_lib.DDPM(num_scales=200),
]
BATCH = 2000
name = lambda sde: type(sde).__name__

PREDICTORS = dict(predictors.PREDICTORS)
CORRECTORS = {
  'langevin': functools.partial(predictors.langevin, snr=0.16),
  'annealed_langevin': functools.partial(
    predictors.annealed_langevin, snr=0.16
  ),
  'none': predictors.no_step,
}


def assert_moments(x, data, *, bias):
  """Mean and variance within 4 standard errors and a discretisation bias."""
  error = 4 * np.sqrt(1 / len(x))
  standardized = (x.mean(0) - data.mean) / np.sqrt(data.variance)
  np.testing.assert_allclose(standardized, 0, atol=error + bias)
  relative = x.var(0) / data.variance
  np.testing.assert_allclose(relative, 1, atol=error * np.sqrt(2) + bias)


def prior(sde):
  """The states at t = 1 of all tests here."""
  return sde.prior_sample(jax.random.key(1), (BATCH, 2))


def compiled(function):
  """Compiled quickly rather than well: these programs run once."""
  options = {'xla_backend_optimization_level': 0}
  return jax.jit(function, compiler_options=options)


def sampler(sde, predictor, corrector, **kwargs):
  """sample(data) -> (x, nfe): one program serves all mixtures of two."""
  options = {'num_steps': 200, 'eps': 1e-3} | kwargs

  @compiled
  def program(rng, weights, means, std):
    z = prior(sde)
    return sampling.pc_sample(
      rng,
      Mixture(weights, means, std).score_fn(sde),
      sde,
      z,
      predictor=predictor,
      corrector=corrector,
      **options,
    )

  def sample(data):
    arrays = (np.float32(v) for v in (data.weights, data.means, data.std))
    samples = program(jax.random.key(0), *arrays)
    return np.asarray(samples.x), int(samples.nfe)

  return sample


def run(sde, data, predictor, corrector, **kwargs):
  return sampler(sde, predictor, corrector, **kwargs)(data)


COMBINATIONS = [
  (predictor, corrector)
  for predictor in PREDICTORS
  for corrector in CORRECTORS
  if (predictor, corrector) != ('none', 'none')
]


@pytest.mark.parametrize('sde', SDES, ids=name)
@pytest.mark.parametrize('predictor,corrector', COMBINATIONS)
def test_every_combination_reaches_the_data(sde, predictor, corrector):
  # Without a predictor only Langevin dynamics moves x: give it more steps. Its
  # own step size leaves a bias, the larger the fewer steps it has.
  alone = predictor == 'none'
  sample = sampler(
    sde,
    PREDICTORS[predictor],
    CORRECTORS[corrector],
    corrector_steps=16 if alone else 1,
  )
  corrections = 0 if corrector == 'none' else 16 * 200 if alone else 200
  annealed = alone and corrector == 'annealed_langevin'
  for data in (GAUSSIAN, MIXTURE):
    x, nfe = sample(data)
    assert nfe == corrections + (1 if alone else 200)
    assert_moments(x, data, bias=0.15 if annealed else 0.04)


@pytest.mark.parametrize('sde', SDES, ids=name)
def test_mixture_weights_are_right(sde):
  predictor, corrector = predictors.reverse_diffusion, CORRECTORS['langevin']
  x, _ = run(sde, MIXTURE, predictor, corrector)
  assert_moments(x, MIXTURE, bias=0.03)
  weight = np.mean(x[:, 0] > 0)
  assert abs(weight - 0.7) < 4 * np.sqrt(0.7 * 0.3 / BATCH) + 0.01


@pytest.mark.parametrize('sde', SDES[:3], ids=name)
@pytest.mark.parametrize(
  'predictor', [predictors.euler_maruyama, predictors.reverse_diffusion]
)
def test_probability_flow_steps(sde, predictor):
  flow = functools.partial(predictor, probability_flow=True)
  x, nfe = run(sde, GAUSSIAN, flow, predictors.no_step, num_steps=1000)
  assert nfe == 1000
  assert_moments(x, GAUSSIAN, bias=0.04)


def test_posterior_variance_noises_less():
  """It is exact for a point mass, where the forward variance is too large."""
  sde = sde_lib.VPSDE()
  point = type(GAUSSIAN)(means=((0.5, -0.3),) * 2, std=1e-3)
  spread = {}
  for variance in ('posterior', 'forward'):
    predictor = functools.partial(predictors.ancestral, variance=variance)
    x, _ = run(sde, point, predictor, predictors.no_step, final_denoise=False)
    spread[variance] = x.std()
  sigma = float(sde.marginal(1e-3)[1])
  centred = np.abs(spread['posterior'] / np.hypot(sigma, np.std(x.mean(0))) - 1)
  assert spread['posterior'] < spread['forward']
  assert centred < 0.05
  with pytest.raises(ValueError, match='ancestral_variance'):
    predictors.ancestral(None, sde, variance='both')


def test_time_grid():
  np.testing.assert_allclose(
    grids.time_grid(sde_lib.VPSDE(), 3, 0.1), [1, 0.55, 0.1], rtol=1e-6
  )
  labels = grids.time_grid(sde_lib.DDPM(num_scales=1000), 1000, 1e-3) * 999
  np.testing.assert_allclose(labels, np.arange(999, -1, -1), atol=1e-3)
  # 1500 steps, eps 1e-3: every step moves, unlike a grid recovered from t.
  assert len(set(grids.time_grid(sde_lib.VPSDE(), 1500, 1e-3))) == 1500
  with pytest.raises(ValueError, match='50 noise levels'):
    grids.time_grid(sde_lib.DDPM(num_scales=50), 51, 0)
  with pytest.raises(ValueError, match='at least 1'):
    grids.time_grid(sde_lib.VPSDE(), 0, 0)


@pytest.mark.parametrize('sde', [sde_lib.VPSDE(), sde_lib.SubVPSDE()], ids=name)
def test_too_coarse_a_chain_is_refused(sde):
  with pytest.raises(ValueError, match='too few'):
    run(sde, GAUSSIAN, predictors.ancestral, predictors.no_step, num_steps=9)


def test_langevin_step_size_is_of_the_whole_batch():
  """Doubling one example's score changes every example's step (Algorithm 4)."""
  sde, t = sde_lib.VESDE(), jnp.full((2,), 0.5)
  x = jnp.zeros((2, 8))
  gain = jnp.asarray([[1.0], [3.0]])

  def moved(gain):
    step = predictors.langevin(lambda x, t: gain + 0 * x, sde, snr=0.1)
    return step(jax.random.key(0), x, t, t)[1]

  alone = moved(jnp.ones((2, 1)))
  both = moved(gain)
  np.testing.assert_allclose(both[0] / alone[0], 1 / 4, rtol=1e-5)


def _fixed_step_error(num_steps, sde):
  """Error at eps of Euler's method on the probability flow of a Gaussian."""
  flow = functools.partial(predictors.euler_maruyama, probability_flow=True)
  x, _ = run(
    sde, GAUSSIAN, flow, predictors.no_step, num_steps=num_steps,
    eps=0.01, final_denoise=False,
  )  # fmt: skip

  # The flow of a Gaussian is affine: it keeps (x - alpha mean) / std_t.
  def std(t):
    alpha, sigma = (float(c) for c in sde.marginal(t))
    return np.hypot(alpha * GAUSSIAN.std, sigma), alpha * GAUSSIAN.mean

  z = np.asarray(prior(sde))
  (std_1, mean_1), (std_0, mean_0) = std(1.0), std(0.01)
  exact = mean_0 + std_0 * (z - mean_1) / std_1
  return np.sqrt(np.mean((x - exact) ** 2)), exact


@pytest.mark.parametrize('sde', SDES[:3], ids=name)
def test_fixed_step_ode_is_of_first_order(sde):
  errors = [_fixed_step_error(n, sde)[0] for n in (101, 201, 401)]
  orders = np.log2(np.array(errors[:-1]) / errors[1:])
  np.testing.assert_allclose(orders, 1, atol=0.2)


@pytest.mark.parametrize('sde', SDES[:3], ids=name)
def test_adaptive_ode_sampler_solves_the_flow(sde):
  sample = compiled(
    lambda z: sampling.ode_sample(
      None,
      GAUSSIAN.score_fn(sde),
      sde,
      z,
      eps=0.01,
      rtol=1e-5,
      atol=1e-5,
    )
  )
  samples = sample(prior(sde))
  assert samples.success
  _, exact = _fixed_step_error(20 if sde.prior_std > 1 else 40, sde)
  np.testing.assert_allclose(samples.x, exact, atol=5e-4)
  assert 20 < int(samples.nfe) < 300
