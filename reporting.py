"""What people and programs read of a run: progress, logs and pictures."""

import json
import os
import pathlib
import sys
import time

import jax
import numpy as np

import checkpoints
import experiment


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


def save_samples(path, samples, *, columns=None):
  """One PNG of samples: uint8 images in a grid, points [N, D] scattered."""
  if samples.ndim > 2:
    return save_grid(path, samples, columns=columns)
  plt = pyplot()
  figure, ax = plt.subplots(figsize=(5, 5))
  ax.scatter(*samples[:, :2].T, s=3, alpha=0.6, linewidths=0)
  ax.set_aspect('equal', 'datalim')
  save_figure(path, figure)


def pyplot():
  """Matplotlib's, which draws into files only."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  return pyplot


def save_figure(path, figure):
  """Writes a figure as PNG, whole or not at all, and closes it."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.tight_layout()
  part = path.with_name(path.name + '.part')
  figure.savefig(part, format='png', dpi=100)
  pyplot().close(figure)
  os.replace(part, path)


def _tiled(images, columns, scale_to):
  """uint8 images [N, H, W, C] as one, in rows of `columns`, white between.

  Small images are enlarged by a whole factor, to a width of about `scale_to`.
  """
  n, h, w, c = images.shape
  rows = -(-n // columns)
  factor = max(1, scale_to // (columns * w))
  h, w = h * factor + 2, w * factor + 2
  grid = np.full((rows * columns, h, w, c), 255, np.uint8)
  grid[:n, :-2, :-2] = images.repeat(factor, axis=1).repeat(factor, axis=2)
  grid = grid.reshape(rows, columns, h, w, c).swapaxes(1, 2)
  return grid.reshape(rows * h, columns * w, c)[:-2, :-2]


def _save_picture(path, *pictures, **options):
  """Writes uint8 [H, W, C] as PNG or, several of them, GIF, by the suffix."""
  from PIL import Image

  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  first, *others = (
    Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pictures
  )
  if others:
    options |= {'save_all': True, 'append_images': others}
  first.save(part, format=path.suffix[1:], **options)
  os.replace(part, path)


def save_grid(path, images, *, columns=None, scale_to=512):
  """Writes uint8 images [N, H, W, C], C = 1, 3 or 4, as one PNG.

  Rows are of `columns` images, or of so many that the grid is nearly square.
  Small images are enlarged by a whole factor, to a grid of about `scale_to`
  pixels; two white pixels part them.
  """
  columns = columns or int(np.ceil(np.sqrt(len(images))))
  _save_picture(path, _tiled(images, columns, scale_to))


def _scattered(points):
  """A picture of points [N, D], uint8 [H, W, 3], cut where most of them are."""
  plt = pyplot()
  figure, ax = plt.subplots(figsize=(2.4, 2.4), layout='constrained')
  ax.scatter(*points[:, :2].T, s=2, alpha=0.6, linewidths=0)
  reach = 1.1 * np.quantile(np.abs(points[:, :2]), 0.995)
  ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect='equal')
  ax.tick_params(labelsize=7)
  figure.canvas.draw()
  picture = np.array(figure.canvas.buffer_rgba())[..., :3]
  plt.close(figure)
  return picture


def save_trajectory(path, frames):
  """Writes the way to samples as a strip, path.png, and a film, path.gif.

  Args:
    path: of the strip; the film beside it has the suffix .gif.
    frames: uint8 images [F, N, H, W, C], of which the strip shows eight, the
      film 64; or points [F, N, D].
  """
  path = pathlib.Path(path)
  if frames.ndim > 3:
    strip = frames[:, :8].swapaxes(0, 1).reshape(-1, *frames.shape[2:])
    columns = int(np.ceil(np.sqrt(min(64, frames.shape[1]))))
    pictures = [_tiled(frame[:64], columns, 256) for frame in frames]
  else:
    strip = np.stack([_scattered(points) for points in frames])
    pictures = list(strip)
  _save_picture(path, _tiled(strip, len(frames), 1024))
  milliseconds = [2000 // len(frames)] * (len(frames) - 1) + [2000]
  film = path.with_suffix('.gif')
  _save_picture(film, *pictures, duration=milliseconds, loop=0)


METRICS = (
  'test_loss', 'bits_per_dim', 'nats', 'true_nats', 'fid', 'kid',
  'is_1_split', 'is_10_splits', 'precision', 'recall', 'density', 'coverage',
  'sliced_wasserstein', 'true_sliced_wasserstein', 'energy_distance',
  'true_energy_distance', *experiment.ACCURACIES,
)  # fmt: skip
# What sets the number of evaluations, and so is no line of its own over NFE.
_COST = ('num_steps', 'rtol', 'atol', 'sde_rtol', 'sde_atol')
OF_SAMPLE = ('num_samples', 'frames')  # Of --mode sample only.


def _settings(result):
  """What may tell results of one checkpoint apart."""
  settings = {
    k: v for k, v in result.get('sampler', {}).items() if k not in OF_SAMPLE
  }
  settings['seed'] = result.get('seed')
  if 'sampler' in result:
    settings['N'] = result.get('count')
    settings['variant'] = result.get('inception_variant')
  return settings


def _labels(results, leave_out=()):
  """A text for each result: the settings in which results differ."""
  all_settings = [_settings(result) for result in results]
  keys = dict.fromkeys(key for settings in all_settings for key in settings)
  vary = [
    key
    for key in keys
    if key not in leave_out
    and len({repr(s[key]) for s in all_settings if key in s}) > 1
  ]
  return [
    ', '.join(
      str(s[key]) if isinstance(s[key], str) else f'{key} {s[key]}'
      for key in vary
      if key in s
    )
    for s in all_settings
  ]


def _show(metric):
  if metric['value'] is None:
    return 'n/a'
  error, probes = metric.get('std_error'), metric.get('probe_error')
  text = f'{metric["value"]:.5g}' + (f' +- {error:.2g}' if error else '')
  return text + (f' (probes {probes:.1g})' if probes else '')


def table(results):
  """Results as lines of text: a row each, and why some numbers are missing.

  Args:
    results: dicts with 'step' or 'images', and where measured 'nfe', 'count'
      and, by name, metrics {'value', 'std_error', 'note', ..}.
  """
  names = [name for name in METRICS if any(name in r for r in results)]
  head = ['of', 'settings', 'NFE', 'N', *names]
  rows = [
    [
      str(result.get('images') or f'step {result["step"]}'),
      label,
      f'{result["nfe"]:g}' if 'nfe' in result else '',
      str(result.get('count', '')),
      *(_show(result[name]) if name in result else '' for name in names),
    ]
    for result, label in zip(results, _labels(results), strict=True)
  ]
  columns = [
    column
    for column in zip(head, *rows, strict=True)
    if any(column[1:])  # Not one in which there is nothing.
  ]
  widths = [max(map(len, column)) for column in columns]
  lines = [
    '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    for row in zip(*columns, strict=True)
  ]
  notes = {}
  for name in names:
    for result in results:
      if note := result.get(name, {}).get('note'):
        notes.setdefault(note, {})[name] = None
  lines += [f'{", ".join(where)}: {note}' for note, where in notes.items()]
  return '\n'.join(line.rstrip() for line in lines)


def save_results(folder, results):
  """Prints results; writes results.json, .txt (the table) and .png (curves)."""
  folder = pathlib.Path(folder)
  order = lambda r: (r['step'], r.get('nfe', 0), r.get('count', 0))
  results = sorted(results, key=order)
  say(table(results))
  text = json.dumps(results, indent=1) + '\n'
  checkpoints.write_text(folder / 'results.json', text)
  checkpoints.write_text(folder / 'results.txt', table(results) + '\n')
  save_curves(folder / 'results.png', results, METRICS)
  say(f'All results are in {folder}/results.json, .txt and .png.')


def save_curves(path, results, names):
  """Plots metrics against step, and the FID against NFE, as one PNG.

  Results that differ in more than the axis, as by their sampler, are lines of
  their own, named by what they differ in.

  Args:
    path: of the picture.
    results: see `table`.
    names: of metrics, a panel each if any result has it.
  """

  over_steps = _labels(results)
  steps = {result['step'] for result in results}
  over_nfe = [
    ', '.join(filter(None, [label, f'step {r["step"]}' * (len(steps) > 1)]))
    for r, label in zip(results, _labels(results, _COST), strict=True)
  ]

  def lines(x, name, labels):
    """{label: [(x, value, error)]}."""
    found = {}
    for result, label in zip(results, labels, strict=True):
      metric = result.get(name, {})
      if x in result and metric.get('value') is not None:
        point = result[x], metric['value'], metric.get('std_error') or 0
        found.setdefault(label, []).append(point)
    return found

  panels = [('step', name, lines('step', name, over_steps)) for name in names]
  panels.append(('nfe', 'fid', lines('nfe', 'fid', over_nfe)))
  panels = [panel for panel in panels if panel[2]]
  if not panels:
    return
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  plt = pyplot()
  figure, axes = plt.subplots(
    rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False
  )
  for ax in axes.flat[len(panels) :]:
    ax.remove()
  for ax, (x, name, found) in zip(axes.flat, panels, strict=False):
    for label, points in found.items():
      at, value, error = zip(*sorted(points), strict=True)
      ax.errorbar(at, value, yerr=error, marker='o', capsize=3, label=label)
    ax.set(xlabel={'nfe': 'NFE'}.get(x, x), ylabel=name)
    ax.grid(alpha=0.3)
    if any(found):
      ax.legend(fontsize='xx-small')
  save_figure(path, figure)
