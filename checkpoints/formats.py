"""The paper's released checkpoints, and models in files of their own.

Three formats are read, told apart by their first bytes:

- JAX release, `checkpoint_N`: msgpack of {step, params_ema, optimizer: {target,
  state: {step, param_states}}, ...}, or of a classifier's parameters alone.
- PyTorch release, `checkpoint_N.pth`: {step, model, ema, optimizer}, whose
  modules are numbered in order of construction.
- safetensors, as `export` writes: averaged parameters and their config.

No code of a file is ever run, and a file is believed only as far as its
parameters have the shapes of the config's network.
"""

import dataclasses
import functools
import json
import os
import pathlib
import typing

import jax
import jax.numpy as jnp
import ml_collections
import msgpack
import numpy as np
import optax
import safetensors
import safetensors.numpy
from flax import traverse_util

import experiment
from runtime import torch_file

_DTYPES = ('float32', 'float64', 'float16', 'int32', 'int64', 'uint32', 'bool')
_NDARRAY, _SCALAR = 1, 3  # flax's codes of msgpack extensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released:
  """What a file holds; pytrees are nested dicts of float32 numpy arrays.

  Attributes:
    step: training steps taken.
    params: parameters.
    ema_params: their moving average; the parameters, if the file has no other.
    adam_mu, adam_nu: Adam's moments, shaped as params, or None.
    adam_count: updates that Adam has made.
  """

  step: int
  params: typing.Any
  ema_params: typing.Any
  adam_mu: typing.Any = None
  adam_nu: typing.Any = None
  adam_count: int = 0


def load(path, config) -> Released:
  """Reads a file of the network of config.

  Args:
    path: a file of any of the formats above.
    config: a ConfigDict; its model and data sections matter.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, of no known format, or of another network; then
      the first parameter that differs is named, with both shapes.
  """
  shape = experiment.image_shape(config, 1)
  return _load(path, experiment.make_network(config), shape)


def load_classifier(path, network, *, image_size=32, num_channels=3):
  """Parameters of a noise-conditional classifier; errors as `load`.

  Args:
    path: a file of any of the formats above.
    network: a flax module, called as network(x, cond, train=).
    image_size, num_channels: of the images that it classifies.
  """
  shape = (1, image_size, image_size, num_channels)
  return _load(path, network, shape).params


def optimizer_state(optimizer, released):
  """State of `losses.make_optimizer(..)` from which training continues.

  Without moments in the file, Adam begins anew.
  """
  if released.adam_mu is None:
    return optimizer.init(released.params)
  count = np.asarray(released.adam_count, np.int32)
  counted = optax.ScaleByAdamState, optax.ScaleByScheduleState

  def fill(node):
    if isinstance(node, optax.ScaleByAdamState):
      return node._replace(
        count=count, mu=released.adam_mu, nu=released.adam_nu
      )
    return optax.ScaleByScheduleState(count)

  return jax.tree.map(
    fill,
    jax.eval_shape(optimizer.init, released.params),
    is_leaf=lambda node: isinstance(node, counted),
  )


# ----------------------------------------------------------------- export


def export(path, config, ema_params, *, step=0):
  """Writes averaged parameters, and config and step as metadata.

  Tensors are named by their path in the pytree, joined by dots.

  Args:
    path: of a safetensors file; written whole or not at all.
    config: the ConfigDict of the run.
    ema_params: pytree of arrays.
    step: training steps taken.
  """
  tensors = {
    '.'.join(name): np.ascontiguousarray(value)
    for name, value in traverse_util.flatten_dict(ema_params).items()
  }
  metadata = {'config': config.to_json_best_effort(), 'step': str(int(step))}
  part = f'{path}.part'
  safetensors.numpy.save_file(tensors, part, metadata)
  os.replace(part, path)


def exported_config(path):
  """The ConfigDict in a file that `export` wrote."""
  with _open_safetensors(_existing(path)) as file:
    text = (file.metadata() or {}).get('config')
  if text is None:
    raise ValueError(f'{path} has no config: it is not of `export`.')

  def tuples(value):
    if isinstance(value, dict):
      return {key: tuples(v) for key, v in value.items()}
    return tuple(value) if isinstance(value, list) else value

  return ml_collections.ConfigDict(tuples(json.loads(text))).lock()


# ---------------------------------------------------------------- matching


def _existing(path):
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f'There is no checkpoint file {path}.')
  return path


@functools.cache
def _network_shapes(network, image_shape):
  """{path in the pytree: shape}, in the network's order of construction."""
  names = []

  def init(rng):
    x, cond = jnp.zeros(image_shape), jnp.ones(1)
    params = network.init(rng, x, cond, train=False)['params']
    names.extend(traverse_util.flatten_dict(params))
    return params

  tree = jax.eval_shape(init, jax.random.key(0))
  flat = traverse_util.flatten_dict(tree)
  return {name: flat[name].shape for name in names}


def _load(path, network, image_shape):
  path, shapes = _existing(path), _network_shapes(network, image_shape)
  with open(path, 'rb') as stream:
    start = stream.read(9)
  if start[8:] == b'{':
    read = _read_safetensors
  elif start[:2] == b'PK' or start[:1] == b'\x80':
    read = _read_torch
  else:
    read = _read_msgpack
  try:
    fields = read(path, shapes)
    for key, value in fields.items():
      flat = isinstance(value, dict)
      fields[key] = _fit(path, value, shapes) if flat else int(value)
    return Released(**fields)
  except (AttributeError, IndexError, KeyError, TypeError) as error:
    # It is not laid out as expected; what it trips over is unforeseeable.
    raise ValueError(
      f'{path} is not a checkpoint of a score model or a classifier '
      f'({type(error).__name__}: {error}).'
    ) from None


def _fit(path, flat, shapes):
  """Nests {name: array}, if it has just the network's names and shapes."""
  nested = {}
  for name in (*shapes, *sorted(flat.keys() - shapes.keys())):
    value = flat.pop(name, None)
    ours = shapes.get(name, 'absent')
    # How flax saved GroupNorm's scale and bias in 2021.
    if value is not None and len(ours) == 1 and value.shape[:-1] == (1, 1, 1):
      value = value.reshape(-1)
    theirs = 'absent' if value is None else value.shape
    if theirs != ours:
      raise ValueError(
        f'{path} is of another network than the config: '
        f'{"/".join(name)} is {theirs} in the file, {ours} in the network.'
      )
    nested[name] = value.astype(np.float32, copy=False)
  return traverse_util.unflatten_dict(nested)


# -------------------------------------------------------------- safetensors


def _open_safetensors(path):
  try:
    return safetensors.safe_open(path, framework='np')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} cannot be read as a safetensors file: {error}.'
    ) from None


def _read_safetensors(path, shapes):
  del shapes
  with _open_safetensors(path) as file:
    keys, metadata = file.keys(), file.metadata() or {}
    flat = {tuple(key.split('.')): file.get_tensor(key) for key in keys}
  step = metadata.get('step', '')
  return {
    'step': int(step) if step.isdecimal() else 0,
    'params': flat,
    'ema_params': dict(flat),
  }


# ------------------------------------------------------------------ msgpack


def _array(code, data):
  """A numpy array, from the extension that flax writes it as."""
  if code not in (_NDARRAY, _SCALAR):
    raise ValueError(f'unknown extension {code}')
  shape, dtype, buffer = msgpack.unpackb(data, max_array_len=16)
  if dtype not in _DTYPES:
    raise ValueError(f'numbers of type {dtype!r}')
  return np.frombuffer(buffer, dtype).reshape(shape)


def _read_msgpack(path, shapes):
  del shapes
  size = path.stat().st_size
  with open(path, 'rb') as stream:
    # Read piece by piece: never the file and its arrays at once. Lists are
    # refused since their length is believed before their content is there.
    unpacker = msgpack.Unpacker(
      stream,
      read_size=1 << 20,
      max_buffer_size=max(size, 1 << 20),
      max_array_len=0,
      ext_hook=_array,
    )
    try:
      state = unpacker.unpack()
      if not isinstance(state, dict) or unpacker.tell() != size:
        raise ValueError('it is not one dictionary')
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
      raise ValueError(
        f'{path} is damaged, or no file of msgpack, PyTorch or safetensors '
        f'({error or type(error).__name__}).'
      ) from None
  if 'optimizer' not in state:
    flat = traverse_util.flatten_dict(state)
    return {'step': 0, 'params': flat, 'ema_params': dict(flat)}
  adam = state['optimizer']['state']
  leaves = traverse_util.flatten_dict(adam['param_states'])
  moment = lambda key: {k[:-1]: v for k, v in leaves.items() if k[-1] == key}
  return {
    'step': state['step'],
    'params': traverse_util.flatten_dict(state['optimizer']['target']),
    'ema_params': traverse_util.flatten_dict(state['params_ema']),
    'adam_mu': moment('grad_ema'),
    'adam_nu': moment('grad_sq_ema'),
    'adam_count': adam['step'],
  }


# ------------------------------------------------------------------ PyTorch


def _from_torch(name, array):
  """Flax's name of a parameter's leaf, and its array.

  Convolutions are [O, I, H, W] there and [H, W, I, O] here; dense layers are
  [O, I] there and [I, O] here.
  """
  *parents, leaf = name
  if leaf == 'weight':
    fused = parents[-1].startswith('Conv2d_')
    leaf = {1: 'scale', 2: 'kernel', 4: 'weight' if fused else 'kernel'}[
      array.ndim
    ]
    array = np.transpose(array, (2, 3, 1, 0) if array.ndim == 4 else None)
  return (*parents, leaf), np.ascontiguousarray(array)


def _read_torch(path, shapes):
  raw = torch_file.load(path)
  model, shadow = raw['model'], raw['ema']['shadow_params']
  slots, groups = raw['optimizer']['state'], raw['optimizer']['param_groups']

  # all_modules.N.CHILD.LEAF, where N counts the modules that have parameters.
  keys = [key for key in model if key.removeprefix('module.') != 'sigmas']
  names = [tuple(key.removeprefix('module.').split('.')) for key in keys]
  if any(n[0] != 'all_modules' or not n[1].isdecimal() for n in names):
    raise ValueError(
      f'{path}: of PyTorch checkpoints, those of NCSN++, DDPM++ and DDPM are '
      f'read; this has a parameter {keys[0]}.'
    )
  modules = dict.fromkeys(name[0] for name in shapes)
  numbers = sorted({int(name[1]) for name in names})
  ours = dict(zip(numbers, modules, strict=False))
  names = [
    (ours.get(int(name[1]), f'all_modules.{name[1]}'), *name[2:])
    for name in names
  ]
  # The Fourier frequencies: neither averaged nor optimised.
  frozen = [len(name) == 2 and name[1] == 'W' for name in names]

  def trainable(values, other):
    """values, one by one for those that are trained; other(i) for the rest."""
    if len(values) != frozen.count(False):
      raise ValueError(
        f'{path} has {len(values)} averages or moments for '
        f'{frozen.count(False)} trained parameters.'
      )
    values = iter(values)
    return [other(i) if f else next(values) for i, f in enumerate(frozen)]

  def flat(arrays):
    renamed = {}
    for i, name in enumerate(names):
      # Let go of one array as the next is copied.
      array, arrays[i] = arrays[i], None
      name, array = _from_torch(name, array)
      renamed[name] = array
    return renamed

  params = [model.pop(key) for key in keys]
  fields = {
    'step': raw['step'],
    'ema_params': trainable(shadow, params.__getitem__),
  }
  if slots:
    order = [slots[i] for i in groups[0]['params'] if i in slots]
    zeros = lambda i: np.zeros_like(params[i])
    fields['adam_count'] = max(int(slot['step']) for slot in order)
    for key, moment in (('adam_mu', 'exp_avg'), ('adam_nu', 'exp_avg_sq')):
      fields[key] = trainable([slot.pop(moment) for slot in order], zeros)
  shadow.clear()
  fields['params'] = params
  return {
    key: flat(value) if isinstance(value, list) else value
    for key, value in fields.items()
  }
