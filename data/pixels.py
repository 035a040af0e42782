"""Pixel values: shapes, ranges, and the input and output of the model.

Images are uint8 [N, H, W, C] in files and on the way to the device. There
`preprocess` draws flips and dequantization noise from a JAX key, and returns
float32 in the range of the model. `to_uint8` leads back.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from data.batches import permutation

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # Modes of PIL by number of channels.
# Grey values by name of what is behind transparent pixels.
BACKGROUNDS = {'white': 255, 'grey': 128, 'black': 0}


# --- Shapes and types of images ---


def _composited(image, background):
  """Return a PIL image with its transparent pixels over a background."""
  from PIL import Image

  image = image.convert('RGBA')
  grey = BACKGROUNDS[background]
  behind = Image.new('RGBA', image.size, (grey, grey, grey, 255))
  return Image.alpha_composite(behind, image)


def fit_image(image, *, size, channels, crop=None, background='white'):
  """Return a PIL image as a square array, cropped and resized.

  As in the paper's pipeline, the central square is cut out and resized with an
  antialiased filter, which is bilinear up to 128 pixels and bicubic above.
  Values are rounded to the nearest integer and clipped to [0, 255].

  Args:
    image: a PIL image of any mode with 8 bits.
    size: height and width of the result, in pixels.
    channels: 1, 3 or 4.
    crop: side of the central square in pixels; None for the shorter side.
    background: what shows through transparent pixels where the result has 1 or
      3 channels, a key of `BACKGROUNDS`. (The colour that such pixels have in
      the file is arbitrary.)

  Returns:
    uint8 [size, size, channels].

  Raises:
    ValueError: the pixels have more than 8 bits.
  """
  from PIL import Image

  if image.mode.startswith(('I', 'F')):
    raise ValueError(f'{image.mode} pixels are not 8 bits deep: convert it')
  if channels != 4 and image.has_transparency_data:
    image = _composited(image, background)
  image = image.convert(MODES[channels])
  width, height = image.size
  side = min(crop or width, width, height)
  left, top = (width - side) // 2, (height - side) // 2
  # resize(box=...) would also filter in pixels from outside of the box.
  image = image.crop((left, top, left + side, top + side))
  smooth = (
    Image.Resampling.BILINEAR if size <= 128 else Image.Resampling.BICUBIC
  )
  image = image.resize((size, size), smooth)
  return np.asarray(image).reshape(size, size, channels)


def fit_array(images, *, size, channels, where):
  """Return images with a given size, cropped and resized where they differ.

  Args:
    images: uint8 [N, H, W, C].
    size: height and width of the result, in pixels.
    channels: number of channels that is expected.
    where: name of the images in errors.

  Returns:
    uint8 [N, size, size, channels].

  Raises:
    ValueError: the images have another number of channels.
  """
  from PIL import Image

  if images.shape[-1] != channels:
    raise ValueError(
      f'{where} has images with {images.shape[-1]} channels (last axis of '
      f'{images.shape}), but data.num_channels is {channels}'
    )
  if images.shape[1:3] == (size, size):
    return images
  fit = functools.partial(fit_image, size=size, channels=channels)
  squeezed = images[..., 0] if channels == 1 else images
  return np.stack([fit(Image.fromarray(image)) for image in squeezed])


def uint8_images(array, where):
  """Return an array of images as uint8 [N, H, W, C].

  Args:
    array: [N, H, W] or [N, H, W, C] with C = 1, 3 or 4: uint8, or integers in
      [0, 255], or floats in [0, 1].
    where: name of the array in errors.

  Raises:
    ValueError: the array has another shape or other values.
  """
  if array.ndim == 3:
    array = array[..., None]
  if array.ndim != 4 or array.shape[-1] not in MODES or 0 in array.shape[1:3]:
    raise ValueError(
      f'{where} has shape {array.shape}, not [N, H, W, C] with 1, 3 or 4 '
      'channels'
    )
  if not len(array):
    raise ValueError(f'{where} holds no images')
  if array.dtype == np.uint8:
    return array
  if array.dtype.kind not in 'iuf':
    raise ValueError(
      f'{where} is {array.dtype}: use uint8, or floats in [0, 1]'
    )
  low, high = array.min(initial=0), array.max(initial=0)
  if array.dtype.kind in 'iu' and low >= 0 and high <= 255:
    return array.astype(np.uint8)
  if array.dtype.kind == 'f' and low >= 0 and high <= 1:
    return np.floor(array * 255 + 0.5).astype(np.uint8)
  raise ValueError(
    f'{where} is {array.dtype} in [{low:g}, {high:g}]: use uint8, or floats '
    'in [0, 1]'
  )


# --- Input and output of the model ---


def scaler(x, *, centered):
  """Return values in [0, 1] in the model's range: [-1, 1] if centered."""
  return 2 * x - 1 if centered else x


def inverse_scaler(x, *, centered):
  """Return values of the model's range in [0, 1]; inverse of `scaler`."""
  return (x + 1) / 2 if centered else x


def preprocess(rng, image, *, random_flip, uniform_dequantization, centered):
  """Return the input of the model for a batch of images; runs under jit.

  Args:
    rng: JAX key; it draws flips and noise for the whole global batch.
    image: uint8 [B, H, W, C]. Floats [B, *space, C] are no 8-bit images: their
      values stay as they are.
    random_flip: whether each image is mirrored left to right with probability
      1/2; what has not two spatial axes is not.
    uniform_dequantization: whether values are (x + u) / 256 with u ~ U[0, 1);
      otherwise they are x / 255.
    centered: whether the range of the model is [-1, 1]; otherwise [0, 1].

  Returns:
    float32 [B, H, W, C] in the range of the model.
  """
  flip_rng, noise_rng = jax.random.split(rng)
  x = image.astype(jnp.float32)
  if random_flip and x.ndim == 4:
    flip = jax.random.bernoulli(flip_rng, shape=(x.shape[0], 1, 1, 1))
    x = jnp.where(flip, x[:, :, ::-1], x)
  if jnp.issubdtype(image.dtype, jnp.floating):
    return x
  if uniform_dequantization:
    x = (x + jax.random.uniform(noise_rng, x.shape)) / 256
  else:
    x = x / 255
  return scaler(x, centered=centered)


# Added to a value between two grey levels before it is rounded down.
ROUNDINGS = {'half_up': 0.5, 'truncate': 0.0}


def to_uint8(x, rounding='half_up'):
  """Return samples as uint8 images, in numpy.

  Args:
    x: samples of any shape; values are clipped to [0, 1].
    rounding: 'half_up' rounds to the nearest level; 'truncate' rounds down, as
      the paper's release does, which makes images darker by half a level.

  Raises:
    ValueError: unknown rounding, or samples that contain NaN.
  """
  if rounding not in ROUNDINGS:
    raise ValueError(f'rounding {rounding!r} is not one of {[*ROUNDINGS]}')
  x = np.asarray(x, np.float32)
  if np.isnan(x).any():
    raise ValueError('samples contain NaN, so they cannot be made images')
  return np.floor(np.clip(x, 0, 1) * 255 + ROUNDINGS[rounding]).astype(np.uint8)


def sigma_max(dataset, *, num_images=None, seed=0):
  """Return the largest Euclidean distance between two images of a data set.

  This is the sigma_max of Song & Ermon 2020 (NCSNv2), Technique 1.

  Args:
    dataset: a `batches.Dataset` of images, whose values are scaled to [0, 1],
      or of points, whose values are taken as they are.
    num_images: size of a random subset, which gives a lower bound; None for
      all images.
    seed: seed of the subset.
  """
  chosen = np.sort(permutation(len(dataset), seed, 0)[:num_images])
  x = dataset.fetch(chosen).reshape(len(chosen), -1)
  unit = 255 if x.dtype == np.uint8 else 1
  # A block has at most 128 MiB, or 16 images.
  block = min(1024, max(16, 2**25 // x.shape[1]))
  parts = [x[i : i + block] for i in range(0, len(x), block)]
  largest = 0.0
  for i, part in enumerate(parts):
    a = part.astype(np.float32) / unit
    a_norm = np.sum(a * a, axis=1)
    for other in parts[i:]:
      b = other.astype(np.float32) / unit
      squared = a_norm[:, None] + np.sum(b * b, axis=1) - 2 * (a @ b.T)
      largest = max(largest, float(squared.max()))
  return math.sqrt(largest)
