"""Operators of one's own, complex measurements, and methods in closed form."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import controllable_generation as control
import sampling
import sde_lib
from benchmarks import measurements
from solvers import grids, predictors
from tests.test_controllable_generation import gaussian_score, linear, posterior

VP = sde_lib.VPSDE()
RNG = np.random.default_rng(0)
ROOT = RNG.standard_normal((4, 4)) * 0.4
MEAN, COV = RNG.standard_normal(4), ROOT @ ROOT.T + 0.02 * np.eye(4)
MATRIX, Y = RNG.standard_normal((3, 4)), RNG.standard_normal(3)
X = np.float32(2 * RNG.standard_normal((16, 4)))
T = np.linspace(0.02, 1.0, 16, dtype=np.float32)


def guided(method, sde, mean=MEAN, cov=COV, operator=None, y=Y):
  operator = operator or linear(MATRIX)
  y = np.broadcast_to(y, (16, len(y)))
  y = y.astype(np.complex64 if np.iscomplexobj(y) else np.float32)
  return method(gaussian_score(mean, cov)(sde), sde, operator=operator, y=y)


def error(found, wanted):
  found, wanted = np.asarray(found), np.asarray(wanted)
  scale = np.abs(wanted).max(-1, keepdims=True)
  return np.abs((found - wanted) / scale).max()


@pytest.mark.parametrize('sde', sde_lib.SDES)
def test_mmps_is_the_conditional_score(sde):
  """It is exact for any Gaussian prior, all processes and any noise."""
  sde = sde_lib.SDES[sde]()

  @jax.jit
  def scores(x, t):
    found = []
    for noise_std in (0.0, 0.3):
      truth = posterior(MEAN, COV, MATRIX, Y, noise_std)
      options = {'noise_std': noise_std, 'ramp': 0.0}
      full, few = (control.MMPS(cg_steps=n, **options) for n in (10, 1))
      fs = gaussian_score(*truth)(sde), guided(full, sde), guided(few, sde)
      found.append([f(x, t) for f in fs])
    return found

  for wanted, full, few in scores(X, T):
    assert error(full, wanted) < 5e-3
    # With fewer steps than measurements it is not.
    assert error(few, wanted) > 0.05


COMPLEX = MATRIX[:2] + 1j * np.array([[0.5, 0, 0.2, 0], [0, -0.4, 0, 0.9]])


@pytest.mark.parametrize('which', ['mmps', 'pigdm', 'diffpir', 'dps', 'ddrm'])
def test_complex_measurements_are_pairs_of_real_ones(which):
  """With noise in both parts, they give the score of real measurements."""
  a, y = np.complex64(COMPLEX), np.complex64([0.3 - 0.2j, 0.5 + 0.1j])
  parts = np.vstack([COMPLEX.real, COMPLEX.imag])
  options = {} if which in ('diffpir', 'ddrm') else {'ramp': 0.0}
  method = control.METHODS[which](noise_std=0.3, **options)
  real = np.concatenate([y.real, y.imag])
  both = (
    guided(method, VP, operator=lambda x: x @ a.T, y=y),
    guided(method, VP, operator=linear(parts), y=real),
  )
  assert error(*jax.jit(lambda x, t: [f(x, t) for f in both])(X, T)) < 1e-3


def test_diffpir_solves_its_problem():
  """x minimises |y - A x|^2 + rho |x - x0_hat|^2, by a dense solution."""
  method = control.DiffPIR(noise_std=0.3, lam=2.0)
  alpha, sigma = (np.asarray(v)[:, None] for v in VP.marginal(T))
  prior = gaussian_score(MEAN, COV)(VP)
  x0_hat = np.asarray(VP.denoise(X, T, prior(X, T)))
  rho = 2 * 0.3**2 * (alpha / sigma) ** 2
  left = MATRIX.T @ MATRIX + rho[..., None] * np.eye(4)
  x0 = np.linalg.solve(left, (MATRIX.T @ Y + rho * x0_hat)[..., None])[..., 0]
  wanted = (alpha * x0 - X) / sigma**2
  assert error(jax.jit(guided(method, VP))(X, T), wanted) < 2e-3


# ----------------------------------------------------------------------- DDRM


def test_the_predictor_ddim():
  """With eta = 0 it takes the steps of the sampler ddim; else it adds noise."""
  score_fn, grid = gaussian_score(MEAN, COV)(VP), grids.LogSNR()
  shared = {'num_steps': 12, 'grid': grid, 'eps': 1e-3}
  samplers = (
    sampling.SAMPLERS['ddim'](**shared),
    *(
      sampling.PC(predictor=predictors.DDIM(eta=eta), **shared)
      for eta in (0.0, 0.5)
    ),
  )
  wanted, found, noisy = jax.jit(
    lambda z: [f(jax.random.key(1), score_fn, VP, z) for f in samplers]
  )(X)
  np.testing.assert_allclose(found.x, wanted.x, rtol=1e-3, atol=1e-3)
  assert int(found.nfe) == 12
  assert np.abs(np.subtract(noisy.x, wanted.x)).max() > 0.1


def test_ddrm_draws_each_coordinate_as_the_paper_does():
  """Moments of one step: unseen, seen below, and seen above the noise."""
  s, noise_std, eta, eta_b = np.array([2.0, 0.05]), 0.1, 0.6, 0.8
  matrix = np.diag([*s, 0.0])[:2]
  known, n = np.array([1.0, 0.04]), 50_000
  prior = gaussian_score(np.zeros(3), np.eye(3))(VP)
  method = control.DDRM(noise_std=noise_std, eta_b=eta_b)
  x = np.tile(np.float32([[0.5, -0.2, 0.8]]), (n, 1))

  @jax.jit
  def step(x):
    y = jnp.tile(jnp.float32(known), (n, 1))
    chain = method(prior, VP, operator=linear(matrix), y=y)
    t, t_next = jnp.full(n, 0.4), jnp.full(n, 0.3)
    return chain.step(jax.random.key(0), x, t, t_next, eta)

  found, mean = map(np.asarray, step(x))
  (alpha, sigma), (a, b) = (
    map(float, VP.marginal(np.float32(time))) for time in (0.3, 0.4)
  )
  level, x0 = sigma / alpha, a * np.asarray(x[0])  # E[x_0 | x] of N(0, I).
  assert noise_std / s[0] < level < noise_std / s[1]
  noise = (np.asarray(x[0]) - a * x0) / b
  yb, left = known / s, np.sqrt(1 - eta**2)
  wanted = alpha * np.array([
    (1 - eta_b) * x0[0] + eta_b * yb[0],
    x0[1] + left * level * (yb[1] - x0[1]) / (noise_std / s[1]),
    x0[2] + level * left * noise[2],
  ])  # fmt: skip
  std = alpha * np.array([
    np.sqrt(level**2 - (eta_b * noise_std / s[0]) ** 2),
    eta * level,
    eta * level,
  ])  # fmt: skip
  np.testing.assert_allclose(mean[0], wanted, atol=1e-5)
  np.testing.assert_allclose(found.mean(0), wanted, atol=5 * std.max() / n**0.5)
  np.testing.assert_allclose(found.std(0), std, rtol=0.02)


def test_ddrm_returns_exact_measurements():
  """Without noise, samples have exactly the measured Fourier coefficients."""
  operator, shape = control.Fourier(known=0.5), (4, 4, 4, 1)
  score_fn = lambda x, t: -x
  sampler = sampling.PC(
    predictor=predictors.DDIM(eta=0.85), num_steps=20, eps=1e-3
  )

  @jax.jit
  def difference(truth, z):
    y = operator(truth)
    chain = control.DDRM()(score_fn, VP, operator=operator, y=y)
    return operator(sampler(jax.random.key(2), chain, VP, z).x) - y

  found = difference(*np.float32(RNG.standard_normal((2, *shape))))
  np.testing.assert_allclose(found, 0, atol=1e-5)


@pytest.mark.parametrize(
  ('operator', 'shape'),
  [
    (control.Deblur(width=0.8), (2, 4, 4, 2)),
    (control.Fourier(known=0.5), (2, 4, 6, 1)),
    (control.Fourier(known=0.6), (2, 5, 5, 1)),
    (control.Inpaint(), (2, 4, 4, 1)),
  ],
)
def test_svd_is_that_of_the_operator(operator, shape):
  """A x = U S V^T x, V has orthonormal columns, and A A^T A = A if said so."""

  @jax.jit
  def values(x, v):
    y, svd = operator(x), operator.svd(shape)
    seen = svd.to(x)
    again, adjoint = svd.back(seen), control.transpose(operator, shape)(v)
    return (
      (svd.of(y), svd.values[None] * seen),
      (svd.to(again), seen),
      (operator(again), y),
      (jnp.vdot(x, adjoint), jnp.sum(jnp.real(jnp.conj(y) * v))),
    )

  x = np.float32(RNG.standard_normal(shape))
  y = jax.eval_shape(operator, x)
  v = control.noise_like(jax.random.key(1), jnp.zeros(y.shape, y.dtype))
  for found, wanted in values(x, v):
    np.testing.assert_allclose(found, wanted, atol=1e-4)
  assert operator.linear


def test_a_large_matrix_is_not_decomposed():
  with pytest.raises(ValueError, match='too large'):
    control.Deblur().svd((1, 64, 65, 1))


# ------------------------------------------------------- operators of one's own

MODULE = """
import jax
import jax.numpy as jnp

def fog(x, depth=1.0):
  return x * jnp.exp(-depth * jnp.arange(x.shape[1]))[None]

def waves(x):
  return jnp.fft.fft(x, axis=1, norm='ortho')[:, :2]

first = lambda x: x[:, :1]
bright = lambda x: jnp.tanh(x)
batch = lambda x: x[:1]
mixed = lambda x: x - x.mean(0, keepdims=True)
rounded = lambda x: jnp.round(4 * x)
counted = lambda x: (x > 0).astype(int)
pair = lambda x: (x, x)
roots = lambda x: jnp.sqrt(x)
shapes = lambda x: x.reshape(-1, 7)
frozen = lambda x: __import__('numpy').sort(x)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
  (tmp_path / 'mine.py').write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'mine', raising=False)

  def make(name, options='', shape=(1, 4)):
    found = control.Own(operator=f'mine:{name}', operator_options=options)
    found.check_shape(shape)
    return found

  yield make
  sys.modules.pop('mine', None)


def test_own_operators(own):
  """Options reach the function; what is linear or orthonormal is found out."""
  fog = own('fog', 'depth=0.5')
  np.testing.assert_allclose(
    fog(jnp.ones((1, 4)))[0], np.exp(-0.5 * np.arange(4)), rtol=1e-6
  )
  kinds = {'fog': (True, False), 'first': (True, True)}
  kinds |= {'bright': (False, False), 'waves': (True, False)}
  for name, kind in kinds.items():
    found = own(name)
    assert (found.linear, found.orthonormal) == kind, name
    y = found(jnp.ones((2, 4)))
    assert found.picture(y, (2, 4)).shape == (2, 4)
  assert own('first').version == own('fog').version  # Of one file.


@pytest.mark.parametrize(
  ('name', 'options', 'line'),
  [
    ('none', '', 'no module:function'),
    ('batch', '', 'first axis is the batch'),
    ('mixed', '', 'mixes examples'),
    ('rounded', '', 'derivative 0 everywhere'),
    ('counted', '', 'returns int32, which has no derivative'),
    ('pair', '', 'returns tuple'),
    ('roots', '', 'not finite'),
    ('shapes', '', r'raised \w+Error: .*reshape.*mine.py, line 19'),
    ('frozen', '', 'raised TracerArrayConversionError'),
    ('fog', 'length=1', 'raised TypeError'),
    ('fog', 'depth', 'keyword arguments'),
    ('fog', 'depth=open', 'keyword arguments'),
  ],
)
def test_own_operators_that_cannot_be_used(own, name, options, line):
  with pytest.raises(ValueError, match=line) as error:
    own(name, options)
  assert 'config.control.operator' in str(error.value)
  assert '\n' not in str(error.value)


def test_no_operator_is_named():
  with pytest.raises(ValueError, match='needs config.control.operator'):
    control.Own().check_shape((1, 4))


# ------------------------------------------------------------------ benchmark


def test_the_reference_posterior():
  """The closed form agrees with weighted draws of the prior of a mixture."""
  law = measurements.prior('Mixture', (3,))
  rng, matrix = np.random.default_rng(0), np.array([[1.0, 0.5, 0.0]])
  x, y = law.sample(rng, 200_000), np.array([0.1])
  mean, cov, _ = measurements._weighed(x, x @ matrix.T, y, rng, 1)
  found = law.given(matrix, y, measurements.NOISE).moments()
  np.testing.assert_allclose(found[0], mean, atol=0.02)
  np.testing.assert_allclose(found[1], cov, atol=0.02)


def test_the_benchmark_measures_errors():
  """MMPS is as good as exact samples, DPS is not, on few samples."""
  case = measurements.make_case('Gaussian', 'own, of points', 8, 200)
  found = measurements.methods()
  errors = {
    name: measurements.compare(case, measurements.draw(case, *found[name], VP))
    for name in ('mmps', 'dps')
  }
  exact = measurements.compare(case, case.exact)
  assert exact.mean < 0.1 and 0.75 < exact.coverage < 1
  assert errors['mmps'].mean < 0.15 and errors['mmps'].cov < exact.cov + 0.1
  assert errors['dps'].mean > 0.3
  assert str(errors['dps']).count('·') == 2
