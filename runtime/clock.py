"""A time limit for work that is done in several pieces, each a process."""

import contextlib
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator

from runtime.files import write_json


class PieceOver(KeyboardInterrupt):
  """The time of a piece is over, or SIGTERM came."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
  """Let SIGTERM raise PieceOver; training saves and stops instead."""

  def stop(number, frame):
    raise PieceOver

  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


class Clock:
  """Time of all pieces together; a context manager.

  A thread writes it to a file, atomically. When the time of a piece is over the
  thread sends SIGTERM to this process. A piece that is killed loses what came
  after the last record.

  Attributes:
    over: whether the time of this piece is over.
  """

  def __init__(
    self,
    path: pathlib.Path,
    begun: float,
    piece_seconds: float,
    interval: float = 1.0,
  ):
    """Go on from a record.

    Args:
      path: path of the record, {'seconds': number}.
      begun: when this piece began, by `time.monotonic`.
      piece_seconds: how long it may take.
      interval: seconds between two records.
    """
    self._path, self._begun = path, begun
    self._limit, self._interval = piece_seconds, interval
    self._earlier, self.over = 0.0, False
    if path.is_file():
      self._earlier = json.loads(path.read_text())['seconds']
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._count, daemon=True)

  @property
  def seconds(self) -> float:
    """Seconds of all pieces until now."""
    return self._earlier + time.monotonic() - self._begun

  def _count(self):
    while not self._ended.wait(self._interval):
      write_json(self._path, {'seconds': self.seconds})
      if not self.over and time.monotonic() > self._begun + self._limit:
        self.over = True
        os.kill(os.getpid(), signal.SIGTERM)

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    self._thread.join()
    write_json(self._path, {'seconds': self.seconds})
