"""Compare guided scores with conditional distributions in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import controllable_generation as control
import losses
import sampling
import sde_lib
from runtime import options
from solvers import grids, ode, predictors
from tests.exact import Mixture, optimized

VE = sde_lib.VESDE(sigma_max=10.0)
VP, SUBVP = sde_lib.VPSDE(), sde_lib.SubVPSDE()
BATCH = 4000
name = lambda sde: type(sde).__name__


def gaussian_score(mean, cov):
  """Return sde -> the exact score of its marginals for data N(mean, cov)."""
  # The noise is the same in all directions, so the axes of `cov` stay.
  variances, axes = (np.float32(v) for v in np.linalg.eigh(cov))
  mean = np.float32(mean)

  def make(sde):
    def score(x, t):
      alpha, sigma = (v[:, None] for v in sde.marginal(t))
      along_axes = (x - alpha * mean[None]) @ axes
      return -along_axes / (alpha**2 * variances[None] + sigma**2) @ axes.T

    return score

  return make


def posterior(mean, cov, matrix, y, noise_std):
  """Return mean and covariance of x given y = matrix x + noise_std n."""
  seen = matrix @ cov @ matrix.T + noise_std**2 * np.eye(len(matrix))
  gain = cov @ matrix.T @ np.linalg.inv(seen)
  return mean + gain @ (y - matrix @ mean), cov - gain @ matrix @ cov


def linear(matrix):
  return lambda x: x @ np.float32(matrix).T


def assert_moments(x, mean, cov, *, bias):
  """Check mean and covariance of x within 4.5 standard errors and a bias."""
  x, cov, mean = np.float64(x), np.asarray(cov), np.asarray(mean)
  scale = np.sqrt(np.maximum(np.diag(cov), 1e-4))
  error = 4.5 / np.sqrt(len(x)) + bias
  np.testing.assert_allclose((x.mean(0) - mean) / scale, 0, atol=error)
  relative = (np.cov(x.T) - cov) / np.outer(scale, scale)
  np.testing.assert_allclose(relative, 0, atol=np.sqrt(2) * error)


pc = sampling.PC(
  predictor=predictors.ReverseDiffusion(), num_steps=400, eps=1e-3
)
flow = ode.ODE(eps=1e-3, rtol=1e-3, atol=1e-3)
fast = sampling.SAMPLERS['dpmpp_2m'](
  num_steps=50, eps=1e-3, grid=grids.LogSNR()
)


def run(sampler, sde, score_fn, dims):
  """Return samples [BATCH, dims]."""

  @optimized
  def program(rng):
    rng, rng_prior = jax.random.split(rng)
    z = sde.prior_sample(rng_prior, (BATCH, dims))
    return sampler(rng, score_fn, sde, z).x

  return np.asarray(program(jax.random.key(0)))


# Each guidance is tested with three samplers and three processes.
PAIRS = pytest.mark.parametrize(
  ('sde', 'sampler'),
  [(VE, pc), (VP, flow), (SUBVP, fast)],
  ids=['ve-pc', 'vp-ode', 'subvp-fast'],
)

PRIOR_MEAN, PRIOR_STD = np.array([0.4, -0.3, 0.2]), 0.5
PRIOR_COV = PRIOR_STD**2 * np.eye(3)
PRIOR = gaussian_score(PRIOR_MEAN, PRIOR_COV)
TWO_OF_THREE = np.array([[1.0, 0.5, 0.0], [-0.3, 0.8, 1.2]])


@PAIRS
def test_pigdm_samples_the_posterior(sde, sampler):
  """PiGDM is exact for isotropic Gaussian priors of known std, and any A."""
  y, noise_std = np.array([0.9, -0.8]), 0.3
  method = control.PiGDM(data_std=PRIOR_STD, noise_std=noise_std, ramp=0.0)
  guided = method(
    PRIOR(sde), sde, operator=linear(TWO_OF_THREE),
    y=np.tile(np.float32(y), (BATCH, 1)),
  )  # fmt: skip
  x = run(sampler, sde, guided, 3)
  truth = posterior(PRIOR_MEAN, PRIOR_COV, TWO_OF_THREE, y, noise_std)
  assert_moments(x, *truth, bias=0.04)


@PAIRS
def test_projection_samples_the_posterior(sde, sampler):
  """Projection is exact if seen and unseen directions are independent."""
  mask, y = np.array([True, False, True]), np.array([0.9, -0.8])
  guided = control.Projection()(
    PRIOR(sde), sde, operator=control.Inpaint(mask=mask),
    y=np.tile(np.float32(y), (BATCH, 1)),
  )  # fmt: skip
  x = run(sampler, sde, guided, 3)
  np.testing.assert_allclose(x[:, mask], np.tile(y, (BATCH, 1)), atol=1e-4)
  unseen, cov = x[:, ~mask], PRIOR_COV[:1, :1]
  assert_moments(np.hstack([unseen, unseen[::-1]]), PRIOR_MEAN[[1, 1]],
                 cov * np.eye(2), bias=0.04)  # fmt: skip


@PAIRS
def test_dps_samples_the_posterior_of_a_sure_prior(sde, sampler):
  """DPS is exact if the prior varies much less than the measurement."""
  mean, cov, noise_std = np.zeros(2), 0.3**2 * np.eye(2), 1.5
  matrix, y = np.array([[1.0, 0.0]]), np.array([8.0])
  guided = control.DPS(noise_std=noise_std, ramp=0.0)(
    gaussian_score(mean, cov)(sde), sde, operator=linear(matrix),
    y=np.tile(np.float32(y), (BATCH, 1)),
  )  # fmt: skip
  truth = posterior(mean, cov, matrix, y, noise_std)
  assert truth[0][0] > 0.3  # One standard deviation away from the prior.
  assert_moments(run(sampler, sde, guided, 2), *truth, bias=0.08)


CLASSES = Mixture(weights=(0.7, 0.3), means=((0.8, 0.1), (-0.2, 0.4)), std=0.4)


def of_class(k):
  return Mixture((0.5, 0.5), (CLASSES.means[k],) * 2, CLASSES.std)


def log_prob(sde, k):
  """Return the exact log p_t(k | x) of class k of `CLASSES`."""

  def function(x, t):
    at = sde.marginal(t)
    return of_class(k).logp(x, *at) - CLASSES.logp(x, *at)

  return function


@PAIRS
def test_classifier_guidance_samples_the_class(sde, sampler):
  guided = control.ClassifierGuidance()(
    CLASSES.score_fn(sde), sde, log_prob=log_prob(sde, 1)
  )
  x = run(sampler, sde, guided, 2)
  assert_moments(x, CLASSES.means[1], 0.4**2 * np.eye(2), bias=0.04)


def labelled_score(sde):
  """Return score_fn: (x, t) of the mixture, (x, t, label) of its classes."""
  both = [of_class(k).score_fn(sde) for k in (0, 1)]

  def score_fn(x, t, label=None):
    if label is None:
      return CLASSES.score_fn(sde)(x, t)
    first, second = (f(x, t) for f in both)
    return jnp.where(sde_lib.expand(label, x) == 0, first, second)

  return score_fn


@PAIRS
def test_labels_sample_the_class(sde, sampler):
  guided = control.ClassifierFree()(
    labelled_score(sde), sde, label=np.ones(BATCH, np.int32)
  )
  x = run(sampler, sde, guided, 2)
  assert_moments(x, CLASSES.means[1], 0.4**2 * np.eye(2), bias=0.04)


# ------------------------------------------------- scores at arbitrary states


def states(dims):
  x = 2 * np.random.default_rng(1).standard_normal((64, dims))
  return np.float32(x), np.linspace(0.02, 1.0, 64, dtype=np.float32)


@pytest.mark.parametrize('sde', [VE, VP, SUBVP], ids=name)
@pytest.mark.parametrize('noise_std', [0.0, 0.3])
def test_pigdm_is_the_conditional_score(sde, noise_std):
  y = np.array([0.9, -0.8])
  method = control.PiGDM(data_std=PRIOR_STD, noise_std=noise_std, ramp=0.0)
  guided = method(
    PRIOR(sde), sde, operator=linear(TWO_OF_THREE),
    y=np.tile(np.float32(y), (64, 1)),
  )  # fmt: skip
  truth = posterior(PRIOR_MEAN, PRIOR_COV, TWO_OF_THREE, y, noise_std)
  x, t = states(3)
  exact = gaussian_score(*truth)(sde)
  got, wanted = jax.jit(lambda x, t: (guided(x, t), exact(x, t)))(x, t)
  scale = np.abs(wanted).max(-1, keepdims=True)
  np.testing.assert_allclose(got / scale, wanted / scale, atol=5e-3)


@pytest.mark.parametrize('method', ['dps', 'pigdm'])
def test_ramp_weighs_the_guidance(method):
  """The weight is 1 / (1 + (ramp sigma / alpha)^2), which fades near t = 1."""
  x, t = states(3)
  data_std = {'data_std': 1.0} if method == 'pigdm' else {}

  def guidance(x, t, ramp):
    found = control.METHODS[method](noise_std=0.3, ramp=ramp, **data_std)
    operator, y = linear(TWO_OF_THREE), np.ones((64, 2), np.float32)
    score_fn = found(PRIOR(VP), VP, operator=operator, y=y)
    return score_fn(x, t) - PRIOR(VP)(x, t)

  full, ramped = jax.jit(
    lambda x, t: [guidance(x, t, ramp) for ramp in (0.0, 0.5)]
  )(x, t)
  alpha, sigma = (np.asarray(v)[:, None] for v in VP.marginal(t))
  weight = alpha**2 / (alpha**2 + 0.25 * sigma**2)
  assert weight[0] > 0.99 and weight[-1] < 1e-3
  np.testing.assert_allclose(ramped, weight * full, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('sde', [VE, VP, SUBVP], ids=name)
def test_guidance_scales(sde):
  """Scales 0 and 1 give the two scores; the score is linear in the scale."""
  score_fn, (x, t) = labelled_score(sde), states(2)
  label = np.arange(64) % 2

  def labels(scale, label):
    return control.ClassifierFree(scale=scale)(score_fn, sde, label=label)

  # By Bayes' rule an exact classifier gives the same score as the labels.
  bayes = control.ClassifierGuidance(scale=3.0)(
    score_fn, sde, log_prob=log_prob(sde, 1)
  )
  scores = [
    score_fn,
    lambda x, t: score_fn(x, t, label),
    *(labels(scale, label) for scale in (0.0, 1.0, 3.0)),
    bayes,
    labels(3.0, np.ones(64, np.int32)),
  ]
  free, given, none, one, three, bayes, ones = map(
    np.asarray, jax.jit(lambda x, t: [f(x, t) for f in scores])(x, t)
  )
  np.testing.assert_array_equal(none, free)
  np.testing.assert_array_equal(one, given)
  np.testing.assert_allclose(three, 3 * given - 2 * free, rtol=1e-3)
  np.testing.assert_allclose(bayes, ones, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('scale', [0.5, 2.0])
def test_guidance_of_a_gaussian_pair(scale):
  """p(x)^(1 - s) p(x | c)^s of two Gaussians is a Gaussian in closed form."""
  free, given = (np.zeros(2), np.eye(2)), (np.ones(2), 0.25 * np.eye(2))
  pair = [gaussian_score(*g)(VP) for g in (free, given)]
  score_fn = lambda x, t, *label: pair[len(label)](x, t)
  guided = control.ClassifierFree(scale=scale)(
    score_fn, VP, label=np.zeros(64, np.int32)
  )
  x, t = states(2)
  alpha, sigma = (np.asarray(v)[:, None] for v in VP.marginal(t))
  weights = (
    (1 - scale) / (alpha**2 + sigma**2),
    scale / (0.25 * alpha**2 + sigma**2),
  )
  precision = sum(weights)
  mean = weights[1] * alpha / precision
  wanted = -(x - mean) * precision
  got = jax.jit(guided)(x, t)
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_projection_of_a_correlated_prior_is_an_approximation():
  """Both projections of the paper are biased; PiGDM is closer to the truth."""
  mean, cov = np.array([0.3, -0.2]), np.array([[0.25, 0.2], [0.2, 0.25]])
  matrix, y = np.array([[1.0, 0.0]]), np.array([0.8])
  truth, _ = posterior(mean, cov, matrix, y, 0.0)
  options = {
    'operator': linear(matrix),
    'y': jnp.full((BATCH, 1), 0.8),
  }
  errors = {}
  for kind, method in {
    'own': control.Projection(),
    'fresh': control.Projection(fresh_noise=True, seed=3),
    'pigdm': control.PiGDM(data_std=0.5, ramp=0.0),
  }.items():
    x = run(pc, VP, method(gaussian_score(mean, cov)(VP), VP, **options), 2)
    np.testing.assert_allclose(x[:, 0], 0.8, atol=1e-4)
    errors[kind] = abs(x[:, 1].mean() - truth[1])
  assert errors['pigdm'] < 0.05 < 0.1 < errors['own'] < 0.2
  assert abs(errors['own'] - errors['fresh']) < 0.04


# ----------------------------------------------------------------- operators

SHAPE = (2, 8, 8, 3)
MASK = np.random.default_rng(0).random((8, 8)) < 0.4
OPTIONS = {
  'inpaint': {'mask': MASK},
  'super_resolution': {'factor': 4},
  'deblur': {'width': 0.8},
  'overexposed': {'gain': 2.0, 'centered': True},
  'own': {'operator': 'jax.numpy:sin'},
}


def operator(which):
  return control.OPERATORS[which](**OPTIONS.get(which, {}))


def image(seed):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)


@pytest.mark.parametrize('which', control.OPERATORS)
def test_operator(which):
  """Linear operators have an adjoint, and orthonormal ones A A^T = I."""
  a, x = operator(which), image(0)
  if which in ('overexposed', 'phase_retrieval', 'own'):
    jax.eval_shape(a, x)
    return
  adjoint = control.transpose(a, SHAPE)

  @jax.jit
  def program(x):
    y = a(x)
    v = control.noise_like(jax.random.key(1), y)
    seen = y if which == 'fourier' else v  # The range of A.
    return y, v, adjoint(v), seen, a(adjoint(seen))

  y, v, back, seen, again = program(x)
  np.testing.assert_allclose(
    np.vdot(y, v).real, np.vdot(x, back), rtol=1e-4, atol=1e-4
  )
  if control.OPERATORS[which].orthonormal:
    np.testing.assert_allclose(again, seen, atol=1e-6)


def test_operators_values():
  x = np.linspace(-1, 1, 2 * 8 * 8 * 3, dtype=np.float32).reshape(SHAPE)
  names = [name for name in control.OPERATORS if name not in ('own', 'fourier')]
  apply = jax.jit(lambda x: {name: operator(name)(x) for name in names})
  seen, shifted = apply(x), apply(np.roll(x, (3, 5), (1, 2)))
  np.testing.assert_array_equal(seen['inpaint'], x[:, MASK])
  np.testing.assert_allclose(
    seen['colorize'], x.mean(-1) * np.sqrt(3), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    seen['super_resolution'][0, 0, 1, 2],
    4 * x[0, :4, 4:, 2].mean(), rtol=1e-5,
  )  # fmt: skip
  flat = apply(np.full(SHAPE, 0.3, np.float32))
  np.testing.assert_allclose(flat['deblur'], 0.3, rtol=1e-5)
  assert seen['deblur'].std() < x.std()
  # tanh(2 x) of x in [0, 1].
  np.testing.assert_allclose(
    seen['overexposed'], 2 * np.tanh(x + 1) - 1, atol=1e-6
  )
  np.testing.assert_allclose(
    shifted['phase_retrieval'], seen['phase_retrieval'], atol=1e-4
  )


@pytest.mark.parametrize('which', control.OPERATORS)
def test_pictures_of_noisy_measurements(which):
  """Pictures have no NaN, although noise makes magnitudes negative."""
  a = operator(which)

  @jax.jit
  def shown(x):
    y = a(x)
    y = y + 2 * jax.random.normal(jax.random.key(1), y.shape)
    return a.picture(y, SHAPE)

  shown = shown(image(0))
  assert shown.shape == SHAPE and np.isfinite(shown).all()


@pytest.mark.parametrize('which', ['inpaint', 'colorize', 'super_resolution'])
def test_known_values_are_returned_exactly(which):
  """This holds for a wrong score, a corrector, and both kinds of noise."""
  a, x0 = operator(which), 0.5 * image(0)
  wrong = lambda x, t: -x  # The score of N(0, I), which x0 is no sample of.
  z = image(1)
  sampler = sampling.PC(
    predictor=predictors.EulerMaruyama(),
    corrector=predictors.Langevin(snr=0.16), num_steps=30, eps=1e-3,
  )  # fmt: skip

  @jax.jit
  def sample(key):
    found, y = [], a(x0)
    for fresh in (False, True):
      method = control.Projection(fresh_noise=fresh, seed=5)
      x = sampler(key, method(wrong, VP, operator=a, y=y), VP, z).x
      found.append((x, a(x) - y))
    return found

  for x, difference in sample(jax.random.key(0)):
    np.testing.assert_allclose(difference, 0, atol=2e-6)
    assert np.abs(x - x0).max() > 0.5


@pytest.mark.parametrize('method', ['dps', 'pigdm'])
def test_nonlinear_measurements_are_met(method):
  """A photograph with saturated highlights is met within the noise."""
  truth, z = 0.5 * image(3)[:1], image(2)[:1]
  a, noise_std = operator('overexposed'), 0.1
  options = {'data_std': 0.5} if method == 'pigdm' else {}
  prior = lambda x, t: (
    -x
    / sde_lib.expand(0.25 * VP.marginal(t)[0] ** 2 + VP.marginal(t)[1] ** 2, x)
  )
  guidance = control.METHODS[method](noise_std=noise_std, ramp=0.0, **options)

  @jax.jit
  def errors(key):
    y = a(truth)
    x = pc(key, guidance(prior, VP, operator=a, y=y), VP, z).x
    return [jnp.sqrt(jnp.mean((a(v) - y) ** 2)) for v in (x, 0.5 * z)]

  error, of_noise = errors(jax.random.key(0))
  assert error < 1.3 * noise_std < of_noise / 3


# ------------------------------------------------------------------- options


def test_masks():
  half, center = (
    control.Inpaint(mask=mask).pixels((8, 8)) for mask in ('half', 'center')
  )
  assert half[:, :4].all() and not half[:, 4:].any()
  assert center.sum() == 48 and not center[2:6, 2:6].any()
  random = lambda seed: control.Inpaint(mask='random', known=0.5, seed=seed)
  share = random(0).pixels((64, 64)).mean()
  assert 0.45 < share < 0.55
  assert np.any(random(0).pixels((8, 8)) != random(1).pixels((8, 8)))
  with pytest.raises(ValueError, match='is of shape'):
    control.Inpaint(mask=MASK).check_shape((2, 4, 4, 3))


WRONG = [
  (control.Inpaint, 'known', 1.0),
  (control.SuperResolution, 'factor', 0),
  (control.Deblur, 'width', 0.0),
  (control.Overexposed, 'gain', -1.0),
  (control.Projection, 'noise_std', -0.1),
  (control.PiGDM, 'data_std', 0.0),
  (control.PiGDM, 'ramp', -1.0),
  (control.ClassifierFree, 'scale', float('inf')),
  (control.Control, 'label', -2),
  (control.Control, 'num_images', 0),
  (control.Control, 'repeats', 0),
]


@pytest.mark.parametrize(('cls', 'key', 'value'), WRONG)
def test_an_option_out_of_range_is_refused(cls, key, value):
  with pytest.raises(ValueError, match=f'{key}={value}'):
    cls(**{key: value})


def test_dps_needs_noise():
  with pytest.raises(ValueError, match='config.control.noise_std'):
    control.DPS()


@pytest.mark.parametrize(
  ('key', 'table'), [('name', control.CONTROLS), ('method', control.METHODS)]
)
def test_controls_are_frozen_and_built_from_one_section(key, table):
  section = {'noise_std': 0.1, 'label': 3, 'factor': 2, 'scale': 2.0}
  for which in table:
    found = options.build(table, section | {key: which}, f'control.{key}')
    assert isinstance(found, control.Operator) is (which in control.OPERATORS)
    assert getattr(found, 'scale', 2.0) == 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
      found.scale = 1.0


# ------------------------------------------------------------------ training


def test_classification_is_cross_entropy():
  logits = np.float32([[1.0, 2.0, -1.0], [0.0, 0.0, 3.0]])
  loss = lambda rng, x, labels: losses.Classification()(
    rng, lambda x, t: logits, VP, x, labels
  )
  x, labels = np.zeros((2, 4), np.float32), np.array([1, 0])
  got = jax.jit(loss)(jax.random.key(0), x, labels)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(got, -np.log(p[[0, 1], [1, 0]]), rtol=1e-5)


# ------------------------------------------------- intervals of noise levels

GOOD, POOR = 0.3**2, 0.8**2  # Variances of two centred Gaussians.


def _gaussian(variance):
  """Return the score of N(0, variance) under VE, and its log-density."""
  total = lambda t: variance + VE.marginal(t)[1] ** 2
  score = lambda x, t, *label: -x / sde_lib.expand(total(t), x)
  log_p = lambda x, t: -0.5 * jnp.sum(x**2, 1) / total(t)
  return score, log_p


def _guided(guidance, name):
  """Return the guided score of two Gaussians, towards the good one."""
  (good, good_log_p), (poor, poor_log_p) = map(_gaussian, (GOOD, POOR))
  label = jnp.zeros(1, jnp.int32)
  if name == 'autoguidance':
    return guidance(good, VE, weak=poor)
  if name == 'labels':
    both = lambda x, t, *label: (good if label else poor)(x, t)
    return guidance(both, VE, label=label)
  log_prob = lambda x, t: good_log_p(x, t) - poor_log_p(x, t)
  return guidance(poor, VE, log_prob=log_prob)


@pytest.mark.parametrize('limits', [(0.0, np.inf), (0.2, 3.0)])
@pytest.mark.parametrize('name', ['autoguidance', 'labels', 'classifier'])
def test_guidance_of_two_gaussians_in_an_interval(name, limits):
  """Compare the flow with its closed form.

  With the scores -x / (v + s) at the variance s of the noise, the ODE is
  d log x / ds = sum_i w_i / (2 (v_i + s)), with w = (scale, 1 - scale) in the
  interval. The solver makes its largest errors at the ends of the interval.
  """
  low, high = limits
  guidance = control.CONTROLS[name](
    scale=2.5, interval_low=low, interval_high=high
  )
  score_fn = _guided(guidance, name)
  z = jnp.linspace(-2, 2, 4)[:, None]
  flow = ode.ODE(eps=1e-3, rtol=1e-5, atol=1e-6, final_denoise=False)
  found = jax.jit(lambda z: flow(None, score_fn, VE, z).x)(z) / z
  ends = [float(VE.marginal(t)[1]) for t in (1e-3, 1.0)]
  inside = np.clip([low, high], *ends) ** 2
  ends = np.square(ends)
  total = lambda v, a, b: 0.5 * np.log((v + b) / (v + a))
  in_all, in_interval = (
    {v: total(v, *ends) for v in (GOOD, POOR)},
    {v: total(v, *inside) for v in (GOOD, POOR)},
  )
  # Outside: the good score; without a classifier's help, the poor one.
  plain = POOR if name == 'classifier' else GOOD
  log_scale = in_all[plain] - in_interval[plain]
  log_scale += 2.5 * in_interval[GOOD] - 1.5 * in_interval[POOR]
  np.testing.assert_allclose(found, np.exp(-log_scale), rtol=4e-3)


@pytest.mark.parametrize('name', ['autoguidance', 'labels', 'classifier'])
def test_outside_of_the_interval_nothing_is_guided(name):
  x, t = np.ones((3, 2), np.float32), np.float32([0.2, 0.5, 0.9])
  sigma = VE.marginal(t)[1]
  limits = {'interval_low': float(sigma[0]), 'interval_high': float(sigma[1])}
  scores = [
    _guided(control.CONTROLS[name](scale=3.0, **limits), name),
    _guided(control.CONTROLS[name](scale=3.0), name),
    _gaussian(POOR if name == 'classifier' else GOOD)[0],
  ]
  limited, everywhere, plain = jax.jit(lambda x, t: [f(x, t) for f in scores])(
    x, t
  )
  np.testing.assert_array_equal(limited[1], everywhere[1])
  np.testing.assert_array_equal(limited[::2], plain[::2])
  assert abs(limited[1] - plain[1]).min() > 0.01
  with pytest.raises(ValueError, match='interval_low=2.0 needs to be below'):
    control.CONTROLS[name](interval_low=2.0, interval_high=1.0)


@pytest.mark.parametrize('shape', [(4,), (6, 2), (4, 6, 5), (2, 4, 2, 1)])
def test_inpainting_of_arrays(shape):
  """The mask is over the axes of space, or over the coordinates of points."""
  x = np.arange(2 * np.prod(shape), dtype=np.float32).reshape(2, *shape)
  x = jnp.asarray(x)
  space = shape[:-1] or shape
  for name in ('half', 'center', 'random'):
    operator = control.Inpaint(mask=name, known=0.5)
    operator.check_shape(x.shape)
    known = operator.pixels(space)
    np.testing.assert_array_equal(operator(x), x[:, known])
  end = control.Inpaint(mask='half')(x)
  kept = x[..., : space[-1] // 2, :] if len(shape) > 1 else x[:, :2]
  np.testing.assert_array_equal(end.ravel(), kept.ravel())
  back = operator.picture(operator(x), x.shape)
  mask = known[None] if len(shape) == 1 else known[None, ..., None]
  np.testing.assert_allclose(back, np.where(mask, x, 0))
