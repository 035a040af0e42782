"""The short program learns the distribution of its rings."""

import functools

import jax
import numpy as np

import sampling
from examples import minimal


def test_samples_lie_around_the_rings(tmp_path, monkeypatch):
  """Take 2000 steps of training, and 200 of sampling."""
  few = functools.partial(sampling.PC, num_steps=200)
  monkeypatch.setattr(sampling, 'PC', lambda num_steps: few())
  # The work is in running, so that optimization saves time.
  options = {'xla_backend_optimization_level': 1}
  compiled = functools.partial(jax.jit, compiler_options=options)
  monkeypatch.setattr(jax, 'jit', compiled)
  picture = tmp_path / 'rings.png'
  samples = minimal.main(['--output', str(picture), '--steps', '2000'])
  assert picture.read_bytes().startswith(b'\x89PNG')
  x = np.asarray(samples.x)
  radius = np.linalg.norm(x, axis=1)
  inner = radius < np.mean(minimal.RADII)
  distance = np.abs(radius - np.where(inner, *minimal.RADII))
  # |N(0, s^2)| has the mean s sqrt(2 / pi), here 0.064. Training with few steps
  # gives wider rings; points between them would be at 0.25 on average.
  assert distance.mean() < 1.5 * minimal.WIDTH * np.sqrt(2 / np.pi)
  # Each ring has half the points, on all sides: a mean of cos(angle) over n
  # angles has the standard deviation 1 / sqrt(2 n).
  error = 4 * np.sqrt(0.25 / len(x))
  assert abs(inner.mean() - 0.5) < error + 0.05
  direction = (x / radius[:, None]).mean(axis=0)
  np.testing.assert_allclose(direction, 0, atol=4 / np.sqrt(2 * len(x)) + 0.05)
  # The path starts at the prior and ends at the samples.
  assert abs(np.std(samples.frames[0]) - 1) < 0.05
  np.testing.assert_array_equal(samples.frames[-1], samples.x)


def test_it_is_short():
  with open(minimal.__file__) as file:
    lines = file.read().splitlines()
  assert len(lines) <= 100
