r"""Conditional models against closed forms.

x | c ~ N(A c, S) with c ~ N(m, I), so x ~ N(A m, S + A A^T). The network of
`Exact` knows both scores, and is told conditions as any other network is.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiment
import run_lib
from commands import evaluate, sample, trained
from configs import base
from data import datasets
from models import conditions
from runtime.devices import make_layout
from runtime.files import load_npz, save_npz
from tests import tiny

A = np.float32([[1.0, 0.5, 0.0], [-0.5, 0.0, 1.0]])
S = np.float32([[0.3, 0.1], [0.1, 0.2]])
M = np.float32([1.0, -1.0, 0.5])
TOLD = {
  # The process leaves nothing of the mean at t = 1.
  'sde.beta_max': 40.0,
  'data.shape': (2,), 'data.mean': (0.0,), 'data.std': (1.0,),
  'data.condition_shape': (3,), 'model.input_scale': 0.0,
  'data.condition_mean': (2.0,), 'data.condition_std': (0.5, 1.0, 4.0),
}  # fmt: skip


def get_config(condition='vector', **overrides):
  """Return the config of points with conditions [3]."""
  more = {key.replace('__', '.'): v for key, v in overrides.items()}
  return base.compose(
    base.vp, base.mlp, base.arrays(), TOLD,
    {'model.condition': condition}, more,
  )  # fmt: skip


def exact_network(sde):
  """Return a network that is -sigma times the exact score (`score.Time`)."""

  def score(x, alpha, sigma, mean, covariance):
    # The noise is the same in all directions, so the axes stay.
    variances, axes = (np.float32(v) for v in np.linalg.eigh(covariance))
    along_axes = (alpha * mean - x) @ axes
    return along_axes / (alpha**2 * variances + sigma**2)[None] @ axes.T

  def apply(variables, x, cond, label=None, condition=None, **_):
    del variables, label
    alpha, sigma = (v[0] for v in sde.marginal(cond / 999))
    free = jnp.broadcast_to(A @ M, x.shape)
    found = score(x, alpha, sigma, free, S + A @ A.T)
    if condition is not None:
      std = jnp.float32(TOLD['data.condition_std'])[None]
      c = condition[:, :-1] * std + 2.0
      given = score(x, alpha, sigma, c @ A.T, S)
      found = jnp.where(condition[:, -1:] > 0, given, found)
    return -sigma * found

  return types.SimpleNamespace(apply=apply, condition='vector')


@pytest.fixture(scope='module')
def exact():
  model = experiment.build(
    get_config(
      eval__bpd_trace='exact',
      sampling__method='ode',
      sampling__rtol=1e-4,
      sampling__atol=1e-4,
      eval__bpd_eps=1e-4,
      sampling__final_denoise=False,
    )  # fmt: skip
  )
  return dataclasses.replace(model, network=exact_network(model.sde))


def logp(x, mean, covariance):
  delta = x - mean
  square = np.sum(delta * np.linalg.solve(covariance, delta.T).T, -1)
  return -0.5 * (square + np.log(np.linalg.det(2 * np.pi * covariance)))


def test_likelihood_given_the_condition(exact):
  """log p(x | c), and log p(x) without; by the command as well."""
  rng = np.random.default_rng(0)
  c = np.float32(M + rng.normal(size=(16, 3)))
  x = np.float32(c @ A.T + rng.normal(size=(16, 2)) * 0.5)
  bits = jax.jit(exact.bits_per_dim)
  for given, expected in (
    ((c,), logp(x, c @ A.T, S)),
    ((), logp(x, A @ M, S + A @ A.T)),
  ):
    found = -bits({}, jax.random.key(0), x, *given)[0] * 2 * np.log(2)
    np.testing.assert_allclose(found, expected, atol=0.01)
  compute = evaluate._compile_bits(exact, make_layout())
  again, *_ = compute({}, jax.random.key(0), x, lambda *_: None, c)
  expected = bits({}, jax.random.key(0), x, c)[0]
  np.testing.assert_allclose(again, expected, rtol=1e-4)


def test_samples_have_mean_and_covariance_of_the_condition(exact):
  c, n = np.float32([2.0, 0.0, -1.0]), 4000
  for scale, mean, covariance in (
    (1.0, A @ c, S), (0.0, A @ M, S + A @ A.T),
  ):  # fmt: skip
    config = exact.config.copy_and_resolve_references()
    config.control.scale = scale
    model = dataclasses.replace(exact, config=config)
    x = model.sample({}, jax.random.key(1), n, condition=c)
    spread = np.sqrt(np.diag(covariance) / n)
    assert (np.abs(x.mean(0) - mean) < 4 * spread).all(), scale
    error = np.abs(np.cov(x.T) - covariance)
    assert error.max() < 6 * np.diag(covariance).max() / np.sqrt(n), scale


def test_codes_are_those_of_the_condition(exact):
  """Decoding with the condition gives back; without, something else."""
  c = np.float32(np.random.default_rng(2).normal(size=(8, 3)))
  x = c @ A.T
  z = jax.jit(exact.encode)({}, x, c).y
  # The flow maps mean to mean.
  np.testing.assert_allclose(
    z, x * exact.sde.marginal(jnp.ones(1))[0][:, None], atol=1e-2
  )
  decode = jax.jit(exact.decode)
  np.testing.assert_allclose(decode({}, z, c).x, x, atol=1e-2)
  assert np.abs(decode({}, z).x - x).max() > 0.1


def test_the_loss_with_dropout_1_is_the_unconditional_one():
  rng, share = jax.random.key(3), 'training__condition_dropout'
  model = experiment.build(get_config(**{share: 1.0}))
  params = model.init_params(jax.random.key(0))
  params = jax.tree.map(lambda v: v + 0.1, params)
  x = np.float32(np.random.default_rng(0).normal(size=(64, 2)))
  batch = {'image': x, 'label': np.zeros(64, np.int32)}
  never, halved = (
    experiment.build(get_config(**{share: value})) for value in (0.0, 0.5)
  )

  @jax.jit
  def values(params, condition):
    told = batch | {'condition': condition}
    _, rng_loss, *_ = jax.random.split(rng, 4)
    return (
      model.loss(params, rng, told),
      model.loss_fn(rng_loss, model.score_fn(params), model.sde, x),
      never.loss(params, rng, told),
      model.loss(params, rng, told, train=False),
      halved.loss(params, rng, told),
    )

  one = np.ones((64, 3), np.float32)
  values = [jax.tree.map(np.asarray, values(params, c)) for c in (one, -one)]
  dropped, free, given, tested, half = values[0]
  np.testing.assert_array_equal(dropped, values[1][0])
  np.testing.assert_allclose(dropped, free, rtol=1e-6)
  # The test loss drops nothing, nor does training with dropout 0.
  np.testing.assert_allclose(tested, given, rtol=1e-6)
  assert (given != dropped).all() and (given != values[1][2]).all()
  # With a half each example is one or the other.
  alone = np.isclose(half, dropped, rtol=1e-6)
  assert (alone | np.isclose(half, given, rtol=1e-6)).all()
  assert 16 < alone.sum() < 48


@pytest.mark.parametrize('augment', [0.0, 1.0])
def test_arrays_move_with_their_images(augment):
  """The network takes the condition for x_0: then the loss is 0."""
  config = tiny.get_config(
    sde__name='ve', data__random_flip=not augment, data__augment=augment,
    data__centered=True, data__condition_shape=(8, 8, 1),
    data__condition_mean=(127.5,), data__condition_std=(127.5,),
    training__condition_dropout=0.0, model__condition='array',
  )  # fmt: skip
  model = experiment.build(config)

  def apply(variables, x, cond, label, condition, **_):
    del variables, label
    z = (x - condition[..., :-1]) / cond.reshape(-1, 1, 1, 1)
    return -z

  network = types.SimpleNamespace(apply=apply)
  model = dataclasses.replace(model, network=network)
  image = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
  batch = {'image': image, 'label': np.zeros(16, np.int32)}
  loss = jax.jit(lambda c: model.loss({}, jax.random.key(4), batch | c))
  same = loss({'condition': np.float32(image)})
  np.testing.assert_allclose(same, 0, atol=0.01)
  other = loss({'condition': np.float32(image[:, :, ::-1])})
  assert (other > 1).any()


@pytest.mark.parametrize(
  ('condition', 'changes', 'text'),
  [
    ('array', {'data.condition_shape': (8, 8, 1)}, 'does not lie over'),
    ('vector', {'data.condition_shape': (8, 8, 1)}, "use 'array'"),
    ('vector', {'data.condition_std': (1.0, 2.0)}, '2 numbers for 3 channels'),
    ('', {}, 'condition_shape=.*needs a network'),
    ('', {'data.condition_shape': (), 'control.condition': 'a'}, 'needs a net'),
    ('vector', {'data.condition_mean': ()}, "'toy/rings' has none"),
  ],
)
def test_configs_that_cannot_be(condition, changes, text):
  config = get_config(condition)
  with config.unlocked():
    for path, value in changes.items():
      section, _, name = path.partition('.')
      config[section][name] = value
    if 'none' in text:
      toy = {'dataset': 'toy/rings', 'centered': False}
      config.data.update(toy, mean=(), std=())
  with pytest.raises(ValueError, match=text):
    experiment.build(config)


def test_the_command_samples_for_a_file(tmp_path):
  """In turn; files of other conditions have other names."""
  config = get_config(sampling__num_steps=50, sampling__num_samples=5)
  model = experiment.build(config)
  params = model.init_params(jax.random.key(0))
  run = trained.Run(
    model=model, workdir=tmp_path, step=1, params=params, layout=make_layout()
  )
  names = set()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trained, 'restore', lambda *_: run)
    for seed in (0, 1):
      c = np.random.default_rng(seed).normal(size=(2, 3))
      save_npz(tmp_path / 'c.npz', condition=c)
      config.control.condition = str(tmp_path / 'c.npz')
      sample.sample(config, tmp_path)
      (path,) = {*(tmp_path / 'samples').glob('*.npz')} - names
      names.add(path)
      found = load_npz(path)
      assert found['points'].shape == (5, 2)
      expected = np.float32(c[[0, 1, 0, 1, 0]])
      np.testing.assert_array_equal(found['condition'], expected)


def test_a_sample_needs_its_condition():
  model = experiment.build(get_config(sampling__num_steps=50))
  with pytest.raises(ValueError, match=r'sample\(..., condition=array\)'):
    jax.eval_shape(model.make_sample(2), {}, jax.random.key(0))
  plain = experiment.build(
    base.compose(
      base.vp,
      base.mlp,
      base.arrays(),
      {'data.shape': (2,), 'data.mean': (0.0,), 'data.std': (1.0,)},
    )
  )
  for given, text in (
    ({'condition': np.zeros((2, 3))}, 'config.model.condition'),
    ({'label': 0}, 'config.model.num_labels'),
  ):
    with pytest.raises(ValueError, match=text):
      plain.sample({}, jax.random.key(0), 2, **given)


def test_a_picture_shows_conditions_beside_samples():
  condition = np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1)
  images = np.arange(10, 15, dtype=np.uint8).reshape(5, 1, 1, 1)
  columns, shown = sample.beside(condition, images)
  assert shown.ravel().tolist() == [0, 10, 12, 1, 11, 13]
  assert columns % 3 == 0
  assert sample.beside(np.zeros((2, 3)), images)[1] is images


def test_batches_hold_conditions_on_devices_too(tmp_path):
  """They have the shapes and types that the step is compiled for."""
  image = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
  np.savez(tmp_path / 'a.npz', images=image, condition=255 - image)
  found = []
  for on_device in (False, True):
    config = tiny.get_config(
      data__dataset='npz', data__path=str(tmp_path / 'a.npz'),
      data__on_device=on_device, model__condition='array',
      training__grad_accumulation=2,
    )  # fmt: skip
    model, layout = experiment.build(config), make_layout()
    dataset = datasets.load(config.data, 'train')
    fetch = run_lib.make_fetch(model, dataset)
    batch = run_lib.make_place(model, dataset, layout)(fetch(3))
    found.append(jax.tree.map(np.asarray, batch))
    np.testing.assert_array_equal(batch['condition'], 255.0 - batch['image'])
    shape = lambda v: (v.shape, v.dtype)
    expected = jax.tree.map(shape, run_lib.abstract_batches(model))
    assert jax.tree.map(shape, dict(batch)) == expected
  for name, value in found[0].items():
    np.testing.assert_array_equal(value, found[1][name])


def test_null_is_told_from_the_mean():
  marked = conditions.marked(jnp.zeros((1, 2)))
  assert marked.tolist() == [[0.0, 0.0, 1.0]]
