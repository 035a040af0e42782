"""Test likelihoods and latent codes against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import likelihood
import sde_lib
from solvers import ode
from tests.exact import MIXTURE, Mixture

SDES = [
  sde_lib.VESDE(sigma_min=0.01, sigma_max=200.0),
  sde_lib.VPSDE(),
  sde_lib.SubVPSDE(),
  sde_lib.EDM(),
  sde_lib.RectifiedFlow(),
]
name = lambda sde: type(sde).__name__


# Centred, because otherwise the marginal at t = 1 has the mean alpha mean.
CENTRED = Mixture(means=((0.0, 0.0),) * 2)


def arrays(data):
  """Return the arguments of a mixture: all mixtures share a program."""
  return tuple(np.float32(v) for v in (data.weights, data.means, data.std))


@functools.cache
def likelihood_program(sde):
  """Return f(data, x, probes, tolerance) -> (Likelihood, exact log p)."""

  @jax.jit
  def program(data, x, probes, tolerance):
    data = Mixture(*data)
    found = likelihood.log_likelihood(
      data.score_fn(sde), sde, x, probes, rtol=tolerance, atol=tolerance
    )
    return found, data.logp(x, *sde.marginal(1e-5))

  return program


def estimated(data, sde, x, probes=None, tolerance=1e-5):
  tolerance = np.float32(tolerance)
  return likelihood_program(sde)(arrays(data), x, probes, tolerance)


@pytest.mark.parametrize('sde', SDES, ids=name)
@pytest.mark.parametrize('trace', ['exact', 'rademacher'])
def test_bits_per_dim_of_a_gaussian(sde, trace):
  """Compare with the density; Rademacher probes have no variance here."""
  x, probes = CENTRED.sample(0, 64), None
  if trace != 'exact':
    probes = likelihood.rademacher(jax.random.key(0), (1, *x.shape))
  result, exact = estimated(CENTRED, sde, x, probes)
  bits = [
    likelihood.bits_per_dim(np.asarray(logp), 2, data_width=2)
    for logp in (result.logp, exact)
  ]
  assert result.success
  np.testing.assert_allclose(bits[0], bits[1], atol=1e-3)
  error = np.asarray(result.std_error)
  assert np.all(error == 0) if trace == 'exact' else np.all(np.isnan(error))


@pytest.mark.parametrize('kind', likelihood.PROBES)
def test_probes_tell_their_error(kind):
  """Check that estimates differ from the exact trace by about their errors."""
  sde = sde_lib.VPSDE()
  x = MIXTURE.sample(0, 200)
  exact, truth = estimated(MIXTURE, sde, x)
  # The prior differs from the marginal at t = 1, where alpha is 0.0066.
  np.testing.assert_allclose(exact.logp, truth, atol=0.02)

  draw = likelihood.PROBES[kind]
  probes = draw(jax.random.key(0), (64, *x.shape))
  estimate, _ = estimated(MIXTURE, sde, x, probes, 1e-4)
  # Student's t with 63 degrees of freedom; nearly normal for errors > 1e-3.
  error = np.asarray(estimate.std_error)
  seen = error > 1e-3
  assert seen.mean() > 0.8
  distance = np.subtract(estimate.logp, exact.logp)[seen] / error[seen]
  assert 0.88 < np.mean(np.abs(distance) < 2) < 0.99
  assert np.abs(distance).max() < 5
  assert abs(np.mean(distance)) < 0.25
  assert 0.8 < np.std(distance) < 1.2
  # With 16 times fewer probes the error is 4 times as large.
  few, _ = estimated(MIXTURE, sde, x, np.asarray(probes)[:4], 1e-4)
  ratio = np.sqrt(np.mean(np.square(few.std_error)) / np.mean(error**2))
  assert 3.4 < ratio < 4.6


def test_divergence_is_unbiased():
  """Check that the mean over all probes is the trace of the Jacobian."""
  sde, t = sde_lib.SubVPSDE(), np.full(4, 0.3, np.float32)
  score_fn = MIXTURE.score_fn(sde)
  signs = np.float32([[1, 1], [1, -1]])
  probes = np.broadcast_to(signs[:, None], (2, 4, 2))

  @jax.jit
  def program(x):
    drift = lambda x: sde.ode_drift(x, t, score_fn(x, t))
    trace = jnp.einsum('bibi->b', jax.jacfwd(drift)(x))
    return (
      drift(x),
      trace,
      [
        likelihood.drift_and_divergence(score_fn, sde, x, t, given)
        for given in (probes, None)
      ],
    )

  drift, trace, found = program(MIXTURE.sample(0, 4))
  for (value, divergence), scale in zip(found, (1e-4, 1e-5), strict=True):
    np.testing.assert_allclose(value, drift, rtol=1e-5)
    np.testing.assert_allclose(np.mean(divergence, 0), trace, rtol=scale)
  assert divergence.shape == (1, 4)


def test_exact_trace_of_images():
  """Check more dimensions than one batch of products, not diagonal."""
  sde, t = sde_lib.VESDE(), np.full(2, 0.5, np.float32)
  w = np.random.default_rng(0).normal(size=(18, 18)).astype(np.float32)
  score_fn = lambda x, t: jnp.tanh(x.reshape(2, 18) @ w).reshape(x.shape)
  x = np.float32(np.random.default_rng(1).normal(size=(2, 3, 3, 2)))
  compute = functools.partial(likelihood.drift_and_divergence, score_fn, sde)
  _, divergence = jax.jit(compute)(x, t)
  slope = 1 - np.tanh(np.reshape(x, (2, 18)) @ w) ** 2
  _, g = sde.coefficients(t)
  want = -0.5 * g**2 * (slope @ np.diag(w))
  np.testing.assert_allclose(divergence[0], want, rtol=1e-4)


# --- Latent codes -------------------------------------------------------------


@functools.cache
def round_trip(sde):
  """Return f(data, x) -> (code, decoded x, success)."""

  @jax.jit
  def program(data, x):
    score_fn = Mixture(*data).score_fn(sde)
    code = likelihood.encode(score_fn, sde, x)
    decode = ode.ODE(eps=1e-5, rtol=1e-5, atol=1e-5, final_denoise=False)
    decoded = decode(None, score_fn, sde, code.y)
    return code.y, decoded.x, code.success & decoded.success

  return program


@pytest.mark.parametrize('sde', SDES, ids=name)
def test_latent_code_decodes_to_the_data(sde):
  x = MIXTURE.sample(0, 64)
  z, decoded, success = round_trip(sde)(arrays(MIXTURE), x)
  assert success
  np.testing.assert_allclose(decoded, x, atol=1e-3)
  # The likelihood returns the same code.
  result, _ = estimated(MIXTURE, sde, x)
  np.testing.assert_allclose(z, result.z, atol=2e-3 * sde.prior_std)


@pytest.mark.parametrize('sde', SDES, ids=name)
def test_code_of_a_gaussian(sde):
  """Check that the ODE scales s to sqrt(alpha^2 s^2 + sigma^2)."""
  x = CENTRED.sample(0, 64)
  code, _, _ = round_trip(sde)(arrays(CENTRED), x)
  scale = [
    np.hypot(np.float64(alpha) * CENTRED.std, sigma)
    for alpha, sigma in map(jax.jit(sde.marginal), (1.0, 1e-5))
  ]
  # The flow stops its noise at 0.999, but its codes are at t = 1.
  rtol = 1.2e-3 if isinstance(sde, sde_lib.RectifiedFlow) else 1e-3
  np.testing.assert_allclose(code, x * (scale[0] / scale[1]), rtol=rtol)


def test_interpolation_keeps_to_the_sphere():
  z0, z1 = np.random.default_rng(0).normal(size=(2, 5, 4, 4, 3))
  z0, z1 = np.float32(z0), np.float32(2 * z1)
  interpolate = jax.jit(likelihood.interpolate)
  weights = np.linspace(0, 1, 7, dtype=np.float32)
  path = np.asarray(interpolate(z0, z1, weights), np.float64)
  np.testing.assert_allclose(path[0], z0, atol=1e-6)
  np.testing.assert_allclose(path[-1], z1, atol=1e-6)
  # For codes of equal norm all angles are equal, and the norm is kept.
  z0, z1 = (z / np.linalg.norm(z.reshape(5, -1), axis=1)[:, None, None, None]
            for z in (z0, z1))  # fmt: skip
  path = np.reshape(interpolate(z0, z1, weights), (7, 5, -1))
  np.testing.assert_allclose(np.linalg.norm(path, axis=-1), 1, rtol=1e-5)
  cosines = np.sum(path[1:] * path[:-1], axis=-1)
  whole = np.arccos(np.sum(path[0] * path[-1], axis=-1))
  steps = np.broadcast_to(whole / 6, (6, 5))
  np.testing.assert_allclose(np.arccos(cosines), steps, rtol=1e-3)
  # Two equal codes define no circle, but give no NaN.
  still = interpolate(z0, z0, weights)
  np.testing.assert_allclose(still, np.broadcast_to(z0, still.shape), atol=1e-5)
