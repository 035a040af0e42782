"""The mesh of all devices of all hosts, and where arrays live on it."""

import math
import os
import typing
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from runtime.files import cache_dir, make_cache_dir

# The program of a CPU device costs more than a few examples save, and each
# device has its own copy of the parameters.
FEWEST_EXAMPLES, MOST_CPU_DEVICES = 8, 8


def keep_programs() -> None:
  """Keep compiled programs in the cache folder, or where JAX is told to."""
  make_cache_dir()
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(cache_dir() / 'jax'))
  # Programs that compile quickly are kept as well.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def num_cores() -> int:
  """Return the number of CPU cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def cpu_devices_for(*batch_sizes, cores: int) -> int:
  """Return how many devices the cores of a CPU become.

  The largest number, at most 8, that divides each batch and leaves at least 8
  examples of it on each device.

  Args:
    *batch_sizes: numbers of examples in a batch.
    cores: number of cores.

  Example:
    >>> [cpu_devices_for(b, cores=4) for b in (64, 18, 16, 12)]
    [4, 2, 2, 1]
  """
  fits = lambda b, n: b % n == 0 and b // n >= FEWEST_EXAMPLES
  numbers = range(1, min(cores, MOST_CPU_DEVICES) + 1)
  return max(
    (n for n in numbers if all(fits(b, n) for b in batch_sizes)), default=1
  )


def divide_cpu(*batch_sizes, wanted: int = 0) -> int:
  """Make devices of the cores of the CPU, if JAX has not started yet.

  Programs that are split over several devices use the cores better than one
  program with several threads. What is there already stays: a number that the
  environment or the caller has set, or devices that have been used.

  Args:
    *batch_sizes: see `cpu_devices_for`.
    wanted: number of devices; 0 for that of `cpu_devices_for`.

  Returns:
    The number of CPU devices that was set; 0 if it was left as it is.
  """
  set_before = jax.config.jax_num_cpu_devices > 0
  forced = 'host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  if not wanted and (set_before or forced):
    return 0
  count = wanted or cpu_devices_for(*batch_sizes, cores=num_cores())
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:  # JAX has started.
    return 0
  return count


class Layout(typing.NamedTuple):
  """Shardings over the mesh of all devices, by the axis that they split.

  Attributes:
    replicated: every device holds the whole array.
    split: axis 0 is split, for arrays [B, ...].
    one_step: axis 1 is split, for arrays [parts, B, ...].
    microbatches: axis 2 is split, for arrays [steps, parts, B, ...].
  """

  replicated: NamedSharding
  split: NamedSharding
  one_step: NamedSharding
  microbatches: NamedSharding

  @property
  def platform(self) -> str:
    """Return what the devices are: 'cpu', 'gpu' or 'tpu'."""
    return self.split.mesh.devices.flat[0].platform


def make_layout(devices: Sequence[jax.Device] | None = None) -> Layout:
  """Return the shardings over the 1-D mesh of all devices of all hosts.

  Args:
    devices: devices to use instead, such as those that `benchmarks.compile`
      compiles for.
  """
  devices = jax.devices() if devices is None else devices
  mesh = jax.make_mesh(
    (len(devices),), ('data',), (AxisType.Auto,), devices=devices
  )
  return Layout(
    NamedSharding(mesh, P()),
    NamedSharding(mesh, P('data')),
    NamedSharding(mesh, P(None, 'data')),
    NamedSharding(mesh, P(None, None, 'data')),
  )


def each_its_part(x: jax.Array, layout: Layout) -> jax.Array:
  """Return x [B, ...], of which each device computes its own part.

  What is sent to all devices afterwards would else be computed by all.

  Args:
    x: an array inside of `jax.jit`.
    layout: see `make_layout`.
  """
  return jax.lax.with_sharding_constraint(x, layout.split)


def check_divisible(batch_size, key, devices=None):
  """Raise ValueError unless the devices divide the batch evenly.

  Args:
    batch_size: number of examples in a batch, over all hosts.
    key: name of the option that sets it, for the error message.
    devices: number of devices; all of all hosts by default.
  """
  devices = devices or jax.device_count()
  if batch_size % devices:
    better = math.ceil(batch_size / devices) * devices
    raise ValueError(
      f'{key}={batch_size} does not divide by the {devices} devices: use '
      f'{better}, say.'
    )


def check_memory(num_bytes, key, share=1 / 4):
  """Raise ValueError if data would take too large a share of a device.

  Args:
    num_bytes: size of what every device is to hold.
    key: name of the option that asks for it, for the error message.
    share: largest share of the memory of a device. CPU devices are taken to
      have equal parts of the memory of their host.
  """
  memory = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  if memory is None:
    host = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    memory = host // jax.local_device_count()
  if num_bytes > share * memory:
    raise ValueError(
      f'{key}: the data have {num_bytes / 2**30:.2f} GiB, more than '
      f'{share:.0%} of the {memory / 2**30:.2f} GiB of a device: set it to '
      'False.'
    )


def to_global(sharding, local):
  """Return global arrays, of which each host passes its own part.

  Args:
    sharding: sharding of the global arrays.
    local: pytree of numpy arrays, the part of this host.
  """
  return jax.tree.map(
    lambda v: jax.make_array_from_process_local_data(sharding, v), local
  )


def local_rows(array) -> np.ndarray:
  """Return the rows of this host of an array that is split along axis 0."""
  shards = {s.index[0].start or 0: s.data for s in array.addressable_shards}
  return np.concatenate([np.asarray(shards[k]) for k in sorted(shards)])


def replicated(like, layout):
  """Return shapes and dtypes that are restored onto every device.

  Args:
    like: pytree of arrays, or of shapes and dtypes.
    layout: see `make_layout`.

  Returns:
    The pytree with a `jax.ShapeDtypeStruct` in place of each leaf.
  """
  return jax.tree.map(
    lambda v: jax.ShapeDtypeStruct(
      v.shape, v.dtype, sharding=layout.replicated
    ),
    like,
  )


# Smaller arrays are not worth a communication: each device holds them.
SMALLEST_SPLIT = 1024


def spread(like, layout):
  """Return shapes and dtypes, as `replicated` does, of arrays that are split.

  Each array is split along its largest dimension that the devices divide. One
  that has none, or fewer than `SMALLEST_SPLIT` elements, is on every device.
  """
  mesh = layout.replicated.mesh

  def split(v):
    axes = [i for i, n in enumerate(v.shape) if n % mesh.size == 0]
    spec = P()
    if axes and math.prod(v.shape) >= SMALLEST_SPLIT:
      axis = max(axes, key=lambda i: v.shape[i])
      spec = P(*[None] * axis, *mesh.axis_names)
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding)

  return jax.tree.map(split, like)


def bytes_per_device(arrays) -> int:
  """Return the bytes that a pytree takes on each device.

  Args:
    arrays: pytree of arrays, or of shapes and dtypes with shardings.
  """
  return sum(
    math.prod(v.sharding.shard_shape(v.shape)) * v.dtype.itemsize
    for v in jax.tree.leaves(arrays)
  )


def all_hosts(flag) -> bool:
  """Return whether the flag is true on every host; all hosts must call it."""
  flags = np.asarray(bool(flag))
  if jax.process_count() > 1:
    flags = multihost_utils.process_allgather(flags)
  return bool(np.all(flags))


def largest(value: int) -> int:
  """Return the largest number of all hosts; all hosts must call it."""
  if jax.process_count() == 1:
    return value
  return int(np.max(multihost_utils.process_allgather(np.asarray(value))))


def on_first_host(function: Callable, *arguments) -> None:
  """Call a function on the first host; if it fails, every host raises.

  Raises:
    Exception: what the function raised there; ValueError on the other hosts.
  """
  error = None
  if jax.process_index() == 0:
    try:
      function(*arguments)
    except Exception as failed:  # Raised when the other hosts know.
      error = failed
  if not all_hosts(error is None):
    raise error or ValueError('The first process stopped, and says why.')


def barrier(name):
  """Wait until every host has called this with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
