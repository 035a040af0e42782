"""Compare processes, scores, losses and samplers with the paper's release.

The arrays are described in `tests/golden.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import likelihood
import losses
import sde_lib
from models import score as score_lib
from solvers import ode, plans, predictors
from tests import golden

# (process, conditioning) of each case.
PROCESSES = {
  've_ncsnpp_continuous': (sde_lib.VESDE(), score_lib.Sigma()),
  'vp_ddpmpp_continuous': (sde_lib.VPSDE(), score_lib.Time()),
  'subvp_ncsnpp_continuous': (sde_lib.SubVPSDE(), score_lib.Time()),
  've_ffhq_256_ncsnpp': (sde_lib.VESDE(sigma_max=348.0), score_lib.Sigma()),
  'vp_ddpm': (sde_lib.DDPM(), score_lib.DDPMLabel(num_scales=1000)),
  've_ncsnv2': (sde_lib.VESDE(), score_lib.SMLDLabel(num_scales=232)),
}
CONTINUOUS = list(PROCESSES)[:4]
NUM_SCALES = dict.fromkeys(PROCESSES, 1000) | {
  've_ffhq_256_ncsnpp': 2000,
  've_ncsnv2': 232,
}
close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


def network_of(case):
  _, params = golden.load(case)
  network = golden.model(case)
  return lambda x, cond: network.apply({'params': params}, x, cond, train=False)


@functools.cache
def score_of(case):
  return score_lib.make_score_fn(network_of(case), *PROCESSES[case])


def near(got, want, tolerance=5e-5):
  """Check that values agree, relative to the largest entry."""
  scale = np.abs(want).max() or 1.0
  np.testing.assert_allclose(got / scale, want / scale, atol=tolerance)


@pytest.mark.parametrize('case', PROCESSES)
def test_process(case):
  g, params = golden.load(case)
  assert sum(v.size for v in jax.tree.leaves(params)) == g['param_count']
  # For the chain of DDPM the release uses the marginals of the limit.
  sde = PROCESSES[case][0].continuous
  in_range = (lambda x: x) if case.startswith('ve') else (lambda x: 2 * x - 1)
  np.testing.assert_array_equal(in_range(g['data01']), g['data'])
  alpha, sigma = sde.marginal(g['t'])
  # Near t = 0 the 1 - exp(..) of the release loses digits in float32.
  close(sigma, g['std'], rtol=1e-4)
  near(sde_lib.expand(alpha, g['data']) * g['data'], g['mean'])
  near(sde.perturb(g['data'], g['t'], g['z']), g['x'])
  f, diffusion = sde.coefficients(g['t'])
  close(diffusion, g['diffusion'])
  near(sde_lib.expand(f, g['x']) * g['x'], g['drift'])
  near(sde.prior_logp(g['x']), g['prior_logp'])


def _chain_times(case, t):
  """Return the level at or below t and the one before, as in the release."""
  sde, n = PROCESSES[case][0], NUM_SCALES[case]
  level = np.floor(t * (n - 1)) / (n - 1)
  if isinstance(sde, sde_lib.VESDE):
    return level, level - 1 / (n - 1)
  if isinstance(sde, sde_lib.SubVPSDE):
    return t, t - 1 / n
  return level, level - 1 / n


@pytest.mark.parametrize('case', PROCESSES)
def test_discretisation(case):
  """Compare x_t = a x_s + sqrt(v) z with x + disc_f + disc_G z."""
  g, _ = golden.load(case)
  sde, _ = PROCESSES[case]
  t, s = (np.float32(v) for v in _chain_times(case, g['t'].astype(float)))
  a, v = sde.discretize(s, t)
  if isinstance(sde, sde_lib.VESDE):  # sigma = 0 below the lowest level.
    v = np.where(s < 0, sde.marginal(t)[1] ** 2, v)
    assert (a == 1).all() and not g['disc_f'].any()
  else:
    near(sde_lib.expand(a - 1, g['x']) * g['x'], g['disc_f'], 1e-4)
  close(np.sqrt(v), g['disc_G'], rtol=1e-4)


@pytest.mark.parametrize('case', CONTINUOUS)
def test_predictors(case):
  g, _ = golden.load(case)
  sde, _ = PROCESSES[case]
  score_fn = lambda x, t: jnp.asarray(g['score'])
  rng, x = jax.random.key(0), jnp.asarray(g['x'])
  t, s = (np.float32(v) for v in _chain_times(case, g['t'].astype(float)))
  # At level 0 the release steps to sigma = 0, which is denoising.
  last = (s < 0) & isinstance(sde, sde_lib.VESDE)
  denoised = sde.denoise(x, t, score_fn(x, t))
  _, v = sde.discretize(s, t)
  noise = np.where(last, sde.marginal(t)[1], np.sqrt(v))
  close(noise, g['reverse_diffusion_G'], rtol=1e-4)

  def mean(predictor, t, s):
    step = predictor(rng, score_fn, sde, x, t, s)[1]
    return jnp.where(sde_lib.expand(last, x), denoised, step)

  near(mean(predictors.ReverseDiffusion(), t, s), g['reverse_diffusion_x_mean'])
  if 'ancestral_x_mean' in g:
    near(mean(predictors.Ancestral(), t, s), g['ancestral_x_mean'])
  euler = predictors.EulerMaruyama()
  t, s = g['t'], g['t'] - 1 / NUM_SCALES[case]
  _, x_mean = euler(rng, score_fn, sde, x, t, s)
  near(x_mean, g['euler_maruyama_x_mean'])


@pytest.mark.parametrize('case', ['vp_ddpm', 've_ncsnv2'])
def test_score_of_discrete_models(case):
  """Compare scores at levels; the release also reads tables between them."""
  g, _ = golden.load(case)
  sde, _ = PROCESSES[case]
  t = g['t'].astype(float)
  levels = NUM_SCALES[case] - 1
  if case == 've_ncsnv2':
    t = 1 - np.rint((1 - t) * levels) / levels
    near(jax.jit(score_of(case))(g['x'], np.float32(t)), g['score'])
  else:
    # The release gives the network t (M - 1), and sigma at the floor of it.
    at_floor = np.float32(np.floor(t * levels) / levels)
    _, sigma = sde.marginal(at_floor)
    score = -jax.jit(network_of(case))(g['x'], np.float32(t * levels))
    near(score / sde_lib.expand(sigma, score), g['score'])


@functools.cache
def drift_and_divergence_of(case):
  """Return both, for the tests of them and of the score."""
  g, _ = golden.load(case)
  compute = functools.partial(
    likelihood.drift_and_divergence, score_of(case), PROCESSES[case][0]
  )
  return jax.jit(compute)(g['x'], g['t'], g['hutchinson_eps'][None])


@pytest.mark.parametrize('case', CONTINUOUS)
def test_score_and_losses(case):
  g, _ = golden.load(case)
  sde, _ = PROCESSES[case]
  # The drift is f x - g^2 score / 2.
  f, diffusion = (sde_lib.expand(v, g['x']) for v in sde.coefficients(g['t']))
  drift, _ = drift_and_divergence_of(case)
  score = 2 * (f * g['x'] - drift) / diffusion**2
  # The tolerance is larger because of sigma near t = 0.
  tolerance = 5e-5 if isinstance(sde, sde_lib.VESDE) else 1e-4
  near(score, g['score'], tolerance)

  names = {
    'loss_mean_op': (losses.Variance(), losses.mean),
    'loss_halfsum_op': (losses.Variance(), losses.half_sum),
    'loss_likelihood_weighting_mean_op': (losses.Likelihood(), losses.mean),
  }

  @jax.jit
  def compute(data, z):
    asked = []

    def score_fn(x, t):
      asked.append((x, t))
      return score

    found = {
      name: losses.denoising_loss(
        score_fn, sde, data, g['t'], z, weighting=weighting, reduction=reduction
      )
      for name, (weighting, reduction) in names.items()
    }
    return found, asked

  found, asked = compute(g['data'], g['z'])
  for name, loss in found.items():
    close(loss, g[name], rtol=2e-4)
  for x, t in asked:
    near(x, g['x'])
    np.testing.assert_array_equal(t, g['t'])


@pytest.mark.parametrize('case', CONTINUOUS)
def test_drift_and_divergence(case):
  g, _ = golden.load(case)
  drift, divergence = drift_and_divergence_of(case)
  near(drift, g['pf_drift'])
  near(divergence[0], g['pf_div'], 1e-4)


ODE_CASES = [case for case in CONTINUOUS if 'ffhq' not in case]


@pytest.mark.parametrize('case', ODE_CASES)
def test_ode_sample(case):
  g, _ = golden.load(case)
  sde, _ = PROCESSES[case]
  score_fn, eps = score_of(case), float(g['ode_eps'])

  @jax.jit
  def solve(z):
    drift = lambda t, x: sde.ode_drift(
      x, jnp.full(4, t), score_fn(x, jnp.full(4, t))
    )
    return ode.solve_ode(drift, z, 1.0, eps, rtol=1e-5, atol=1e-5)

  solution = solve(g['ode_z'])
  assert solution.success
  near(solution.y, g['ode_x'], 1e-3)
  assert abs(int(solution.nfe) - g['ode_nfe']) <= 0.1 * g['ode_nfe']


@pytest.mark.slow  # A few hundred evaluations in each direction
@pytest.mark.parametrize('case', ODE_CASES)
def test_codes(case):
  """Check that samples of the release have the codes they were drawn from."""
  g, _ = golden.load(case)
  sde, _ = PROCESSES[case]
  encode = functools.partial(likelihood.encode, score_of(case), sde)
  code = jax.jit(lambda x: encode(x, eps=float(g['ode_eps'])))(g['ode_x'])
  assert code.success
  near(code.y, g['ode_z'], 1e-2)


# The VP network gets sines of 999 t and was hardly trained, so it varies fast
# with t and needs more steps.
@pytest.mark.parametrize(
  'case,solver,num_steps',
  [
    ('ve_ncsnpp_continuous', plans.UniPC, 150),
    ('vp_ddpmpp_continuous', plans.DPMpp2M, 500),
  ],
)
def test_fast_solvers_reach_the_ode_sample(case, solver, num_steps):
  g, _ = golden.load(case)
  sde, _ = PROCESSES[case]

  sampler = solver(
    num_steps=num_steps + 1, eps=float(g['ode_eps']), final_denoise=False
  )
  solve = jax.jit(functools.partial(sampler, None, score_of(case), sde))
  samples = solve(g['ode_z'])
  near(samples.x, g['ode_x'], 1e-3)
  assert int(samples.nfe) == num_steps


@pytest.mark.slow  # 1,500 to 2,900 evaluations of a network and its derivative
@pytest.mark.parametrize('case', ODE_CASES)
def test_likelihood(case):
  """Compare to 1e-2, since sigma of the release cancels near t = 0."""
  g, _ = golden.load(case)
  sde, _ = PROCESSES[case]
  compute = jax.jit(
    functools.partial(likelihood.log_likelihood, score_of(case), sde)
  )
  result = compute(
    jnp.asarray(g['data']), jnp.asarray(g['hutchinson_eps'])[None]
  )
  assert result.success
  near(result.z, g['lik_z'], 1e-2)
  close(result.logp - sde.prior_logp(result.z), g['lik_delta_logp'], rtol=1e-2)
  close(sde.prior_logp(result.z), g['lik_prior_logp'], rtol=1e-2)
  bits = likelihood.bits_per_dim(
    result.logp,
    g['data'][0].size,
    data_width=1 if isinstance(sde, sde_lib.VESDE) else 2,
  )
  close(bits, g['lik_bpd'], rtol=1e-2)
  assert abs(int(result.nfe) - g['lik_nfe']) <= 0.1 * g['lik_nfe']
