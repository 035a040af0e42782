"""Checkpoints that are removed or damaged while they are read, a full disk."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from checkpoints.workdir import Checkpoints, read_config
from tests.checkpoints.test_workdir import like, params

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
  """Return a workdir with the checkpoints 1, 2 and 3, of which 2 is best."""
  save(tmp_path, {1: 2.0, 2: 1.0, 3: 3.0})
  return tmp_path


def save(workdir, losses):
  with Checkpoints(workdir, keep_every=1) as saved:
    for step, loss in losses.items():
      saved.save(step, {'step': np.int32(step)}, params(step), loss=loss)
    saved.wait()


def remove(workdir, step):
  shutil.rmtree(workdir / 'checkpoints' / str(step))


def damage(workdir, step, item='ema'):
  for path in (workdir / 'checkpoints' / str(step) / item).rglob('*'):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)


def reading(saved):
  return lambda step: saved.restore(step, like(), 'ema')


def test_a_removed_one_is_not_called_damaged(run):
  with Checkpoints(run) as saved:
    remove(run, 1)
    with pytest.raises(FileNotFoundError, match='1 is no longer there'):
      saved.restore(1, like(), 'ema')


@pytest.mark.parametrize(('which', 'step'), [('last', 5), ('best', 4)])
def test_chosen_again_while_training_goes_on(run, capsys, which, step):
  with Checkpoints(run, fall_back=True) as saved:
    for old in (1, 2, 3):
      remove(run, old)
    save(run, {4: 0.5, 5: 0.7})
    found, ema = saved.restore_first(which, reading(saved))
  assert found == step
  np.testing.assert_array_equal(ema['w'], params(step)['w'])
  assert capsys.readouterr().out == ''


def test_all_leaves_out_what_is_removed(run, capsys):
  with Checkpoints(run, fall_back=True) as saved:
    steps = []
    for step, _ in saved.restore_each('all', reading(saved)):
      steps.append(step)
      if step == 1:
        remove(run, 2)
  assert steps == [1, 3]
  line = capsys.readouterr().out
  assert line.startswith('warning: Checkpoint ') and line.count('\n') == 1
  assert '/checkpoints/2 is no longer there' in line and 'damaged' not in line


def test_the_one_before_a_damaged_one(run, capsys):
  damage(run, 3)
  with Checkpoints(run, fall_back=True) as saved:
    step, ema = saved.restore_first('last', reading(saved))
  assert step == 2
  np.testing.assert_array_equal(ema['w'], params(2)['w'])
  line = capsys.readouterr().out
  assert f'{run}/checkpoints/3 cannot be read (damaged' in line
  assert line.endswith('Checkpoint 2 is taken instead.\n')
  assert line.count('\n') == 1
  # Reading moves nothing.
  assert (run / 'checkpoints' / '3').is_dir()


def test_training_moves_a_damaged_one_out_of_its_way(run, capsys):
  damage(run, 3)
  with Checkpoints(run, keep_every=1, fall_back=True) as saved:
    step, _ = saved.restore_first('last', reading(saved))
    assert step == 2 and saved.steps == [1, 2]
    saved.save(3, {'step': np.int32(3)}, params(7), loss=0.1)
    saved.wait()
    assert saved.steps == [1, 2, 3]
  assert (run / 'damaged_checkpoints' / '3' / 'ema').is_dir()
  assert f'moved to {run}/damaged_checkpoints/3' in capsys.readouterr().out


def test_all_are_damaged(run):
  for step in (1, 2, 3):
    damage(run, step)
  with Checkpoints(run, keep_every=1, fall_back=True) as saved:
    with pytest.raises(ValueError, match='3 cannot be read'):
      saved.restore_first('last', reading(saved))
    with pytest.raises(ValueError, match='1 cannot be read'):
      list(saved.restore_each('all', reading(saved)))
    assert saved.steps == [1, 2, 3]


@pytest.mark.parametrize('keep_every', [None, 1])
def test_damaged_metrics(run, capsys, keep_every):
  path = run / 'checkpoints' / '2' / 'metrics' / 'metrics'
  os.truncate(path, path.stat().st_size // 2)
  with Checkpoints(run, keep_every=keep_every, fall_back=True) as saved:
    assert saved.steps == [1, 2, 3] and saved.best == 1
  assert 'checkpoints/2 cannot be read (damaged)' in capsys.readouterr().out


# Saves two checkpoints, and a third when files cannot grow any more.
FULL = f"""
import resource, signal, sys
import numpy as np
sys.path.insert(0, {str(ROOT)!r})
from checkpoints.workdir import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
  with Checkpoints(sys.argv[1], keep_every=1) as saved:
    for step in (1, 2, 3, 4):
      if step == 3:
        saved.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
      tree = {{f'w{{i}}': np.random.default_rng(i).random((200, 200))
              for i in range(5)}}
      saved.save(step, tree, tree, loss=1.0)
except OSError as error:
  sys.exit(f'error: {{error}}')
"""


def test_a_full_disk_is_one_line(tmp_path):
  """Orbax writes in threads, whose errors fill pages."""
  done = subprocess.run(
    [sys.executable, '-c', FULL, tmp_path], capture_output=True, text=True
  )
  assert done.returncode == 1
  assert done.stderr == (
    f'error: Checkpoint {tmp_path}/checkpoints/3 could not be saved: File too '
    'large. The last complete checkpoint is 2.\n'
  )
  with Checkpoints(tmp_path) as saved:
    assert saved.steps == [1, 2]
  # What was begun does not stay.
  save(tmp_path, {3: 1.0})
  names = [path.name for path in (tmp_path / 'checkpoints').iterdir()]
  assert sorted(names) == ['1', '2', '3']


def test_an_error_is_not_buried(run):
  """Closing does not replace the error that is being raised."""
  with (
    pytest.raises(ZeroDivisionError),
    Checkpoints(run, keep_every=1) as saved,
  ):
    saved._manager.close()
    saved._manager.wait_until_finished = lambda: 1 / 0
    raise ZeroDivisionError


@pytest.mark.parametrize('content', ['[]', 'null', '3', '"text"', b'\xff\xfe'])
def test_a_damaged_config_is_named(tmp_path, content):
  path = tmp_path / 'config.json'
  content = content.encode() if isinstance(content, str) else content
  path.write_bytes(content)
  with pytest.raises(ValueError, match='config.json is'):
    read_config(tmp_path)
