"""Progress of long work, lines for the user, and the log of a training run."""

import contextlib
import json
import os
import pathlib
import sys
import time

import jax
import tqdm

from runtime.files import naming, to_json, write_text

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


class _Board:
  """Write scalars for TensorBoard, in this thread: an error is raised here."""

  def __init__(self, folder, first_step):
    """Make the folder and hide earlier scalars of `first_step` and later."""
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    self._event = event_pb2.Event
    self._summary = summary_pb2.Summary
    folder.mkdir(exist_ok=True)
    # Two runs may begin in the same second.
    suffix = f'.{os.getpid()}'
    self._file = event_file_writer.EventsWriter(str(folder / 'events'), suffix)
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._file.write_event(self._event(step=first_step, session_log=start))

  def write(self, record):
    """Add an entry of the log."""
    values = [
      self._summary.Value(tag=name, simple_value=value)
      for name, value in record.items()
      if name != 'step'
    ]
    self._file.write_event(
      self._event(
        step=record['step'],
        wall_time=time.time(),
        summary=self._summary(value=values),
      )
    )
    self._file.flush()

  def close(self):
    """Close the file."""
    self._file.close()


class Log:
  """Write scalars of a run as JSON lines and for TensorBoard.

  A context manager; the files are workdir/train.jsonl and workdir/tensorboard.
  They are opened by the first entry. Only the first host writes.
  """

  def __init__(self, workdir, *, resumed_at):
    """Say where the log is, and from which step on it is written.

    Args:
      workdir: folder of the run.
      resumed_at: step from which training continues. Later steps will be made
        again, so their entries are removed.
    """
    self._folder, self._resumed_at = pathlib.Path(workdir), resumed_at
    self._path = self._folder / 'train.jsonl'
    self._file = self._board = None

  def _open(self):
    """Open the files and remove entries of steps after `resumed_at`."""
    self._folder.mkdir(parents=True, exist_ok=True)
    if self._path.is_file():
      write_text(self._path, ''.join(self._kept()))
    self._file = self._path.open('a')
    self._board = _Board(self._folder / 'tensorboard', self._resumed_at + 1)

  def _kept(self):
    """Return the lines of steps that are not made again; name damaged ones."""
    kept, damaged = [], []
    text = self._path.read_bytes().decode(errors='replace')
    for number, line in enumerate(text.splitlines(keepends=True), 1):
      step = _step_of(line)
      if step is None:
        # A line without an end was cut when the process was killed.
        damaged += [number] if line.endswith('\n') else []
      elif step <= self._resumed_at and line.endswith('\n'):
        kept.append(line)
    if damaged:
      copy = self._path.with_name(f'{self._path.name}.damaged')
      write_text(copy, text)
      say(
        f'warning: {self._path} is damaged in line {damaged[0]}'
        f'{f" and {len(damaged) - 1} more" if damaged[1:] else ""}: removed '
        f'there and kept in {copy}.'
      )
    return kept

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for file in (self._file, self._board):
      if file is not None:
        # Each entry was flushed; a disk that is full is an error already.
        with contextlib.suppress(OSError):
          file.close()

  def write(self, step, **scalars):
    """Add scalars of a step."""
    if jax.process_index() != 0:
      return
    if self._file is None:
      self._open()
    record = {'step': step, **{k: float(v) for k, v in scalars.items()}}
    with naming(self._path):
      print(to_json(record), file=self._file, flush=True)
      self._board.write(record)


def _step_of(line):
  """Return the step of a line of the log, or None if it is no entry."""
  try:
    step = json.loads(line)['step']
  except (ValueError, TypeError, KeyError):
    return None
  return step if isinstance(step, int) else None
