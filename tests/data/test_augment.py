"""Test augmentation against closed forms of what each change does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import augment

SIZE, ZERO = 24, np.zeros(3, np.float32)
NAMES = ('scale', 'angle', 'stretch', 'axis', 'right', 'down')
warp = jax.jit(augment.warp)
STILL = dict.fromkeys(NAMES, ZERO)


def blobs(right, down):
  """Return a smooth function of positions about the center, in pixels."""
  peak = lambda a, b, s: np.exp(-((right - a) ** 2 + (down - b) ** 2) / s**2)
  return peak(2.0, -1.5, 2.5) + 0.6 * peak(-2.5, 1.0, 3.0)


def positions():
  at = np.arange(SIZE) - 0.5 * (SIZE - 1)
  return np.meshgrid(at, at)  # (right, down), [H, W] each


def image():
  return np.float32(np.tile(blobs(*positions())[None, ..., None], (3, 1, 1, 1)))


def test_the_filter_is_orthonormal():
  h = augment.SYM6
  products = [h[2 * k :] @ h[: 12 - 2 * k] for k in range(6)]
  np.testing.assert_allclose(products, [1, 0, 0, 0, 0, 0], atol=1e-10)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_an_image_that_is_not_moved_stays(dtype):
  x = jax.random.uniform(jax.random.key(0), (3, SIZE, SIZE, 3), dtype)
  got = warp(x, **STILL)
  assert got.dtype == x.dtype
  np.testing.assert_allclose(
    np.float32(got), np.float32(x), atol=2e-6 if dtype == 'float32' else 0.03
  )


def test_a_shift_by_whole_pixels_mirrors_the_edge():
  x = np.float32(np.random.default_rng(0).normal(size=(3, SIZE, SIZE, 2)))
  moves = np.array([[2, 0], [0, 3], [-4, 1]])  # right, down
  shift = np.float32(moves.T / (SIZE * augment.MOVE_STD))
  got = warp(x, **{**STILL, 'right': shift[0], 'down': shift[1]})
  padded = np.pad(x, ((0, 0), (5, 5), (5, 5), (0, 0)), mode='reflect')
  for i, (right, down) in enumerate(moves):
    rows = slice(5 - down, 5 - down + SIZE)
    columns = slice(5 - right, 5 - right + SIZE)
    np.testing.assert_allclose(got[i], padded[i, rows, columns], atol=2e-5)


@pytest.mark.parametrize('seed', range(3))
def test_every_change_is_its_map_of_a_smooth_image(seed):
  rng = np.random.default_rng(seed)
  drawn = {name: np.float32(rng.normal(size=3)) for name in NAMES}
  drawn['right'], drawn['down'] = 0.5 * drawn['right'], 0.5 * drawn['down']
  got = warp(image(), **drawn)
  for i in range(3):
    v = {name: float(value[i]) for name, value in drawn.items()}
    right, down = positions()
    p = np.stack([right.ravel(), down.ravel()])
    p = p - 0.125 * SIZE * np.array([[v['right']], [v['down']]])
    along = np.array([np.cos(v['axis']), -np.sin(v['axis'])])
    across = np.array([np.sin(v['axis']), np.cos(v['axis'])])
    s = 2 ** (0.2 * v['stretch'])  # Longer along the axis, shorter across.
    p = np.outer(along, along @ p) / s + np.outer(across, across @ p) * s
    c, n = np.cos(v['angle']), np.sin(v['angle'])
    p = np.array([[c, -n], [n, c]]) @ p / 2 ** (0.2 * v['scale'])
    # The image is mirrored at its edges.
    edge = 0.5 * (SIZE - 1)
    p = edge - np.abs((p + edge) % (4 * edge) - 2 * edge)
    want = blobs(*p).reshape(SIZE, SIZE)
    np.testing.assert_allclose(got[i, ..., 0], want, atol=0.03)
    assert np.abs(image()[i, ..., 0] - want).max() > 0.15


def test_labels_tell_what_was_done():
  """Check shares and values, and that x moves only where a label says it."""
  x = jnp.tile(jnp.asarray(image()[:1]), (600, 1, 1, 1))
  got, labels = jax.jit(augment.augment)(jax.random.key(0), x, 0.12)
  labels = np.asarray(labels)
  assert labels.shape == (600, augment.LABELS)
  share = (labels != 0).mean(0)
  error = 4 * np.sqrt(0.25 / 600)
  assert abs(share[0] - 0.5) < error
  assert abs(share[1] - 0.06) < error
  np.testing.assert_allclose(share[[2, 3, 4, 5, 7, 8]], 0.12, atol=error)
  assert abs(share[6] - 0.06) < error
  np.testing.assert_allclose(
    (labels[:, 3] + 1) ** 2 + labels[:, 4] ** 2, 1, atol=1e-5
  )
  difference = np.abs(got - x).max((1, 2, 3))
  still = (labels == 0).all(1)
  assert still.sum() > 100
  np.testing.assert_allclose(difference[still], 0, atol=1e-5)
  assert (difference[~still] > 1e-4).mean() > 0.99


def test_without_a_share_images_are_mirrored_only():
  x = jax.random.uniform(jax.random.key(1), (20, 8, 8, 1))
  got, labels = augment.augment(jax.random.key(0), x, 0.0)
  assert not labels[:, 1:].any() and 3 < labels[:, 0].sum() < 17
  want = jnp.where(labels[:, 0, None, None, None] > 0, x[:, :, ::-1], x)
  np.testing.assert_allclose(got, want, atol=1e-5)
