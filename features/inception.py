"""The Inception network behind FID, IS and KID, in Flax.

This is the classifier of 5 December 2015 that Heusel et al. 2017 (FID) and
Salimans et al. 2016 (IS) took their features and class probabilities from.
It differs from the Inception-v3 that libraries ship today: average pools do
not count the padding, the last block max-pools, batch norms have no scale
and epsilon 1e-3, and there are 1008 classes. Batch norms are folded into the
convolutions when weights are loaded (`models/weights.py`).

Scores are comparable only when images enter the network in the same way, so
each convention has a name (`VARIANTS`), which belongs in every result.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
IMAGE_SIZE = 299
NUM_CLASSES = 1008


# --- Images to network input -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
  """How uint8 images become network input: resize, then (x - shift) / scale.

  Attributes:
    half_pixel: whether pixel centres lie at half-integers, as they do in
      today's libraries but did not in TensorFlow 1. Neither antialiases.
    shift: subtracted from pixel values in [0, 255].
    scale: divides the difference.
  """

  half_pixel: bool
  shift: float
  scale: float


VARIANTS = {
  # The graph that Heusel et al. 2017 evaluated; also torch-fidelity.
  'tensorflow': Variant(half_pixel=False, shift=128.0, scale=128.0),
  # The PyTorch port of that graph, 2x/255 - 1; also cleaner upsampling.
  'pytorch_fid': Variant(half_pixel=True, shift=127.5, scale=127.5),
  # The release of Song et al. 2021, through TF-GAN.
  'score_sde': Variant(half_pixel=False, shift=127.5, scale=127.5),
}


def find_variant(name: str) -> Variant:
  """The convention of that name, or a ValueError that lists them."""
  if name not in VARIANTS:
    raise ValueError(
      f'No Inception variant {name!r}; there are {", ".join(VARIANTS)}.'
    )
  return VARIANTS[name]


def interpolation_matrix(num_in: int, half_pixel: bool) -> np.ndarray:
  """Bilinear interpolation to `IMAGE_SIZE` points as a [299, num_in] matrix."""
  shift = 0.5 if half_pixel else 0.0
  # Coordinates are rounded to float32, as in the libraries of the variants.
  out = np.arange(IMAGE_SIZE, dtype=np.float32)
  x = (out + shift) * np.float32(num_in / IMAGE_SIZE) - shift
  x = np.clip(x, 0, num_in - 1)  # Edges repeat.
  below = np.floor(x).astype(int)
  above = np.minimum(below + 1, num_in - 1)
  matrix = np.zeros((IMAGE_SIZE, num_in), np.float32)
  matrix[np.arange(IMAGE_SIZE), below] += 1 - (x - below)
  matrix[np.arange(IMAGE_SIZE), above] += x - below
  return matrix


def preprocess(images: Array, variant: str = 'tensorflow') -> Array:
  """Network input for images of any size.

  Args:
    images: uint8 [B, H, W, C], C = 3, or 1 (repeated thrice).
    variant: a key of `VARIANTS`.

  Returns:
    float32 [B, 299, 299, 3], about [-1, 1].
  """
  convention = find_variant(variant)
  if images.ndim != 4 or images.dtype != np.uint8:
    raise ValueError(
      'Inception takes uint8 images of shape [B, H, W, C] with values 0 to '
      f'255; got {images.dtype} of shape {tuple(images.shape)}.'
    )
  if images.shape[-1] not in (1, 3):
    raise ValueError(
      f'Inception takes 1 or 3 channels, not {images.shape[-1]}; put images '
      'with transparency on a plain background first.'
    )
  rows, columns = (
    interpolation_matrix(n, convention.half_pixel) for n in images.shape[1:3]
  )
  x = jnp.asarray(images, jnp.float32)
  x = jnp.einsum('ih,bhwc->biwc', rows, x, precision='highest')
  x = jnp.einsum('jw,biwc->bijc', columns, x, precision='highest')
  x = (x - convention.shift) / convention.scale
  return jnp.broadcast_to(x, (*x.shape[:3], 3))


# --- The network -------------------------------------------------------------


def _convolve(x, kernel, *args, **kwargs):
  """As lax.conv_general_dilated; a 1x1 is a product, quicker on CPU."""
  if kernel.shape[:2] == (1, 1):
    return jnp.einsum(
      'bhwi,io->bhwo', x, kernel[0, 0], precision=kwargs['precision']
    )
  return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)


def _conv(x, features, kernel_size, name, *, strides=1, padding='SAME'):
  """Convolution (with its batch norm folded in) and ReLU."""
  conv = nn.Conv(
    features,
    kernel_size,
    strides=strides,
    padding=padding,
    precision='highest',  # The default is coarser on GPU and TPU.
    conv_general_dilated=_convolve,
    name=name,
  )
  return nn.relu(conv(x))


def _pool(x, combine, stride=1):
  """combine() of the pixels in each 3x3 window, of shifted images.

  It is what reduce_window gives, two to five times as fast on CPU.
  """
  rows, columns = ((n - 3) // stride * stride + 1 for n in x.shape[1:3])
  windows = [
    x[:, i : i + rows : stride, j : j + columns : stride]
    for i in range(3)
    for j in range(3)
  ]
  return functools.reduce(combine, windows)


def _pad(x, value):
  return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def _avg_pool(x):
  """3x3, the padding not counted."""
  ends = lambda n: np.where(np.isin(np.arange(n), (0, n - 1)), 2.0, 3.0)
  count = np.outer(*map(ends, x.shape[1:3])).astype(np.float32)
  return _pool(_pad(x, 0), jnp.add) / count[None, :, :, None]


def _max_pool(x):
  """3x3, of every second pixel, without padding."""
  return _pool(x, jnp.maximum, stride=2)


def _same_max_pool(x):
  """3x3, padded."""
  return _pool(_pad(x, -jnp.inf), jnp.maximum)


class MixedA(nn.Module):
  """35x35 blocks: 1x1, 5x5, double 3x3 and pooled branches."""

  pool_features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    a = _conv(x, 64, (1, 1), 'branch1x1')
    b = _conv(x, 48, (1, 1), 'branch5x5_1')
    b = _conv(b, 64, (5, 5), 'branch5x5_2')
    c = _conv(x, 64, (1, 1), 'branch3x3dbl_1')
    c = _conv(c, 96, (3, 3), 'branch3x3dbl_2')
    c = _conv(c, 96, (3, 3), 'branch3x3dbl_3')
    d = _conv(_avg_pool(x), self.pool_features, (1, 1), 'branch_pool')
    return jnp.concatenate([a, b, c, d], axis=-1)


class MixedB(nn.Module):
  """From 35x35 to 17x17."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    down = {'strides': 2, 'padding': 'VALID'}
    a = _conv(x, 384, (3, 3), 'branch3x3', **down)
    b = _conv(x, 64, (1, 1), 'branch3x3dbl_1')
    b = _conv(b, 96, (3, 3), 'branch3x3dbl_2')
    b = _conv(b, 96, (3, 3), 'branch3x3dbl_3', **down)
    c = _max_pool(x)
    return jnp.concatenate([a, b, c], axis=-1)


class MixedC(nn.Module):
  """17x17 blocks: 7x7 convolutions as pairs of 1x7 and 7x1."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    n = self.features
    a = _conv(x, 192, (1, 1), 'branch1x1')
    b = _conv(x, n, (1, 1), 'branch7x7_1')
    b = _conv(b, n, (1, 7), 'branch7x7_2')
    b = _conv(b, 192, (7, 1), 'branch7x7_3')
    c = _conv(x, n, (1, 1), 'branch7x7dbl_1')
    c = _conv(c, n, (7, 1), 'branch7x7dbl_2')
    c = _conv(c, n, (1, 7), 'branch7x7dbl_3')
    c = _conv(c, n, (7, 1), 'branch7x7dbl_4')
    c = _conv(c, 192, (1, 7), 'branch7x7dbl_5')
    d = _conv(_avg_pool(x), 192, (1, 1), 'branch_pool')
    return jnp.concatenate([a, b, c, d], axis=-1)


class MixedD(nn.Module):
  """From 17x17 to 8x8."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    down = {'strides': 2, 'padding': 'VALID'}
    a = _conv(x, 192, (1, 1), 'branch3x3_1')
    a = _conv(a, 320, (3, 3), 'branch3x3_2', **down)
    b = _conv(x, 192, (1, 1), 'branch7x7x3_1')
    b = _conv(b, 192, (1, 7), 'branch7x7x3_2')
    b = _conv(b, 192, (7, 1), 'branch7x7x3_3')
    b = _conv(b, 192, (3, 3), 'branch7x7x3_4', **down)
    c = _max_pool(x)
    return jnp.concatenate([a, b, c], axis=-1)


class MixedE(nn.Module):
  """8x8 blocks, whose 3x3 branches end in a 1x3 and a 3x1 side by side."""

  pool: Callable[[Array], Array]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    a = _conv(x, 320, (1, 1), 'branch1x1')
    b = _conv(x, 384, (1, 1), 'branch3x3_1')
    b1 = _conv(b, 384, (1, 3), 'branch3x3_2a')
    b2 = _conv(b, 384, (3, 1), 'branch3x3_2b')
    c = _conv(x, 448, (1, 1), 'branch3x3dbl_1')
    c = _conv(c, 384, (3, 3), 'branch3x3dbl_2')
    c1 = _conv(c, 384, (1, 3), 'branch3x3dbl_3a')
    c2 = _conv(c, 384, (3, 1), 'branch3x3dbl_3b')
    d = _conv(self.pool(x), 192, (1, 1), 'branch_pool')
    return jnp.concatenate([a, b1, b2, c1, c2, d], axis=-1)


class InceptionV3(nn.Module):
  """The FID network.

  Attributes:
    with_logits: whether the weights have the last layer, 'fc'.
  """

  with_logits: bool = True

  @nn.compact
  def __call__(self, x: Array) -> dict[str, Array | None]:
    """Features of preprocessed images.

    Args:
      x: float32 [B, 299, 299, 3] from `preprocess`.

    Returns:
      'pool_3': float32 [B, 2048]; 'logits': float32 [B, 1008], or None. As
      in Salimans et al. 2016 the logits lack the bias of the last layer.
    """
    # A convolution without padding, as XLA computes it thrice as fast on CPU.
    inner = lambda x: x[:, 1:-1, 1:-1]
    down = {'strides': 2, 'padding': 'VALID'}
    x = _conv(x, 32, (3, 3), 'Conv2d_1a_3x3', **down)
    x = inner(_conv(x, 32, (3, 3), 'Conv2d_2a_3x3'))
    x = _max_pool(_conv(x, 64, (3, 3), 'Conv2d_2b_3x3'))
    x = _conv(x, 80, (1, 1), 'Conv2d_3b_1x1')
    x = _max_pool(inner(_conv(x, 192, (3, 3), 'Conv2d_4a_3x3')))
    x = MixedA(32, name='Mixed_5b')(x)
    x = MixedA(64, name='Mixed_5c')(x)
    x = MixedA(64, name='Mixed_5d')(x)
    x = MixedB(name='Mixed_6a')(x)
    x = MixedC(128, name='Mixed_6b')(x)
    x = MixedC(160, name='Mixed_6c')(x)
    x = MixedC(160, name='Mixed_6d')(x)
    x = MixedC(192, name='Mixed_6e')(x)
    x = MixedD(name='Mixed_7a')(x)
    x = MixedE(_avg_pool, name='Mixed_7b')(x)
    x = MixedE(_same_max_pool, name='Mixed_7c')(x)
    pool_3 = x.mean(axis=(1, 2))
    logits = None
    if self.with_logits:
      dense = nn.Dense(
        NUM_CLASSES, use_bias=False, precision='highest', name='fc'
      )
      logits = dense(pool_3)
    return {'pool_3': pool_3, 'logits': logits}
