"""Tests of python -m data."""

import importlib.util

import pytest

from data import __main__ as command_line
from data import datasets, pixels
from tests.data.shared import config


def test_sigma_max_is_printed(capsys):
  train = datasets.load(config('digits', num_channels=1), 'train')
  largest = pixels.sigma_max(train)
  sizes = ['--image_size', '8', '--num_channels', '1']
  command_line.main(['sigma_max', 'digits', *sizes])
  assert f'sigma_max = {largest:.2f}, of all images' in capsys.readouterr().out
  with pytest.raises(SystemExit, match='^error: .*gone.npz does not exist'):
    command_line.main(['sigma_max', 'npz', '--path', 'gone.npz'])


def test_preparing_alone_needs_tensorflow(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(SystemExit, match='^error: .* pip install tensorflow-cpu'):
    command_line.main(['prepare', 'svhn'])
  with pytest.raises(SystemExit, match='digits needs no preparation'):
    command_line.main(['prepare', 'digits'])


def fill_cache(folder):
  """Write 3 MiB below folder/jax and a small file beside it."""
  (folder / 'jax' / 'deep').mkdir(parents=True)
  (folder / 'jax' / 'program').write_bytes(bytes(2**20))
  (folder / 'jax' / 'deep' / 'program').write_bytes(bytes(2**21))
  (folder / 'a.npz').write_bytes(b'small')


def test_the_cache_is_listed_and_emptied(tmp_path, capsys):
  cache, other = tmp_path / 'cache', tmp_path / 'other'
  command_line.main(['cache'])
  assert f'0.0 MiB  in {cache}' in capsys.readouterr().out
  fill_cache(cache)
  other.mkdir()
  (other / 'mine').write_text('not of the cache')
  (cache / 'link').symlink_to(other)
  command_line.main(['cache'])
  lines = capsys.readouterr().out.splitlines()
  assert '3.0 MiB  jax' in lines[1] and '0.0 MiB  a.npz' in lines[0]
  assert f'3.0 MiB  in {cache}' in lines[-1]
  with pytest.raises(SystemExit, match='^error: .*cache has no gone'):
    command_line.main(['cache', '--clear', 'jax', 'gone'])
  assert (cache / 'jax').is_dir()
  command_line.main(['cache', '--clear', 'jax'])
  assert sorted(p.name for p in cache.iterdir()) == ['a.npz', 'link']
  command_line.main(['cache', '--clear'])
  assert not list(cache.iterdir())
  assert (other / 'mine').is_file()


def test_only_a_cache_is_emptied(tmp_path, monkeypatch):
  """A folder that contains the user's home is not emptied."""
  fill_cache(tmp_path / 'cache')
  monkeypatch.setenv('HOME', str(tmp_path / 'cache' / 'home'))
  with pytest.raises(SystemExit, match='home: it is not emptied'):
    command_line.main(['cache', '--clear'])
  assert (tmp_path / 'cache' / 'a.npz').is_file()


@pytest.mark.parametrize(
  'arguments',
  ['sigma_max folder --path', 'prepare celeba --data_dir', 'cache ffhq --path']
  + ['prepare celeba_hq --manual_dir'],
)
def test_addresses_are_refused(arguments, tmp_path, monkeypatch):
  line = '^error: gs://b/d is an address, .*: mount the bucket'
  with pytest.raises(SystemExit, match=line):
    command_line.main([*arguments.split(), 'gs://b/d'])
  monkeypatch.setenv('SCORE_SDE_CACHE', 'gs://b/d')
  with pytest.raises(SystemExit, match=line):
    command_line.main(['cache'])


def test_the_section_is_checked():
  with pytest.raises(SystemExit, match=r'^error: .*image_size=0 is not in \[1'):
    command_line.main(['sigma_max', 'digits', '--image_size', '0'])
