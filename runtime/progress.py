"""What is read of a run while it goes on: progress and logs."""

import json
import os
import pathlib
import sys
import time

import jax

from runtime.files import write_text


def duration(seconds):
  """Seconds as e.g. 1:02:03."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def say(*words):
  """Prints a line, once for all processes."""
  if jax.process_index() == 0:
    print(*words, flush=True)


class Progress:
  """A line that tells how far, how fast and how long still."""

  def __init__(self, what, total, unit, *, start=0, interval=5.0):
    """Starts the clock.

    Args:
      what: printed first.
      total: units of the whole job.
      unit: their name.
      start: units done before.
      interval: least seconds between two lines; on a terminal, one line is
        rewritten.
    """
    self._what, self._total, self._unit = what, total, unit
    self._start, self._interval = start, interval
    self._begun = self._shown = time.monotonic()

  def __call__(self, done, note=''):
    """Reports that `done` units are done in all."""
    now = time.monotonic()
    if done < self._total and now - self._shown < self._interval:
      return
    self._shown = now
    rate = (done - self._start) / max(now - self._begun, 1e-9)
    left = duration((self._total - done) / rate) if rate > 0 else '?'
    if jax.process_index() == 0:
      line = (
        f'{self._what} {done}/{self._total} {note} {rate:.3g} {self._unit}/s '
        f'{left} left'
      )
      end = '\r' if sys.stdout.isatty() and done < self._total else '\n'
      print(' '.join(line.split()), end=end, flush=True)


class Log:
  """Scalars of a run, as JSON lines and for TensorBoard; a context manager."""

  def __init__(self, workdir, *, resumed_at):
    """Opens them to go on after step `resumed_at`, whose later lines go."""
    self._file = self._board = None
    if jax.process_index() != 0:
      return
    from tensorboardX import SummaryWriter

    path = pathlib.Path(workdir) / 'train.jsonl'
    if path.is_file():
      lines = [
        line
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith('\n') and json.loads(line)['step'] <= resumed_at
      ]
      write_text(path, ''.join(lines))
    self._file = path.open('a')
    self._board = SummaryWriter(
      os.fspath(pathlib.Path(workdir) / 'tensorboard'),
      purge_step=resumed_at + 1,
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._file:
      self._file.close()
      self._board.close()

  def write(self, step, **scalars):
    """Adds scalars of a step."""
    if self._file:
      record = {'step': step, **{k: float(v) for k, v in scalars.items()}}
      print(json.dumps(record), file=self._file, flush=True)
      for name, value in scalars.items():
        self._board.add_scalar(name, float(value), step)
