"""What people and programs read of a run: progress, logs and pictures."""

import json
import os
import pathlib
import sys
import time

import jax
import numpy as np

import checkpoints


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
      checkpoints.write_text(path, ''.join(lines))
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


def save_samples(path, samples):
  """One PNG of samples: uint8 images in a grid, points [N, D] scattered."""
  if samples.ndim > 2:
    return save_grid(path, samples)
  plt = _pyplot()
  figure, ax = plt.subplots(figsize=(5, 5))
  ax.scatter(*samples[:, :2].T, s=3, alpha=0.6, linewidths=0)
  ax.set_aspect('equal', 'datalim')
  _save_figure(path, figure)


def _pyplot():
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  return pyplot


def _save_figure(path, figure):
  """Writes a figure as PNG, whole or not at all, and closes it."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.tight_layout()
  part = path.with_name(path.name + '.part')
  figure.savefig(part, format='png', dpi=100)
  _pyplot().close(figure)
  os.replace(part, path)


def save_grid(path, images, *, scale_to=512):
  """Writes uint8 images [N, H, W, C], C = 1, 3 or 4, as one nearly square PNG.

  Small images are enlarged by a whole factor, to a grid of about `scale_to`
  pixels; two white pixels part them.
  """
  from PIL import Image

  n, h, w, c = images.shape
  columns = int(np.ceil(np.sqrt(n)))
  rows = -(-n // columns)
  factor = max(1, scale_to // (columns * w))
  h, w = h * factor + 2, w * factor + 2
  grid = np.full((rows * columns, h, w, c), 255, np.uint8)
  grid[:n, :-2, :-2] = images.repeat(factor, axis=1).repeat(factor, axis=2)
  grid = grid.reshape(rows, columns, h, w, c).swapaxes(1, 2)
  grid = grid.reshape(rows * h, columns * w, c)[:-2, :-2]
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  Image.fromarray(grid[..., 0] if c == 1 else grid).save(part, format='PNG')
  os.replace(part, path)


def save_curves(path, results, names):
  """Plots metrics against step, and the FID against NFE, as one PNG.

  Args:
    path: of the picture.
    results: dicts with 'step', and where measured 'nfe' and, by name, metrics
      {'value', 'std_error', ..}.
    names: of metrics, a panel each if any result has it.
  """

  def points(x, name):
    found = [
      (r[x], r[name]['value'], r[name].get('std_error') or 0)
      for r in results
      if x in r and r.get(name, {}).get('value') is not None
    ]
    return sorted(found)

  panels = [('step', name) for name in names if points('step', name)]
  if points('nfe', 'fid'):
    panels.append(('nfe', 'fid'))
  if not panels:
    return
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  plt = _pyplot()
  figure, axes = plt.subplots(
    rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False
  )
  for ax in axes.flat[len(panels) :]:
    ax.remove()
  for ax, (x, name) in zip(axes.flat, panels, strict=False):
    at, value, error = zip(*points(x, name), strict=True)
    ax.errorbar(at, value, yerr=error, marker='o', capsize=3)
    ax.set(xlabel={'nfe': 'NFE'}.get(x, x), ylabel=name)
    ax.grid(alpha=0.3)
  _save_figure(path, figure)
