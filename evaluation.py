"""How good are samples? Metrics of images, computed from arrays of features.

All compare Inception features (`models/inception.py`), or any others, of
samples with those of real images:

- FID (Heusel et al. 2017), the Frechet distance of two Gaussians,
  |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2));
- KID (Binkowski et al. 2018), an unbiased squared distance with a standard
  error;
- Inception Score (Salimans et al. 2016), exp(E KL(p(y|x) || p(y)));
- improved precision and recall (Kynkaanniemi et al. 2019), density and
  coverage (Naeem et al. 2020), from nearest neighbours.

FID falls as samples grow in number, so every result carries its count.
"""

import dataclasses
import os
import warnings
from collections.abc import Iterator

import numpy as np

from runtime.files import load_npz, save_npz

# Below this, FID depends more on the count than on the samples.
ENOUGH_SAMPLES = 10_000
NO_LOGITS = (
  'Inception Score needs logits, but the weights at hand end at pool_3; '
  'pt_inception-2015-12-05-6726825d.pth of pytorch-fid has them '
  '(config.eval.inception_path).'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
  """One number of a result.

  Attributes:
    value: None if it cannot be had, for the reason in `note`.
    count: of samples.
    std_error: of `value`, for other samples of the same model.
    std: over splits or subsets; papers print this one after IS.
    note: what a reader should know, or ''.
  """

  value: float | None
  count: int
  std_error: float | None = None
  std: float | None = None
  note: str = ''


def _over(values: np.ndarray, count: int) -> Metric:
  """Mean over subsets, splits or samples, with its standard error."""
  if len(values) == 1:
    return Metric(value=float(values[0]), count=count)
  return Metric(
    value=float(np.mean(values)),
    count=count,
    std=float(np.std(values)),
    std_error=float(np.std(values, ddof=1) / np.sqrt(len(values))),
  )


# --- Frechet distance ---------------------------------------------------------


@dataclasses.dataclass
class Moments:
  """Mean and covariance of features, accumulated in float64.

  Batches, hosts and resumed runs each have their own and are merged at the
  end; the order changes rounding only.

  Attributes:
    count: number of features seen.
    mean: [D].
    scatter: [D, D], the sum of (x - mean) (x - mean)^T.
  """

  count: int = 0
  mean: np.ndarray | float = 0.0
  scatter: np.ndarray | float = 0.0

  def update(self, features: np.ndarray) -> None:
    """Adds features [N, D]."""
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
    """Adds what another has seen (Chan et al. 1979)."""
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
    """Mean [D]."""
    return self.mean

  @property
  def sigma(self) -> np.ndarray:
    """Unbiased covariance [D, D]."""
    if self.count < 2:
      raise ValueError(f'{self.count} images have no covariance; use more.')
    return self.scatter / (self.count - 1)

  def save(self, path: str | os.PathLike) -> None:
    """Writes an .npz, whole or not at all."""
    save_npz(path, **dataclasses.asdict(self))

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Moments':
    """Reads what `save` wrote."""
    file = load_npz(path)
    try:
      return cls(int(file['count']), file['mean'][()], file['scatter'][()])
    except KeyError as error:
      raise ValueError(
        f'{path} holds no moments: {error} is missing.'
      ) from None


def frechet_distance(
  mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
  """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017).

  S1 S2 has the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric: two
  symmetric decompositions are quick, and stay real where covariances of few
  samples are singular.

  Args:
    mu1, mu2: means [D].
    sigma1, sigma2: covariances [D, D].
  """
  values, vectors = np.linalg.eigh(sigma1)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  product = np.linalg.eigvalsh(root @ sigma2 @ root)
  trace = np.trace(sigma1) + np.trace(sigma2)
  trace -= 2 * np.sqrt(np.maximum(product, 0)).sum()
  return max(float(np.sum((mu1 - mu2) ** 2) + trace), 0.0)


def frechet_std_error(samples, reference, features: np.ndarray) -> float:
  """Standard error of the Frechet distance, to first order in 1 / N.

  A sample x moves the distance by its influence / N, which is (delta method)
    2 (mu1 - mu2).d + d.(I - T) d, less its mean,   d = x - mu1,
  where T = S1^(-1/2) (S1^(1/2) S2 S1^(1/2))^(1/2) S1^(-1/2) is the optimal
  transport of one Gaussian to the other: I - T is the gradient of the
  distance by S1. The reference counts as fixed, and the bias of few samples
  is not part of it; where the distance is mostly bias, this is too large.

  Args:
    samples, reference: as in `fid`.
    features: some of the samples', [n, D].
  """
  values, vectors = np.linalg.eigh(samples.sigma)
  root = np.sqrt(np.maximum(values, 0))
  inverse = np.where(root > 1e-6 * root[-1], 1 / np.maximum(root, 1e-300), 0)
  root, inverse = ((vectors * v) @ vectors.T for v in (root, inverse))
  values, vectors = np.linalg.eigh(root @ reference.sigma @ root)
  middle = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  gradient = np.eye(len(root)) - inverse @ middle @ inverse
  d = np.float64(features) - samples.mu
  influence = 2 * d @ (samples.mu - reference.mu) + (d @ gradient * d).sum(1)
  return float(influence.std(ddof=1) / np.sqrt(samples.count))


def too_few(count: int, dims: int) -> str:
  """Why there is no FID of so few images, or ''."""
  if count > dims:
    return ''
  return (
    f'{count} images cannot fill a covariance of {dims} dimensions, so '
    f'their FID says little: use at least {dims + 1} (50,000 is usual), or '
    'allow few (config.eval.allow_few_samples).'
  )


def fid(
  samples,
  reference,
  *,
  features: np.ndarray | None = None,
  allow_few: bool = False,
) -> Metric:
  """Frechet distance between samples and reference.

  Args:
    samples, reference: `Moments` or `ReferenceStats`, of any features.
    features: some of the samples' features [n, D], for the standard error.
    allow_few: permit no more samples than features have dimensions.

  Raises:
    ValueError: features differ in size, or there are too few.
  """
  dims = np.size(samples.mu)
  if np.shape(samples.mu) != np.shape(reference.mu):
    raise ValueError(
      f'Samples have {dims} features, the reference {reference.mu.size}.'
    )
  known = [m.count for m in (samples, reference) if m.count is not None]
  count, note = min(known), ''
  if too_few(count, dims) and not allow_few:
    raise ValueError(too_few(count, dims))
  if count < ENOUGH_SAMPLES:
    note = f'FID of {count} images is biased upwards; 50,000 are usual.'
    warnings.warn(note, stacklevel=2)
  value = frechet_distance(
    samples.mu, samples.sigma, reference.mu, reference.sigma
  )
  std_error = None
  if features is not None and not too_few(count, dims):
    std_error = frechet_std_error(samples, reference, features)
  return Metric(
    value=value, count=samples.count, std_error=std_error, note=note
  )


# --- Metrics of features and logits -------------------------------------------


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
  """Unbiased squared distance of the kernel means of x and y, both [n, D]."""

  def kernel(a, b):
    linear = a @ b.T / a.shape[1] + 1
    return linear * linear * linear  # Far quicker than linear**3.

  def off_diagonal_mean(k):  # No image is compared with itself.
    return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

  within = off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y))
  return within - 2 * kernel(x, y).mean()


def kid(
  real: np.ndarray,
  fake: np.ndarray,
  *,
  subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 0,
) -> Metric:
  """Kernel distance with k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018).

  Subsets are drawn as torch-fidelity draws them, whose seed is 2020. They
  overlap: the standard error is that of as many as are disjoint.

  Args:
    real, fake: features [N, D], [M, D].
    subsets: how many pairs of subsets, drawn with `seed`, are averaged.
    subset_size: images in each.
  """
  if min(len(real), len(fake)) < subset_size:
    raise ValueError(
      f'KID draws subsets of {subset_size} images, but there are only '
      f'{len(real)} real and {len(fake)} generated.'
    )
  rng = np.random.RandomState(seed)  # NumPy promises never to change it.
  values = []
  for _ in range(subsets):
    x, y = (
      np.float64(f[rng.choice(len(f), subset_size, replace=False)])
      for f in (fake, real)
    )
    values.append(_squared_mmd(x, y))
  metric = _over(np.array(values), len(fake))
  if metric.std_error is None:
    return metric
  disjoint = min(subsets, len(fake) // subset_size)
  std = np.std(values, ddof=1)
  return dataclasses.replace(metric, std_error=float(std / np.sqrt(disjoint)))


def inception_score(logits: np.ndarray | None, *, splits: int = 10) -> Metric:
  """exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016).

  Papers differ in `splits`: ten consecutive parts averaged, or one, as Song
  et al. 2021. One has a standard error too, by the delta method: p(y) moves
  the score only in second order, so it is that of the mean of KL.

  Args:
    logits: [N, 1008], or None if the weights have none.
    splits: number of parts, each with its own p(y).
  """
  if logits is None:
    return Metric(value=None, count=0, note=NO_LOGITS)
  if len(logits) < splits:
    raise ValueError(f'{len(logits)} images cannot be split into {splits}.')
  x = np.float64(logits)
  x = x - x.max(axis=1, keepdims=True)
  log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
  bounds = np.arange(splits + 1) * len(x) // splits
  scores = []
  for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
    log_p_y_x = log_p[start:stop]
    p_y_x = np.exp(log_p_y_x)
    log_p_y = np.log(p_y_x.mean(axis=0))
    divergence = (p_y_x * (log_p_y_x - log_p_y)).sum(axis=1)
    scores.append(np.exp(divergence.mean()))
  metric = _over(np.array(scores), len(x))
  if splits > 1:
    return metric
  std_error = metric.value * divergence.std() / np.sqrt(len(x))
  return dataclasses.replace(metric, std_error=float(std_error))


def _squared_distances(
  x: np.ndarray, y: np.ndarray, block: int = 1000
) -> Iterator[np.ndarray]:
  """Rows of the [N, M] matrix of |x - y|^2, `block` at a time."""
  x, y = np.float64(x), np.float64(y)
  y_norm = (y**2).sum(axis=1)
  for start in range(0, len(x), block):
    part = x[start : start + block]
    part_norm = (part**2).sum(axis=1, keepdims=True)
    yield np.maximum(part_norm + y_norm - 2 * part @ y.T, 0)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
  """Squared distance from each point to its k-th nearest neighbour, [N]."""
  if len(x) <= k:
    raise ValueError(f'{len(x)} images have no {k}-th nearest neighbours.')
  # The nearest, at index 0, is the point itself.
  rows = [np.partition(d, k, axis=1)[:, k] for d in _squared_distances(x, x)]
  return np.concatenate(rows)


def precision_recall(
  real: np.ndarray, fake: np.ndarray, *, k: int = 3
) -> dict[str, Metric]:
  """Improved precision and recall (Kynkaanniemi et al. 2019, Equation 1).

  Precision is the share of samples within the k-th-neighbour ball of any
  real image; recall the share of real images within such a ball of a sample.

  Args:
    real, fake: features [N, D], [M, D]; the paper takes 50,000 of each, and
      numbers of unequal counts are not comparable.
  """

  def covered(points, centres):
    radii = _radii(centres, k)
    return np.concatenate(
      [(d <= radii).any(axis=1) for d in _squared_distances(points, centres)]
    )

  return {
    'precision': _over(covered(fake, real), len(fake)),
    'recall': _over(covered(real, fake), len(fake)),
  }


def density_coverage(
  real: np.ndarray, fake: np.ndarray, *, k: int = 5
) -> dict[str, Metric]:
  """Density and coverage (Naeem et al. 2020, Equations 3 and 4).

  Density is the mean number of real images' balls that a sample lies in,
  over k; coverage the share of real images whose ball holds a sample.

  Args:
    real, fake: features [N, D], [M, D].
  """
  radii = _radii(real, k)
  density, coverage = [], np.zeros(len(real), bool)
  for distances in _squared_distances(fake, real):
    inside = distances <= radii
    density.append(inside.sum(axis=1) / k)
    coverage |= inside.any(axis=0)
  return {
    'density': _over(np.concatenate(density), len(fake)),
    'coverage': _over(coverage, len(fake)),
  }


# --- Files --------------------------------------------------------------------
