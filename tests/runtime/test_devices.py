"""Arrays over all devices, on the devices that there are."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from runtime import devices

ROOT = pathlib.Path(__file__).parents[2]


def test_global_arrays_hold_the_rows_of_this_host():
  layout = devices.make_layout()
  n = 2 * jax.device_count()
  local = {'a': np.arange(3.0 * n).reshape(n, 3), 'b': np.arange(n)}
  found = devices.to_global(layout.split, local)
  assert found['a'].sharding == layout.split
  for key, value in local.items():
    np.testing.assert_array_equal(devices.local_rows(found[key]), value)


def test_replicated():
  layout = devices.make_layout()
  found = devices.replicated({'a': np.zeros((2, 3), np.float32)}, layout)
  assert found['a'].shape == (2, 3) and found['a'].dtype == np.float32
  assert found['a'].sharding == layout.replicated


def test_spread():
  layout = devices.make_layout()
  mesh = jax.sharding.AbstractMesh((8,), ('data',))
  layout = layout._replace(replicated=NamedSharding(mesh, P()))
  shapes = {
    (3, 3, 16, 64): P(None, None, None, 'data'),
    (3, 3, 64, 16): P(None, None, 'data'),
    (64, 64): P('data'),
    (1023, 8): P(None, 'data'),  # The largest does not divide by 8.
    (1023, 3): P(),
    (512,): P(),
    (): P(),
  }
  like = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
  found = devices.spread(like, layout)
  assert [v.sharding.spec for v in found] == [*shapes.values()]
  assert [v.shape for v in found] == [*shapes]
  elements = 2 * 9 * 16 * 8 + 64 * 8 + 1023 + 1023 * 3 + 512 + 1
  assert devices.bytes_per_device(found) == 4 * elements
  whole = devices.replicated({'a': np.zeros((2, 3), np.int8)}, layout)
  assert devices.bytes_per_device(whole) == 6


def test_check_divisible(monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  devices.check_divisible(16, 'config.training.batch_size')
  with pytest.raises(ValueError, match=r'batch_size=12 .* 8 devices: use 16'):
    devices.check_divisible(12, 'config.training.batch_size')


def test_one_host_agrees_with_itself():
  assert devices.all_hosts(True) is True
  assert devices.all_hosts(False) is False
  devices.barrier('here')


def test_cores_become_devices():
  """Check the rule, and that what was chosen before stays."""
  program = """
import jax
from runtime import devices
devices.num_cores = lambda: 6
assert devices.divide_cpu(64) == 4
assert jax.device_count() == 4
assert devices.divide_cpu(64) == 0
assert devices.divide_cpu(wanted=2) == 0  # JAX has started.
assert jax.device_count() == 4
"""
  subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True)
  rule = devices.cpu_devices_for
  assert rule(128, cores=64) == 8
  assert rule(64, 24, cores=8) == 2
  assert rule(4, cores=2) == rule(17, cores=2) == rule(64, cores=1) == 1
