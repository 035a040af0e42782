"""Features of images, and their statistics over whole datasets.

`FeatureExtractor` runs the Inception network; `compute_stats` reduces a
dataset to the reference that samples are compared with. Statistics say which
network input, resolution and images they come from, because a distance to
the wrong reference is a number like any other.
"""

import dataclasses
import hashlib
import importlib
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import evaluation
from features import inception
from runtime.files import load_npz, save_npz

Progress = Callable[[int, int], None]  # (images done, images in all)


class FeatureExtractor:
  """Inception features of any number of images, on all devices of this host.

  Each host of several works through its own share at its own pace; their
  results meet in `evaluation.Moments.merge` or `merge_stats`.
  """

  def __init__(
    self,
    params: dict[str, Any],
    *,
    variant: str = 'tensorflow',
    batch_size: int | None = None,
  ):
    """Places the network.

    Args:
      params: of `weights.load_weights`.
      variant: input convention, a key of `inception.VARIANTS`.
      batch_size: images at a time, rounded up to fill all devices; None for
        8 on a CPU, whose caches hold no more, else 128 a device.
    """
    inception.find_variant(variant)  # Fails here rather than at first use.
    self.variant = variant
    self.with_logits = 'fc' in params
    network = {k: v for k, v in params.items() if k != 'fc'}
    self.identity = f'{variant}-{_digest(network)}'
    devices = jax.local_devices()
    if batch_size is None:
      on_cpu = devices[0].platform == 'cpu'
      batch_size = 8 if on_cpu else 128 * len(devices)
    mesh = jax.make_mesh(
      (len(devices),), ('data',), (AxisType.Auto,), devices=devices
    )
    everywhere = NamedSharding(mesh, P())  # Every device has all parameters
    self._split = NamedSharding(mesh, P('data'))  # and its part of a batch.
    self._batch_size = -(-batch_size // len(devices)) * len(devices)
    self._params = jax.device_put(params, everywhere)
    network = inception.InceptionV3(with_logits=self.with_logits)
    self._apply = jax.jit(
      lambda params, images: network.apply(
        {'params': params}, inception.preprocess(images, variant)
      )
    )

  def __call__(
    self, images: np.ndarray, progress: Progress | None = None
  ) -> dict[str, np.ndarray | None]:
    """Features and logits.

    Args:
      images: uint8 [N, H, W, C], C = 1 or 3.
      progress: called after every batch.

    Returns:
      'pool_3': [N, 2048], 'logits': [N, 1008] or None, float32.
    """
    batches = []
    for start in range(0, len(images), self._batch_size):
      batch = np.asarray(images[start : start + self._batch_size])
      count = len(batch)
      # The last batch is filled up, so that one program serves all.
      fill = [(0, self._batch_size - count)] + [(0, 0)] * (batch.ndim - 1)
      batch = jax.device_put(np.pad(batch, fill), self._split)
      outputs = self._apply(self._params, batch)
      batches.append(
        {
          k: v if v is None else np.asarray(v)[:count]
          for k, v in outputs.items()
        }
      )
      if progress:
        progress(start + count, len(images))
    if not batches:
      raise ValueError('There are no images to take features of.')
    return jax.tree.map(lambda *x: np.concatenate(x), *batches)


def _digest(params: dict[str, Any]) -> str:
  """Eight hexadecimal digits of the arrays in a pytree."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.ascontiguousarray(leaf))
  return digest.hexdigest()[:8]


# What metrics need of an extractor: uint8 [N, H, W, C] -> [N, D], or a dict
# with those as 'pool_3' (and, for Inception Score, 'logits'). Users' own are
# welcome.
Extract = Callable[[np.ndarray], Any]


def find_extractor(name: str) -> Extract:
  """A user's function, by 'module:function'.

  Its `variant`, by which features and statistics know it, carries a hash of
  the module's file, so that those of an earlier version are not used.

  Raises:
    ValueError: there is no such module or function.
  """
  module_name, _, function_name = name.partition(':')
  try:
    module = importlib.import_module(module_name)
    function = getattr(module, function_name)
    source = pathlib.Path(module.__file__).read_bytes()
  except (ImportError, AttributeError, TypeError, ValueError) as error:
    raise ValueError(
      f'config.eval.extractor={name!r} is no module:function that can be '
      f'imported: {error}'
    ) from None
  digest = hashlib.sha256(source).hexdigest()[:8]

  def extract(images):
    return function(images)

  extract.variant = f'{name.replace(":", ".")}-{digest}'
  return extract


def outputs_of(images: np.ndarray, extract: Extract) -> dict[str, np.ndarray]:
  """'pool_3' [N, D], and 'logits' if there are any, by any extractor."""
  outputs = extract(images)
  if not isinstance(outputs, dict):
    outputs = {'pool_3': outputs}
  outputs = {k: np.asarray(v) for k, v in outputs.items() if v is not None}
  for name, value in outputs.items():
    if value.ndim != 2 or len(value) != len(images):
      raise ValueError(
        f'The extractor made {name} of shape {value.shape} from '
        f'{len(images)} images; it should be [{len(images)}, D].'
      )
  return outputs


def features_of(images: np.ndarray, extract: Extract) -> np.ndarray:
  """Features [N, D] by Inception or a user's own extractor."""
  return outputs_of(images, extract)['pool_3']


# --- Reference statistics -----------------------------------------------------


def fingerprint(images: np.ndarray, previous: str = '0') -> str:
  """Identifies a set of uint8 images [N, H, W, C], whatever their order.

  Args:
    images: a batch of the set.
    previous: fingerprint of the batches so far; those of shards combine too,
      see `merge_stats`.

  Returns:
    32 hexadecimal digits: the sum of the images' hashes.
  """
  shape = repr(images.shape[1:]).encode()
  total = int(previous, 16)
  for image in images:
    digest = hashlib.blake2b(shape + image.tobytes(), digest_size=16).digest()
    total += int.from_bytes(digest, 'big')
  return f'{total % 2**128:032x}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceStats:
  """What metrics need of a dataset. None is what a foreign file leaves out.

  Attributes:
    mu: mean of the features, [D].
    sigma: their unbiased covariance, [D, D].
    count: number of images.
    variant: input convention of `inception.VARIANTS`, or the name of a
      user's extractor.
    resolution: image height.
    fingerprint: of the images.
    features: of a random subset, [n, D], for KID and neighbours.
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
    """D."""
    return len(self.mu)

  def save(self, path: str | os.PathLike) -> None:
    """Writes an .npz that pytorch-fid and EDM read too (mu, sigma)."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    known = {k: v for k, v in fields.items() if v is not None}
    save_npz(path, **known)


def compute_stats(
  batches: Iterable[np.ndarray],
  extract: Extract,
  *,
  num_features: int = 10_000,
  progress: Callable[[int], None] | None = None,
) -> ReferenceStats:
  """Statistics of a dataset: raw images, no flips, each one once.

  Args:
    batches: uint8 [N, H, W, C], N may vary.
    extract: a `FeatureExtractor`, or a function of the user's.
    num_features: how many features are kept, drawn at random.
    progress: called with the number of images done.
  """
  moments = evaluation.Moments()
  rng = np.random.default_rng(0)
  digest, sizes = '0', set()
  kept, keys = None, None
  for images in batches:
    features = features_of(images, extract)
    moments.update(features)
    digest = fingerprint(images, digest)
    sizes.add(images.shape[1])
    # The subset is that with the smallest random keys, in one pass.
    new_keys = rng.random(len(images))
    kept = features if kept is None else np.concatenate([kept, features])
    keys = new_keys if keys is None else np.concatenate([keys, new_keys])
    order = np.argsort(keys)[:num_features]
    kept, keys = kept[order], keys[order]
    if progress:
      progress(moments.count)
  if not moments.count:
    raise ValueError('There are no images to take statistics of.')
  if len(sizes) > 1:
    raise ValueError(f'Images differ in height: {sorted(sizes)}.')
  return ReferenceStats(
    mu=moments.mu,
    sigma=moments.sigma,
    count=moments.count,
    variant=variant_of(extract),
    resolution=sizes.pop(),
    fingerprint=digest,
    features=np.float32(kept),
  )


def variant_of(extract: Extract) -> str:
  """The name that results give to an extractor."""
  name = getattr(extract, '__name__', type(extract).__name__)
  return getattr(extract, 'variant', name)


def identity_of(extract: Extract) -> str:
  """A name, fit for files, of all that an extractor's features depend on."""
  return getattr(extract, 'identity', variant_of(extract))


def merge_stats(parts: list[ReferenceStats]) -> ReferenceStats:
  """Statistics of shards, of hosts or of one run after another, together."""
  moments, digest = evaluation.Moments(), 0
  for part in parts:
    check_compatible(
      part, variant=parts[0].variant, resolution=parts[0].resolution
    )
    scatter = part.sigma * (part.count - 1)
    moments.merge(evaluation.Moments(part.count, part.mu, scatter))
    digest += int(part.fingerprint, 16)
  return dataclasses.replace(
    parts[0],
    mu=moments.mu,
    sigma=moments.sigma,
    count=moments.count,
    fingerprint=f'{digest % 2**128:032x}',
    features=np.concatenate([part.features for part in parts]),
  )


def load_stats(path: str | os.PathLike) -> ReferenceStats:
  """Reads statistics: ours, or of other projects.

  Those of pytorch-fid, of Heusel et al. 2017 and of EDM hold mu and sigma;
  those of Song et al. 2021 hold the features themselves, as 'pool_3'.

  Raises:
    FileNotFoundError, ValueError: no such file, or no statistics in it.
  """
  file = load_npz(path)
  if 'mu' not in file and 'pool_3' in file:
    moments = evaluation.Moments()
    moments.update(file['pool_3'])
    return ReferenceStats(
      mu=moments.mu,
      sigma=moments.sigma,
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
  scalars = {k: file[k].item() for k in names if k in file}
  return ReferenceStats(
    mu=np.float64(mu),
    sigma=np.float64(sigma),
    features=file.get('features'),
    **scalars,
  )


def check_compatible(stats: ReferenceStats, **wanted: Any) -> None:
  """Refuses statistics of something else; warns where they do not say.

  Args:
    stats: the reference.
    **wanted: any of dimensions, variant, resolution, fingerprint, with their
      values.
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
        'compute them anew with --mode stats, or leave out '
        'config.eval.stats_path.'
      )


# --- All metrics at once ------------------------------------------------------


def score_samples(
  batches: Iterable[dict[str, np.ndarray]],
  reference: ReferenceStats,
  *,
  seed: int = 0,
  allow_few: bool = False,
) -> dict[str, evaluation.Metric]:
  """Every metric that the samples and the reference permit.

  FID takes all samples, a batch at a time; KID and neighbours as many as the
  reference has features. Those that need more images than there are, or
  features that the reference does not hold, have no value but a note that
  says so.

  Args:
    batches: dicts with 'pool_3', [n, D], and perhaps 'logits', [n, 1008].
    reference: what they are compared with.
    seed: of KID's subsets.
    allow_few: see `fid`.

  Returns:
    'fid', 'is_1_split', 'is_10_splits', 'kid', 'precision', 'recall',
    'density', 'coverage'.
  """
  real = reference.features
  most = evaluation.ENOUGH_SAMPLES if real is None else len(real)
  moments, kept, logits = evaluation.Moments(), [], []
  for batch in batches:
    room = max(most - moments.count, 0)
    moments.update(batch['pool_3'])
    kept.append(batch['pool_3'][:room])
    if 'logits' in batch:
      logits.append(batch['logits'])
  fake = np.concatenate(kept)
  logits = np.concatenate(logits) if logits else None

  def attempt(metric, *args, **kwargs):
    try:
      return metric(*args, **kwargs)
    except ValueError as error:
      return evaluation.Metric(value=None, count=moments.count, note=str(error))

  metrics = {
    'fid': attempt(
      evaluation.fid, moments, reference, features=fake, allow_few=allow_few
    ),
    'is_1_split': attempt(evaluation.inception_score, logits, splits=1),
    'is_10_splits': attempt(evaluation.inception_score, logits, splits=10),
  }
  neighbours = ('precision', 'recall', 'density', 'coverage')
  if real is None:
    note = 'The reference statistics hold no features.'
    missing = evaluation.Metric(value=None, count=moments.count, note=note)
    return metrics | dict.fromkeys(('kid', *neighbours), missing)
  metrics['kid'] = attempt(evaluation.kid, real, fake, seed=seed)
  # Shares of neighbours depend on the counts: keep them equal.
  equal = min(len(real), len(fake))
  for function in (evaluation.precision_recall, evaluation.density_coverage):
    metrics |= function(real[:equal], fake[:equal])
  return metrics
