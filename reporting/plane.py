"""Pictures of the plane: densities, score fields, points and paths.

Each function draws into axes `ax` of matplotlib. `canvas` makes the axes and
writes the file.
"""

import contextlib

import numpy as np

from reporting.pictures import pyplot, save_figure

DENSITY, POINTS, PATHS = 'Blues', '#d1495b', '#f4a259'


@contextlib.contextmanager
def canvas(path, rows, columns, *, size=3.2, **options):
  """Yield axes [rows, columns] of a figure; write it to `path` at the end.

  Args:
    path: path of the PNG.
    rows: rows of axes.
    columns: columns of axes.
    size: width and height of each of the axes, in inches.
    **options: further arguments of `pyplot.subplots`.
  """
  plt = pyplot()
  figure, axes = plt.subplots(
    rows,
    columns,
    figsize=(size * columns, size * rows),
    squeeze=False,
    **options,
  )
  try:
    yield axes
    save_figure(path, figure)
  finally:
    plt.close(figure)


def grid(half, n):
  """Return the points, float32 [n * n, 2], of a grid over [-half, half]^2."""
  edge = np.linspace(-half, half, n, dtype=np.float32)
  return np.stack(np.meshgrid(edge, edge), axis=-1).reshape(-1, 2)


def frame(ax, half, title=''):
  """Show the square [-half, half]^2 without ticks."""
  ax.set(xlim=(-half, half), ylim=(-half, half), aspect='equal', title=title)
  ax.set(xticks=[], yticks=[])


def density(ax, half, values):
  """Draw a density, dark where it is large.

  Args:
    ax: axes.
    half: half the width of the square.
    values: values [n * n] of the density at the points of `grid(half, n)`.
  """
  n = round(np.sqrt(len(values)))
  ax.imshow(
    np.reshape(values, (n, n)),
    extent=(-half, half, -half, half),
    origin='lower',
    cmap=DENSITY,
    # A few very large values, at jumps or peaks, would make the rest pale.
    vmin=0,
    vmax=np.quantile(values, 0.995),
    interpolation='bilinear',
  )


def field(ax, x, score, *, longest=None, color='#333333'):
  """Draw a score as arrows.

  Args:
    ax: axes.
    x: points [N, 2] at which the arrows start.
    score: score [N, 2] at these points.
    longest: longer arrows are shortened to this norm; None for the norm that
      nine of ten arrows do not exceed.
    color: colour of the arrows.
  """
  norm = np.linalg.norm(score, axis=1, keepdims=True)
  longest = longest or np.quantile(norm, 0.9)
  score = score * np.minimum(1, longest / np.maximum(norm, 1e-9))
  ax.quiver(*x.T, *score.T, color=color, width=0.004, scale=22 * longest)


def scatter(ax, x, *, color=POINTS, size=3, alpha=0.5):
  """Draw points x [N, 2]."""
  ax.scatter(*np.asarray(x).T, s=size, alpha=alpha, c=color, linewidths=0)


def paths(ax, x, *, color=PATHS):
  """Draw the paths x [F, N, 2] of N points over F times, and their ends."""
  for path in np.swapaxes(x, 0, 1):
    ax.plot(*path.T, color=color, lw=0.8, alpha=0.7)
  scatter(ax, x[-1], size=8, alpha=1.0)


def spread(n):
  """Return n colours in order, which tell neighbouring paths apart."""
  cmap = pyplot().get_cmap('autumn')
  return [cmap(0.75 * i / max(n - 1, 1)) for i in range(n)]
