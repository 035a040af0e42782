"""Likelihoods against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import likelihood
import ode
import sde_lib
from tests.exact import MIXTURE, Mixture

SDES = [
  sde_lib.VESDE(sigma_min=0.01, sigma_max=200.0),
  sde_lib.VPSDE(),
  sde_lib.SubVPSDE(),
]
name = lambda sde: type(sde).__name__


@pytest.mark.parametrize('sde', SDES, ids=name)
def test_bits_per_dim_of_a_gaussian(sde):
  """For an isotropic Gaussian Hutchinson's estimate has no variance."""
  # Centred, or its marginal at t = 1 would differ from the prior by alpha mean.
  data = Mixture(means=((0.0, 0.0),) * 2)
  x = jnp.asarray(data.sample(0, 64))
  probe = likelihood.rademacher(jax.random.key(0), x.shape)
  solve = jax.jit(
    lambda x: likelihood.log_likelihood(data.score_fn(sde), sde, x, probe)
  )
  result = solve(x)
  alpha, sigma = sde.marginal(1e-5)
  exact = data.logp(x, alpha, sigma)
  bits = [
    likelihood.bits_per_dim(logp, 2, data_width=2)
    for logp in (result.logp, exact)
  ]
  assert result.success
  np.testing.assert_allclose(bits[0], bits[1], atol=1e-3)


def test_latent_code_decodes_to_the_data():
  sde = sde_lib.VPSDE()
  x = jnp.asarray(MIXTURE.sample(0, 16))
  score_fn = MIXTURE.score_fn(sde)
  probe = likelihood.rademacher(jax.random.key(0), x.shape)
  encode = jax.jit(lambda x: likelihood.log_likelihood(score_fn, sde, x, probe))

  def drift(t, x):
    t = jnp.full((16,), t)
    return sde.ode_drift(x, t, score_fn(x, t))

  decode = jax.jit(
    lambda z: ode.solve_ode(drift, z, 1.0, 1e-5, rtol=1e-5, atol=1e-5)
  )
  np.testing.assert_allclose(decode(encode(x).z).y, x, atol=1e-3)


def test_divergence_is_unbiased():
  """Averaged over all Rademacher probes it is the trace of the Jacobian."""
  sde, t = sde_lib.SubVPSDE(), jnp.full((4,), 0.3)
  x = jnp.asarray(MIXTURE.sample(0, 4))
  score_fn = MIXTURE.score_fn(sde)
  drift = lambda x: sde.ode_drift(x, t, score_fn(x, t))
  jacobian = jax.jacfwd(drift)(x)
  trace = jnp.einsum('bibi->b', jacobian)
  probes = jnp.asarray([[1.0, 1.0], [1.0, -1.0]])
  estimates = []
  for probe in probes:
    probe = jnp.broadcast_to(probe, x.shape)
    value, divergence = likelihood.drift_and_divergence(
      score_fn, sde, x, t, probe
    )
    np.testing.assert_allclose(value, drift(x), rtol=1e-5)
    estimates.append(divergence)
  np.testing.assert_allclose(sum(estimates) / 2, trace, rtol=1e-4)


@pytest.mark.parametrize('width,offset', [(1, 8), (2, 7)])
def test_bits_per_dim_offset(width, offset):
  """A uniform density over the data's range costs 8 bits."""
  dims = 12
  logp = -dims * np.log(width)
  bits = likelihood.bits_per_dim(logp, dims, data_width=width)
  np.testing.assert_allclose(bits, 8)
  zero = likelihood.bits_per_dim(0.0, dims, data_width=width)
  np.testing.assert_allclose(zero, offset)
