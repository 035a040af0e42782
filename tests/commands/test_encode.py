"""Latent codes and samples of networks that are trained here."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import experiment
import likelihood
import losses
import models
import optimization
import run_lib
import sde_lib
from commands import encode
from models import score as score_lib
from solvers.ode import ODE
from tests import tiny
from tests.exact import MIXTURE, optimized

MEAN = np.array([0.3, -0.5])
COVARIANCE = np.array([[0.8, 0.35], [0.35, 0.4]])


def gaussian(rng, n):
  noise = jax.random.normal(rng, (n, 2)) @ np.linalg.cholesky(COVARIANCE).T
  return noise + jnp.asarray(MEAN, jnp.float32)[None]


def trained(data, sde, conditioning, *, seed, steps=800, loss=None, **fields):
  """Return (score_fn, losses [steps]) of an MLP trained on data(rng, n).

  Args:
    data: data(rng, n) -> [n, 2].
    sde: forward process.
    conditioning: of `score.CONDITIONINGS`.
    seed: seed of everything random.
    steps: number of training steps.
    loss: a `losses.ScoreMatching`; None for the default.
    **fields: fields of the MLP.
  """
  loss_fn = loss or losses.ScoreMatching()
  network = models.create('mlp', embedding_type='positional', **fields)
  adam = optimization.Adam(
    lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, warmup=100,
    grad_clip=1.0,
  )  # fmt: skip
  optimizer = optimization.make_optimizer(adam)

  def score_of(params):
    net = functools.partial(network.apply, {'params': params}, train=False)
    return score_lib.make_score_fn(net, sde, conditioning)

  def step(carry, rng):
    params, state, ema = carry
    rng_data, rng_loss = jax.random.split(rng)
    mean = lambda params: loss_fn(
      rng_loss, score_of(params), sde, data(rng_data, 256)
    ).mean()
    value, grads = jax.value_and_grad(mean)(params)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state, optax.incremental_update(params, ema, 0.01)), value

  @optimized
  def train(rng):
    rng, rng_init = jax.random.split(rng)
    params = network.init(rng_init, jnp.zeros((1, 2)), jnp.ones(1), train=False)
    params = params['params']
    start = params, optimizer.init(params), params
    (_, _, ema), values = jax.lax.scan(
      step, start, jax.random.split(rng, steps)
    )
    return ema, values

  ema, values = train(jax.random.key(seed))
  return score_of(ema), values


def exact_code(sde, x, eps):
  """Return the codes of Gaussian data: each principal axis is stretched."""
  (a0, s0), (a1, s1) = (map(np.float64, sde.marginal(t)) for t in (eps, 1.0))
  values, axes = np.linalg.eigh(COVARIANCE)
  stretch = np.sqrt((a1**2 * values + s1**2) / (a0**2 * values + s0**2))
  return a1 * MEAN + (x - a0 * MEAN) @ axes * stretch @ axes.T


def test_two_networks_agree_on_codes():
  """Codes depend on the data, not on the network (Section 4.3)."""
  sde, eps = sde_lib.VPSDE(), 1e-2
  x = jax.jit(gaussian, static_argnums=1)(jax.random.key(9), 256)
  want = exact_code(sde, np.float64(x), eps)
  codes = []
  for seed, fields in enumerate((
    {'nf': 64, 'num_layers': 2},
    {'nf': 48, 'num_layers': 3, 'nonlinearity': 'elu'},
  )):  # fmt: skip
    score_fn, _ = trained(gaussian, sde, score_lib.Time(), seed=seed, **fields)
    encode = functools.partial(
      likelihood.encode, score_fn, sde, eps=eps, rtol=1e-3, atol=1e-3
    )
    code = jax.jit(encode)(x)
    assert code.success
    codes.append(np.asarray(code.y))
  distance = lambda a, b: np.sqrt(np.mean(np.sum((a - b) ** 2, axis=1)))
  assert distance(codes[0], codes[1]) < 0.15
  assert distance(codes[0], want) < 0.15
  assert distance(codes[1], want) < 0.15
  # The difference of codes that do not know the covariance of the data.
  isotropic = (x - MEAN[None]) / np.sqrt(COVARIANCE.trace() / 2)
  assert distance(isotropic, want) > 0.5


def test_edm_trains_and_samples():
  """A network trained as in EDM samples the mixture of its data."""
  sde, sigma_data = sde_lib.EDM(sigma_max=20.0), 0.7
  x0 = jnp.asarray(MIXTURE.sample(0, 50_000))
  loss = losses.ScoreMatching(
    times=losses.Lognormal(), weighting=losses.EDM(sigma_data=sigma_data)
  )
  score_fn, values = trained(
    lambda rng, n: jax.random.choice(rng, x0, (n,)),
    sde, score_lib.EDM(sigma_data=sigma_data), seed=0, loss=loss, nf=64,
    num_layers=3,
  )  # fmt: skip
  values = np.asarray(values)
  exact = jax.jit(lambda rng: loss(rng, MIXTURE.score_fn(sde), sde, x0).mean())(
    jax.random.key(1)
  )
  assert values[:20].mean() > 1.2 * exact
  np.testing.assert_allclose(values[-200:].mean(), exact, rtol=0.03)

  z = sde.prior_sample(jax.random.key(1), (4000, 2))
  sampler = ODE(eps=1e-4, rtol=1e-4, atol=1e-4)
  samples = optimized(lambda z: sampler(None, score_fn, sde, z))(z)
  assert samples.success
  x = np.asarray(samples.x)
  np.testing.assert_allclose(x.mean(0), MIXTURE.mean, atol=0.08)
  np.testing.assert_allclose(x.var(0), MIXTURE.variance, rtol=0.1)
  # The weight of the component on the right, and the likelihood.
  np.testing.assert_allclose(np.mean(x[:, 0] > 0), 0.7, atol=0.05)
  logp = jax.jit(lambda x: MIXTURE.logp(x).mean())
  np.testing.assert_allclose(logp(samples.x), logp(x0), atol=0.05)


def test_points_have_nats(monkeypatch):
  """Points are not dequantised: their nats are those of their density."""
  config = experiment.load_config('configs/toy/rings_vp.py')
  config.eval.bpd_trace = 'exact'
  model = experiment.build(config)
  exact = lambda self, params, **_: MIXTURE.score_fn(sde_lib.VPSDE())
  monkeypatch.setattr(experiment.Experiment, 'score_fn', exact)
  x = MIXTURE.sample(0, 200)
  compute = jax.jit(model.bits_per_dim)
  bits, error, _, success = compute(None, jax.random.key(0), x)
  assert success and (error == 0).all()
  noise = jax.jit(sde_lib.VPSDE().marginal)(1e-5)
  nats = -jax.jit(MIXTURE.logp)(x, *noise)
  np.testing.assert_allclose(bits * 2 * np.log(2), nats, atol=0.02)
  config.eval.bpd_trace = 'hutchinson'
  with pytest.raises(ValueError, match="bpd_trace='hutchinson' is unknown"):
    experiment.build(config)


def test_encode_mode(quick_network, tmp_path, capsys):
  """Ends of interpolations, and temperature 1, are the images."""
  config = tiny.get_config(training__n_iters=2)
  run_lib.train(config, tmp_path)
  config.sampling.update(num_samples=20, rtol=1e-5, atol=1e-5)
  encode.encode(config, tmp_path)
  (folder,) = (tmp_path / 'latent').glob('step_2-*-20')
  with np.load(folder / 'codes.npz') as file:
    codes = dict(file)
  images = np.int32(codes['images'])
  assert images.shape == codes['z'].shape == (20, 8, 8, 1)
  assert codes['interpolations'].shape == (8, 10, 8, 8, 1)
  assert np.abs(images - codes['reconstructions']).max() <= 1
  ends = np.int32(codes['interpolations'][:, [0, -1]])
  assert np.abs(ends - images[:16].reshape(8, 2, 8, 8, 1)).max() <= 1
  one = list(codes['temperatures']).index(1)
  assert np.abs(images[:8] - codes['rescaled'][:, one]).max() <= 1
  assert np.abs(images[:8] - codes['rescaled'][:, 0]).mean() > 5
  result = json.loads((folder / 'result.json').read_text())
  assert result['count'] == 20 and result['max_error'] <= 1
  with Image.open(folder / 'interpolations.png') as picture:
    factor = 800 // 80
    assert picture.size == ((8 * factor + 2) * 10 - 2, (8 * factor + 2) * 8 - 2)
  assert (folder / 'reconstructions.png').is_file()
  assert (folder / 'temperatures.png').is_file()
  assert 'reconstructions are' in capsys.readouterr().out
