"""Statistics of features: moments, and references of whole data sets.

`compute_stats` reduces a data set to the reference with which samples are
compared. A reference says from which network input, resolution and images it
comes, because the distance to a wrong reference looks like any other number.
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from features.extract import Extract, features_of, variant_of
from runtime.files import load_npz, save_npz


@dataclasses.dataclass
class Moments:
  """Mean and covariance of features, accumulated in float64.

  Batches, hosts and resumed runs have their own moments, which are merged at
  the end. The order changes only the rounding.

  Attributes:
    count: number of features seen.
    mean: their mean, [D].
    scatter: sum of (x - mean) (x - mean)^T over the features, [D, D].
  """

  count: int = 0
  mean: np.ndarray | float = 0.0
  scatter: np.ndarray | float = 0.0

  def update(self, features: np.ndarray) -> None:
    """Add features [N, D].

    Raises:
      ValueError: the shape is another one, or values are not finite.
    """
    if features.ndim != 2:
      raise ValueError(f'Features are [N, D], not {features.shape}.')
    if not len(features):
      return
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
      raise ValueError('There are features that are not finite.')
    mean = x.mean(axis=0)
    self.merge(Moments(len(x), mean, (x - mean).T @ (x - mean)))

  def merge(self, other: 'Moments') -> None:
    """Add the features that other moments have seen (Chan et al. 1979).

    Raises:
      ValueError: the features have another number of dimensions.
    """
    if not other.count:
      return
    if self.count and np.shape(self.mean) != np.shape(other.mean):
      raise ValueError(
        f'Features of {np.size(self.mean)} and {np.size(other.mean)} '
        'dimensions do not mix.'
      )
    count = self.count + other.count
    delta = other.mean - self.mean
    self.mean = self.mean + delta * (other.count / count)
    self.scatter = self.scatter + other.scatter
    self.scatter += np.outer(delta, delta) * (self.count * other.count / count)
    self.count = count

  @property
  def mu(self) -> np.ndarray:
    """Mean, [D]."""
    return self.mean

  @property
  def sigma(self) -> np.ndarray:
    """Unbiased covariance, [D, D].

    Raises:
      ValueError: there are fewer than two features.
    """
    if self.count < 2:
      raise ValueError(f'{self.count} images have no covariance; use more.')
    return self.scatter / (self.count - 1)

  def save(self, path: str | os.PathLike) -> None:
    """Write an .npz file, completely or not at all."""
    save_npz(path, **dataclasses.asdict(self))

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Moments':
    """Return the moments of a file that `save` wrote.

    Raises:
      FileNotFoundError, ValueError: no such file, or no moments in it.
    """
    file = load_npz(path)
    try:
      return cls(int(file['count']), file['mean'][()], file['scatter'][()])
    except KeyError as error:
      raise ValueError(
        f'{path} holds no moments: {error} is missing.'
      ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceStats:
  """What metrics need to know of a data set.

  Files of other projects leave out some attributes, which are then None.

  Attributes:
    mu: mean of the features, [D].
    sigma: their unbiased covariance, [D, D].
    count: number of images.
    variant: how images become network input, a key of `inception.VARIANTS`, or
      the name of the user's extractor.
    resolution: height of the images, in pixels.
    fingerprint: fingerprint of the data set.
    features: features of a random subset, [n, D], for the Kernel Inception
      Distance and metrics of nearest neighbours.
  """

  mu: np.ndarray
  sigma: np.ndarray
  count: int | None = None
  variant: str | None = None
  resolution: int | None = None
  fingerprint: str | None = None
  features: np.ndarray | None = None

  @property
  def dimensions(self) -> int:
    """Number of dimensions of the features, D."""
    return len(self.mu)

  def save(self, path: str | os.PathLike) -> None:
    """Write an .npz file, which pytorch-fid and EDM can read too."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    known = {k: v for k, v in fields.items() if v is not None}
    save_npz(path, **known)


def compute_stats(
  batches: Iterable[np.ndarray],
  extract: Extract,
  *,
  fingerprint: str | None = None,
  num_features: int = 10_000,
  progress: Callable[[int], None] | None = None,
) -> ReferenceStats:
  """Return statistics of the images of a data set, each one once, not flipped.

  Args:
    batches: uint8 [N, H, W, C]; N can vary.
    extract: a `FeatureExtractor`, or a function of the user.
    fingerprint: fingerprint of the data set.
    num_features: number of features that are kept, a random subset.
    progress: function that is called with the number of images that are done.

  Raises:
    ValueError: there are no images, or images of several heights.
  """
  moments = Moments()
  rng = np.random.default_rng(0)
  heights = set()
  kept, keys = None, None
  for images in batches:
    features = features_of(images, extract)
    moments.update(features)
    heights.add(images.shape[1])
    # The features with the smallest random keys are a random subset. They are
    # found in one pass, without keeping the others.
    new_keys = rng.random(len(images))
    kept = features if kept is None else np.concatenate([kept, features])
    keys = new_keys if keys is None else np.concatenate([keys, new_keys])
    order = np.argsort(keys)[:num_features]
    kept, keys = kept[order], keys[order]
    if progress:
      progress(moments.count)
  if not moments.count:
    raise ValueError('There are no images to compute statistics of.')
  if len(heights) > 1:
    raise ValueError(f'Images differ in height: {sorted(heights)}.')
  return ReferenceStats(
    mu=moments.mu,
    sigma=moments.sigma,
    count=moments.count,
    variant=variant_of(extract),
    resolution=heights.pop(),
    fingerprint=fingerprint,
    features=np.float32(kept),
  )


def merge_stats(parts: list[ReferenceStats]) -> ReferenceStats:
  """Return the statistics of a data set from those of its parts.

  Raises:
    ValueError: the parts are of different data sets, resolutions or variants.
  """
  moments, first = Moments(), parts[0]
  for part in parts:
    same = ('variant', 'resolution', 'fingerprint')
    if any(getattr(part, name) != getattr(first, name) for name in same):
      raise ValueError('Statistics of different data sets cannot be merged.')
    scatter = part.sigma * (part.count - 1)
    moments.merge(Moments(part.count, part.mu, scatter))
  return dataclasses.replace(
    first,
    mu=moments.mu,
    sigma=moments.sigma,
    count=moments.count,
    features=np.concatenate([part.features for part in parts]),
  )


def _is_finite(array):
  return array.dtype.kind in 'fiu' and np.isfinite(array).all()


def load_stats(path: str | os.PathLike) -> ReferenceStats:
  """Return the statistics of a file of this project or of another one.

  Files of pytorch-fid, of Heusel et al. 2017 and of EDM contain mu and sigma.
  Files of Song et al. 2021 contain the features, as 'pool_3'.

  Raises:
    FileNotFoundError, ValueError: no such file, or no statistics in it.
  """
  file = load_npz(path)
  if 'mu' not in file and 'pool_3' in file:
    moments = Moments()
    try:
      moments.update(file['pool_3'])
      sigma = moments.sigma
    except (ValueError, TypeError) as error:
      raise ValueError(
        f'{path} holds no reference statistics: {error}'
      ) from None
    return ReferenceStats(
      mu=moments.mu,
      sigma=sigma,
      count=moments.count,
      features=file['pool_3'],
    )
  mu, sigma = file.get('mu'), file.get('sigma')
  if mu is None or sigma is None or sigma.shape != (mu.size, mu.size):
    raise ValueError(
      f'{path} holds no reference statistics: it needs mu [D] and sigma '
      f'[D, D], or pool_3 [N, D]; it has {", ".join(file) or "nothing"}.'
    )
  names = ('count', 'variant', 'resolution', 'fingerprint')
  whole = all(file[k].size == 1 for k in names if k in file)
  numbers = [file[k] for k in ('mu', 'sigma', 'features') if k in file]
  if not whole or not all(_is_finite(array) for array in numbers):
    raise ValueError(
      f'{path} holds no reference statistics: they are not all finite numbers.'
    )
  features = file.get('features')
  counts = file.get('count', np.asarray(2)).item()
  if (
    not np.allclose(sigma, sigma.T, atol=1e-3 * np.abs(sigma).max(initial=0))
    or (np.diag(sigma) < 0).any()
    or not (isinstance(counts, int) and counts > 1)
    or not (features is None or features.shape[1:] == (mu.size,))
  ):
    raise ValueError(
      f'{path} holds no reference statistics: sigma is no covariance, count is '
      'below 2, or features are not [N, D].'
    )
  scalars = {k: file[k].item() for k in names if k in file}
  return ReferenceStats(
    mu=np.float64(mu),
    sigma=np.float64(sigma),
    features=file.get('features'),
    **scalars,
  )


def check_compatible(stats: ReferenceStats, **wanted: Any) -> None:
  """Check that statistics are of the right data; warn where they do not say.

  Args:
    stats: the reference.
    **wanted: any of dimensions, variant, resolution and fingerprint, with the
      values that the reference must have.

  Raises:
    ValueError: the reference has another value.
  """
  for name, want in wanted.items():
    have = getattr(stats, name)
    if have is None:
      warnings.warn(
        f'The reference statistics do not say their {name}; make sure that '
        f'it is {want}.',
        stacklevel=2,
      )
    elif have != want:
      raise ValueError(
        f'The reference statistics have the {name} {have}, not {want}: '
        'compute new ones with --mode stats, or leave config.eval.stats_path '
        'empty.'
      )
