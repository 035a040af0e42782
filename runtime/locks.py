"""A lock file: one process at a time, and an error that says which."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

from runtime.files import naming


@contextlib.contextmanager
def lock(path: str | os.PathLike) -> Iterator[None]:
  """Hold a lock file, which is removed at the end.

  The file says which process holds the lock: its host, number and start. The
  operating system releases the lock of a process that dies, so that a file
  which such a process left behind locks nothing on its own host.

  Args:
    path: path of the file. Missing parent folders are made.

  Raises:
    OSError: another process holds the lock, or a process of another host may
      hold it. The line says which process, and what to do.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with _opened(path) as (file, released):
    holder = _holder(file)
    if not released or (holder and holder['host'] != socket.gethostname()):
      raise OSError(_in_use(path, holder))
    with naming(path):
      _write(file)
    try:
      yield
    finally:
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path):
  """Yield (file, whether no other process of this host has locked it)."""
  while True:
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), 'r+') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        released = True
      except OSError as error:
        # Where files cannot be locked, what the file says must do.
        held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        released = not held and not _lives(_holder(file))
      # A holder that has ended meanwhile has removed the file opened here.
      if released and not _is_at(file, path):
        continue
      yield file, released
      return


def _is_at(file, path):
  """Whether an open file is the one at a path."""
  try:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
  except FileNotFoundError:
    return False


def _holder(file) -> dict[str, Any]:
  """Return what a lock file says, or {} if it says nothing yet."""
  file.seek(0)
  try:
    found = json.loads(file.read())
    return {key: found[key] for key in ('host', 'process', 'started')}
  except (ValueError, TypeError, KeyError):
    return {}


def _write(file):
  """Write into a lock file that this process holds it."""
  holder = {
    'host': socket.gethostname(),
    'process': os.getpid(),
    'started': time.strftime('%Y-%m-%d %H:%M:%S'),
  }
  file.seek(0)
  file.truncate()
  json.dump(holder, file)
  file.flush()


def _lives(holder):
  """Whether the process of a lock file runs on this host."""
  if not holder or holder['host'] != socket.gethostname():
    return False
  try:
    os.kill(holder['process'], 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # It is another user's.
    pass
  return True


def _in_use(path, holder):
  """Return one line that says who holds a lock, and what to do."""
  if not holder:
    return f'{path.parent} is in use by another process: wait until it ends.'
  line = (
    f'{path.parent} is in use by process {holder["process"]} on host '
    f'{holder["host"]} since {holder["started"]}: wait until it ends'
  )
  if holder['host'] == socket.gethostname():
    return f'{line}.'
  return f'{line}; if it has ended already, remove {path}.'
