"""Locks: who holds one, and which are left of processes that died."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from runtime.locks import lock

ROOT = pathlib.Path(__file__).parents[2]
HOLDER = """
import sys, time
from runtime.locks import lock
with lock(sys.argv[1]):
  print('held', flush=True)
  time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
  """Return a process that holds tmp_path/run/train.lock."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDER, tmp_path / 'run' / 'train.lock'],
    cwd=ROOT,
    stdout=subprocess.PIPE,
  )
  assert process.stdout.readline() == b'held\n'
  yield process
  process.kill()
  process.wait()


def test_one_at_a_time(holder, tmp_path):
  path = tmp_path / 'run' / 'train.lock'
  with pytest.raises(OSError) as error, lock(path):
    pass
  line = str(error.value)
  started = json.loads(path.read_text())['started']
  assert line == (
    f'{path.parent} is in use by process {holder.pid} on host '
    f'{socket.gethostname()} since {started}: wait until it ends.'
  )


def test_a_dead_process_holds_nothing(holder, tmp_path):
  path = tmp_path / 'run' / 'train.lock'
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert path.is_file()
  with lock(path):
    assert json.loads(path.read_text())['process'] == os.getpid()
    with pytest.raises(OSError, match='in use'), lock(path):
      pass
  assert not path.exists()


def test_another_host_may_hold_it(tmp_path):
  path = tmp_path / 'train.lock'
  there = {'host': 'elsewhere', 'process': 7, 'started': '2026-01-02 03:04:05'}
  path.write_text(json.dumps(there))
  with pytest.raises(OSError) as error, lock(path):
    pass
  assert 'process 7 on host elsewhere since 2026-01-02' in str(error.value)
  assert str(error.value).endswith(f'if it has ended already, remove {path}.')
  path.unlink()
  with lock(path):
    pass


@pytest.mark.parametrize('content', ['', '{', '[]', '{"host": 3}'])
def test_what_cannot_be_read_locks_nothing(tmp_path, content):
  path = tmp_path / 'train.lock'
  path.write_text(content)
  with lock(path):
    pass
  assert not path.exists()


def test_released_by_an_error(tmp_path):
  with pytest.raises(KeyError), lock(tmp_path / 'a'):
    raise KeyError
  with lock(tmp_path / 'a'):
    pass
