"""A run's folder: its config, and its checkpoints, written in the background.

The checkpoints are Orbax's. Each holds two items: `state`, everything that
training needs besides the averaged parameters, and `ema`, the averaged
parameters, which are all that sampling and evaluation read. A checkpoint that
is being written when the process dies is not listed afterwards; the earlier
ones are.
"""

import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from runtime.files import write_json

# Orbax logs a warning for every checkpoint that is opened for reading.
logging.set_verbosity(logging.ERROR)


# ----------------------------------------------------------------- config


def read_config(workdir) -> dict[str, Any]:
  """Return the config of a run as nested dicts, with lists for tuples.

  Raises:
    FileNotFoundError: no run was started in this folder.
    ValueError: the file is damaged.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(
      f'There is no {path}: train with this --workdir first.'
    )
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is not a readable JSON file: {error}') from None


def claim(
  workdir,
  config_dict: Mapping[str, Any],
  fixed: Collection[str],
  *,
  upgrade: Callable[[dict], Mapping] = dict,
  write: bool = True,
) -> None:
  """Check that a folder belongs to this config, and keep the config in it.

  A key that the stored config does not have was introduced later, and is not
  compared.

  Args:
    workdir: folder of the run; it is made if it does not exist.
    config_dict: the config as nested dicts of values that JSON can hold.
    fixed: dotted keys whose values must not change when a run is resumed.
    upgrade: turns the stored config into one with today's keys.
    write: False to check only.

  Raises:
    ValueError: the stored config has another value for a key of `fixed`.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if path.is_file():
    old, new = _leaves(upgrade(read_config(workdir))), _leaves(config_dict)
    for key in sorted(old.keys() & set(fixed)):
      if old[key] != new.get(key):
        raise ValueError(
          f'{workdir} belongs to a run with config.{key}={old[key]!r}, not '
          f'{new.get(key)!r}: choose another --workdir, or that value.'
        )
  if write and jax.process_index() == 0:
    write_json(path, config_dict)


def _leaves(config, prefix=''):
  """Return {dotted key: value} of nested dicts, with tuples for lists."""
  leaves = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      leaves |= _leaves(value, f'{prefix}{key}.')
    else:
      leaves[prefix + key] = tuple(value) if isinstance(value, list) else value
  return leaves


# ------------------------------------------------------------- checkpoints


def _reason(error):
  """Return the first line of an error, shortened: Orbax's fill pages."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:160]


class Checkpoints:
  """The checkpoints in workdir/checkpoints; a context manager.

  The best checkpoint, by test loss, and the last two are kept, besides those
  that `keep_every` selects.
  """

  def __init__(self, workdir, *, keep_every=None):
    """Open the checkpoints.

    Args:
      workdir: folder of the run.
      keep_every: checkpoints whose step is a multiple of this number are kept
        as well, with 0 none. None opens the checkpoints for reading only.

    Raises:
      FileNotFoundError: they are opened for reading, and there are none.
      ValueError: a file is damaged.
    """
    self._folder = epath.Path(workdir).absolute() / 'checkpoints'
    policy, best = preservation_policy, lambda metrics: metrics['loss']
    read_only = keep_every is None
    if read_only and not self._folder.exists():
      raise FileNotFoundError(
        f'{self._folder} does not exist: train with this --workdir first.'
      )
    keep = [policy.PreserveAll()]
    if not read_only:
      keep = [
        policy.LatestN(2),
        policy.BestN(get_metric_fn=best, reverse=True, n=1),
      ]
      if keep_every:
        keep.append(policy.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy.AnyPreservationPolicy(keep),
      best_fn=best,
      best_mode='min',
      read_only=read_only,
      enable_async_checkpointing=not read_only,
    )
    try:
      self._manager = ocp.CheckpointManager(
        self._folder, item_names=('state', 'ema'), options=options
      )
    except ValueError as error:  # A file of metrics is incomplete.
      raise ValueError(
        f'The checkpoints in {self._folder} cannot be read (one is damaged: '
        f'move it away): {_reason(error)}'
      ) from error

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.close()

  @property
  def steps(self):
    """The steps that can be restored, in increasing order."""
    return sorted(self._manager.all_steps())

  @property
  def last(self):
    """The last step, or None if there is no checkpoint."""
    return self._manager.latest_step()

  @property
  def best(self):
    """The step with the smallest test loss, else the last step."""
    step = self._manager.best_step()
    return self.last if step is None else step

  def select(self, which):
    """Return the steps that a value of `config.eval.checkpoint` selects.

    Args:
      which: 'last', 'best', 'all', a step, or 'first:last', a range of steps
        with both ends.

    Returns:
      A list of at least one step, in increasing order.

    Raises:
      ValueError: there is no such checkpoint.
    """
    which, steps = str(which), self.steps
    named = {'last': [self.last], 'best': [self.best], 'all': steps}
    try:
      if which in named:
        chosen = [step for step in named[which] if step is not None]
      elif ':' in which:
        first, last = (int(v) for v in which.split(':'))
        chosen = [step for step in steps if first <= step <= last]
      else:
        chosen = [step for step in steps if step == int(which)]
    except ValueError:
      raise ValueError(
        f"config.eval.checkpoint={which!r} is none of 'last', 'best', 'all', a "
        "step, or 'first:last'."
      ) from None
    if not chosen:
      raise ValueError(
        f'There is no checkpoint {which!r} in {self._folder}; it has '
        f'{steps or "none"}.'
      )
    return chosen

  def save(self, step, state, ema, *, loss=None):
    """Start to save a checkpoint in the background; see `wait`.

    The arrays may be changed or deleted as soon as this returns.

    Args:
      step: number of training steps taken.
      state: pytree of arrays.
      ema: averaged parameters, a pytree of arrays.
      loss: test loss, by which the best checkpoint is chosen.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), ema=ocp.args.StandardSave(ema)
      ),
      metrics=None if loss is None else {'loss': float(loss)},
      force=True,
    )

  def wait(self):
    """Wait until everything that was saved is on disk."""
    self._manager.wait_until_finished()

  def restore(self, step, like, item):
    """Return one item of a checkpoint, a pytree of arrays.

    Args:
      step: one of `steps`.
      like: pytree of `jax.ShapeDtypeStruct` with shardings.
      item: 'state' or 'ema'.

    Raises:
      ValueError: the checkpoint is damaged, or belongs to another network.
    """
    try:
      args = ocp.args.Composite(**{item: ocp.args.StandardRestore(like)})
      return self._manager.restore(step, args=args)[item]
    except Exception as error:  # Orbax raises many types for damaged files.
      raise ValueError(
        f'Checkpoint {self._folder}/{step} cannot be read (damaged, or of '
        f'another network): {_reason(error)}'
      ) from error


def restore_ema(workdir, like, which='last'):
  """Return the averaged parameters of a run, on the default device.

  Args:
    workdir: folder of the run.
    like: shapes and dtypes of the parameters, a pytree.
    which: see `Checkpoints.select`; the last step that it selects is read.

  Raises:
    FileNotFoundError: the run has no checkpoints.
    ValueError: there is no such checkpoint, it is damaged, or it belongs to
      another network.
  """
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), like
  )
  with Checkpoints(workdir) as checkpoints:
    step = checkpoints.select(which)[-1]
    return checkpoints.restore(step, like, 'ema')
