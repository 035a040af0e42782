"""Tests see annotations that are not true."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import sde_lib
from solvers import grids


def test_shapes_are_checked():
  sde, t = sde_lib.VPSDE(), jnp.ones(3)
  with pytest.raises(jaxtyping.TypeCheckError):
    sde.perturb(jnp.ones((3, 2)), t, jnp.ones((3, 4)))
  with pytest.raises(jaxtyping.TypeCheckError):
    sde.prior_logp('z')
  with pytest.raises(jaxtyping.TypeCheckError):
    grids.Uniform()(sde, '10', 1e-3)


def test_what_is_true_passes():
  sde = sde_lib.VPSDE(beta_max=10)  # An integer in place of a float.
  assert sde.prior_logp(np.ones((3, 2), np.float32)).shape == (3,)
  # Options have a check of their own.
  with pytest.raises(ValueError, match='beta_max'):
    sde_lib.VPSDE(beta_max='10')
