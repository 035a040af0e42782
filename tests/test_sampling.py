"""Test samplers with known scores, and their options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sampling
import sde_lib
from runtime import options
from solvers import base, grids, predictors
from tests.exact import GAUSSIAN, MIXTURE, Mixture

SDES = [
  sde_lib.VESDE(sigma_min=0.01, sigma_max=6.0),
  sde_lib.VPSDE(),
  sde_lib.SubVPSDE(),
  sde_lib.DDPM(num_scales=200),
  sde_lib.RectifiedFlow(),
]
BATCH = 2000
name = lambda sde: type(sde).__name__

PREDICTORS = {name: cls() for name, cls in predictors.PREDICTORS.items()}
PREDICTORS['ancestral'] = predictors.Ancestral(ancestral_variance='forward')
CORRECTORS = {
  'langevin': predictors.Langevin(snr=0.16),
  'ald': predictors.AnnealedLangevin(snr=0.16),
  'none': predictors.NoStep(),
}


def assert_moments(x, data, *, bias):
  """Check the moments within 4 standard errors and a discretization bias."""
  error = 4 * np.sqrt(1 / len(x))
  standardized = (x.mean(0) - data.mean) / np.sqrt(data.variance)
  np.testing.assert_allclose(standardized, 0, atol=error + bias)
  relative = x.var(0) / data.variance
  np.testing.assert_allclose(relative, 1, atol=error * np.sqrt(2) + bias)


def prior(sde):
  """Return the states at t = 1 that all tests of this file start from."""
  return sde.prior_sample(jax.random.key(1), (BATCH, 2))


def sampler(sde, predictor, corrector, **kwargs):
  """Return sample(data) -> (x, nfe), one program for all mixtures of two."""
  fields = {'num_steps': 200, 'eps': 1e-3} | kwargs
  pc = sampling.PC(predictor=predictor, corrector=corrector, **fields)

  @jax.jit
  def program(rng, weights, means, std):
    z = prior(sde)
    return pc(rng, Mixture(weights, means, std).score_fn(sde), sde, z)

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
  # Without a predictor only Langevin dynamics changes x, so it gets more steps.
  # Its step size leaves a bias, which is larger with fewer steps.
  alone = predictor == 'none'
  levels = 100 if (alone and corrector == 'langevin') else 200
  sample = sampler(
    sde,
    PREDICTORS[predictor],
    CORRECTORS[corrector],
    num_steps=levels,
    corrector_steps=16 if alone else 1,
  )
  corrections = 0 if corrector == 'none' else 16 * levels if alone else levels
  annealed = alone and corrector == 'ald'
  for data in (GAUSSIAN, MIXTURE):
    x, nfe = sample(data)
    assert nfe == corrections + (1 if alone else 200)
    assert_moments(x, data, bias=0.15 if annealed else 0.04)


@pytest.mark.parametrize('sde', SDES, ids=name)
def test_mixture_weights_are_right(sde):
  predictor, corrector = predictors.ReverseDiffusion(), CORRECTORS['langevin']
  x, _ = run(sde, MIXTURE, predictor, corrector)
  assert_moments(x, MIXTURE, bias=0.03)
  weight = np.mean(x[:, 0] > 0)
  assert abs(weight - 0.7) < 4 * np.sqrt(0.7 * 0.3 / BATCH) + 0.01


@pytest.mark.parametrize('sde', SDES[:3], ids=name)
@pytest.mark.parametrize(
  'predictor', [predictors.EulerMaruyama, predictors.ReverseDiffusion]
)
def test_probability_flow_steps(sde, predictor):
  flow = predictor(probability_flow=True)
  x, nfe = run(sde, GAUSSIAN, flow, predictors.NoStep(), num_steps=1000)
  assert nfe == 1000
  assert_moments(x, GAUSSIAN, bias=0.04)


def test_posterior_variance_noises_less():
  """Check that it is exact for a point mass, and the forward one too large."""
  sde = sde_lib.VPSDE()
  point = type(GAUSSIAN)(means=((0.5, -0.3),) * 2, std=1e-3)
  spread = {}
  for variance in ('posterior', 'forward'):
    predictor = predictors.Ancestral(ancestral_variance=variance)
    x, _ = run(sde, point, predictor, predictors.NoStep(), final_denoise=False)
    spread[variance] = x.std()
  sigma = float(sde.marginal(1e-3)[1])
  centred = np.abs(spread['posterior'] / np.hypot(sigma, np.std(x.mean(0))) - 1)
  assert spread['posterior'] < spread['forward']
  assert centred < 0.05
  with pytest.raises(ValueError, match='ancestral_variance'):
    predictors.Ancestral(ancestral_variance='both')


def test_the_papers_ancestral_variance():
  """Check that it is the posterior's for VE, and the chain's for VP."""
  x, rng = jnp.ones((3, 2)), jax.random.key(0)
  t, t_next = jnp.full(3, 0.5), jnp.full(3, 0.25)
  score_fn = lambda x, t: -x
  for sde in (*SDES, sde_lib.EDM()):
    wanted = 'posterior' if sde.prior_std > 1 else 'forward'
    default, explicit = (
      predictors.Ancestral(ancestral_variance=variance)(
        rng, score_fn, sde, x, t, t_next
      )
      for variance in ('paper', wanted)
    )
    np.testing.assert_array_equal(default[0], explicit[0])


def test_time_grid():
  grid = grids.Uniform()
  np.testing.assert_allclose(
    grid(sde_lib.VPSDE(), 3, 0.1), [1, 0.55, 0.1], rtol=1e-6
  )
  labels = grid(sde_lib.DDPM(num_scales=1000), 1000, 1e-3, 1000) * 999
  np.testing.assert_allclose(labels, np.arange(999, -1, -1), atol=1e-3)
  # With 1500 steps and eps 1e-3 all times differ.
  assert len(set(grid(sde_lib.VPSDE(), 1500, 1e-3))) == 1500
  with pytest.raises(ValueError, match='50 noise levels'):
    grid(sde_lib.DDPM(num_scales=50), 51, 0, 50)
  with pytest.raises(ValueError, match='at least 1'):
    grid(sde_lib.VPSDE(), 0, 0)


@pytest.mark.parametrize('sde', [sde_lib.VPSDE(), sde_lib.SubVPSDE()], ids=name)
def test_too_coarse_a_chain_is_refused(sde):
  with pytest.raises(ValueError, match='too few'):
    run(sde, GAUSSIAN, predictors.Ancestral(), predictors.NoStep(), num_steps=9)


def test_langevin_step_size_is_of_the_whole_batch():
  """Check that the score of one example changes every step (Algorithm 4)."""
  sde, t = sde_lib.VESDE(), jnp.full((2,), 0.5)
  x = jnp.zeros((2, 8))
  gain = jnp.asarray([[1.0], [3.0]])

  def moved(gain):
    score_fn = lambda x, t: gain + 0 * x
    step = predictors.Langevin(snr=0.1)
    return step(jax.random.key(0), score_fn, sde, x, t, t)[1]

  alone = moved(jnp.ones((2, 1)))
  both = moved(gain)
  np.testing.assert_allclose(both[0] / alone[0], 1 / 4, rtol=1e-5)


def _fixed_step_error(num_steps, sde):
  """Return the error at eps of Euler's method on the flow of a Gaussian."""
  flow = predictors.EulerMaruyama(probability_flow=True)
  x, _ = run(
    sde, GAUSSIAN, flow, predictors.NoStep(), num_steps=num_steps,
    eps=0.01, final_denoise=False,
  )  # fmt: skip

  # The flow of a Gaussian is affine: (x - alpha mean) / std_t is constant.
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
  sampler = sampling.SAMPLERS['ode'](
    eps=0.01, rtol=1e-5, atol=1e-5, final_denoise=False
  )
  sample = jax.jit(lambda z: sampler(None, GAUSSIAN.score_fn(sde), sde, z))
  samples = sample(prior(sde))
  assert samples.success
  _, exact = _fixed_step_error(20 if sde.prior_std > 1 else 40, sde)
  np.testing.assert_allclose(samples.x, exact, atol=5e-4)
  assert 20 < int(samples.nfe) < 300


# ------------------------------------------------- options and their section


def section():
  """Return the section `sampling` of a config with all defaults."""
  found = {}
  tables = (
    sampling.SAMPLERS,
    grids.GRIDS,
    predictors.PREDICTORS,
    predictors.CORRECTORS,
  )
  for table in tables:
    for cls in table.values():
      for option in options.declared(cls):
        if not option.given:
          default = found.setdefault(option.name, option.default)
          assert default == option.default, option.name
  return found


@pytest.mark.parametrize('method', sampling.SAMPLERS)
def test_every_sampler_is_built_from_the_defaults(method):
  defaults = section() | {'method': method}
  given = {'num_scales': 0, 'data_width': 2.0}
  sampler = options.build(
    sampling.SAMPLERS, defaults, 'sampling.method', **given
  )
  assert sampler == sampling.SAMPLERS[method](
    **{k: v for k, v in given.items() if hasattr(sampler, k)}
  )
  assert isinstance(sampler, base.Sampler)
  hash(sampler)  # Samplers are static under jit.


@pytest.mark.parametrize(
  'method,name,value',
  [
    ('pc', 'num_steps', 0),
    ('pc', 'corrector_steps', 0),
    ('ddim', 'eps', 1.0),
    ('ode', 'rtol', 0.0),
    ('ode', 'atol', float('nan')),
    ('adaptive_sde', 'sde_atol', -1.0),
    ('ula', 'step_size', 0.0),
    ('unipc', 'order', 4),
    ('heun', 's_churn', -1.0),
    ('heun', 's_noise', -0.5),
  ],
)
def test_an_option_out_of_range_is_refused_by_its_name(method, name, value):
  with pytest.raises(ValueError, match=f'{name}={value!r} is not'):
    sampling.SAMPLERS[method](**{name: value})
  wrong = section() | {'method': method, name: value}
  with pytest.raises(ValueError, match=f'config.sampling.{name}={value!r}'):
    options.build(sampling.SAMPLERS, wrong, 'sampling.method')


@pytest.mark.parametrize(
  'name', ['grid', 'predictor', 'corrector', 'num_steps', 'eps']
)
def test_an_unknown_name_is_refused(name):
  wrong = section() | {'method': 'pc', name: 'even'}
  with pytest.raises(ValueError, match=f"config.sampling.{name}='even' is"):
    options.build(sampling.SAMPLERS, wrong, 'sampling.method')


@pytest.mark.parametrize('method', sampling.SAMPLERS)
def test_frames_are_refused_before_anything_is_sampled(method):
  def score_fn(x, t):
    raise AssertionError('The score was evaluated.')

  sampler, z = sampling.SAMPLERS[method](), jnp.zeros((2, 2))
  # None of these solves the reverse process.
  none = method in ('ula', 'mala', 'annealed_langevin', 'consistency')
  assert sampler.records_frames != none
  for frames in (-1, 1, *((2, 10) if none else ())):
    with pytest.raises(ValueError, match=f'sampling.frames={frames}'):
      sampler(jax.random.key(0), score_fn, SDES[1], z, frames=frames)


def test_a_chain_of_levels_is_stepped_on_its_levels():
  """Check that a sampler uses the levels of DDPM without being told."""
  sde = SDES[3]
  told, not_told = (
    sampling.PC(num_steps=20, num_scales=n).times(sde) for n in (200, 0)
  )
  np.testing.assert_array_equal(told, not_told)
  np.testing.assert_allclose(told * 199, np.rint(told * 199), atol=1e-4)
