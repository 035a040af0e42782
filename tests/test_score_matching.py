"""Score matching: minimisers, and what the objectives have to do with another.

On Gaussian data N(m, C) the score is linear, -A (x - b) with A = C^-1, b = m;
all objectives are quadratic in (A, A b), so a few steps of Newton's method find
their minimum over such functions exactly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiment
import losses
import score_matching
import sde_lib
from data import toy

N = 40_000
MEAN = np.array([0.5, -1.0])
COVARIANCE = np.array([[1.2, 0.5], [0.5, 0.7]])
SIGMA = 0.6
# Compiled quickly rather than well: these programs run once.
quickly = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
RINGS = toy.DISTRIBUTIONS['toy/rings']


@functools.cache
def gaussian_data():
  """Points whose sample mean and covariance are MEAN and COVARIANCE."""
  z = np.random.default_rng(0).standard_normal((N, 2))
  z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T, ddof=0)).T)
  return MEAN + z @ np.linalg.cholesky(COVARIANCE).T


def linear_score(theta):
  """s(x) = c - A x for theta = (A, c), A [2, 2] symmetric, flattened."""
  a, b, d, *c = theta
  matrix = jnp.array([[a, b], [b, d]])
  return lambda x: jnp.stack(c)[None] - x @ matrix


def true_theta(covariance):
  a = np.linalg.inv(covariance)
  return np.array([a[0, 0], a[0, 1], a[1, 1], *(a @ MEAN)])


def exact(x):
  return linear_score(jnp.asarray(true_theta(COVARIANCE), x.dtype))(x)


OPTIONS = {'explicit': {'target': exact}, 'denoising': {'sigma': SIGMA}}


@pytest.mark.parametrize('name', score_matching.OBJECTIVES)
def test_minimiser_is_the_score(name):
  """By Newton's method, in float64; errors are those of the directions."""
  objective = functools.partial(
    score_matching.OBJECTIVES[name], **OPTIONS.get(name, {})
  )
  exactly = name in ('explicit', 'implicit')
  with jax.enable_x64(True):
    x = jnp.asarray(gaussian_data())

    def loss(theta):
      return jnp.mean(objective(jax.random.key(0), linear_score(theta), x))

    theta = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0])
    # The sum of squares that the mean is of is not quadratic: it is, in theta.
    gradient, hessian = jax.grad(loss)(theta), jax.hessian(loss)(theta)
    theta = np.asarray(theta - jnp.linalg.solve(hessian, gradient))
    slope = np.asarray(jax.grad(loss)(theta))
  np.testing.assert_allclose(slope, 0, atol=1e-9)
  noise = SIGMA**2 if name == 'denoising' else 0
  want = true_theta(COVARIANCE + noise * np.eye(2))
  tolerance = 1e-9 if exactly else 0.05
  np.testing.assert_allclose(theta, want, atol=tolerance)
  if name == 'denoising':  # and not the score of the clean data
    assert np.abs(theta - true_theta(COVARIANCE)).max() > 0.3


def _mean_and_error(values):
  values = np.asarray(values, np.float64)
  return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


@functools.cache
def _noisy_rings():
  """Points of the rings with noise, whose score is smooth."""
  x = RINGS.sample(np.random.default_rng(1), N)
  noise = np.random.default_rng(2).standard_normal(x.shape)
  return jnp.asarray(x + 0.3 * noise, jnp.float32)


def _rings_score(x):
  return jax.grad(lambda x: jnp.sum(RINGS.logp(x, 1.0, 0.3)))(x)


# Some vector fields, the last not a gradient.
FIELDS = {
  'zero': jnp.zeros_like,
  'linear': lambda x: -0.4 * x,
  'wave': lambda x: jnp.sin(2 * x),
  'rotation': lambda x: jnp.stack([x[:, 1] - x[:, 0], -x[:, 0]], axis=1),
}


def test_implicit_is_explicit_plus_a_constant():
  """The same constant, 1/2 E |grad log p|^2, for all fields."""
  x, rng = _noisy_rings(), jax.random.key(0)
  target = jax.jit(_rings_score)(x)
  constant = 0.5 * np.sum(np.asarray(target) ** 2, axis=1)
  for field in FIELDS.values():
    implicit = score_matching.implicit(rng, field, x)
    explicit = score_matching.explicit(rng, field, x, target=lambda x: target)
    mean, error = _mean_and_error(explicit - implicit - constant)
    assert abs(mean) < 4 * error + 1e-6
    # The interval is narrow enough to tell the fields apart.
    assert error < 0.02 * constant.mean()


@pytest.mark.parametrize('name', ['sliced', 'sliced_vr'])
def test_sliced_estimates_are_unbiased(name):
  """For fixed points, over directions; and the second has less variance."""
  x, field = _noisy_rings()[:4], FIELDS['rotation']
  want = score_matching.implicit(None, field, x)
  many = jnp.repeat(x, 20_000, axis=0)
  rng = jax.random.key(3)
  values = score_matching.OBJECTIVES[name](rng, field, many).reshape(4, -1)
  for row, value in zip(values, want, strict=True):
    mean, error = _mean_and_error(row)
    assert abs(mean - value) < 4 * error
    assert error < 0.1
  if name == 'sliced_vr':
    plain = score_matching.sliced(rng, field, many).reshape(4, -1)
    assert values.var(axis=1).mean() < 0.5 * plain.var(axis=1).mean()


def test_finite_difference_tends_to_sliced():
  """With an error of second order in the step."""
  with jax.enable_x64(True):
    x = jnp.asarray(_noisy_rings()[:1000], jnp.float64)
    rng, field = jax.random.key(1), FIELDS['wave']
    limit = score_matching.sliced(rng, field, x)
    steps = np.array([0.2, 0.1, 0.05, 0.025])
    errors = [
      np.abs(
        score_matching.finite_difference(rng, field, x, step=h) - limit
      ).mean()
      for h in steps
    ]
  order = np.polyfit(np.log(steps), np.log(errors), 1)[0]
  assert 1.9 < order < 2.1


def test_energy_score_is_minus_its_gradient():
  energy = lambda x: 0.5 * jnp.sum(x**2, axis=1) + x[:, 0]
  score = score_matching.energy_score(energy)(jnp.array([[1.0, 2.0]]))
  np.testing.assert_allclose(score, [[-2.0, -2.0]])


def test_weighted_sum_over_sigmas():
  """NCSN's Eq. 5-6 is `losses.score_matching` on the levels of a VE process.

  1/L sum_i sigma_i^2 l_i, with l_i = `denoising` at sigma_i, that is Vincent's
  objective, whose expectation over the noise is taken here for s(x) = -k x.
  """
  levels, k = 5, 0.4
  sde = sde_lib.VESDE(sigma_min=0.1, sigma_max=3.0, num_scales=levels)
  x0 = jnp.asarray(gaussian_data(), jnp.float32)
  loss = losses.score_matching(
    jax.random.key(0),
    lambda x, t: -k * x,
    sde,
    x0,
    times='grid',
    reduction='half_sum',
  )
  sigmas = np.geomspace(0.1, 3.0, levels)
  per_level, errors = zip(
    *[
      _mean_and_error(
        sigma**2
        * score_matching.denoising(
          jax.random.key(i), lambda x: -k * x, x0, sigma=sigma
        )
      )
      for i, sigma in enumerate(sigmas)
    ],
    strict=True,
  )
  mean, error = _mean_and_error(loss)
  bound = 4 * np.hypot(error, np.linalg.norm(errors) / levels)
  assert abs(mean - np.mean(per_level)) < bound
  assert bound < 0.05 * mean
  second = np.trace(COVARIANCE) + MEAN @ MEAN  # E |x0|^2
  closed = (
    0.5 * sigmas**2 * (k**2 * second + 2 * (k * sigmas - 1 / sigmas) ** 2)
  )
  assert abs(mean - closed.mean()) < 4 * error


@pytest.mark.parametrize('name', score_matching.OBJECTIVES)
def test_an_energy_trains_with_each(name):
  """The error of the score falls to a fraction, for all noise levels at once.

  The loss is the config's, at random times of a VE process.
  """
  config = experiment.load_config('configs/toy/mixture_ve.py')
  config.training.objective = name
  config.model.energy = True
  config.model.nf = 32
  with config.unlocked():
    config.sde.update(sigma_min=1.0, sigma_max=10.0)
  law = toy.DISTRIBUTIONS['toy/mixture']
  sde = experiment.make_sde(config)
  loss_fn = experiment.make_loss_fn(config, train=True)
  optimizer = experiment.make_optimizer(config)
  params = experiment.init_params(config, jax.random.key(0))
  x = jnp.asarray(law.sample(np.random.default_rng(0), 20_000), jnp.float32)

  def step(carry, key):
    params, state = carry
    rows = jax.random.randint(key, (256,), 0, len(x))
    batch = {'image': x[rows], 'label': jnp.zeros(256, int)}
    mean = lambda params: jnp.mean(loss_fn(params, key, batch))
    updates, state = optimizer.update(jax.grad(mean)(params), state, params)
    params = jax.tree.map(jnp.add, params, updates)
    return (params, state), None

  @quickly
  def train(params):
    keys = jax.random.split(jax.random.key(1), 200)
    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, keys)[0][0]

  @quickly
  def error(params):
    """E sigma^2 |s - grad log p_t|^2 over the data and times."""
    t = jnp.linspace(0, 1, len(x[:2000]))
    noisy = sde.perturb(
      x[:2000], t, jax.random.normal(jax.random.key(2), (2000, 2))
    )
    score_fn = experiment.make_score_fn(config, params)
    delta = score_fn(noisy, t) - law.score_fn(sde)(noisy, t)
    sigma = sde.marginal(t)[1]
    return jnp.mean(sigma**2 * jnp.sum(delta**2, axis=1))

  before, after = error(params), error(train(params))
  assert after < 0.25 * before


def test_bad_objectives_are_refused():
  config = experiment.load_config('configs/quickstart.py')
  config.training.objective = 'sliecd'
  with pytest.raises(ValueError, match='training.objective'):
    experiment.check(config)
  config.training.objective = 'explicit'
  with pytest.raises(ValueError, match='data.dataset'):
    experiment.check(config)
