"""The Inception network behind FID, IS and KID, in Flax.

This is the classifier of 5 December 2015, from which Heusel et al. 2017 (FID)
and Salimans et al. 2016 (IS) took features and class probabilities. It differs
from the Inception-v3 of today's libraries: average pools do not count the
padding, the last block uses a max pool, batch norms have no scale and an
epsilon of 1e-3, and there are 1008 classes. Batch norms become part of the
convolutions when weights are loaded (`features.weights`).

Scores can be compared only if images become network input in the same way.
Therefore each convention has a name (see `VARIANTS`), which results contain.
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
  """How uint8 images become network input: resized, then (x - shift) / scale.

  Attributes:
    half_pixel: whether the centres of pixels have half-integer coordinates, as
      in today's libraries, or integer coordinates, as in TensorFlow 1. In
      both cases the filter is not antialiased.
    shift: number that is subtracted from pixel values in [0, 255].
    scale: number by which the difference is divided.
  """

  half_pixel: bool
  shift: float
  scale: float


VARIANTS = {
  # The graph of Heusel et al. 2017; also torch-fidelity.
  'tensorflow': Variant(half_pixel=False, shift=128.0, scale=128.0),
  # The PyTorch port of that graph, whose input is 2 x / 255 - 1.
  'pytorch_fid': Variant(half_pixel=True, shift=127.5, scale=127.5),
  # The release of Song et al. 2021, which uses TF-GAN.
  'score_sde': Variant(half_pixel=False, shift=127.5, scale=127.5),
}


def find_variant(name: str) -> Variant:
  """Return the convention of a name.

  Raises:
    ValueError: there is no such convention; the message lists all.
  """
  if name not in VARIANTS:
    raise ValueError(
      f'No Inception variant {name!r}; there are {", ".join(VARIANTS)}.'
    )
  return VARIANTS[name]


def interpolation_matrix(num_in: int, half_pixel: bool) -> np.ndarray:
  """Return the matrix [299, num_in] of bilinear interpolation to 299 points.

  Args:
    num_in: number of pixels of the input.
    half_pixel: see `Variant`.
  """
  shift = 0.5 if half_pixel else 0.0
  # The libraries of the variants compute coordinates in float32, too.
  out = np.arange(IMAGE_SIZE, dtype=np.float32)
  x = (out + shift) * np.float32(num_in / IMAGE_SIZE) - shift
  x = np.clip(x, 0, num_in - 1)  # Pixels at the edges are repeated.
  below = np.floor(x).astype(int)
  above = np.minimum(below + 1, num_in - 1)
  matrix = np.zeros((IMAGE_SIZE, num_in), np.float32)
  matrix[np.arange(IMAGE_SIZE), below] += 1 - (x - below)
  matrix[np.arange(IMAGE_SIZE), above] += x - below
  return matrix


def preprocess(images: Array, variant: str = 'tensorflow') -> Array:
  """Return the network input for images of any size.

  Args:
    images: uint8 [B, H, W, C] with C = 3, or C = 1, which is repeated three
      times.
    variant: a key of `VARIANTS`.

  Returns:
    float32 [B, 299, 299, 3], approximately in [-1, 1].

  Raises:
    ValueError: unknown variant, or images of another type or shape.
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
  """Convolve as lax.conv_general_dilated does.

  A 1x1 convolution is a matrix product, which is faster on a CPU.
  """
  if kernel.shape[:2] == (1, 1):
    return jnp.einsum(
      'bhwi,io->bhwo', x, kernel[0, 0], precision=kwargs['precision']
    )
  return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)


def _conv(x, features, kernel_size, name, *, strides=1, padding='SAME'):
  """Apply a convolution, which includes its batch norm, and ReLU."""
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
  """Combine the pixels of each 3x3 window, by combining shifted images.

  The result is that of reduce_window, two to five times faster on a CPU.
  """
  rows, columns = ((n - 3) // stride * stride + 1 for n in x.shape[1:3])
  windows = [
    x[:, i : i + rows : stride, j : j + columns : stride]
    for i in range(3)
    for j in range(3)
  ]
  return functools.reduce(combine, windows)


def _pad(x, value):
  """Pad height and width by one pixel on each side."""
  return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def _avg_pool(x):
  """Apply a 3x3 average pool that does not count the padding."""
  ends = lambda n: np.where(np.isin(np.arange(n), (0, n - 1)), 2.0, 3.0)
  count = np.outer(*map(ends, x.shape[1:3])).astype(np.float32)
  return _pool(_pad(x, 0), jnp.add) / count[None, :, :, None]


def _max_pool(x):
  """Apply a 3x3 max pool with stride 2 and without padding."""
  return _pool(x, jnp.maximum, stride=2)


def _same_max_pool(x):
  """Apply a 3x3 max pool with stride 1 and padding."""
  return _pool(_pad(x, -jnp.inf), jnp.maximum)


class MixedA(nn.Module):
  """A block at 35x35: branches 1x1, 5x5, double 3x3 and pooled.

  Attributes:
    pool_features: number of features of the pooled branch.
  """

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
  """The block that reduces 35x35 to 17x17."""

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
  """A block at 17x17: 7x7 convolutions as pairs of 1x7 and 7x1.

  Attributes:
    features: number of features between the convolutions of a pair.
  """

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
  """The block that reduces 17x17 to 8x8."""

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
  """A block at 8x8, whose 3x3 branches end in a 1x3 and a 3x1 in parallel.

  Attributes:
    pool: pool of the last branch.
  """

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
  """The Inception network of the Frechet Inception Distance.

  Attributes:
    with_logits: whether the weights include the last layer, 'fc'.
  """

  with_logits: bool = True

  @nn.compact
  def __call__(self, x: Array) -> dict[str, Array | None]:
    """Return features and logits of preprocessed images.

    Args:
      x: float32 [B, 299, 299, 3] from `preprocess`.

    Returns:
      'pool_3': float32 [B, 2048]; 'logits': float32 [B, 1008], or None. As in
      Salimans et al. 2016, the logits do not include the bias of the last
      layer.
    """
    # XLA on a CPU computes a convolution without padding three times faster as
    # one with padding, whose edges are cut off.
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
