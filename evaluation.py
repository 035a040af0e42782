"""Metrics of samples: arrays in, numbers out.

Metrics of images compare features of samples with features of real images. The
features are those of Inception (`features.inception`) or any others.

- Frechet Inception Distance, FID (Heusel et al. 2017), the Frechet distance of
  two Gaussians, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2));
- Kernel Inception Distance, KID (Binkowski et al. 2018), an unbiased squared
  distance with a standard error;
- Inception Score, IS (Salimans et al. 2016), exp(E KL(p(y|x) || p(y)));
- improved precision and recall (Kynkaanniemi et al. 2019), density and
  coverage (Naeem et al. 2020), from nearest neighbours.

Metrics of arrays, and of points, compare them as they are: the sliced
Wasserstein distance and the energy distance.

FID becomes smaller when the number of samples grows, so every result contains
that number.
"""

import dataclasses
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from features.statistics import Moments, ReferenceStats

# With fewer samples, FID depends more on their number than on their quality.
ENOUGH_SAMPLES = 10_000
NO_LOGITS = 'Inception Score needs logits beside the features (pool_3)'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
  """A number of a result.

  Attributes:
    value: the number; None if it cannot be computed, for the reason in `note`.
    count: number of samples.
    std_error: standard error of `value`, for other samples of the same model.
    std: standard deviation over splits or subsets, which papers report with
      the Inception Score.
    note: what a reader should know, or ''.
  """

  value: float | None
  count: int
  std_error: float | None = None
  std: float | None = None
  note: str = ''


def standard_error(values: np.ndarray) -> float | None:
  """Return the standard error of the mean; None for a single value."""
  if len(values) < 2:
    return None
  return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _over(values: np.ndarray, count: int) -> Metric:
  """Return the mean over subsets, splits or samples, with standard error."""
  if len(values) == 1:
    return Metric(value=float(values[0]), count=count)
  return Metric(
    value=float(np.mean(values)),
    count=count,
    std=float(np.std(values)),
    std_error=standard_error(values),
  )


# --- Frechet distance ---------------------------------------------------------


def frechet_distance(
  mu1: Float[ArrayLike, ' D'],
  sigma1: Float[ArrayLike, 'D D'],
  mu2: Float[ArrayLike, ' D'],
  sigma2: Float[ArrayLike, 'D D'],
) -> float:
  """Return the Frechet distance of two Gaussians (Heusel et al. 2017).

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

  S1 S2 has the same eigenvalues as S1^(1/2) S2 S1^(1/2), which is symmetric.
  Two symmetric decompositions are fast, and their results stay real when the
  covariances of few samples are singular.

  Args:
    mu1: mean [D].
    sigma1: covariance [D, D].
    mu2: mean [D].
    sigma2: covariance [D, D].
  """
  values, vectors = np.linalg.eigh(sigma1)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  product = np.linalg.eigvalsh(root @ sigma2 @ root)
  trace = np.trace(sigma1) + np.trace(sigma2)
  trace -= 2 * np.sqrt(np.maximum(product, 0)).sum()
  return max(float(np.sum((mu1 - mu2) ** 2) + trace), 0.0)


def frechet_std_error(
  samples: Moments | ReferenceStats,
  reference: Moments | ReferenceStats,
  features: Float[ArrayLike, 'n D'],
) -> float:
  """Return the standard error of the Frechet distance, to first order in 1/N.

  By the delta method a sample x changes the distance by its influence / N,
    2 (mu1 - mu2).d + d.(I - T) d minus its mean, with d = x - mu1.
  Here T = S1^(-1/2) (S1^(1/2) S2 S1^(1/2))^(1/2) S1^(-1/2) is the optimal
  transport from one Gaussian to the other, and I - T is the gradient of the
  distance with respect to S1. The reference is taken as exact. The bias of few
  samples is not included; where the distance is mostly bias, the result is too
  large.

  Args:
    samples: see `fid`.
    reference: see `fid`.
    features: features of some of the samples, [n, D].
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
  """Return why there is no FID of so few images, or ''.

  Args:
    count: number of images.
    dims: number of dimensions of the features.
  """
  if count > dims:
    return ''
  return (
    f'{count} images have no regular covariance in {dims} dimensions, so '
    f'their FID says little: use at least {dims + 1} (50,000 are usual), or '
    'set config.eval.allow_few_samples.'
  )


def fid(
  samples: Moments | ReferenceStats,
  reference: Moments | ReferenceStats,
  *,
  features: Float[ArrayLike, 'n D'] | None = None,
  allow_few: bool = False,
) -> Metric:
  """Return the Frechet distance between samples and a reference.

  Args:
    samples: moments of the features of the samples.
    reference: moments of the features of real images.
    features: features of some of the samples, [n, D], for the standard error.
    allow_few: whether the number of samples can be as small as the number of
      dimensions of the features, or smaller.

  Raises:
    ValueError: the features differ in size, or there are too few samples.
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
  few = features is None or len(features) < 2 or too_few(count, dims)
  if not few:
    std_error = frechet_std_error(samples, reference, features)
  return Metric(
    value=value, count=samples.count, std_error=std_error, note=note
  )


# --- Metrics of features and logits -------------------------------------------


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
  """Return the squared distance of the kernel means of x and y, both [n, D].

  The estimate is unbiased.
  """

  def kernel(a, b):
    linear = a @ b.T / a.shape[1] + 1
    return linear * linear * linear  # Much faster than linear**3.

  def off_diagonal_mean(k):  # Images are not compared with themselves.
    return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

  within = off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y))
  return within - 2 * kernel(x, y).mean()


def kid(
  real: Float[ArrayLike, 'N D'],
  fake: Float[ArrayLike, 'M D'],
  *,
  subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 0,
  count: int | None = None,
) -> Metric:
  """Return the kernel distance of two sets (Binkowski et al. 2018).

  The kernel is k(x, y) = (x.y / D + 1)^3. Subsets are drawn as in
  torch-fidelity, whose seed is 2020. Subsets overlap, so the standard error is
  that of the number of subsets that could be disjoint.

  Args:
    real: features of real images, [N, D].
    fake: features of samples, [M, D].
    subsets: number of pairs of subsets whose distances are averaged.
    subset_size: number of images in a subset.
    seed: seed of the subsets.
    count: number of samples that there are, if `fake` is a part of them; only
      for the error.

  Raises:
    ValueError: there are fewer images than a subset has.
  """
  if min(len(real), len(fake)) < subset_size:
    raise ValueError(
      f'KID draws subsets of {subset_size} images, but there are only '
      f'{len(real)} real and {count or len(fake)} generated.'
    )
  # The stream of RandomState stays the same in all versions of NumPy.
  rng = np.random.RandomState(seed)
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


def inception_score(
  logits: Float[ArrayLike, 'N K'] | None, *, splits: int = 10
) -> Metric:
  """Return the Inception Score (Salimans et al. 2016).

    exp(E KL(p(y|x) || p(y)))

  Papers differ in `splits`: the mean of ten consecutive parts, or one part, as
  in Song et al. 2021. One part has a standard error too, by the delta method.
  It is that of the mean of KL, because p(y) changes the score only in second
  order.

  Args:
    logits: logits of K classes, [N, K]; None if the weights have none.
    splits: number of parts, each of which has its own p(y).

  Returns:
    The score; without a value if there are no logits.

  Raises:
    ValueError: there are fewer images than splits.
  """
  if logits is None:
    return Metric(value=None, count=0, note=f'{NO_LOGITS}.')
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
    with np.errstate(divide='ignore', invalid='ignore'):
      log_p_y = np.log(p_y_x.mean(axis=0))
      terms = p_y_x * (log_p_y_x - log_p_y)
    # The limit of p log p at p = 0 is 0.
    divergence = np.where(p_y_x > 0, terms, 0).sum(axis=1)
    scores.append(np.exp(divergence.mean()))
  metric = _over(np.array(scores), len(x))
  if splits > 1 or len(x) < 2:
    return metric
  std_error = metric.value * divergence.std() / np.sqrt(len(x))
  return dataclasses.replace(metric, std_error=float(std_error))


def _squared_distances(
  x: np.ndarray, y: np.ndarray, block: int = 1000
) -> Iterator[np.ndarray]:
  """Yield rows of the [N, M] matrix of |x - y|^2, `block` at a time."""
  x, y = np.float64(x), np.float64(y)
  y_norm = (y**2).sum(axis=1)
  for start in range(0, len(x), block):
    part = x[start : start + block]
    part_norm = (part**2).sum(axis=1, keepdims=True)
    yield np.maximum(part_norm + y_norm - 2 * part @ y.T, 0)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
  """Return squared distances to the k-th nearest neighbours, [N]."""
  if len(x) <= k:
    raise ValueError(f'{len(x)} images have no {k}-th nearest neighbours.')
  # Index 0 is the point itself.
  rows = [np.partition(d, k, axis=1)[:, k] for d in _squared_distances(x, x)]
  return np.concatenate(rows)


def precision_recall(
  real: Float[ArrayLike, 'N D'], fake: Float[ArrayLike, 'M D'], *, k: int = 3
) -> dict[str, Metric]:
  """Return improved precision and recall (Kynkaanniemi et al. 2019, Eq. 1).

  The ball of an image has the distance to its k-th nearest neighbour as radius.
  Precision is the fraction of samples that lie in the ball of any real image.
  Recall is the fraction of real images that lie in the ball of any sample.

  Args:
    real: features of real images, [N, D]; the paper uses 50,000.
    fake: features of samples, [M, D]. Results for other numbers of images
      cannot be compared.
    k: number of neighbours.

  Returns:
    'precision' and 'recall'.

  Raises:
    ValueError: there are not more than k images.
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
  real: Float[ArrayLike, 'N D'], fake: Float[ArrayLike, 'M D'], *, k: int = 5
) -> dict[str, Metric]:
  """Return density and coverage (Naeem et al. 2020, Equations 3 and 4).

  Density is the mean number of balls of real images in which a sample lies,
  divided by k. Coverage is the fraction of real images whose ball contains a
  sample. For the balls see `precision_recall`.

  Args:
    real: features of real images, [N, D].
    fake: features of samples, [M, D].
    k: number of neighbours.

  Returns:
    'density' and 'coverage'.

  Raises:
    ValueError: there are not more than k images.
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


def attempted(
  names: Sequence[str], count: int, function: Callable, /, *args, **kwargs
) -> dict[str, Metric]:
  """Return metrics by name; without values, but a note, where it fails.

  Args:
    names: names of the metrics.
    count: number of samples, for metrics without a value.
    function: returns a Metric, a number, or Metrics by name. Its ValueError is
      the note.
    *args, **kwargs: its arguments.
  """
  try:
    found = function(*args, **kwargs)
  except ValueError as error:
    missing = Metric(value=None, count=count, note=str(error))
    return dict.fromkeys(names, missing)
  if isinstance(found, dict):
    return found
  if not isinstance(found, Metric):
    found = Metric(value=found, count=count)
  return dict.fromkeys(names, found)


# --- All metrics of images ----------------------------------------------------


def score_samples(
  batches: Iterable[Mapping[str, Float[ArrayLike, '_ _']]],
  reference: ReferenceStats,
  *,
  seed: int = 0,
  allow_few: bool = False,
  logits_hint: str = '',
) -> dict[str, Metric]:
  """Return all metrics of samples of images.

  FID uses all samples, one batch at a time. KID and metrics of neighbours use
  as many samples as the reference has features. A metric that needs more images
  than there are, or features that the reference does not have, has no value,
  and its note tells why; the others have theirs.

  Args:
    batches: dicts of features of samples: 'pool_3' [n, D], and optionally
      'logits' [n, K].
    reference: statistics of real images.
    seed: seed of the subsets of KID.
    allow_few: see `fid`.
    logits_hint: how to get logits, for the note if there are none.

  Returns:
    'fid', 'is_1_split', 'is_10_splits', 'kid', 'precision', 'recall', 'density'
    and 'coverage'.
  """
  real = reference.features
  most = ENOUGH_SAMPLES if real is None else len(real)
  moments, kept, logits = Moments(), [], []
  for batch in batches:
    room = max(most - moments.count, 0)
    moments.update(batch['pool_3'])
    kept.append(batch['pool_3'][:room])
    if 'logits' in batch:
      logits.append(batch['logits'])
  fake = np.concatenate(kept)
  logits = np.concatenate(logits) if logits else None

  def attempt(names, metric, *args, **kwargs):
    return attempted(names, moments.count, metric, *args, **kwargs)

  metrics = attempt(
    ('fid',), fid, moments, reference, features=fake, allow_few=allow_few
  )
  for splits, name in ((1, 'is_1_split'), (10, 'is_10_splits')):
    if logits is None:
      note = '; '.join(filter(None, (NO_LOGITS, logits_hint))) + '.'
      metrics[name] = Metric(value=None, count=moments.count, note=note)
    else:
      metrics |= attempt((name,), inception_score, logits, splits=splits)
  if real is None:
    note = 'The reference statistics hold no features.'
    missing = Metric(value=None, count=moments.count, note=note)
    names = ('kid', 'precision', 'recall', 'density', 'coverage')
    return metrics | dict.fromkeys(names, missing)
  metrics |= attempt(('kid',), kid, real, fake, seed=seed, count=moments.count)
  # Metrics of neighbours depend on the numbers of images, so these are equal.
  equal = min(len(real), len(fake))
  for names, function in (
    (('precision', 'recall'), precision_recall),
    (('density', 'coverage'), density_coverage),
  ):
    metrics |= attempt(names, function, real[:equal], fake[:equal])
  return metrics


# --- Distances and spectra of arrays ------------------------------------------


def _directions(dims: int, count: int) -> np.ndarray:
  """Return unit vectors [D, count]: evenly spread in the plane, else random."""
  if dims == 2:
    angle = np.pi * (np.arange(count) + 0.5) / count
    return np.stack([np.cos(angle), np.sin(angle)])
  # The stream of RandomState stays the same in all versions of NumPy.
  normal = np.random.RandomState(0).standard_normal((dims, count))
  return normal / np.linalg.norm(normal, axis=0)


def _quantiles(x, levels):
  """Return the quantiles [L, D] of columns of x [N, D].

  One sort is a hundred times faster than `np.quantile` at thousands of levels.
  """
  x, at = np.sort(x, axis=0), levels * (len(x) - 1)
  low = at.astype(int)
  share = (at - low)[:, None]
  return (1 - share) * x[low] + share * x[np.minimum(low + 1, len(x) - 1)]


def sliced_wasserstein(
  x: Real[ArrayLike, 'N D'], y: Real[ArrayLike, 'M D'], *, directions: int = 128
) -> float:
  """Return the sliced 2-Wasserstein distance of points (Bonneel et al. 2015).

  This is the square root of the mean, over directions, of the squared distance
  of the quantiles of the projections. Directions are evenly spread in the plane
  and random, but always the same, in other dimensions.

  Args:
    x: points [N, D].
    y: points [M, D].
    directions: number of directions.

  Returns:
    The distance, in units of x.
  """
  axes = _directions(np.shape(x)[1], directions)
  levels = (np.arange(min(len(x), len(y))) + 0.5) / min(len(x), len(y))
  a, b = (_quantiles(np.asarray(v) @ axes, levels) for v in (x, y))
  return float(np.sqrt(np.mean((a - b) ** 2)))


def _sum_of_distances(x: np.ndarray, y: np.ndarray) -> float:
  """Return the sum of |x - y| over all pairs."""
  if x.shape[1] <= 16:
    # Imported here, because it would add .3 s to every start.
    from scipy.spatial.distance import cdist

    return cdist(x, y).sum()
  # Products of matrices are many times faster in many dimensions.
  return sum(np.sqrt(d).sum() for d in _squared_distances(x, y))


def energy_distance(
  x: Real[ArrayLike, 'N D'], y: Real[ArrayLike, 'M D']
) -> float:
  """Return an unbiased estimate of the energy distance of points.

    2 E|x - y| - E|x - x'| - E|y - y'|    (Szekely & Rizzo 2013)

  It is 0 for equal distributions only. The estimate can be negative.

  Args:
    x: points [N, D].
    y: points [M, D].

  Returns:
    The distance, in units of x.

  Raises:
    ValueError: there are fewer than two points.
  """
  if min(len(x), len(y)) < 2:
    raise ValueError('A single point has no energy distance; use more.')

  def within(v):
    return _sum_of_distances(v, v) / (len(v) * (len(v) - 1))

  between = _sum_of_distances(x, y) / (len(x) * len(y))
  return float(2 * between - within(x) - within(y))


def power_spectrum(
  x: Real[ArrayLike, 'N *space C'],
) -> tuple[Float[np.ndarray, ' K'], Float[np.ndarray, 'K C']]:
  """Return the mean power of each channel over frequencies.

    P(f) = mean of |F(k)|^2 / n over the examples and all k with |k| near f

  F is the discrete Fourier transform over the n places of space, and k its wave
  vectors in cycles per place. White noise of variance v has P(f) = v.

  Args:
    x: examples [N, *space, C] with one to three axes of space.

  Returns:
    Frequencies [K] from 0 to 1/2, the multiples of 1 / (size of the largest
    axis), and powers [K, C] in units of x^2.
  """
  x = np.asarray(x)
  space = x.shape[1:-1]
  size, axes = max(space), range(1, x.ndim - 1)
  waves = np.meshgrid(*map(np.fft.fftfreq, space), indexing='ij')
  shell = np.rint(np.linalg.norm(waves, axis=0) * size).astype(int).ravel()
  frequency = np.arange(size // 2 + 1) / size
  shell = np.minimum(shell, len(frequency))  # The last is left out.
  total = sum(
    np.sum(np.abs(np.fft.fftn(part, axes=axes)) ** 2, axis=0)
    for part in np.array_split(x, -(-len(x) // 256))
  )
  power = total.reshape(-1, x.shape[-1]) / (len(x) * len(shell))
  sums = np.zeros((len(frequency) + 1, x.shape[-1]))
  np.add.at(sums, shell, power)
  counts = np.bincount(shell)[: len(frequency), None]
  return frequency, sums[:-1] / counts


# --- Out-of-distribution scores -----------------------------------------------


class Seen(typing.NamedTuple):
  """What a model says of examples.

  Attributes:
    nats: negative log-likelihoods [N].
    norms: logarithms of the norms of the score at L noise levels, [N, L]; see
      `likelihood.log_score_norms`.
  """

  nats: Real[ArrayLike, ' N']
  norms: Real[ArrayLike, 'N L']


def negative_likelihood(train: Seen, seen: Seen) -> Float[np.ndarray, ' N']:
  """Return -log p(x): what is unlikely is taken to be from elsewhere."""
  del train
  return np.float64(seen.nats)


def atypicality(train: Seen, seen: Seen) -> Float[np.ndarray, ' N']:
  """Return the distance to the typical set (Nalisnick et al. 2019).

      | -log p(x) - H |

  H is the mean of -log p over training examples. The paper tests groups of M
  examples; this is M = 1.
  """
  return np.abs(np.float64(seen.nats) - np.mean(train.nats, dtype=np.float64))


def norms_mixture(train: Seen, seen: Seen) -> Float[np.ndarray, ' N']:
  """Return -log q of norms of the score (Mahmood et al. 2021).

  q is a mixture of Gaussians that is fitted to the norms of training examples
  at all noise levels. Here it is fitted to their logarithms, standardised, with
  the number of components, 1 to 5, that has the least BIC.
  """
  from sklearn.mixture import GaussianMixture

  known, new = np.float64(train.norms), np.float64(seen.norms)
  mean, std = known.mean(0), np.maximum(known.std(0), 1e-12)
  known, new = ((v - mean) / std for v in (known, new))
  fits = [GaussianMixture(k, random_state=0).fit(known) for k in range(1, 6)]
  return -min(fits, key=lambda q: q.bic(known)).score_samples(new)


# score(what is seen of training examples, of examples) -> [N]; the larger, the
# less an example looks like the data.
OOD_SCORES = {
  'likelihood': negative_likelihood,
  'typicality': atypicality,
  'score_norms': norms_mixture,
}


def auroc(
  inside: Real[ArrayLike, ' N'], outside: Real[ArrayLike, ' M']
) -> Metric:
  """Return the area under the receiver operating characteristic.

      P(outside > inside) + P(outside = inside) / 2

  The standard error is that of DeLong et al. (1988): it is 0 if all outside are
  larger.

  Args:
    inside: scores of examples of the data, [N].
    outside: scores of other examples, [M].

  Returns:
    The area: 0.5 if the scores do not differ, 1 if all outside are larger; its
    count is that of the examples outside.

  Raises:
    ValueError: there are fewer than two, or a score is not finite.
  """
  inside, outside = np.float64(inside), np.float64(outside)
  if min(len(inside), len(outside)) < 2:
    raise ValueError('AUROC needs at least two examples of each set.')
  if not np.isfinite([*inside, *outside]).all():
    raise ValueError('Scores of some examples are not finite.')

  def below(values, others):  # Share of the others, equal ones half.
    others = np.sort(others)
    sides = (np.searchsorted(others, values, s) for s in ('left', 'right'))
    return sum(sides) / (2 * len(others))

  parts = below(outside, inside), below(inside, outside)
  variance = sum(np.var(v, ddof=1) / len(v) for v in parts)
  return Metric(
    value=float(parts[0].mean()),
    count=len(outside),
    std_error=float(np.sqrt(variance)),
  )
