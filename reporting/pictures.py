"""Pictures of samples: grids of images, point clouds, and trajectories."""

import pathlib

import numpy as np

from runtime.files import atomic


def save_samples(path, samples, *, columns=None):
  """Write samples as one PNG: a grid of images, or a scatter plot of points.

  Args:
    path: path of the PNG.
    samples: uint8 images [N, H, W, C], or points [N, D], of which the first two
      coordinates are shown.
    columns: images in a row; None for a nearly square grid.
  """
  if samples.ndim > 2:
    return save_grid(path, samples, columns=columns)
  plt = pyplot()
  figure, ax = plt.subplots(figsize=(5, 5))
  ax.scatter(*samples[:, :2].T, s=3, alpha=0.6, linewidths=0)
  ax.set_aspect('equal', 'datalim')
  save_figure(path, figure)


def pyplot():
  """Return matplotlib.pyplot, set up to draw into files only."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  return pyplot


def save_figure(path, figure):
  """Write a figure as PNG atomically, and close it."""
  figure.tight_layout()
  with atomic(path) as part:
    figure.savefig(part, format='png', dpi=100)
  pyplot().close(figure)


def _tiled(images, columns, scale_to):
  """Return uint8 images [N, H, W, C] as one picture [H', W', C].

  Rows have `columns` images, with white lines of two pixels between them. Small
  images are enlarged by an integer factor, such that the picture is about
  `scale_to` pixels wide.
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
  """Write uint8 pictures [H, W, C]: one as PNG, several as GIF, by suffix."""
  from PIL import Image

  path = pathlib.Path(path)
  first, *others = (
    Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pictures
  )
  if others:
    options |= {'save_all': True, 'append_images': others}
  with atomic(path) as part:
    first.save(part, format=path.suffix[1:], **options)


def save_grid(path, images, *, columns=None, scale_to=512):
  """Write images as one PNG, a grid with white lines of two pixels.

  Args:
    path: path of the PNG.
    images: uint8 [N, H, W, C] with C = 1, 3 or 4.
    columns: images in a row; None for a nearly square grid.
    scale_to: small images are enlarged by an integer factor, such that the grid
      is about so many pixels wide.
  """
  columns = columns or int(np.ceil(np.sqrt(len(images))))
  _save_picture(path, _tiled(images, columns, scale_to))


def _scattered(points):
  """Return a picture, uint8 [H, W, 3], of points [N, D] without outliers."""
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
  """Write the states on the way to samples as a strip and as a film.

  The strip is a PNG whose columns are the states. The film is a GIF beside it.

  Args:
    path: path of the strip; the film has the suffix .gif instead.
    frames: uint8 images [F, N, H, W, C], of which the strip shows the first 8
      and the film the first 64; or points [F, N, D].
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
