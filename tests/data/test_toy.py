"""Tests of points in the plane: densities, samples and scores agree."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import i0e

import sde_lib
from data import batches, datasets, pixels, toy

LAWS = toy.DISTRIBUTIONS
SIDE = 192


def config(name, **changes):
  fields = {
    'dataset': name,
    'shape': (2,),
    'std': (),
    'centered': False,
    'num_channels': 3,
  }
  return argparse.Namespace(**fields | changes)


def cells(law, half):
  """Return the centres [SIDE^2, 2] of a grid, its edges, and a cell's area."""
  edges = np.linspace(-half, half, SIDE + 1)
  centre = (edges[1:] + edges[:-1]) / 2
  x = np.stack(np.meshgrid(centre, centre, indexing='ij'), axis=-1)
  return x.reshape(-1, 2).astype(np.float32), edges, (2 * half / SIDE) ** 2


DENSITIES = [(name, 1.0, 0.0) for name in LAWS if LAWS[name].has_density] + [
  (name, 0.6, 0.3) for name in LAWS
]


@pytest.mark.parametrize('name, alpha, sigma', DENSITIES)
def test_density(name, alpha, sigma):
  """The density integrates to 1 and predicts the samples in 16 x 16 bins."""
  law = LAWS[name]
  x, edges, area = cells(law, law.extent)
  density = np.exp(jax.jit(law.logp)(x, alpha, sigma)).reshape(SIDE, SIDE)
  # Cells at the edges of the checkerboard contain a jump.
  jumps = name == 'toy/checkerboard' and not sigma
  assert abs(density.sum() * area - 1) < (0.01 if jumps else 2e-3)

  n, rng = 200_000, np.random.default_rng(0)
  points = alpha * law.sample(rng, n) + sigma * rng.standard_normal((n, 2))
  coarse = edges[:: SIDE // 16]
  counts, *_ = np.histogram2d(*points.T, bins=(coarse, coarse))
  want = density.reshape(16, SIDE // 16, 16, SIDE // 16).sum((1, 3)) * area * n
  if jumps:  # The squares of the checkerboard are not unions of bins.
    bins = want > 0.5 * want.max()
    want, counts = want[bins], counts[bins]
    assert abs(counts.sum() / want.sum() - 1) < 0.02
  else:
    chi = (counts - want) / np.sqrt(want + 1)
    assert np.abs(chi).max() < 5.5
    chi = chi[want > 20]
    # chi^2 has mean 1 and variance 2.
    assert abs((chi**2).mean() - 1) < 4 * np.sqrt(2 / len(chi))


def test_rings_in_closed_form():
  """A ring with Gaussian noise has the density of a Rice distribution."""
  law = LAWS['toy/rings']
  x = law.sample(np.random.default_rng(1), 500)
  radius, want = np.linalg.norm(x, axis=1), 0
  for r in (0.8, 1.6):
    v = law.std**2
    bell = np.exp(-((radius - r) ** 2) / (2 * v)) / (2 * np.pi * v)
    want += bell * i0e(radius * r / v) / 2
  got = jax.jit(law.logp)(np.float32(x))
  np.testing.assert_allclose(got, np.log(want), atol=1e-3)


@pytest.mark.parametrize('name', LAWS)
def test_score_is_the_gradient(name):
  """The score equals central differences, also where the density is tiny."""
  law, sde = LAWS[name], sde_lib.VPSDE()
  x = np.float32(np.random.default_rng(0).uniform(-2, 2, (40, 2)))
  t, h = np.full(40, 0.3, np.float32), np.float32([[1e-2, 0.0]])

  @jax.jit
  def values(x):
    low, high = (law.logp(v, *sde.marginal(t)) for v in (x - h, x + h))
    return law.score_fn(sde)(x, t), high - low

  score, slope = map(np.asarray, values(x))
  np.testing.assert_allclose(score[:, 0], slope / 2e-2, rtol=0.02, atol=0.05)


def test_far_from_the_checkerboard():
  """Far away the score points back to the data, without NaN."""
  x = np.float32([[30.0, 0.3], [-30.0, 0.3]])
  law = LAWS['toy/checkerboard']
  score = jax.jit(jax.grad(lambda x: jnp.sum(law.logp(x, 1.0, 0.5))))(x)
  np.testing.assert_allclose(score[:, 0], [-112, 112], rtol=0.01)


@pytest.mark.parametrize('name', LAWS)
def test_dataset(name):
  train = datasets.load(config(name), 'train')
  test = datasets.load(config(name), 'test')
  assert (len(train), len(test)) == (100_000, 4000)
  batch = batches.train_batch(train, 3, batch_size=5, seed=0)
  assert batch['image'].shape == (5, 2)
  assert batch['image'].dtype == np.float32
  assert batch['label'].dtype == np.int32
  again = datasets.load(config(name), 'train')
  assert again.fingerprint == train.fingerprint != test.fingerprint
  half = LAWS[name].extent
  assert (np.abs(test.fetch(range(4000))) < half).mean() > 0.999


def test_bad_dims_are_refused():
  for changes in ({'shape': ()}, {'centered': True}):
    with pytest.raises(
      ValueError, match=r'data.shape=.2,.*data.centered=False'
    ):
      datasets.load(config('toy/rings', **changes), 'train')


def test_sigma_max_of_points():
  train = datasets.load(config('toy/checkerboard'), 'test')
  got = pixels.sigma_max(train)
  assert 5.5 < got < np.sqrt(32)
