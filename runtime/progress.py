"""Progress of long work, lines for the user, and the log of a training run."""

import json
import os
import pathlib
import sys
import time

import jax
import tqdm

from runtime.files import write_text

_BAR = '{desc} {n}/{total} {bar} {rate_noinv_fmt} {remaining} left{postfix}'


def duration(seconds):
  """Return a number of seconds as text, such as '1:02:03'."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def say(*words):
  """Print a line on the first host; progress bars stay below it."""
  if jax.process_index() == 0:
    with tqdm.tqdm.external_write_mode(file=sys.stdout):
      print(*words, flush=True)


class Progress:
  """Show how much is done, how fast it goes, and the time that is left.

  On a terminal this is a progress bar, elsewhere a line from time to time.
  Only the first host shows it.
  """

  def __init__(self, what, total, unit, *, start=0, interval=5.0):
    """Start the clock.

    Args:
      what: name of the work; it is shown first.
      total: units of the whole work.
      unit: name of the units, in the plural.
      start: units that were done earlier; they do not count for the rate.
      interval: minimum time between two lines, in seconds.
    """
    self._what, self._total, self._unit = what, total, unit
    self._start, self._interval = start, interval
    self._begun = self._shown = time.monotonic()
    self._bar = None
    if jax.process_index() == 0 and sys.stdout.isatty():
      self._bar = tqdm.tqdm(
        desc=what,
        total=total,
        initial=start,
        unit=f' {unit}',
        smoothing=0,  # The mean rate, as in the lines.
        bar_format=_BAR,
        dynamic_ncols=True,
        file=sys.stdout,
      )

  def __call__(self, done, note=''):
    """Report the units that are done in total, with a note such as a loss."""
    if self._bar is not None:
      self._bar.set_postfix_str(note, refresh=False)
      self._bar.update(done - self._bar.n)
      if done >= self._total:
        self._bar.close()
      return
    now = time.monotonic()
    if done < self._total and now - self._shown < self._interval:
      return
    self._shown = now
    rate = (done - self._start) / max(now - self._begun, 1e-9)
    left = duration((self._total - done) / rate) if rate > 0 else '?'
    line = (
      f'{self._what} {done}/{self._total} {note} {rate:.3g} {self._unit}/s '
      f'{left} left'
    )
    say(' '.join(line.split()))


class Log:
  """Write scalars of a run as JSON lines and for TensorBoard.

  A context manager; the files are workdir/train.jsonl and workdir/tensorboard.
  Only the first host writes.
  """

  def __init__(self, workdir, *, resumed_at):
    """Open the files and remove entries of steps after `resumed_at`.

    Args:
      workdir: folder of the run.
      resumed_at: step from which training continues. Later steps will be made
        again, so their entries are removed.
    """
    self._file = self._board = None
    if jax.process_index() != 0:
      return
    from tensorboardX import SummaryWriter

    path = pathlib.Path(workdir) / 'train.jsonl'
    if path.is_file():
      lines = [
        line
        for line in path.read_text().splitlines(keepends=True)
        # A line without an end was cut when the process was killed.
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
    """Add scalars of a step."""
    if self._file:
      record = {'step': step, **{k: float(v) for k, v in scalars.items()}}
      print(json.dumps(record), file=self._file, flush=True)
      for name, value in scalars.items():
        self._board.add_scalar(name, float(value), step)
