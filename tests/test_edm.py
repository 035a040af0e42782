"""Test EDM (Karras et al. 2022): preconditioning, noise levels and loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import experiment
import losses
import sde_lib
from models import score as score_lib
from tests import tiny
from tests.exact import MIXTURE, Mixture

SDE = sde_lib.EDM()
SIGMA_DATA = 0.6
SIGMAS = [0.002, 0.1, 0.6, 3.0, 80.0]


@pytest.mark.parametrize('conditioning', ['edm', 'edm_fourier'])
def test_scales_are_the_papers(conditioning):
  """Compare with D = c_skip x + c_out F(c_in x, log(sigma) / 4) (Table 1)."""
  x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
  sigma, d = np.asarray(SIGMAS)[:, None], SIGMA_DATA

  def net(x, cond):
    # Fourier features take the logarithm themselves.
    cond = jnp.log(cond) if conditioning == 'edm_fourier' else cond
    return jnp.sin(3 * x) + cond[:, None]

  t = jnp.asarray(SIGMAS) / SDE.sigma_max
  told = score_lib.CONDITIONINGS[conditioning](sigma_data=SIGMA_DATA)
  score = score_lib.make_score_fn(net, SDE, told)(x, t)
  c_skip = d**2 / (sigma**2 + d**2)
  c_out = sigma * d / np.sqrt(sigma**2 + d**2)
  c_in = 1 / np.sqrt(sigma**2 + d**2)
  x = np.float64(x)
  denoiser = c_skip * x + c_out * (np.sin(3 * c_in * x) + np.log(sigma) / 4)
  want = (denoiser - x) / sigma**2
  np.testing.assert_allclose(score, want, rtol=2e-5, atol=1e-6)


def losses_at(sigma, scale, data, *, n=100_000):
  """Return EDM's losses [n] of the network scale * c_in x at a noise level."""
  x0 = jnp.asarray(data.sample(0, n))
  z = jax.random.normal(jax.random.key(0), x0.shape)
  t = jnp.full(n, sigma / SDE.sigma_max)
  edm = score_lib.EDM(sigma_data=SIGMA_DATA)
  score_fn = score_lib.make_score_fn(lambda x, c: scale * x, SDE, edm)
  weighting = losses.EDM(sigma_data=SIGMA_DATA)
  return losses.denoising_loss(
    score_fn, SDE, x0, t, z, weighting=weighting, reduction=losses.mean
  )


@pytest.mark.parametrize('sigma', SIGMAS)
def test_network_targets_have_unit_variance(sigma):
  """Use that the loss of a zero network is the mean square of its target."""
  # The mean is 0 and both variances are 0.36, but it is not Gaussian.
  corners = ((0.5, 0.5), (0.5, -0.5), (-0.5, 0.5), (-0.5, -0.5))
  std = (SIGMA_DATA**2 - 0.25) ** 0.5
  data = Mixture(weights=(0.25,) * 4, means=corners, std=std)
  np.testing.assert_allclose(losses_at(sigma, 0.0, data).mean(), 1, rtol=0.02)


@pytest.mark.parametrize('sigma', SIGMAS)
def test_loss_is_least_at_the_exact_score(sigma):
  """Compare the networks a c_in x on Gaussian data of another deviation s.

  The best denoiser is D = s^2 / (s^2 + sigma^2) x. The loss is a parabola in a,
  whose vertex follows from three points.
  """
  data = Mixture(means=((0.0, 0.0),) * 2, std=0.25)
  low, middle, high = (losses_at(sigma, a, data).mean() for a in (-1, 0, 1))
  vertex = (low - high) / (2 * (low + high - 2 * middle))
  s, d = data.std**2, SIGMA_DATA**2
  v = sigma**2 + d
  best = (s / (s + sigma**2) - d / v) * v / (sigma * np.sqrt(d))
  np.testing.assert_allclose(vertex, best, atol=0.02)


def test_noise_levels_are_lognormal():
  times = losses.Lognormal()
  draw = lambda eps: times(jax.random.key(0), SDE, 5000, eps)
  t, weight = draw(1e-5)
  log_sigma = np.log(SDE.marginal(t)[1])
  normal = scipy.stats.norm(times.p_mean, times.p_std)
  assert scipy.stats.kstest(log_sigma, normal.cdf).pvalue > 0.01
  assert (weight == 1).all()
  assert np.min(draw(0.01)[0]) == np.float32(0.01)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('training.times', 'lognormal'),
    ('training.weighting', 'edm'),
    ('model.conditioning', 'edm'),
  ],
)
def test_other_processes_are_refused(key, value):
  with pytest.raises(ValueError, match=f"{key}='{value}' needs sde.name='edm'"):
    experiment.build(tiny.get_config(**{key.replace('.', '__'): value}))


def test_the_exact_score_of_a_mixture_minimises_the_loss():
  """Average over all noise levels that training draws."""
  x0 = jnp.asarray(MIXTURE.sample(0, 20_000))
  exact = MIXTURE.score_fn(SDE)

  objective = losses.ScoreMatching(
    times=losses.Lognormal(), weighting=losses.EDM(sigma_data=SIGMA_DATA)
  )

  def loss(score_fn):
    return objective(jax.random.key(1), score_fn, SDE, x0).mean()

  best = loss(exact)
  for other in (
    lambda x, t: 0.95 * exact(x, t),
    lambda x, t: 1.05 * exact(x, t),
    lambda x, t: exact(x, t) + 0.3,
  ):
    assert best < loss(other)
