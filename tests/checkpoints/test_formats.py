"""Files of the paper's two releases are read as what they hold.

`released_jax.checkpoint` and `released_torch.pth` are such files, written by
those releases for reduced models after three steps of training; the scores of
the former are in golden_ve_ffhq_256_ncsnpp.npz, of the latter in
released_torch.npz.
"""

import dataclasses
import functools
import os
import pathlib
import pickle

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization, traverse_util

import experiment
import models
from checkpoints import formats
from configs import schema
from runtime import torch_file

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / 'tests' / 'arrays'
_REDUCED = {'num_res_blocks': 1, 'attn_resolutions': (8,), 'dropout': 0.0}
_MODELS = {
  'released_jax.checkpoint': (
    've/ffhq_256_ncsnpp_continuous',
    {'nf': 8, 'ch_mult': (1, 2, 2)},
  ),
  'released_torch.pth': (
    've/cifar10_ncsnpp_continuous',
    {'nf': 16, 'ch_mult': (1, 2)},
  ),
}
FILES = list(_MODELS)


def config_of(name, **fields):
  path, reduced = _MODELS[name]
  config = experiment.load_config(ROOT / 'configs' / f'{path}.py')
  config.data.image_size = 16
  config.model.update({**reduced, **_REDUCED, **fields})
  return config


def model_of(name, **fields):
  return experiment.build(config_of(name, **fields))


@functools.cache
def compiled_score(name):
  model = model_of(name)
  return jax.jit(lambda params, x, t: model.score_fn(params)(x, t))


def read(path, model):
  return formats.load(path, model.network, model.shape(1))


@pytest.fixture(params=FILES)
def name(request):
  return request.param


def load(name):
  return read(DATA / name, model_of(name))


def as_json(config):
  return config.to_json_best_effort()


def assert_same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
  ('name', 'golden', 'field', 'score'),
  [
    (FILES[0], 'golden_ve_ffhq_256_ncsnpp', 'ema_params', 'score'),
    (FILES[1], 'released_torch', 'ema_params', 'score_ema_params'),
    (FILES[1], 'released_torch', 'params', 'score_model_params'),
  ],
)
def test_score(name, golden, field, score):
  params = getattr(load(name), field)
  with np.load(DATA / f'{golden}.npz') as file:
    x, t, want = file['x'], file['t'], file[score]
  got = compiled_score(name)(params, x, t)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)


def test_step_and_shapes(name):
  got, want = load(name), model_of(name).abstract_params()
  assert got.step == got.adam_count == 3
  for tree in (got.params, got.ema_params, got.adam_mu, got.adam_nu):
    same = jax.tree.map(
      lambda a, b: a.shape == b.shape and a.dtype == b.dtype, tree, want
    )
    assert all(jax.tree.leaves(same))
  frequencies = 'GaussianFourierProjection_0', 'W'
  flat = traverse_util.flatten_dict(got.adam_mu)
  assert not flat[frequencies].any()  # Never trained.


def test_moments_belong_to_their_parameters(name):
  """Parameters are ahead of their average, where Adam has been going."""
  got = load(name)

  def alignment(params, ema, mu, nu):
    if params.size < 256:
      return 1.0
    ahead, step = (params - ema).ravel(), -(mu / np.sqrt(nu + 1e-30)).ravel()
    return np.corrcoef(ahead, step)[0, 1]

  values = jax.tree.map(
    alignment, got.params, got.ema_params, got.adam_mu, got.adam_nu
  )
  assert min(jax.tree.leaves(values)) > 0.5


def test_training_continues_with_the_next_step_of_adam(name):
  model, whole = model_of(name), load(name)
  part = ('GaussianFourierProjection_0', 'Dense_0', 'ResnetBlockBigGANpp_3')
  trees = {
    key: {module: getattr(whole, key)[module] for module in part}
    for key in ('params', 'adam_mu', 'adam_nu')
  }
  got = dataclasses.replace(whole, **trees)
  optimizer = model.optimizer
  state = formats.optimizer_state(optimizer, got)
  like = jax.eval_shape(optimizer.init, got.params)
  assert jax.tree.structure(state) == jax.tree.structure(like)
  draw = np.random.default_rng(0).normal
  grads = jax.tree.map(
    lambda p: draw(size=p.shape, scale=1e-4).astype(np.float32), got.params
  )
  updates, state = jax.jit(optimizer.update)(grads, state, got.params)
  updates = jax.tree.map(np.asarray, updates)

  count = 3 + 1
  rate = 2e-4 * 3 / 5000  # Warming up.

  def adam(p, g, mu, nu):
    p, g, mu, nu = (np.asarray(v, np.float64) for v in (p, g, mu, nu))
    mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2
    mu, nu = mu / (1 - 0.9**count), nu / (1 - 0.999**count)
    return -rate * mu / (np.sqrt(nu) + 1e-8)

  want = jax.tree.map(adam, got.params, grads, got.adam_mu, got.adam_nu)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-12),
    updates,
    want,
  )
  moved = jax.tree.map(lambda p, u: (p + u != p).any(), got.params, updates)
  assert any(jax.tree.leaves(moved))
  counts = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32]
  assert [int(c) for c in counts] == [4, 4]


# ------------------------------------------------------------ wrong files


@pytest.mark.parametrize(
  ('name', 'fields', 'message'),
  [
    (
      FILES[0],
      {'nf': 16},
      r'GaussianFourierProjection_0/W is \(8,\) in the file, \(16,\) in',
    ),
    (
      FILES[0],
      {'progressive': 'none'},
      r'config: GroupNorm_0/scale is \(16,\) in the file, \(8,\) in',
    ),
    (FILES[0], {'num_res_blocks': 2}, r'in the file, .* in the network'),
    (
      FILES[1],
      {'nf': 32},
      r'GaussianFourierProjection_0/W is \(16,\) in the file, \(32,\) in',
    ),
    (
      FILES[1],
      {'embedding_type': 'positional'},
      r'Dense_0/kernel is absent in the file, \(16, 64\) in the network',
    ),
    (FILES[1], {'progressive_input': 'none'}, r'in the file, .* in the netw'),
  ],
)
def test_another_network_is_named_by_its_first_parameter(name, fields, message):
  with pytest.raises(ValueError, match=message):
    read(DATA / name, model_of(name, **fields))


def refused(path, content, name=FILES[0]):
  """Return the one line with which loading `content` fails."""
  path.write_bytes(content)
  with pytest.raises(ValueError) as error:
    read(path, model_of(name))
  message = str(error.value)
  assert str(path) in message and '\n' not in message
  assert path.read_bytes() == content
  return message


@pytest.mark.parametrize('kept', [0, 1, 8, 9, 1000, 0.5, 0.999])
def test_truncated(tmp_path, name, kept):
  content = (DATA / name).read_bytes()
  kept = int(kept * len(content)) if isinstance(kept, float) else kept
  refused(tmp_path / 'checkpoint', content[:kept], name)


class Trap:
  """Pickles as a call."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_pickled_call_is_refused(tmp_path):
  trap = tmp_path / 'trap'
  message = refused(tmp_path / 'checkpoint', pickle.dumps(Trap(trap), 2))
  assert 'mkdir, which is refused' in message
  assert not trap.exists()


def _array(dtype, shape, data, code=1):
  return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


@pytest.mark.parametrize(
  'content',
  [
    b'{"json": 1}',
    b'\xff\xd8\xff\xe0 a picture',
    (DATA / FILES[0]).read_bytes() + b'x',  # Something after the end.
    b'\xdd\xff\xff\xff\xff',  # A list of 2^32 - 1 things, none of them there.
    b'\x81\xa1a' * 100_000,  # Nested deeper than any stack.
    msgpack.packb({'a': _array('object', (1,), b'12345678')}),
    msgpack.packb({'a': _array('float32', (2,), b'1234')}),
    msgpack.packb({'a': _array('float32', (1,), b'1234', code=9)}),
    msgpack.packb({'a': 'not an array'}),
    msgpack.packb({1: _array('float32', (1,), b'1234')}),
    msgpack.packb({'optimizer': {'target': {}}}),
  ],
)
def test_other_files_are_refused(tmp_path, content):
  refused(tmp_path / 'checkpoint', content)


@pytest.mark.parametrize(
  'content',
  [
    [],
    {'model': {'module.begin_conv.weight': 0}},
    {'model': {}, 'ema': {'shadow_params': 3}, 'step': 1},
  ],
)
def test_other_pickles_are_refused(tmp_path, content):
  if content and 'step' not in content:
    content |= {'ema': {'shadow_params': []}, 'step': 1}
    content |= {'optimizer': {'state': {}, 'param_groups': []}}
  stream = b''.join(
    pickle.dumps(part, 2)
    for part in (
      torch_file._LEGACY_MAGIC,
      torch_file._LEGACY_PROTOCOL,
      {'little_endian': True},
      content,
      [],
    )
  )
  refused(tmp_path / 'checkpoint', stream)


def test_absent_file(tmp_path):
  with pytest.raises(FileNotFoundError, match='no checkpoint file'):
    read(tmp_path / 'nothing', model_of(FILES[0]))


# ------------------------------------------------- classifiers and exports


def test_classifier(tmp_path):
  network = models.create(
    'wideresnet_noise_conditional', blocks_per_group=1, channel_multiplier=1
  )
  x, cond = jnp.zeros((1, 8, 8, 3)), jnp.ones(1)
  shapes = jax.eval_shape(
    lambda: network.init(jax.random.key(0), x, cond, train=False)['params']
  )
  draw = np.random.default_rng(0).normal
  params = jax.tree.map(lambda s: draw(size=s.shape).astype('f4'), shapes)
  # GroupNorm as flax had it then.
  old = {
    key: v.reshape(1, 1, 1, -1) if 'bn' in key[-2] else v
    for key, v in traverse_util.flatten_dict(params).items()
  }
  path = tmp_path / 'classifier'
  tree = traverse_util.unflatten_dict(old)
  path.write_bytes(serialization.msgpack_serialize(tree))

  def load(path, image_size):
    return formats.load(path, network, (1, image_size, image_size, 3)).params

  assert_same(load(path, image_size=8), params)
  # Ours, by the same function as score models.
  ours = tmp_path / 'classifier.safetensors'
  formats.export(ours, as_json(config_of(FILES[0])), params)
  assert_same(load(ours, image_size=8), params)
  # A score model's file, of either release; and a cut one.
  for name in FILES:
    with pytest.raises(ValueError, match=r'W is .* in the file, \(128,\) in'):
      load(DATA / name, image_size=8)
  cut = tmp_path / 'cut'
  cut.write_bytes(path.read_bytes()[:-1000])
  with pytest.raises(ValueError, match='cut is damaged'):
    load(cut, image_size=8)
  # Not a score model.
  with pytest.raises(ValueError, match='of another network than the config'):
    read(path, model_of(FILES[0]))


def test_export_round_trip_is_bit_equal(tmp_path, name):
  config, got, path = config_of(name), load(name), tmp_path / 'model'
  formats.export(path, as_json(config), got.ema_params, step=got.step)
  assert list(tmp_path.iterdir()) == [path]
  again = schema.from_dict(formats.exported_config(path))
  assert again.to_dict() == config.to_dict()
  loaded = read(path, experiment.build(again))
  assert_same(loaded.ema_params, got.ema_params)
  assert_same(loaded.params, got.ema_params)
  assert loaded.step == 3
  # There are no moments in it: Adam begins anew.
  optimizer = model_of(name).optimizer
  state = jax.jit(lambda: formats.optimizer_state(optimizer, loaded))()
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(state))
  content = path.read_bytes()
  for kept in (7, 100, len(content) - 1):
    refused(path, content[:kept], name)
