"""Features of images: those of the Inception network, or the user's own.

`extractor` makes what the section `eval` of a config asks for. Each extractor
has a variant, which results and statistics name, and an identity, which the
names of files contain.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from features import inception, weights
from runtime import user_code
from runtime.devices import largest
from runtime.files import digest

# What metrics need of an extractor: a function of uint8 [N, H, W, C] that
# returns [N, D], or a dict with these as 'pool_3'. The Inception Score also
# needs 'logits' in it.
Extract = Callable[[np.ndarray], Any]


class FeatureExtractor:
  """Compute Inception features of images on all devices of this host.

  With several hosts, each host computes the features of its own share, without
  waiting for the others. `statistics.merge_stats` joins the results.
  """

  def __init__(
    self,
    params: dict[str, Any],
    *,
    variant: str = 'tensorflow',
    batch_size: int | None = None,
  ):
    """Place the network on the devices.

    Args:
      params: parameters from `weights.load_weights`.
      variant: how images become the input of the network, a key of
        `inception.VARIANTS`.
      batch_size: images at a time, rounded up to a multiple of the number of
        devices. None means 8 on a CPU, whose caches are small (also the fastest
        of 4 to 64 with two devices), and 128 for each device elsewhere.

    Raises:
      ValueError: the variant is unknown.
    """
    inception.find_variant(variant)
    self.variant = variant
    self.logits_hint = (
      'pt_inception-2015-12-05-6726825d.pth of pytorch-fid has the layer that '
      'makes them (config.eval.inception_path)'
    )
    self.with_logits = 'fc' in params
    network = {k: v for k, v in params.items() if k != 'fc'}
    weights = (np.asarray(v).tobytes() for v in jax.tree.leaves(network))
    self.identity = f'{variant}-{digest(*weights)[:8]}'
    devices = jax.local_devices()
    if batch_size is None:
      on_cpu = devices[0].platform == 'cpu'
      batch_size = 8 if on_cpu else 128 * len(devices)
    mesh = jax.make_mesh(
      (len(devices),), ('data',), (AxisType.Auto,), devices=devices
    )
    # Every device has all parameters and its part of a batch.
    everywhere = NamedSharding(mesh, P())
    self._split = NamedSharding(mesh, P('data'))
    self._batch_size = -(-batch_size // len(devices)) * len(devices)
    self._params = jax.device_put(params, everywhere)
    network = inception.InceptionV3(with_logits=self.with_logits)
    self._apply = jax.jit(
      lambda params, images: network.apply(
        {'params': params}, inception.preprocess(images, variant)
      )
    )

  def __call__(
    self,
    images: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
  ) -> dict[str, np.ndarray | None]:
    """Return features and logits of images.

    Args:
      images: uint8 [N, H, W, C], C = 1 or 3, N >= 1.
      progress: function that is called after every batch with the number of
        images that are done, and the number of all images.

    Returns:
      'pool_3': float32 [N, 2048], and 'logits': float32 [N, 1008], or None for
      weights without the last layer.

    Raises:
      ValueError: there are no images, or they are not uint8 [N, H, W, C].
    """
    batches = []
    for start in range(0, len(images), self._batch_size):
      batch = np.asarray(images[start : start + self._batch_size])
      count = len(batch)
      # The last batch is padded, so that one compiled program is enough.
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
      raise ValueError('There are no images to compute features of.')
    return jax.tree.map(lambda *x: np.concatenate(x), *batches)


def _shown(function):
  """Return what a function makes of fixed images, to four digits."""
  rng, found = np.random.default_rng(0), []
  for channels in (1, 3, 4):
    images = rng.integers(0, 256, (2, 32, 32, channels), np.uint8)
    try:
      outputs = jax.tree.map(np.asarray, function(images))
      values = [np.float64(v).ravel() for v in jax.tree.leaves(outputs)]
      found += [[f'{v:.4g}' for v in some] for some in values]
    except (Exception, SystemExit) as error:  # It may take another shape only.
      found.append(type(error).__name__)
  return found


def find_extractor(name: str) -> Extract:
  """Return a function of the user as an extractor.

  Its `variant` contains a digest of the module's file and of what the function
  makes of a few images. So features and statistics of earlier code, or of other
  weights that it reads, are not used.

  Args:
    name: 'module:function', such as 'my_features:colours'.

  Raises:
    ValueError: there is no such module or function.
  """
  extract, source = user_code.find('eval.extractor', name)
  shown = digest(*_shown(extract.__wrapped__))
  shown = largest(int(shown[:7], 16))  # On all hosts.
  version = digest(source, shown)[:8]

  extract.variant = f'{name.replace(":", ".")}-{version}'
  extract.logits_hint = (
    f"{name} can return them, as {{'pool_3': [N, D], 'logits': [N, K]}}"
  )
  return extract


def extractor(config) -> Extract:
  """Return the extractor that a config chooses.

  Args:
    config: section `eval` of the config, with the keys extractor,
      inception_path and inception_variant.

  Raises:
    FileNotFoundError, ValueError: there are no such weights or function.
  """
  if config.extractor:
    return find_extractor(config.extractor)
  params = weights.load_weights(config.inception_path or None)
  return FeatureExtractor(params, variant=config.inception_variant)


def variant_of(extract: Extract) -> str:
  """Return the name that results and statistics give to an extractor."""
  name = getattr(extract, '__name__', type(extract).__name__)
  return getattr(extract, 'variant', name)


def identity_of(extract: Extract) -> str:
  """Return a name, for files, of all that an extractor's features depend on."""
  return getattr(extract, 'identity', variant_of(extract))


def outputs_of(images: np.ndarray, extract: Extract) -> dict[str, np.ndarray]:
  """Return the outputs of any extractor in one form.

  Args:
    images: uint8 [N, H, W, C].
    extract: a `FeatureExtractor`, or a function of the user.

  Returns:
    'pool_3' [N, D], and 'logits' [N, K] if the extractor has them.

  Raises:
    ValueError: the extractor returned another shape, or no finite numbers.
  """
  outputs = extract(images)
  if not isinstance(outputs, dict):
    outputs = {'pool_3': outputs}
  try:
    outputs = {k: np.asarray(v) for k, v in outputs.items() if v is not None}
  except ValueError as error:  # Rows of different lengths.
    raise ValueError(
      f'The extractor {variant_of(extract)} returned no array: {error}'
    ) from None
  for name, value in outputs.items():
    if value.ndim != 2 or len(value) != len(images) or not value.size:
      raise ValueError(
        f'The extractor {variant_of(extract)} returned {name} of shape '
        f'{value.shape} from {len(images)} images; it should be '
        f'[{len(images)}, D].'
      )
    if value.dtype.kind not in 'fiu' or not np.isfinite(value).all():
      raise ValueError(
        f'The extractor {variant_of(extract)} returned {name} that are not '
        'finite numbers.'
      )
  if 'pool_3' not in outputs:
    raise ValueError(
      f'The extractor {variant_of(extract)} returned '
      f'{", ".join(outputs) or None}; it '
      "should return [N, D], or a dict with that as 'pool_3'."
    )
  return outputs


def features_of(images: np.ndarray, extract: Extract) -> np.ndarray:
  """Return the features [N, D] of images by any extractor."""
  return outputs_of(images, extract)['pool_3']
