"""Test the losses against closed forms."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy.spatial import distance

import losses
import sde_lib
from runtime import options
from tests.exact import GAUSSIAN

SDES = [
  sde_lib.VESDE(sigma_max=10.0),
  sde_lib.VPSDE(),
  sde_lib.SubVPSDE(),
  sde_lib.EDM(sigma_max=10.0),
  sde_lib.RectifiedFlow(),
]
name = lambda sde: type(sde).__name__


@pytest.mark.parametrize('sde', SDES, ids=name)
@pytest.mark.parametrize('weighting', ['variance', 'likelihood'])
def test_the_exact_score_minimises_the_loss(sde, weighting):
  """Check that scaling or shifting the exact score increases the loss."""
  x0 = jnp.asarray(GAUSSIAN.sample(0, 20_000))
  exact = GAUSSIAN.score_fn(sde)

  def loss(score_fn):
    weigh = losses.WEIGHTINGS[weighting]()
    objective = losses.ScoreMatching(weighting=weigh, eps=1e-2)
    return jnp.mean(objective(jax.random.key(0), score_fn, sde, x0))

  best = loss(exact)
  assert best < loss(lambda x, t: 0.9 * exact(x, t))
  assert best < loss(lambda x, t: 1.1 * exact(x, t))
  assert best < loss(lambda x, t: exact(x, t) + 0.3)


@pytest.mark.parametrize('sde', SDES, ids=name)
def test_importance_sampling_estimates_the_same_loss(sde):
  x0 = jnp.asarray(GAUSSIAN.sample(0, 50_000))
  zero = lambda x, t: jnp.zeros_like(x)
  estimates = {
    times: losses.ScoreMatching(
      times=losses.TIMES[times](), weighting=losses.Likelihood(), eps=0.01
    )(jax.random.key(1), zero, sde, x0)
    for times in ('uniform', 'importance')
  }
  uniform, importance = estimates['uniform'], estimates['importance']
  error = jnp.std(uniform) / np.sqrt(len(x0))
  np.testing.assert_allclose(
    jnp.mean(importance), jnp.mean(uniform), atol=4 * error
  )
  if isinstance(sde, sde_lib.VESDE):  # There log SNR is linear in t.
    np.testing.assert_allclose(importance, uniform, rtol=1e-3, atol=1e-4)
  else:
    assert jnp.std(importance) < 0.8 * jnp.std(uniform)


def test_grid_times_are_the_levels():
  sde = sde_lib.DDPM(num_scales=50)
  times = losses.Grid(num_scales=50)
  t, weight = times(jax.random.key(0), sde, 5000, 0.0)
  labels = np.asarray(t) * 49
  np.testing.assert_allclose(labels, np.rint(labels), atol=1e-4)
  assert set(np.rint(labels)) == set(range(50))
  assert (weight == 1).all()
  with pytest.raises(ValueError, match='num_scales'):
    losses.Grid()


def test_loss_is_per_example():
  x0 = jnp.zeros((3, 4, 4, 1))
  loss = losses.ScoreMatching()
  value = loss(jax.random.key(0), lambda x, t: -x, sde_lib.VPSDE(), x0)
  assert value.shape == (3,)


@pytest.mark.parametrize(
  ('cls', 'values'),
  [
    (losses.ScoreMatching, {'eps': 1.0}),
    (losses.ScoreMatching, {'eps': -1e-5}),
    (losses.Classification, {'eps': float('nan')}),
    (losses.Lognormal, {'p_std': 0.0}),
    (losses.EDM, {'sigma_data': 0.0}),
  ],
)
def test_options_out_of_range_are_refused(cls, values):
  with pytest.raises(ValueError, match=f'{cls.__name__}: {[*values][0]}='):
    cls(**values)


def test_a_section_of_a_config_makes_the_loss():
  section = {
    'loss': 'score_matching',
    'objective': 'explicit',
    'times': 'grid',
    'weighting': 'edm',
    'reduction': 'half_sum',
    'eps': 1e-3,
  }
  target = lambda x, t: -x
  given = {'num_scales': 7, 'sigma_data': 0.3, 'target': target}
  make = lambda **changes: options.build(
    losses.LOSSES, section | changes, 'training.loss', **given
  )
  assert make() == losses.ScoreMatching(
    objective=losses.Explicit(target=target),
    times=losses.Grid(num_scales=7),
    weighting=losses.EDM(sigma_data=0.3),
    reduction=losses.half_sum,
    eps=1e-3,
  )
  make().check(sde_lib.EDM())
  with pytest.raises(ValueError, match="weighting='edm' needs sde.name='edm'"):
    make().check(sde_lib.VESDE())
  with pytest.raises(ValueError, match='config.training.eps=2'):
    make(eps=2)
  times = make(loss='classification', times='lognormal', p_std=2.0)
  assert times == losses.Classification(
    times=losses.Lognormal(p_std=2.0), eps=1e-3
  )
  given = {}
  with pytest.raises(ValueError, match='set training.num_scales'):
    make(objective='sliced', reduction='mean')
  with pytest.raises(ValueError, match='data.dataset'):
    make(times='uniform')


# ------------------------------------------------------- assignment of noise


def images_and_noise(n=24, dims=(3, 2)):
  rng = np.random.default_rng(n)
  x0, z = rng.normal(size=(2, n, *dims)).astype(np.float32)
  flat = (v.reshape(n, -1) for v in (x0, z))
  return x0, z, distance.cdist(*flat, 'sqeuclidean')


def test_optimal_assignment_is_that_of_scipy():
  x0, z, cost = images_and_noise()
  _, want = optimize.linear_sum_assignment(cost)
  np.testing.assert_array_equal(jax.jit(losses.optimal)(x0, z), want)
  # On a line both are sorted.
  x0, z, _ = images_and_noise(dims=(1,))
  found = z[np.asarray(losses.optimal(x0, z))]
  order = np.argsort(x0[:, 0])
  np.testing.assert_array_equal(found[order], np.sort(z, axis=0))


def test_greedy_assignment_is_in_turn():
  x0, z, cost = images_and_noise()
  want = []
  for row in cost:
    row[want] = np.inf
    want.append(int(np.argmin(row)))
  np.testing.assert_array_equal(jax.jit(losses.greedy)(x0, z), want)
  assert sorted(want) == [*range(len(want))]


@pytest.mark.parametrize('noise', [*losses.ASSIGNMENTS])
def test_noise_is_assigned_in_training_only(noise):
  """Check which x_t the score is asked for."""
  x0, _, _ = images_and_noise()
  assign = losses.ASSIGNMENTS[noise]
  loss, sde, asked = losses.ScoreMatching(noise=assign), SDES[1], []

  def score_fn(x, t):
    asked.append((x, t))
    return -x

  for train in (True, False):
    loss(jax.random.key(0), score_fn, sde, x0, train=train)
  (x, t), (apart, _) = asked

  def noise_of(x):
    alpha, sigma = (sde_lib.expand(v, x) for v in sde.marginal(t))
    return np.asarray((x - alpha * x0) / sigma)

  z = jax.random.normal(jax.random.split(jax.random.key(0), 2)[1], x0.shape)
  np.testing.assert_allclose(noise_of(apart), z, atol=1e-3)
  np.testing.assert_allclose(noise_of(x), z[assign(x0, z)], atol=1e-3)
  assert (noise == 'independent') == np.array_equal(x, apart)


def test_noise_is_assigned_over_all_devices():
  program = """
import jax
jax.config.update('jax_num_cpu_devices', 4)
import numpy as np
import losses
from runtime.devices import make_layout, to_global
from tests.test_losses import images_and_noise
layout, (x0, z, _) = make_layout(), images_and_noise()
split = [to_global(layout.split, v) for v in (x0, z)]
assert len(split[0].addressable_shards) == 4
for assign in losses.ASSIGNMENTS.values():
  np.testing.assert_array_equal(jax.jit(assign)(*split), assign(x0, z))
"""
  root = pathlib.Path(__file__).parents[1]
  subprocess.run([sys.executable, '-c', program], cwd=root, check=True)


def test_min_snr_is_the_papers_weight_of_the_denoiser():
  """Compare with min(SNR, gamma) || D - x_0 ||^2 (Hang et al. 2023, Eq. 6)."""
  x0, z = jax.random.normal(jax.random.key(0), (2, 9, 3))
  t = jnp.linspace(0.02, 0.95, 9)
  score_fn = lambda x, t: -0.7 * x
  for sde in (sde_lib.VPSDE(), sde_lib.EDM(sigma_max=10.0)):
    x = sde.perturb(x0, t, z)
    error = sde.denoise(x, t, score_fn(x, t)) - x0
    snr = jnp.exp(sde.log_snr(t))
    want = jnp.minimum(snr, 5.0) * losses.mean(error**2)
    assert (snr > 5).any() and (snr < 5).any()
    found = losses.denoising_loss(
      score_fn, sde, x0, t, z,
      weighting=losses.MinSNR(), reduction=losses.mean,
    )  # fmt: skip
    np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize('reduction', ['mean', 'half_sum'])
def test_the_best_log_variance_is_that_of_the_loss(reduction):
  """Fit a constant u: at the minimum e^u is the mean square of an entry."""
  x0, sde = jnp.zeros((4000, 3)), sde_lib.EDM()
  loss = losses.ScoreMatching(
    times=losses.Single(), eps=0.5, reduction=losses.REDUCTIONS[reduction]
  )
  half = lambda x, t: -0.4 * x / 40.0**2  # The score of data at 0 is -x / s^2.
  value = lambda u: loss(
    jax.random.key(0), half, sde, x0, lambda t: jnp.full_like(t, u)
  ).mean()
  slope = jax.grad(value)
  np.testing.assert_allclose(slope(jnp.log(0.36)), 0, atol=0.03)
  assert slope(jnp.log(0.3)) < -0.1 < 0.1 < slope(jnp.log(0.45))
  plain = loss(jax.random.key(0), half, sde, x0).mean()
  np.testing.assert_allclose(value(0.0), plain, rtol=1e-6)
