"""The comparison with torch, as far as it goes without torch."""

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
