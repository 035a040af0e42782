"""Test samplers with known scores, and their options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sampling
import sde_lib
from runtime import options
from solvers import base, grids, predictors
from tests.exact import GAUSSIAN, MIXTURE, Mixture, optimized

SDES = [
  sde_lib.VESDE(sigma_min=0.01, sigma_max=6.0),
  sde_lib.VPSDE(),
  sde_lib.SubVPSDE(),
  sde_lib.DDPM(num_scales=200),
  sde_lib.RectifiedFlow(),
]
BATCH = 2000
NONE = (predictors.NoStep(),)
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


@dataclasses.dataclass(frozen=True)
class OneOf:
  """The step of this index among several, which are compiled together."""

  steps: tuple
  index: jax.Array

  def __call__(self, rng, score_fn, sde, *state):
    calls = [
      lambda rng, *state, step=step: step(rng, score_fn, sde, *state)
      for step in self.steps
    ]
    return jax.lax.switch(self.index, calls, rng, *state)


@functools.cache
def program(
  sde,
  steps,
  correctors=NONE,
  data=(GAUSSIAN, MIXTURE),
  **fields,
):
  """Return sample(i, j) -> x [K, B, 2] for K mixtures `data`, one program.

  The samples are those of the predictor steps[i] and of correctors[j].
  """
  arrays = [
    np.float32([getattr(d, field) for d in data])
    for field in ('weights', 'means', 'std')
  ]

  @optimized
  def sample(i, j):
    pc = sampling.PC(
      predictor=OneOf(steps, i),
      corrector=OneOf(correctors, j),
      **{'num_steps': 200, **fields},
    )

    def of(*mixture):
      score_fn = Mixture(*mixture).score_fn(sde)
      return pc(jax.random.key(0), score_fn, sde, prior(sde)).x

    return jax.vmap(of)(*arrays)

  return lambda i=0, j=0: np.asarray(sample(i, j))


@functools.cache
def samples(sde, predictor, corrector):
  """Return samples [2, B, 2] of GAUSSIAN and of MIXTURE, for all tests.

  Without a predictor only Langevin dynamics changes x, so it gets more steps.
  """
  correctors = tuple(CORRECTORS.values())
  j = list(CORRECTORS).index(corrector)
  if predictor == 'none':
    return program(sde, NONE, correctors, corrector_steps=12)(0, j)
  i = list(PREDICTORS).index(predictor)
  return program(sde, tuple(PREDICTORS.values()), correctors)(i, j)


COMBINATIONS = [
  (predictor, corrector)
  for predictor in PREDICTORS
  for corrector in CORRECTORS
  if (predictor, corrector) != ('none', 'none')
]


@pytest.mark.parametrize('sde', SDES, ids=name)
@pytest.mark.parametrize('predictor,corrector', COMBINATIONS)
def test_every_combination_reaches_the_data(sde, predictor, corrector):
  # The step size of Langevin dynamics leaves a bias.
  annealed = (predictor, corrector) == ('none', 'ald')
  gaussian, mixture = samples(sde, predictor, corrector)
  assert_moments(gaussian, GAUSSIAN, bias=0.15 if annealed else 0.04)
  assert_moments(mixture, MIXTURE, bias=0.15 if annealed else 0.04)


@pytest.mark.parametrize('predictor,corrector', COMBINATIONS)
def test_number_of_evaluations(predictor, corrector):
  pc = sampling.PC(
    predictor=PREDICTORS[predictor],
    corrector=CORRECTORS[corrector],
    num_steps=20,
    corrector_steps=3,
  )
  predictions = 1 if predictor == 'none' else 20  # The last one denoises.
  corrections = 0 if corrector == 'none' else 60
  assert pc._nfe(SDES[1], (BATCH, 2)) == predictions + corrections


@pytest.mark.parametrize('sde', SDES, ids=name)
def test_mixture_weights_are_right(sde):
  x = samples(sde, 'reverse_diffusion', 'langevin')[1]
  assert_moments(x, MIXTURE, bias=0.03)
  weight = np.mean(x[:, 0] > 0)
  assert abs(weight - 0.7) < 4 * np.sqrt(0.7 * 0.3 / BATCH) + 0.01


def test_posterior_variance_noises_less():
  """Check that it is exact for a point mass, and the forward one too large."""
  sde = sde_lib.VPSDE()
  point = Mixture(means=((0.5, -0.3),) * 2, std=1e-3)
  steps = tuple(
    predictors.Ancestral(ancestral_variance=variance)
    for variance in ('posterior', 'forward')
  )
  sample = program(sde, steps, data=(point,), final_denoise=False)
  posterior, forward = sample(0), sample(1)
  sigma = float(sde.marginal(1e-3)[1])
  exact = np.hypot(sigma, np.std(forward.mean((0, 1))))
  centred = np.abs(posterior.std() / exact - 1)
  assert posterior.std() < forward.std()
  assert centred < 0.05
  with pytest.raises(ValueError, match='ancestral_variance'):
    predictors.Ancestral(ancestral_variance='both')


def test_the_papers_ancestral_variance():
  """Check that it is the posterior's for VE, and the chain's for VP."""
  x, t, t_next = jnp.ones((3, 2)), jnp.full(3, 0.5), jnp.full(3, 0.25)

  def step(sde, variance):
    predictor = predictors.Ancestral(ancestral_variance=variance)
    rng = jax.random.key(0)
    return predictor(rng, lambda x, t: -x, sde, x, t, t_next)[0]

  sdes = (*SDES, sde_lib.EDM())
  wanted = ['posterior' if sde.prior_std > 1 else 'forward' for sde in sdes]
  default = jax.jit(lambda: [step(sde, 'paper') for sde in sdes])()
  explicit = jax.jit(lambda: [*map(step, sdes, wanted)])()
  np.testing.assert_array_equal(default, explicit)


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
  pc = sampling.PC(predictor=predictors.Ancestral(), num_steps=9)
  with pytest.raises(ValueError, match='too few'):
    pc(jax.random.key(0), GAUSSIAN.score_fn(sde), sde, jnp.zeros((2, 2)))


def test_langevin_step_size_is_of_the_whole_batch():
  """Check that the score of one example changes every step (Algorithm 4)."""
  sde, t, x = sde_lib.VESDE(), np.full(2, 0.5), np.zeros((2, 8), np.float32)

  @jax.jit
  def moved(gain):
    score_fn = lambda x, t: gain + 0 * x
    step = predictors.Langevin(snr=0.1)
    return step(jax.random.key(0), score_fn, sde, x, t, t)[1]

  alone, both = moved(np.float32([[1], [1]])), moved(np.float32([[1], [3]]))
  np.testing.assert_allclose(np.divide(both, alone)[0], 1 / 4, rtol=1e-5)


def exact_flow(sde, eps):
  """Return the states at eps of the flow of GAUSSIAN, from those of `prior`.

  It is affine: (x - alpha mean) / std_t is constant.
  """

  def std(t):
    alpha, sigma = (float(c) for c in sde.marginal(t))
    return np.hypot(alpha * GAUSSIAN.std, sigma), alpha * GAUSSIAN.mean

  (std_1, mean_1), (std_0, mean_0) = std(1.0), std(eps)
  return mean_0 + std_0 * (np.asarray(prior(sde)) - mean_1) / std_1


@pytest.mark.parametrize('sde', SDES[:3], ids=name)
def test_fixed_step_ode_is_of_first_order(sde):
  kinds = predictors.EulerMaruyama, predictors.ReverseDiffusion
  flows = tuple(kind(probability_flow=True) for kind in kinds)
  exact, errors = exact_flow(sde, 0.01), []
  for n in (101, 401):
    fields = {'num_steps': n, 'eps': 0.01, 'final_denoise': False}
    sample = program(sde, flows, data=(GAUSSIAN,), **fields)
    x = np.concatenate([sample(0), sample(1)])
    errors.append(np.sqrt(np.mean((x - exact) ** 2, axis=(1, 2))))
  orders = np.log(errors[0] / errors[1]) / np.log(4)
  np.testing.assert_allclose(orders, 1, atol=0.12)
  assert max(errors[1]) < 0.04


@pytest.mark.parametrize('sde', SDES[:3], ids=name)
def test_adaptive_ode_sampler_solves_the_flow(sde):
  sampler = sampling.SAMPLERS['ode'](
    eps=0.01, rtol=1e-5, atol=1e-5, final_denoise=False
  )
  sample = jax.jit(lambda z: sampler(None, GAUSSIAN.score_fn(sde), sde, z))
  samples = sample(prior(sde))
  assert samples.success
  np.testing.assert_allclose(samples.x, exact_flow(sde, 0.01), atol=5e-4)
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
