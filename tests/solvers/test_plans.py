"""Fast solvers: orders of convergence, what they cost, and where they end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sampling
import sde_lib
from solvers import grids, plans, predictors
from tests.exact import GAUSSIAN, MIXTURE
from tests.test_sampling import assert_moments, compiled

SDES = [
  sde_lib.VESDE(sigma_min=0.01, sigma_max=50.0),
  sde_lib.VPSDE(),
  sde_lib.SubVPSDE(),
]
DISCRETE = [
  sde_lib.DDPM(num_scales=200),
  sde_lib.VESDE(sigma_min=0.01, sigma_max=50.0, num_scales=200),
]
name = lambda sde: type(sde).__name__ + '_discrete' * bool(sde.num_scales)

# What each solver costs per step of the grid.
COSTS = dict.fromkeys(plans.SOLVERS, 1)
COSTS |= {'heun': 2, 'dpmpp_2s': 2, 'dpmpp_3s': 3}

ROWS, DEPTH = 480, 4


def padded(plan):
  """The same plan, of `ROWS` and `DEPTH`, so that one program serves all."""
  rows, depth = ROWS - len(plan.t), DEPTH + 1 - plan.move.shape[1]
  idle = np.zeros((rows, 1))
  return plans.Plan(
    np.pad(plan.t, (0, rows), mode='edge'),
    np.vstack([np.pad(plan.keep, ((0, 0), (0, depth))), np.pad(
      idle + 1, ((0, 0), (0, DEPTH + 1)))]),
    np.vstack([np.pad(plan.move, ((0, 0), (0, depth))), np.pad(
      idle + 1, ((0, 0), (0, DEPTH)))]),
    np.pad(plan.noise, (0, rows)),
  )  # fmt: skip


@functools.cache
def program(sde, noisy):
  """run(plan, z) -> x on the mixture."""

  @compiled
  def run(plan, z):
    return sampling.carry_out(
      plan,
      jax.random.key(0),
      MIXTURE.score_fn(sde),
      sde,
      z,
      noisy=noisy,
      end=0,
    )[0]

  return lambda plan, z: np.asarray(run(padded(plan), z))


# ------------------------------------------------------- order of convergence

ORDERS = [
  ('ddim', {}, 1),
  ('heun', {}, 2),
  ('dpmpp_2m', {}, 2),
  ('dpmpp_2s', {}, 2),
  ('dpmpp_3m', {}, 3),
  ('dpmpp_3s', {}, 3),
  ('unipc', {'order': 1}, 2),
  ('unipc', {'order': 2}, 3),
  ('unipc', {'order': 3}, 4),
]


def order_of(num_steps, errors):
  """Slope of log error against log step size."""
  return np.polyfit(-np.log(num_steps), np.log(errors), 1)[0]


@pytest.mark.parametrize('sde', SDES, ids=name)
def test_order_of_convergence(sde):
  """In float64, on a mixture, against a solution with 160 times less error."""
  with jax.enable_x64(True):
    z = sde.prior_sample(jax.random.key(0), (32, 2)).astype(jnp.float64)

    def solve(solver, num_steps, **options):
      t = grids.time_grid(sde, num_steps + 1, 0.02, grid='log_snr')
      return program(sde, False)(plans.SOLVERS[solver](sde, t, **options), z)

    exact = solve('unipc', ROWS, order=3)
    for solver, options, order in ORDERS:
      num_steps = np.array([40, 60, 90, 140])
      errors = [
        np.sqrt(np.mean((solve(solver, n, **options) - exact) ** 2))
        for n in num_steps
      ]
      found = order_of(num_steps, errors)
      assert abs(found - order) < 0.35, (solver, options, found, errors)


def _gaussian_variance(sde, plan, data_std):
  """Variance of the result for centred Gaussian data, whose D is linear in x.

  The covariance of (x, base, D_0, ..) obeys a recursion: no sampling error.
  """
  size = plan.move.shape[1] + 1
  alpha, sigma = grids.marginal(sde, 1.0)
  covariance = np.zeros((size, size))
  covariance[:2, :2] = alpha**2 * data_std**2 + sigma**2
  for t, keep, move, noise in zip(*plan, strict=True):
    alpha, sigma = grids.marginal(sde, t)
    predict = np.eye(size)
    predict[3:] = np.eye(size)[2:-1]
    predict[2] = 0
    predict[2, 0] = alpha * data_std**2 / (alpha**2 * data_std**2 + sigma**2)
    new_base, new_x = np.eye(size), np.eye(size)
    new_base[1] = keep
    new_x[0, 0], new_x[0, 1:] = 0, move
    step = new_x @ new_base @ predict
    covariance = step @ covariance @ step.T
    covariance[0, 0] += noise**2
  return covariance[0, 0]


@pytest.mark.parametrize('sde', SDES, ids=name)
@pytest.mark.parametrize(
  'solver,options,order',
  [
    ('sde_dpmpp', {}, 2),
    ('heun', {'s_churn': 10.0}, 2),
    ('heun', {'s_churn': 10.0, 's_min': 0.1, 's_max': 1.0}, 2),
  ],
)
def test_weak_order_of_stochastic_solvers(sde, solver, options, order):
  """Error of the variance, which is that of p_t whatever the noise."""
  num_steps, errors = np.array([100, 200, 400]), []
  alpha, sigma = grids.marginal(sde, np.float32(0.02))
  exact = float(alpha**2 * 0.4**2 + sigma**2)
  for n in num_steps:
    t = grids.time_grid(sde, n + 1, 0.02, grid='log_snr')
    plan = plans.SOLVERS[solver](sde, t, **options)
    assert plan.noise.any()
    errors.append(abs(_gaussian_variance(sde, plan, 0.4) - exact))
  found = order_of(num_steps, errors)
  assert abs(found - order) < 0.35, (found, errors)


# ------------------------------------------------------------ where they end


@pytest.mark.parametrize('sde', SDES + DISCRETE, ids=name)
def test_every_solver_reaches_the_data(sde):
  z = sde.prior_sample(jax.random.key(1), (2000, 2))
  for solver, function in plans.SOLVERS.items():
    options = {'s_churn': 10.0} if solver == 'heun' else {}
    t = grids.time_grid(sde, 61, 1e-3, grid='edm')
    plan = plans.with_denoising(function(sde, t, **options), t[-1])
    assert len(plan.t) == 60 * COSTS[solver] + 1
    if sde.num_scales:  # Everything happens on the levels.
      levels = plan.t * (sde.num_scales - 1)
      np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)
    x = program(sde, True)(plan, z)
    assert_moments(x, MIXTURE, bias=0.04)


def test_stochastic_heun_adds_noise_between_its_levels():
  sde = SDES[0]
  t = grids.time_grid(sde, 11, 1e-5, grid='edm')
  plan = plans.heun(sde, t, s_churn=4.0, s_min=0.1, s_max=10.0, s_noise=1.0)
  sigma = np.asarray(sde.marginal(t)[1])
  inside = (sigma >= 0.1) & (sigma <= 10) & (np.arange(11) < 10)
  raised = np.asarray(sde.marginal(plan.t[::2])[1]) / sigma[:-1]
  np.testing.assert_allclose(raised, np.where(inside[:-1], 1.4, 1), rtol=1e-4)
  noise = sigma[1:] * np.sqrt(np.where(inside[1:], 1.4**2 - 1, 0))
  np.testing.assert_allclose(plan.noise[1::2], noise, rtol=1e-4)
  # No level above that of t = 1.
  capped = plans.heun(sde, t, s_churn=4.0)
  assert capped.t.max() == 1


def test_unipc_refuses_orders_that_it_has_not():
  with pytest.raises(ValueError, match='sampling.order=4'):
    plans.unipc(SDES[1], np.array([1, 0.5, 0.1]), order=4)


# -------------------------------------------------------------------- grids


def test_edm_grid_is_karras_formula():
  sde = SDES[0]
  t = grids.time_grid(sde, 9, 0.1, grid='edm', rho=7.0)
  sigma = np.asarray(sde.marginal(t)[1], float)
  first, last = 50.0 ** (1 / 7), sigma[-1] ** (1 / 7)
  karras = (first + np.arange(9) / 8 * (last - first)) ** 7
  np.testing.assert_allclose(sigma, karras, rtol=1e-5)


@pytest.mark.parametrize('sde', SDES, ids=name)
def test_log_snr_grid_is_even_in_lambda(sde):
  t = grids.time_grid(sde, 20, 1e-3, grid='log_snr')
  assert t[0] == 1 and t[-1] == np.float32(1e-3)
  steps = np.diff(grids.half_log_snr(sde, t))
  np.testing.assert_allclose(steps, steps.mean(), rtol=1e-3)


@pytest.mark.parametrize('grid', grids.GRIDS)
@pytest.mark.parametrize('sde', DISCRETE, ids=name)
def test_levels_are_taken_once(sde, grid):
  for num_steps in (1, 7, 150, 200):
    labels = grids.time_grid(sde, num_steps, 1e-3, grid=grid) * 199
    np.testing.assert_allclose(labels, np.rint(labels), atol=1e-4)
    assert (np.diff(labels) < -0.5).all()
    assert labels[0] > 198.5 and (num_steps == 1 or labels[-1] < 0.5)


def test_grids_refuse_what_they_cannot():
  with pytest.raises(ValueError, match='none of'):
    grids.time_grid(SDES[1], 5, 1e-3, grid='even')
  with pytest.raises(ValueError, match='rho'):
    grids.time_grid(SDES[1], 5, 1e-3, grid='edm', rho=0)
  with pytest.raises(ValueError, match='200 noise levels'):
    grids.time_grid(DISCRETE[0], 201, 1e-3, grid='edm')


# ----------------------------------------------------------- all in the table


def small(method):
  """The sampler with options for a short run."""
  options = {'num_steps': 6, 'final_denoise': True}
  if method == 'pc':
    options |= {
      'predictor': predictors.ancestral,
      'corrector': functools.partial(predictors.langevin, snr=0.1),
      'num_steps': 25,
    }
  elif method == 'ode':
    options = {'rtol': 0.1, 'atol': 0.1}
  elif method == 'adaptive_sde':
    options = {'sde_rtol': 0.5, 'sde_atol': 0.1}
  elif method in ('ula', 'mala', 'annealed_langevin'):
    options |= {'step_size': 1e-3}
  return functools.partial(sampling.SAMPLERS[method], eps=1e-2, **options)


@pytest.mark.parametrize('method', sampling.SAMPLERS)
def test_nfe_is_what_is_evaluated(method):
  """Without compiling, loops run in Python and every evaluation is a call."""
  sde, calls = SDES[1], []

  def counting(x, t):
    calls.append(1)
    return -x / (1 + sde_lib.expand(t, x))

  z = jnp.asarray([[0.5, -1.0], [0.1, 2.0]])
  with jax.disable_jit():
    samples = small(method)(jax.random.key(0), counting, sde, z)
  assert len(calls) == int(samples.nfe) > 0
  assert samples.success
  if method in COSTS:
    assert int(samples.nfe) == 5 * COSTS[method] + 1


@pytest.mark.parametrize('method', ['pc', 'ode', 'adaptive_sde', 'heun'])
def test_frames_lead_from_noise_to_the_samples(method):
  sde = SDES[1]
  z = jax.random.normal(jax.random.key(0), (3, 2))

  def run(**options):
    sampler = functools.partial(
      small(method), score_fn=GAUSSIAN.score_fn(sde), sde=sde, **options
    )
    return compiled(lambda rng, z: sampler(rng, z=z))(jax.random.key(1), z)

  samples, plain = run(frames=4), run()
  assert samples.frames.shape == (4, 3, 2) and plain.frames.shape == (0, 3, 2)
  np.testing.assert_array_equal(samples.frames[0], z)
  np.testing.assert_array_equal(samples.frames[-1], samples.x)
  assert samples.times[0] == 1 and (np.diff(samples.times) < 0).all()
  assert np.isfinite(samples.frames).all()
  if method in ('pc', 'heun'):
    np.testing.assert_allclose(samples.x, plain.x, rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match='frames=1'):
    run(frames=1)
