"""Test the processes against calculus and closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import sde_lib
from runtime import options

CONTINUOUS = [
  sde_lib.VESDE(sigma_min=0.02, sigma_max=7.0),
  sde_lib.VPSDE(),
  sde_lib.SubVPSDE(beta_min=0.2, beta_max=15.0),
  sde_lib.EDM(),
  sde_lib.RectifiedFlow(),
]
# The flow keeps its coefficients from t = 0.999 on.
IS_FLOW = lambda sde: isinstance(sde, sde_lib.RectifiedFlow)
ALL = [*CONTINUOUS, sde_lib.DDPM(num_scales=100)]
name = lambda sde: type(sde).__name__


@pytest.mark.parametrize('sde', CONTINUOUS, ids=name)
def test_coefficients_are_derivatives_of_the_marginal(sde):
  t = jnp.linspace(0.01, 0.998 if IS_FLOW(sde) else 1, 50)
  derivative = jax.vmap(jax.grad(lambda t: jnp.log(sde.marginal(t)[0])))(t)
  slope = jax.vmap(jax.grad(lambda t: sde.marginal(t)[1] ** 2))(t)
  _, sigma = sde.marginal(t)
  f, g = sde.coefficients(t)
  np.testing.assert_allclose(f, derivative, rtol=1e-5)
  np.testing.assert_allclose(g**2, slope - 2 * f * sigma**2, rtol=1e-4)


def _sigma64(sde, t):
  """Return sigma(t) of VP and sub-VP from the integral of beta in float64."""
  integral = sde.beta_min * t + 0.5 * t**2 * (sde.beta_max - sde.beta_min)
  variance = -np.expm1(-np.longdouble(integral))
  return variance if isinstance(sde, sde_lib.SubVPSDE) else np.sqrt(variance)


@pytest.mark.parametrize('sde', CONTINUOUS[1:3], ids=name)
@pytest.mark.parametrize('t', [1e-5, 1e-4, 1e-2, 0.5, 1.0])
def test_sigma_is_accurate_in_float32(sde, t):
  _, sigma = sde.marginal(jnp.float32(t))
  np.testing.assert_allclose(sigma, float(_sigma64(sde, t)), rtol=2e-6)


@pytest.mark.parametrize('sde', ALL, ids=name)
def test_transitions_compose(sde):
  """Check that steps from r to s and from s to t equal one from r to t."""
  r, s, t = (jnp.round(99 * jnp.full(3, v)) / 99 for v in (0.1, 0.3, 0.9))
  a_rs, v_rs = sde.transition(r, s)
  a_st, v_st = sde.transition(s, t)
  a, v = sde.transition(r, t)
  np.testing.assert_allclose(a, a_st * a_rs, rtol=1e-5)
  np.testing.assert_allclose(v, v_st + a_st**2 * v_rs, rtol=1e-4)


@pytest.mark.parametrize('sde', CONTINUOUS, ids=name)
def test_short_transitions_follow_the_sde(sde):
  t = jnp.linspace(0.05, 0.9 if IS_FLOW(sde) else 0.99, 7)
  a, v = sde.transition(t, t + 1e-3)
  f, g = sde.coefficients(t + 5e-4)
  np.testing.assert_allclose(a, jnp.exp(f * 1e-3), rtol=1e-5)
  np.testing.assert_allclose(v, g**2 * 1e-3, rtol=2e-2)


@pytest.mark.parametrize('sde', ALL, ids=name)
def test_the_papers_chain_tends_to_the_exact_transition(sde):
  t = jnp.round(99 * jnp.linspace(0.2, 0.99, 5)) / 99
  exact, chain = sde.transition(t - 1 / 99, t), sde.discretize(t - 1 / 99, t)
  np.testing.assert_allclose(chain[0], exact[0], rtol=2e-2)
  np.testing.assert_allclose(chain[1], exact[1], rtol=0.12)


def test_ddpm_chain_multiplies_its_betas():
  sde = sde_lib.DDPM(num_scales=1000)
  i = jnp.arange(1, 1000)
  a, v = sde.discretize((i - 1) / 999, i / 999)
  betas = np.linspace(0.1 / 1000, 20 / 1000, 1000)[1:]
  np.testing.assert_allclose(a**2, 1 - betas, rtol=1e-5)
  np.testing.assert_allclose(v, betas, rtol=2e-3)
  np.testing.assert_allclose(
    sde.marginal(jnp.zeros(1))[1] ** 2, [0.1 / 1000], rtol=1e-5
  )


@pytest.mark.parametrize('sde', CONTINUOUS, ids=name)
def test_time_inverts_log_snr(sde):
  t = jnp.linspace(0.001, 0.998 if IS_FLOW(sde) else 1, 40)
  np.testing.assert_allclose(sde.time(sde.log_snr(t)), t, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('sde', ALL, ids=name)
def test_prior(sde):
  z = sde.prior_sample(jax.random.key(0), (4000, 3, 1, 2))
  np.testing.assert_allclose(jnp.std(z), sde.prior_std, rtol=0.02)
  reference = scipy.stats.norm(scale=sde.prior_std).logpdf(z).sum((1, 2, 3))
  np.testing.assert_allclose(sde.prior_logp(z), reference, rtol=1e-5)
  # For data near 0, the marginal at t = 1 is the prior.
  _, sigma = sde.marginal(jnp.ones(1))
  np.testing.assert_allclose(sigma, sde.prior_std, rtol=1e-3)


@pytest.mark.parametrize('sde', ALL, ids=name)
def test_reverse_drifts(sde):
  x, score = jax.random.normal(jax.random.key(1), (2, 5, 4, 4, 1))
  t = jnp.linspace(0.1, 1, 5)
  f, g = (np.asarray(c)[:, None, None, None] for c in sde.coefficients(t))
  np.testing.assert_allclose(
    sde.reverse_drift(x, t, score), f * x - g**2 * score, rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(
    sde.ode_drift(x, t, score), f * x - g**2 * score / 2, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  'make',
  [
    lambda: sde_lib.VESDE(sigma_min=2.0, sigma_max=1.0),
    lambda: sde_lib.VPSDE(beta_min=-1.0),
    lambda: sde_lib.DDPM(num_scales=20),
    lambda: sde_lib.EDM(sigma_max=0.0),
  ],
)
def test_impossible_processes_are_refused(make):
  with pytest.raises(ValueError, match='need|levels|is not in'):
    make()


@pytest.mark.parametrize(
  'process',
  [
    name
    for name, process in sde_lib.SDES.items()
    if {'sigma_max', 'beta_max'} & {o.name for o in options.declared(process)}
  ],
)
def test_an_option_out_of_range_is_refused_by_its_name(process):
  key = 'sigma_max' if process in ('ve', 'edm') else 'beta_max'
  with pytest.raises(ValueError, match=f'{key}=-1.0'):
    sde_lib.SDES[process](**{key: -1.0})
  section = {'name': process, key: -1.0}
  with pytest.raises(ValueError, match=f'config.sde.{key}=-1.0 is not in'):
    options.build(sde_lib.SDES, section, 'sde.name')


@pytest.mark.parametrize('sde', ALL, ids=name)
def test_denoising_inverts_the_perturbation(sde):
  """Check that the score -z / sigma of a single x_0 gives x_0."""
  x0, z = jax.random.normal(jax.random.key(0), (2, 5, 4, 4, 1))
  t = jnp.linspace(0.1, 0.5, 5)
  x, (_, sigma) = sde.perturb(x0, t, z), sde.marginal(t)
  score = -z / sde_lib.expand(sigma, z)
  got = sde.denoise(x, t, score)
  np.testing.assert_allclose(got, x0, rtol=1e-3, atol=1e-4)
