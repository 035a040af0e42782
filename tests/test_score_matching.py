"""Test the minimisers of the objectives, and how the objectives are related.

On Gaussian data N(m, C) the score is linear, -A (x - b) with A = C^-1, b = m.
All objectives are quadratic in (A, A b), so that one step of Newton's method
finds their minimum over such functions exactly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiment
import losses
import sde_lib
from data import toy

N = 40_000
MEAN = np.array([0.5, -1.0])
COVARIANCE = np.array([[1.2, 0.5], [0.5, 0.7]])
SIGMA = 0.6
RINGS = toy.DISTRIBUTIONS['toy/rings']


@functools.cache
def gaussian_data():
  """Return points whose sample mean and covariance are as above."""
  z = np.random.default_rng(0).standard_normal((N, 2))
  z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T, ddof=0)).T)
  return MEAN + z @ np.linalg.cholesky(COVARIANCE).T


def linear_score(theta):
  """Return s(x) = c - A x for theta = (A, c), A [2, 2] symmetric."""
  a, b, d, *c = theta
  matrix = jnp.array([[a, b], [b, d]])
  return lambda x: jnp.stack(c)[None] - x @ matrix


def true_theta(covariance):
  a = np.linalg.inv(covariance)
  return np.array([a[0, 0], a[0, 1], a[1, 1], *(a @ MEAN)])


def exact(x):
  return linear_score(jnp.asarray(true_theta(COVARIANCE), x.dtype))(x)


OPTIONS = {'explicit': {'target': exact}, 'denoising': {'sigma': SIGMA}}


# 'consistency' learns a denoiser of EDM; see tests/test_consistency.py.
OBJECTIVES = [name for name in losses.OBJECTIVES if name != 'consistency']


@pytest.mark.parametrize('name', OBJECTIVES)
def test_minimiser_is_the_score(name):
  """Use Newton's method in float64; errors are those of the directions."""
  objective = functools.partial(getattr(losses, name), **OPTIONS.get(name, {}))
  exactly = name in ('explicit', 'implicit')
  with jax.enable_x64(True):
    x, theta = gaussian_data(), np.array([1.0, 0.0, 1.0, 0.0, 0.0])

    @jax.jit
    def slope(theta, x):
      def loss(theta):
        return jnp.mean(objective(jax.random.key(0), linear_score(theta), x))

      return jax.grad(loss)(theta)

    # The loss is quadratic in theta, so that one step is enough, and exact
    # differences of slopes are its Hessian.
    gradient = np.asarray(slope(theta, x))
    hessian = [slope(theta + unit, x) - gradient for unit in np.eye(5)]
    theta = theta - np.linalg.solve(hessian, gradient)
    slope = np.asarray(slope(theta, x))
  np.testing.assert_allclose(slope, 0, atol=1e-9)
  noise = SIGMA**2 if name == 'denoising' else 0
  want = true_theta(COVARIANCE + noise * np.eye(2))
  tolerance = 1e-9 if exactly else 0.05
  np.testing.assert_allclose(theta, want, atol=tolerance)
  if name == 'denoising':  # It is not the score of the clean data.
    assert np.abs(theta - true_theta(COVARIANCE)).max() > 0.3


def _mean_and_error(values):
  values = np.asarray(values, np.float64)
  return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


@functools.cache
def _noisy_rings():
  """Return points of the rings with noise, whose score is smooth."""
  x = RINGS.sample(np.random.default_rng(1), N)
  noise = np.random.default_rng(2).standard_normal(x.shape)
  return np.float32(x + 0.3 * noise)


def _rings_score(x):
  return jax.grad(lambda x: jnp.sum(RINGS.logp(x, 1.0, 0.3)))(x)


# Some vector fields, the last of which is not a gradient.
FIELDS = {
  'zero': jnp.zeros_like,
  'linear': lambda x: -0.4 * x,
  'wave': lambda x: jnp.sin(2 * x),
  'rotation': lambda x: jnp.stack([x[:, 1] - x[:, 0], -x[:, 0]], axis=1),
}


def test_implicit_is_explicit_plus_a_constant():
  """Check for all fields that the constant is 1/2 E |grad log p|^2."""

  @jax.jit
  def differences(x):
    target = _rings_score(x)
    found = [
      losses.explicit(None, field, x, target=lambda x: target)
      - losses.implicit(None, field, x)
      for field in FIELDS.values()
    ]
    return found, target

  found, target = differences(_noisy_rings())
  constant = 0.5 * np.sum(np.square(target), axis=1)
  for difference in found:
    mean, error = _mean_and_error(difference - constant)
    assert abs(mean) < 4 * error + 1e-6
    # The interval is narrow enough to tell the fields apart.
    assert error < 0.02 * constant.mean()


@pytest.mark.parametrize('name', ['sliced', 'sliced_vr'])
def test_sliced_estimates_are_unbiased(name):
  """Average over directions at fixed points; the second has less variance."""
  x, field = _noisy_rings()[:4], FIELDS['rotation']
  many = np.repeat(x, 20_000, axis=0)

  @jax.jit
  def estimates(x):
    kinds = losses.sliced, losses.sliced_vr
    return losses.implicit(None, field, x[::20_000]), {
      kind.__name__: kind(jax.random.key(3), field, x).reshape(4, -1)
      for kind in kinds
    }

  want, values = jax.tree.map(np.asarray, estimates(many))
  values, plain = values[name], values['sliced']
  for row, value in zip(values, want, strict=True):
    mean, error = _mean_and_error(row)
    assert abs(mean - value) < 4 * error
    assert error < 0.1
  if name == 'sliced_vr':
    assert values.var(axis=1).mean() < 0.5 * plain.var(axis=1).mean()


def test_finite_difference_tends_to_sliced():
  """Check that the error is of second order in the step."""
  with jax.enable_x64(True):
    x = np.float64(_noisy_rings()[:1000])
    rng, field = jax.random.key(1), FIELDS['wave']
    steps = np.array([0.2, 0.1, 0.05, 0.025])

    @jax.jit
    def error(x, h):
      found = losses.finite_difference(rng, field, x, step=h)
      return jnp.abs(found - losses.sliced(rng, field, x)).mean()

    errors = [error(x, h) for h in steps]
  order = np.polyfit(np.log(steps), np.log(errors), 1)[0]
  assert 1.9 < order < 2.1


def test_energy_score_is_minus_its_gradient():
  energy = lambda x: 0.5 * jnp.sum(x**2, axis=1) + x[:, 0]
  score = jax.jit(losses.energy_score(energy))(np.float32([[1, 2]]))
  np.testing.assert_allclose(score, [[-2.0, -2.0]])


def test_weighted_sum_over_sigmas():
  """Check that `ScoreMatching` on the levels of VE is NCSN's Eq. 5-6.

  It is 1/L sum_i sigma_i^2 l_i, where l_i is `denoising` at sigma_i, Vincent's
  objective, whose expectation over the noise is known for s(x) = -k x.
  """
  levels, k = 5, 0.4
  sde = sde_lib.VESDE(sigma_min=0.1, sigma_max=3.0)
  x0 = np.float32(gaussian_data())
  objective = losses.ScoreMatching(
    times=losses.Grid(num_scales=levels), reduction=losses.half_sum
  )
  sigmas = np.geomspace(0.1, 3.0, levels)

  @jax.jit
  def values(x0):
    loss = objective(jax.random.key(0), lambda x, t: -k * x, sde, x0)
    return loss, [
      sigma**2
      * losses.denoising(jax.random.key(i), lambda x: -k * x, x0, sigma=sigma)
      for i, sigma in enumerate(sigmas.tolist())
    ]

  loss, at_levels = values(x0)
  per_level, errors = zip(*map(_mean_and_error, at_levels), strict=True)
  mean, error = _mean_and_error(loss)
  bound = 4 * np.hypot(error, np.linalg.norm(errors) / levels)
  assert abs(mean - np.mean(per_level)) < bound
  assert bound < 0.05 * mean
  second = np.trace(COVARIANCE) + MEAN @ MEAN  # E |x0|^2
  closed = (
    0.5 * sigmas**2 * (k**2 * second + 2 * (k * sigmas - 1 / sigmas) ** 2)
  )
  assert abs(mean - closed.mean()) < 4 * error


LAW = toy.DISTRIBUTIONS['toy/mixture']


def energy_model(objective):
  """Return the Experiment of an energy on the mixture, by an objective."""
  config = experiment.load_config('configs/toy/mixture_ve.py')
  config.training.objective = objective
  config.model.energy = True
  config.model.nf = 32
  with config.unlocked():
    config.sde.update(sigma_min=1.0, sigma_max=10.0)
  return experiment.build(config)


@functools.cache
def energy_training():
  """Return (train(params, i), error(params), params), one program for all i."""
  models = [energy_model(name) for name in OBJECTIVES]
  sde, optimizer = models[0].sde, models[0].optimizer
  x = np.float32(LAW.sample(np.random.default_rng(0), 20_000))

  @jax.jit
  def train(params, i):
    def step(carry, key):
      params, state = carry
      rows = jax.random.randint(key, (256,), 0, len(x))
      batch = {'image': jnp.asarray(x)[rows], 'label': jnp.zeros(256, int)}

      def loss(params):
        branches = [
          lambda params, model=model: model.loss(params, key, batch)
          for model in models
        ]
        return jnp.mean(jax.lax.switch(i, branches, params))

      updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      params = jax.tree.map(jnp.add, params, updates)
      return (params, state), None

    keys = jax.random.split(jax.random.key(1), 200)
    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, keys)[0][0]

  @jax.jit
  def error(params):
    """Return E sigma^2 |s - grad log p_t|^2 over the data and times."""
    t = jnp.linspace(0, 1, len(x[:2000]))
    noisy = sde.perturb(
      x[:2000], t, jax.random.normal(jax.random.key(2), (2000, 2))
    )
    score_fn = models[0].score_fn(params)
    delta = score_fn(noisy, t) - LAW.score_fn(sde)(noisy, t)
    sigma = sde.marginal(t)[1]
    return jnp.mean(sigma**2 * jnp.sum(delta**2, axis=1))

  return train, error, models[0].init_params(jax.random.key(0))


@pytest.mark.parametrize('name', OBJECTIVES)
def test_an_energy_trains_with_each(name):
  """Check that the error of the score falls to a fraction at all noise levels.

  The loss is the config's, at random times of a VE process.
  """
  train, error, params = energy_training()
  trained = train(params, OBJECTIVES.index(name))
  assert error(trained) < 0.25 * error(params)


def test_bad_objectives_are_refused():
  config = experiment.load_config('configs/quickstart.py')
  config.training.objective = 'sliecd'
  with pytest.raises(ValueError, match='training.objective'):
    experiment.build(config)
  config.training.objective = 'explicit'
  with pytest.raises(ValueError, match='data.dataset'):
    experiment.build(config)
