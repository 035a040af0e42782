"""Pictures of samples: grids, point clouds, and the way to them."""

import os
import pathlib

import numpy as np


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
