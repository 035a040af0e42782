"""Arrays over all devices, on the devices that there are."""

import jax
import numpy as np
import pytest

from runtime import devices


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


def test_check_divisible(monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  devices.check_divisible(16, 'config.training.batch_size')
  with pytest.raises(ValueError, match=r'batch_size=12 .* 8 devices: use 16'):
    devices.check_divisible(12, 'config.training.batch_size')


def test_one_host_agrees_with_itself():
  assert devices.all_hosts(True) is True
  assert devices.all_hosts(False) is False
  devices.barrier('here')
