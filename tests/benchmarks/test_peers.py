"""The comparison with torch, as far as it goes without torch."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import comparison, peers
from checkpoints import diffusers


def test_without_torch_one_line_says_so(monkeypatch):
  monkeypatch.setattr(comparison, 'installed', lambda *modules: False)
  with pytest.raises(SystemExit) as stop:
    peers.main([])
  assert 'pip install torch diffusers' in stop.value.code
  assert '\n' not in stop.value.code


@pytest.mark.parametrize('name', peers.NETWORKS)
def test_networks_of_the_default_size_can_be_exported(name):
  model = peers.build(peers.NETWORKS[name], peers.parse_args([]))
  diffusers.check(model)


def test_convolutions_of_a_program_are_found():
  x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
  names = 'NHWC', 'HWIO', 'NHWC'

  @jax.jit
  def halved(x):
    return jax.lax.conv_general_dilated(
      x, kernel, (2, 2), 'SAME', dimension_numbers=names
    )

  program = jax.make_jaxpr(lambda x: halved(x) + halved(2 * x))(x)
  found = (x.shape, kernel.shape, (2, 4, 4, 5), (2, 2), ((0, 1), (0, 1)))
  assert [*peers.convolutions(program.jaxpr)] == [found] * 2
