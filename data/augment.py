r"""Non-leaky augmentation of training images (Karras et al. 2022, App. F.2).

Each image is flipped, scaled, rotated, stretched along a random axis and moved,
each with a probability of its own (Table 6 there). The network is told what was
done, by nine numbers that are 0 for an image as it is (Jun et al. 2020), so
that samples, made with zeros, are as the data. All of it runs on the device.

One affine map takes output positions to input positions. To resample without
aliasing, the image, mirrored at its edges, is upsampled twice by an orthogonal
wavelet filter, interpolated bilinearly, and downsampled by the same filter,
which gives back an image that is not moved (Karras et al. 2020, "Training GANs
with limited data", App. B).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

LABELS = 9  # Numbers that tell what was done.
SCALE_STD = ANISO_STD = 0.2  # In octaves.
MOVE_STD = 0.125  # In widths of the image.

# The low-pass filter of the wavelet symlet 6.
SYM6 = np.array(
  [
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
  ]
)
# The place of its mean, where an upsampled pixel is.
CENTER = float(np.arange(12) @ SYM6 / SYM6.sum())


@functools.cache
def _filters(size):
  """Return (up [U, size], down [size, M]) for one axis, and the place of u[0].

  up mirrors an axis at its ends and filters it; down filters the upsampled
  output. Sample n of the latter is at n / 2 - CENTER / 2, in pixels.
  """
  margin = size - 1
  up = np.zeros((2 * (size + 2 * margin) + 10, size))
  for place in range(-margin, size + margin):
    inside = abs(place) if place < size else 2 * margin - place
    start = 2 * (place + margin)
    up[start : start + 12, inside] += SYM6
  down = np.zeros((size, 2 * size + 10))
  for place in range(size):
    down[place, 2 * place : 2 * place + 12] = SYM6
  return up, down, 2 * margin


def _matrix(a, b, c, d):
  """Return matrices [[a, b], [c, d]], [B, 2, 2]."""
  return jnp.stack([jnp.stack([a, b], -1), jnp.stack([c, d], -1)], -2)


def _rotation(angle):
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return _matrix(cos, -sin, sin, cos)


def _draw(rng, batch, share):
  """Return the parameters of the maps, {name: [B]}, 0 for those not drawn."""
  names = ('chosen', 'scale', 'angle', 'stretch', 'axis', 'right', 'down')
  keys = dict(zip(names, jax.random.split(rng, len(names)), strict=True))
  normal = lambda name: jax.random.normal(keys[name], (batch,))
  turn = lambda name: jax.random.uniform(
    keys[name], (batch,), minval=-math.pi, maxval=math.pi
  )
  *chosen, tilted = jax.random.uniform(
    keys['chosen'], (5, batch)
  ) < jnp.asarray([share, share, share, share, 0.5]).reshape(5, 1)
  use = lambda which, value: jnp.where(which, value, 0.0)
  return {
    'scale': use(chosen[0], normal('scale')),
    'angle': use(chosen[1], turn('angle')),
    'stretch': use(chosen[2], normal('stretch')),
    'axis': use(tilted, turn('axis')),
    'right': use(chosen[3], normal('right')),
    'down': use(chosen[3], normal('down')),
  }


def warp(x, scale, angle, stretch, axis, right, down):
  """Return images moved by affine maps about their centers.

  Args:
    x: images [B, H, W, C], H = W.
    scale: octaves of enlargement in units of `SCALE_STD`, [B].
    angle: rotation in radians, [B].
    stretch: octaves, in units of `ANISO_STD`, by which the image is longer
      along one axis and shorter across, [B].
    axis: angle of this axis, in radians, [B].
    right, down: shift in units of `MOVE_STD` widths, [B].

  Returns:
    Shaped as x, of its dtype.
  """
  size = x.shape[1]
  u, v, offset = _filters(size)
  u, v = jnp.asarray(u, x.dtype), jnp.asarray(v, x.dtype)
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  up = product('yh,bhwc,xw->bcyx', u, x, u)

  zero, grow = jnp.zeros_like(stretch), 2 ** (stretch * ANISO_STD)
  shrink = 2 ** (-scale * SCALE_STD)[:, None, None]
  # From output to input positions (x, y).
  inverse = shrink * _rotation(angle) @ _rotation(-axis)
  inverse = inverse @ _matrix(1 / grow, zero, zero, grow) @ _rotation(axis)
  place = 0.5 * (np.arange(v.shape[1]) - CENTER) - 0.5 * (size - 1)
  place = jnp.stack(jnp.meshgrid(jnp.float32(place), jnp.float32(place)))
  shift = MOVE_STD * size * jnp.stack([right, down], 1)
  place = place[None] - shift[:, :, None, None]
  place = product('bij,bjyx->biyx', inverse, place)
  index = 2 * (place + 0.5 * (size - 1)) + CENTER + offset

  def resample(image, index):
    return map_coordinates(image, [index[1], index[0]], 1, 'nearest')

  moved = jax.vmap(jax.vmap(resample, (0, None)))(up, index.astype(jnp.float32))
  return product('hy,bcyx,wx->bhwc', v, moved.astype(x.dtype), v)


def augment(rng, x, share):
  """Return augmented images and what the network is told of it.

  Args:
    rng: key.
    x: images [B, H, W, C] in any range, H = W.
    share: probability in [0, 1] of each change; images are mirrored left to
      right with probability 1/2 whatever it is.

  Returns:
    Images shaped as x, of its dtype, and labels [B, 9], which are 0 for what
    was not done: mirrored, upside down, scale, cos(angle) - 1, sin(angle),
    stretch cos(axis), stretch sin(axis), shift right and down.
  """
  rng_flip, rng_half, rng_share, rng_warp = jax.random.split(rng, 4)
  batch = x.shape[:1]
  mirrored = jax.random.bernoulli(rng_flip, 0.5, batch)
  turned = jax.random.bernoulli(rng_half, 0.5, batch)
  turned &= jax.random.bernoulli(rng_share, share, batch)
  x = jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
  x = jnp.where(turned[:, None, None, None], x[:, ::-1], x)
  drawn = _draw(rng_warp, len(x), share)
  stretch, axis, angle = drawn['stretch'], drawn['axis'], drawn['angle']
  labels = [
    mirrored,
    turned,
    drawn['scale'],
    jnp.cos(angle) - 1,
    jnp.sin(angle),
    stretch * jnp.cos(axis),
    stretch * jnp.sin(axis),
    drawn['right'],
    drawn['down'],
  ]
  return warp(x, **drawn), jnp.stack(labels, 1).astype(jnp.float32)
