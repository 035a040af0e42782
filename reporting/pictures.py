"""Pictures of samples: grids of images, point clouds, and trajectories."""

import pathlib

import numpy as np

from runtime.files import atomic

# Axes in a picture, at most.
MOST_AXES = 16


def save_samples(path, samples, *, columns=None):
  """Write samples as one PNG, in the form that suits their shape.

  Args:
    path: path of the PNG.
    samples: uint8 images [N, H, W, C], a grid; or arrays: points [N, D], a
      scatter plot if D = 2, else histograms; signals [N, L, C] as lines, each
      channel by itself; images [N, H, W, C] as a grid with a tile for each
      channel; volumes [N, D, H, W, C] likewise, of which the middle of the
      first axis is shown.
    columns: images in a row; None for a nearly square grid.
  """
  if samples.dtype == np.uint8:
    return save_grid(path, samples, columns=columns)
  if samples.ndim > 3:
    return _save_channels(path, samples)
  if samples.ndim == 3:
    return _save_signals(path, samples, columns)
  if samples.shape[1] != 2:
    return save_histograms(path, samples)
  plt = pyplot()
  figure, ax = plt.subplots(figsize=(5, 5))
  ax.scatter(*samples.T, s=3, alpha=0.6, linewidths=0)
  ax.set_aspect('equal', 'datalim')
  save_figure(path, figure)


def as_grey(images, like=None):
  """Return images [..., H, W, C] of numbers as uint8, each channel by itself.

  Grey levels run from the 1% to the 99% quantile of the channel.

  Args:
    images: [..., H, W, C].
    like: images [N, H, W, C] whose quantiles are used; None for their own.
  """
  like = images if like is None else like
  axes = tuple(range(like.ndim - 1))
  low, high = np.quantile(like, [0.01, 0.99], axis=axes)
  unit = (images - low) / np.maximum(high - low, 1e-30)
  return np.uint8(np.clip(unit, 0, 1) * 255 + 0.5)


def _flat(images):
  """Return volumes [..., D, H, W, C] as images: the middle of their depth."""
  return images[..., images.shape[-4] // 2, :, :, :]


def _save_channels(path, images):
  """Write images or volumes [N, ..., C] as a grid of all their channels."""
  if images.ndim == 5:
    images = _flat(images)
  channels = images.shape[-1]
  images = as_grey(images[: max(1, 64 // channels)])
  tiles = np.moveaxis(images, -1, 1).reshape(-1, *images.shape[1:3], 1)
  rows = int(np.ceil(np.sqrt(len(tiles)) / channels))
  save_grid(path, tiles, columns=channels * rows)


def _panels(count, columns=None):
  """Return (figure, axes) of `count` axes, by default nearly in a square."""
  columns = columns or int(np.ceil(np.sqrt(count)))
  rows = -(-count // columns)
  figure, axes = pyplot().subplots(
    rows, columns, figsize=(3 * columns, 2 * rows), squeeze=False
  )
  for ax in axes.flat:
    ax.tick_params(labelsize=7)
  for ax in axes.flat[count:]:
    ax.remove()
  return figure, axes.flat[:count]


def _save_signals(path, signals, columns):
  """Draw signals [N, L, C], a row of axes for each if it has channels."""
  channels = min(signals.shape[2], MOST_AXES // 2)
  most = 4 if channels > 1 else 4 * (columns or 4)
  chosen = np.moveaxis(signals[:most, :, :channels], -1, 1)
  rows = chosen.reshape(-1, signals.shape[1])
  columns = channels if channels > 1 else columns
  figure, axes = _panels(len(rows), columns)
  low, high = signals.min((0, 1)), signals.max((0, 1))
  for i, (ax, row) in enumerate(zip(axes, rows, strict=True)):
    channel = i % channels
    ax.plot(row, lw=0.8, color=f'C{channel}')
    ax.set(ylim=(low[channel], high[channel] + 1e-30))
  save_figure(path, figure)


def save_scores(path, scores):
  """Draw histograms of scores of several sets, a panel for each score.

  Args:
    path: path of the PNG.
    scores: {name of the score: {name of the set: values [N]}}.
  """
  figure, axes = _panels(len(scores), len(scores))
  figure.set_size_inches(4 * len(scores), 3)
  for ax, (name, of_sets) in zip(axes, scores.items(), strict=True):
    # Far outliers would leave a single bar for all else.
    low, high = np.quantile(np.concatenate([*of_sets.values()]), [0.01, 0.99])
    edges = np.linspace(low, high + 1e-9, 40)
    for label, values in of_sets.items():
      shown = np.clip(values, low, high)
      ax.hist(shown, edges, histtype='step', density=True, label=label)
    ax.set(title=name, yticks=[])
  axes[0].legend(fontsize='x-small')
  save_figure(path, figure)


def save_histograms(path, samples, data=None):
  """Draw histograms of each channel of samples, over those of data if given.

  Args:
    path: path of the PNG.
    samples: [N, ..., C], of which the first channels are shown.
    data: [M, ..., C].
  """
  shown = {'samples': samples} if data is None else {
    'data': data, 'samples': samples
  }  # fmt: skip
  figure, axes = _panels(min(samples.shape[-1], MOST_AXES))
  for channel, ax in enumerate(axes):
    values = {name: v[..., channel].ravel() for name, v in shown.items()}
    low, high = np.quantile(next(iter(values.values())), [0.001, 0.999])
    edges = np.linspace(1.1 * low - 0.1 * high, 1.1 * high - 0.1 * low, 60)
    for name, v in values.items():
      filled = {'histtype': 'stepfilled', 'alpha': 0.4}
      style = filled if name == 'data' else {'histtype': 'step', 'lw': 1.2}
      v = np.clip(v, edges[0], edges[-1])
      ax.hist(v, edges, density=True, label=name, **style)
    ax.set_title(f'channel {channel}', fontsize=8)
  if data is not None:
    axes[0].legend(fontsize=7)
  save_figure(path, figure)


def save_spectra(path, samples, data):
  """Draw power spectra of each channel of samples and of data.

  Args:
    path: path of the PNG.
    samples, data: (frequencies [K] in cycles per place, powers [K, C]).
  """
  figure, axes = _panels(min(samples[1].shape[1], MOST_AXES))
  for channel, ax in enumerate(axes):
    for name, (frequency, power) in (('data', data), ('samples', samples)):
      width = 3 if name == 'data' else 1.2
      ax.semilogy(frequency, power[:, channel], label=name, lw=width, alpha=0.7)
    ax.set_title(f'channel {channel}', fontsize=8)
  axes[0].legend(fontsize=7)
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


def _drawn(x):
  """Return a picture, uint8 [H, W, 3], of points [N, D] or signals [N, L, C].

  Of points the first two coordinates are shown, without outliers; of signals
  the first channel of the first eight.
  """
  plt = pyplot()
  figure, ax = plt.subplots(figsize=(2.4, 2.4), layout='constrained')
  if x.ndim > 2:
    ax.plot(x[:8, :, 0].T, lw=0.8, alpha=0.8)
  elif x.shape[1] == 1:
    ax.hist(x[:, 0], 40)
  else:
    ax.scatter(*x[:, :2].T, s=2, alpha=0.6, linewidths=0)
    reach = 1.1 * np.quantile(np.abs(x[:, :2]), 0.995)
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
      and the film the first 64; or arrays [F, N, *space, C], of whose images
      the first channel is shown.
  """
  path = pathlib.Path(path)
  if frames.ndim == 6:
    frames = _flat(frames)
  if frames.ndim == 5 and frames.dtype != np.uint8:
    frames = as_grey(frames, like=frames[-1])[..., :1]
  if frames.ndim > 4:
    strip = frames[:, :8].swapaxes(0, 1).reshape(-1, *frames.shape[2:])
    columns = int(np.ceil(np.sqrt(min(64, frames.shape[1]))))
    pictures = [_tiled(frame[:64], columns, 256) for frame in frames]
  else:
    strip = np.stack([_drawn(x) for x in frames])
    pictures = list(strip)
  _save_picture(path, _tiled(strip, len(frames), 1024))
  milliseconds = [2000 // len(frames)] * (len(frames) - 1) + [2000]
  film = path.with_suffix('.gif')
  _save_picture(film, *pictures, duration=milliseconds, loop=0)
