"""Features of images, and their statistics over whole datasets.

`FeatureExtractor` runs the Inception network; `compute_stats` reduces a
dataset to the reference that samples are compared with. Statistics say which
network input, resolution and images they come from, because a distance to
the wrong reference is a number like any other.
"""

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import evaluation
from models import inception

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
      params: of `inception_weights.load_weights`.
      variant: input convention, a key of `inception.VARIANTS`.
      batch_size: images at a time, rounded up to fill all devices; None for
        8 on a CPU, whose caches hold no more, else 128 a device.
    """
    inception.find_variant(variant)  # Fails here rather than at first use.
    self.variant = variant
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
    network = inception.InceptionV3(with_logits='fc' in params)
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


# What metrics need of an extractor: uint8 [N, H, W, C] -> [N, D], or a dict
# with those as 'pool_3'. Users' own are welcome.
Extract = Callable[[np.ndarray], Any]


def features_of(images: np.ndarray, extract: Extract) -> np.ndarray:
  """Features [N, D] by Inception or a user's own extractor."""
  features = extract(images)
  if isinstance(features, dict):
    features = features['pool_3']
  return np.asarray(features)


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

  def save(self, path: str | os.PathLike) -> None:
    """Writes an .npz that pytorch-fid and EDM read too (mu, sigma)."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    known = {k: v for k, v in fields.items() if v is not None}
    evaluation.save_npz(path, **known)


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
    if len(features) != len(images):
      raise ValueError(
        f'The extractor made {len(features)} features of {len(images)} images.'
      )
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


def merge_stats(parts: list[ReferenceStats]) -> ReferenceStats:
  """Statistics of all hosts' shards together."""
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
  file = evaluation.load_npz(path)
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
    **wanted: any of variant, resolution, fingerprint, with their values.
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
        f'The reference statistics have the {name} {have}, not {want}; '
        'compute them anew with --mode stats.'
      )
