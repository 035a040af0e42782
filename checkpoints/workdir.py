"""A run's folder: its config, and its checkpoints, written in the background.

The checkpoints are Orbax's. Each holds items: `state`, everything that
training needs besides the averaged parameters, and `ema`, the averaged
parameters, which are all that sampling and evaluation read. Averages of further
lengths are items of their own, such as `average_0.05`. A checkpoint that
is being written when the process dies is not listed afterwards; the earlier
ones are.
"""

import contextlib
import functools
import json
import logging
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from runtime.devices import all_hosts, barrier, largest
from runtime.files import check_local, write_json
from runtime.progress import say

# Orbax logs a warning for every checkpoint that is opened for reading, and
# pages of tracebacks of its threads for errors that are raised here as well.
absl_logging.set_verbosity(absl_logging.FATAL)
logging.getLogger('asyncio').setLevel(logging.CRITICAL)


def _leave_out_closed_loops(show):
  """Return a hook for unraisable errors without what follows another error.

  Writes that are still under way find that Orbax has closed their event loop.
  """

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      show(unraisable)

  return hook


sys.unraisablehook = _leave_out_closed_loops(sys.unraisablehook)


# ----------------------------------------------------------------- config


def read_config(workdir) -> dict[str, Any]:
  """Return the config of a run as nested dicts, with lists for tuples.

  Raises:
    FileNotFoundError: no run was started in this folder.
    ValueError: the file is damaged.
  """
  check_local(workdir)
  path = pathlib.Path(workdir) / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(
      f'There is no {path}: train with this --workdir first.'
    )
  try:
    config = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is not a readable JSON file: {error}') from None
  if not isinstance(config, dict) or not config:
    raise ValueError(f'{path} is damaged: it holds no config.')
  return config


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
  check_local(workdir)
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
  if code := re.search(r"os_error_code='(\d+)'", str(error)):
    return os.strerror(int(code[1]))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:160]


# Where damaged checkpoints are moved when training goes on, in the workdir.
DAMAGED = 'damaged_checkpoints'


class _PatientManager(ocp.CheckpointManager):
  """Orbax's manager; a file of metrics that is damaged costs a warning."""

  def metrics(self, step):
    """Return the metrics of a checkpoint, or None if they are not known."""
    try:
      return super().metrics(step)
    except ValueError as error:
      say(
        f'warning: The test loss of checkpoint {self.directory}/{step} cannot '
        f'be read (damaged), so it is not the best: {_reason(error)}'
      )
      return None


class Checkpoints:
  """The checkpoints in workdir/checkpoints; a context manager.

  The best checkpoint, by test loss, and the last two are kept, besides those
  that `keep_every` selects.
  """

  def __init__(self, workdir, *, keep_every=None, fall_back=False):
    """Open the checkpoints.

    Args:
      workdir: folder of the run.
      keep_every: checkpoints whose step is a multiple of this number are kept
        as well, with 0 none. None opens the checkpoints for reading only.
      fall_back: whether a damaged checkpoint is passed over with a warning. If
        the checkpoints are not opened for reading only, it is moved away.

    Raises:
      FileNotFoundError: they are opened for reading, and there are none.
      ValueError: a file is damaged, and `fall_back` is False.
    """
    check_local(workdir)
    self._workdir = pathlib.Path(workdir).absolute()
    self._folder = epath.Path(workdir).absolute() / 'checkpoints'
    self._keep_every, self._fall_back = keep_every, fall_back
    self._saving = None
    if self._read_only and not self._folder.exists():
      raise FileNotFoundError(
        f'{self._folder} does not exist: train with this --workdir first.'
      )
    try:
      self._manager = self._open()
    except ValueError as error:  # A file of metrics is incomplete.
      raise ValueError(
        f'The checkpoints in {self._folder} cannot be read (one is damaged: '
        f'move it away): {_reason(error)}'
      ) from error

  @property
  def _read_only(self):
    return self._keep_every is None

  def _open(self):
    """Return Orbax's manager of the folder."""
    policy, best = preservation_policy, lambda metrics: metrics['loss']
    keep = [policy.PreserveAll()]
    if not self._read_only:
      keep = [
        policy.LatestN(2),
        policy.BestN(get_metric_fn=best, reverse=True, n=1),
      ]
      if self._keep_every:
        keep.append(policy.EveryNSteps(self._keep_every))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy.AnyPreservationPolicy(keep),
      best_fn=best,
      best_mode='min',
      read_only=self._read_only,
      enable_async_checkpointing=not self._read_only,
      # What a process left that died while it saved.
      cleanup_tmp_directories=not self._read_only,
    )
    manager = _PatientManager if self._fall_back else ocp.CheckpointManager
    return manager(self._folder, options=options)

  def _move_away(self, step):
    """Move a damaged checkpoint out of the way of the one made in its place."""
    target = self._workdir / DAMAGED / str(step)
    if jax.process_index() == 0:
      target.parent.mkdir(exist_ok=True)
      while target.exists():
        target = target.with_name(f'{target.name}_')
      os.replace(self._folder / str(step), target)
      say(f'warning: It was moved to {target}.')
    barrier(f'moved_{step}')

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    with self._named_errors():
      try:
        self._manager.close()
      except Exception:
        if kind is None:  # Else an earlier error is being raised.
          raise

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
    return next(iter(self._preferred('best')), None)

  def _preferred(self, which):
    """Return the steps that `which` selects, those to be read first first."""
    if which == 'last':
      self.select(which)  # Says so if there is none.
      return self.steps[::-1]
    if which != 'best':
      return self.select(which)[::-1]
    path = lambda step: (
      pathlib.Path(self._folder) / str(step) / 'metrics' / 'metrics'
    )
    losses = {step: _loss_in(path(step)) for step in self.steps}
    last_first = sorted(losses, reverse=True)
    return sorted(
      last_first,
      key=lambda step: math.inf if losses[step] is None else losses[step],
    )

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

  def lengths(self, step):
    """Return the lengths of the averages in a checkpoint, in order."""
    prefix = average_item('')
    found = (self._folder / str(step)).glob(f'{prefix}*')
    return sorted(float(path.name.removeprefix(prefix)) for path in found)

  def save(self, step, state, ema, *, averages=None, loss=None):
    """Start to save a checkpoint in the background; see `wait`.

    The arrays may be changed or deleted as soon as this returns.

    Args:
      step: number of training steps taken.
      state: pytree of arrays.
      ema: averaged parameters, a pytree of arrays.
      averages: {length: parameters}, further averages.
      loss: test loss, by which the best checkpoint is chosen.
    """
    items = {'state': state, 'ema': ema}
    items |= {average_item(length): v for length, v in (averages or {}).items()}
    with self._named_errors():
      self.wait()
      self._saving = step
      self._manager.save(
        step,
        args=ocp.args.Composite(
          **{name: ocp.args.StandardSave(v) for name, v in items.items()}
        ),
        metrics=None if loss is None else {'loss': float(loss)},
        force=True,
      )

  def wait(self):
    """Wait until everything that was saved is on disk."""
    with self._named_errors():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _named_errors(self):
    """Say in one line which checkpoint could not be saved, and why.

    Orbax raises many types, from threads, when it saves or waits.
    """
    try:
      yield
    except SaveError:
      raise
    except Exception as error:
      with contextlib.suppress(Exception):
        self._manager.reload()
      raise SaveError(
        f'Checkpoint {self._folder}/{self._saving} could not be saved: '
        f'{_reason(error)}. The last complete checkpoint is {self.last}.'
      ) from error

  def restore(self, step, like, item):
    """Return one item of a checkpoint, a pytree of arrays.

    Args:
      step: one of `steps`.
      like: pytree of `jax.ShapeDtypeStruct` with shardings.
      item: 'state', 'ema', or an `average_item`.

    Raises:
      FileNotFoundError: the checkpoint was removed, as training does with old
        ones.
      ValueError: the checkpoint is damaged, or belongs to another network.
    """
    try:
      args = ocp.args.Composite(**{item: ocp.args.StandardRestore(like)})
      return self._manager.restore(step, args=args)[item]
    except Exception as error:  # Orbax raises many types for damaged files.
      if self._is_removed(step):
        raise FileNotFoundError(
          f'Checkpoint {self._folder}/{step} is no longer there: training has '
          'removed it.'
        ) from error
      raise ValueError(
        f'Checkpoint {self._folder}/{step} cannot be read (damaged, or of '
        f'another network or optimizer): {_reason(error)}'
      ) from error

  def _is_removed(self, step):
    """Whether a checkpoint that could not be read was removed meanwhile."""
    for _ in range(10):
      if not (self._folder / str(step) / '_CHECKPOINT_METADATA').exists():
        return True
      time.sleep(0.05)  # Its files are removed one after the other.
    return False

  def restore_first(self, which, restore):
    """Return (step, restore(step)) of the step that `which` names.

    Of several it is the last; of 'best', that with the smallest test loss. One
    that training removes meanwhile is chosen again. With `fall_back`, a damaged
    one is passed over with a warning.

    Args:
      which: see `select`.
      restore: restore(step) -> anything, which calls the method `restore`.

    Raises:
      FileNotFoundError, ValueError: there is none, or none can be read; it says
        why the first could not.
    """
    failed = {}
    while steps := [s for s in self._preferred(which) if s not in failed]:
      # All hosts take the same, though they may see the folder change.
      step = -largest(-steps[0])
      found, error = attempt(restore, step)
      if error is None:
        self._pass_over(failed, step)
        return step, found
      failed[step] = error
      damaged = not isinstance(error, FileNotFoundError)
      if damaged and not self._fall_back:
        break
      self._manager.reload()
    raise next(iter(failed.values()))

  def _pass_over(self, failed, step):
    """Say which checkpoints are damaged, so that `step` is taken instead."""
    for bad, error in failed.items():
      if not isinstance(error, FileNotFoundError):
        say(f'warning: {error} Checkpoint {step} is taken instead.')
        if not self._read_only:
          self._move_away(bad)
    if failed:
      self._manager.reload()

  def restore_each(self, which, restore):
    """Yield (step, restore(step)) of all steps that `which` selects.

    Those that training removes meanwhile, or that are damaged, are left out
    with a line.

    Raises:
      FileNotFoundError, ValueError: there is none, or none can be read.
    """
    if which in ('last', 'best'):
      yield self.restore_first(which, restore)
      return
    errors, steps = [], self.select(which)
    for step in steps:
      found, error = attempt(restore, step)
      if error is None:
        yield step, found
      else:
        errors.append(error)
        if len(errors) < len(steps):
          say(f'warning: {errors[-1]} It is left out.')
    if len(errors) == len(steps):
      raise errors[0]


def attempt(restore, step):
  """Return (restore(step), None), or (None, why) if a host cannot read it.

  All hosts must call it.
  """
  found, error = None, None
  try:
    found = restore(step)
  except (FileNotFoundError, ValueError) as problem:
    error = problem
  if all_hosts(error is None):
    return found, None
  return None, error or ValueError(f'Another host cannot read {step}.')


def average_item(length):
  """Return the name of the item that holds the average of a length."""
  return f'average_{length}'


class SaveError(OSError):
  """A checkpoint could not be saved."""


def _loss_in(path):
  """Return the test loss in a file of metrics, or None if there is none."""
  try:
    return float(json.loads(path.read_text())['loss'])
  except (OSError, ValueError, TypeError, KeyError):
    return None


def restore_ema(workdir, like, which='last', restore=None):
  """Return the averaged parameters of a run, on the default device.

  Args:
    workdir: folder of the run.
    like: shapes and dtypes of the parameters, a pytree.
    which: see `Checkpoints.select`; the last step that it selects is read.
    restore: restore(checkpoints, step, like) -> parameters; None for the
      averaged parameters as they are in the checkpoint.

  Raises:
    FileNotFoundError: the run has no checkpoints.
    ValueError: there is no such checkpoint, it is damaged, or it belongs to
      another network.
  """
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = jax.tree.map(
    lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), like
  )
  with Checkpoints(workdir) as checkpoints:
    restore = restore or functools.partial(Checkpoints.restore, item='ema')
    restored = functools.partial(restore, checkpoints, like=like)
    return checkpoints.restore_first(which, restored)[1]


def check_run(workdir, choice, advice):
  """Raise FileNotFoundError unless a run was started in a folder.

  Args:
    workdir: the folder.
    choice: the key that names it, with its value, for the error.
    advice: what to do.
  """
  if not (pathlib.Path(workdir) / 'config.json').is_file():
    raise FileNotFoundError(f'config.{choice} has no config.json: {advice}.')


def restore_arrays(workdir, like, which='last'):
  """Return what `restore_ema` does as numpy arrays, which are of no device.

  Every host has them all.
  """
  return jax.tree.map(np.asarray, restore_ema(workdir, like, which))
