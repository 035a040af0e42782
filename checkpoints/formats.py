"""The paper's released checkpoints, and trained models as single files.

Three formats are read. The first bytes of a file tell which one it has:

- JAX release, `checkpoint_N`: msgpack of {step, params_ema, optimizer: {target,
  state: {step, param_states}}, ...}, or of the parameters of a classifier.
- PyTorch release, `checkpoint_N.pth`: {step, model, ema, optimizer}, whose
  modules are numbered in the order of their construction.
- safetensors, which `export` writes: averaged parameters and their config.

No code that a file contains is ever run, and a file is accepted only if its
parameters have the names and shapes of the given network.
"""

import dataclasses
import json
import pathlib
import typing

import jax
import msgpack
import numpy as np
import optax
import safetensors
import safetensors.numpy
from flax import traverse_util

import models
from runtime import torch_file
from runtime.files import atomic

_DTYPES = ('float32', 'float64', 'float16', 'int32', 'int64', 'uint32', 'bool')
_NDARRAY, _SCALAR = 1, 3  # Codes that flax gives its msgpack extensions.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released:
  """The content of a file; pytrees are nested dicts of float32 numpy arrays.

  Attributes:
    step: number of training steps taken.
    params: parameters.
    ema_params: their moving average; equal to `params` if the file has one set
      of parameters only.
    adam_mu: first moments of Adam, with the shapes of `params`, or None.
    adam_nu: second moments of Adam, likewise.
    adam_count: number of updates that Adam has made.
    classes: names of the classes, if the file has them.
  """

  step: int
  params: typing.Any
  ema_params: typing.Any
  adam_mu: typing.Any = None
  adam_nu: typing.Any = None
  adam_count: int = 0
  classes: tuple[str, ...] = ()


def load(path, network, shape) -> Released:
  """Return the content of a file that belongs to a network.

  Args:
    path: a file of any of the three formats.
    network: a flax module, called as network(x, cond, train=).
    shape: shape of x, [B, H, W, C] or [B, D]; B has no effect.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, of an unknown format, or of another
      network; in the last case the message names the first parameter that
      differs, with both shapes.
  """
  path = _existing(path)
  params = models.abstract_params(network, tuple(shape[1:]))
  shapes = {
    path: like.shape
    for path, like in traverse_util.flatten_dict(params).items()
  }
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
    classes = fields.pop('classes', ())
    for key, value in fields.items():
      flat = isinstance(value, dict)
      fields[key] = _fit(path, value, shapes) if flat else int(value)
      if not flat and not 0 <= fields[key] < 2**31:
        raise ValueError(f'{path} is damaged: its {key} is out of range.')
    return Released(**fields, classes=classes)
  except (AttributeError, IndexError, KeyError, TypeError) as error:
    # A file with another layout can raise any of these.
    raise ValueError(
      f'{path} is not a checkpoint of a score model or a classifier '
      f'({type(error).__name__}: {error}).'
    ) from None


def optimizer_state(optimizer, released):
  """Return the state of an optimizer from which training continues.

  Args:
    optimizer: optax transformation.
    released: content of a file. If it has no moments, or if Adam does not
      update all parameters, the optimizer starts from zero.
  """
  if released.adam_mu is None:
    return optimizer.init(released.params)
  nu = optax.tree.get(jax.eval_shape(optimizer.init, released.params), 'nu')
  if jax.tree.structure(nu) != jax.tree.structure(released.adam_mu):
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


def export(path, config_json, ema_params, step=0, classes=()):
  """Write averaged parameters to a safetensors file, with config and step.

  The tensors are named by their path in the pytree, joined by dots. All else is
  in the metadata of the file, which is written atomically.

  Args:
    path: path of the file.
    config_json: the config of the run as JSON text.
    ema_params: pytree of arrays.
    step: number of training steps taken.
    classes: names of the classes, if there are any.
  """
  tensors = {
    '.'.join(name): np.ascontiguousarray(value)
    for name, value in traverse_util.flatten_dict(ema_params).items()
  }
  metadata = {'config': config_json, 'step': str(int(step))}
  if classes:
    metadata['classes'] = json.dumps(classes)
  with atomic(path) as part:
    try:
      safetensors.numpy.save_file(tensors, part, metadata)
    except safetensors.SafetensorError as error:  # Such as a full disk.
      reason = str(error).rpartition('error: ')[2]
      raise OSError(f'{path} cannot be written: {reason}') from None


def exported_config(path) -> dict[str, typing.Any]:
  """Return the config in a file of `export`, with lists for tuples.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no safetensors file, or has no config.
  """
  with _open_safetensors(_existing(path)) as file:
    text = (file.metadata() or {}).get('config')
  if text is None:
    raise ValueError(f'{path} has no config: `--mode export` did not write it.')
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} has a damaged config: {error}') from None


# ---------------------------------------------------------------- matching


def _existing(path):
  """Return the path of a file that exists."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'There is no checkpoint file {path}.')
  return path


def _fit(path, flat, shapes):
  """Return the pytree of {name: array}, if it has the names and shapes."""
  nested = {}
  for name in (*shapes, *sorted(flat.keys() - shapes.keys())):
    value = flat.pop(name, None)
    ours = shapes.get(name, 'absent')
    # In 2021 flax saved the scale and bias of GroupNorm as [1, 1, 1, C].
    if value is not None and len(ours) == 1 and value.shape[:-1] == (1, 1, 1):
      value = value.reshape(-1)
    theirs = 'absent' if value is None else value.shape
    if theirs != ours:
      raise ValueError(
        f'{path} is of another network than the config: '
        f'{"/".join(name)} is {theirs} in the file, {ours} in the network.'
      )
    nested[name] = value.astype(np.float32, copy=False)
    if not np.isfinite(nested[name]).all():
      raise ValueError(f'{path} is damaged: {"/".join(name)} is not finite.')
  return traverse_util.unflatten_dict(nested)


# -------------------------------------------------------------- safetensors


def _open_safetensors(path):
  """Open a safetensors file, or raise ValueError."""
  try:
    return safetensors.safe_open(path, framework='np')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} cannot be read as a safetensors file: {error}.'
    ) from None


def _read_safetensors(path, shapes):
  """Return the fields of `Released` in a file of `export`."""
  del shapes
  with _open_safetensors(path) as file:
    keys, metadata = file.keys(), file.metadata() or {}
    flat = {tuple(key.split('.')): file.get_tensor(key) for key in keys}
  step = metadata.get('step', '')
  try:
    classes = tuple(map(str, json.loads(metadata.get('classes', '[]'))))
  except (ValueError, TypeError, RecursionError):
    raise ValueError(f'{path} has damaged names of classes.') from None
  return {
    'step': int(step[:20]) if step.isdecimal() else 0,
    'params': flat,
    'ema_params': dict(flat),
    'classes': classes,
  }


# ------------------------------------------------------------------ msgpack


def _array(code, data):
  """Return the numpy array of a msgpack extension that flax wrote."""
  if code not in (_NDARRAY, _SCALAR):
    raise ValueError(f'unknown extension {code}')
  shape, dtype, buffer = msgpack.unpackb(data, max_array_len=16)
  if dtype not in _DTYPES:
    raise ValueError(f'numbers of type {dtype!r}')
  return np.frombuffer(buffer, dtype).reshape(shape)


def _read_msgpack(path, shapes):
  """Return the fields of `Released` in a file of the JAX release."""
  del shapes
  size = path.stat().st_size
  with open(path, 'rb') as stream:
    # The file is read in pieces, so that it and its arrays are never in memory
    # together. Lists are refused, because msgpack reserves memory for their
    # declared length before it has read their content.
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
  """Return the name and the array of a parameter as flax has them.

  Convolutions are [O, I, H, W] in PyTorch and [H, W, I, O] in flax; dense
  layers are [O, I] and [I, O].
  """
  *parents, leaf = name
  if leaf == 'weight':
    fused = parents[-1].startswith('Conv2d_')
    leaf = {1: 'scale', 2: 'kernel', 4: 'weight' if fused else 'kernel'}[
      array.ndim
    ]
    array = np.transpose(array, (2, 3, 1, 0) if array.ndim == 4 else None)
  return (*parents, leaf), np.ascontiguousarray(array)


def _torch_names(path, keys, shapes):
  """Return the paths, with PyTorch's leaves, of all_modules.N.CHILD.LEAF.

  N counts the modules that have parameters, in the order of construction.
  """
  names = [tuple(key.removeprefix('module.').split('.')) for key in keys]
  if any(n[0] != 'all_modules' or not n[1].isdecimal() for n in names):
    raise ValueError(
      f'{path} has a parameter {keys[0]}: PyTorch checkpoints can be read for '
      'NCSN++, DDPM++ and DDPM only.'
    )
  modules = dict.fromkeys(name[0] for name in shapes)
  numbers = sorted({int(name[1]) for name in names})
  ours = dict(zip(numbers, modules, strict=False))
  return [
    (ours.get(int(name[1]), f'all_modules.{name[1]}'), *name[2:])
    for name in names
  ]


def _read_torch(path, shapes):
  """Return the fields of `Released` in a file of the PyTorch release."""
  raw = torch_file.load(path)
  model, shadow = raw['model'], raw['ema']['shadow_params']
  slots, groups = raw['optimizer']['state'], raw['optimizer']['param_groups']
  keys = [key for key in model if key.removeprefix('module.') != 'sigmas']
  names = _torch_names(path, keys, shapes)
  # The Fourier frequencies are neither averaged nor optimised.
  frozen = [len(name) == 2 and name[1] == 'W' for name in names]

  def trainable(values, other):
    """Return values for the trained parameters, other(i) for the others."""
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
      # Each array is released as soon as it is copied, to save memory.
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
