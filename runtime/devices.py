"""The mesh of all devices of all hosts, and where arrays live on it."""

import math
import typing

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


class Layout(typing.NamedTuple):
  """Where arrays live."""

  replicated: NamedSharding  # The same on every device.
  split: NamedSharding  # Axis 0 split: [B, ...].
  one_step: NamedSharding  # Axis 1 split: [parts, B, ...].
  microbatches: NamedSharding  # Axis 2 split: [steps, parts, B, ...].


def make_layout():
  """The 1-D mesh of all devices of all hosts, and the shardings over it."""
  mesh = jax.make_mesh((jax.device_count(),), ('data',), (AxisType.Auto,))
  return Layout(
    NamedSharding(mesh, P()),
    NamedSharding(mesh, P('data')),
    NamedSharding(mesh, P(None, 'data')),
    NamedSharding(mesh, P(None, None, 'data')),
  )


def check_divisible(batch_size, key):
  """Raises a ValueError unless the batch divides by the devices."""
  devices = jax.device_count()
  if batch_size % devices:
    better = math.ceil(batch_size / devices) * devices
    raise ValueError(
      f'{key}={batch_size} does not divide by the {devices} devices: '
      f'use {better}, say.'
    )


def to_global(sharding, local):
  """Global arrays of which this host holds `local`, a pytree of numpy's."""
  return jax.tree.map(
    lambda v: jax.make_array_from_process_local_data(sharding, v), local
  )


def replicated(like, layout):
  """Shapes and dtypes, to be restored onto every device."""
  return jax.tree.map(
    lambda v: jax.ShapeDtypeStruct(
      v.shape, v.dtype, sharding=layout.replicated
    ),
    like,
  )


def barrier(name):
  """Waits until every host is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
