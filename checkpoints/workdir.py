"""Checkpoints of a run: asynchronous, atomic, the best and the last kept.

A thin wrapper of Orbax. A checkpoint holds two items: `state`, all that
training needs, and `ema`, the averaged parameters alone, which is what
sampling and evaluation read. A step that is being written when the process
dies does not exist afterwards; the one before it does.
"""

import json
import pathlib

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from runtime.files import write_text

# Orbax warns of every checkpoint that is opened for reading.
logging.set_verbosity(logging.ERROR)


def _differences(new, old, prefix=''):
  for key in sorted(new.keys() | old.keys()):
    a, b = new.get(key), old.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      yield from _differences(a, b, f'{prefix}{key}.')
    elif a != b:
      yield f'{prefix}{key}', a, b


# What a run is: changing it on resume would train another model on the state.
_FIXED = ('data', 'sde', 'model')


def claim_workdir(config, workdir, *, write=True):
  """Makes workdir the one of this config, and keeps the config in it.

  Args:
    config: a ConfigDict.
    workdir: of the run.
    write: False to check only.

  Raises:
    ValueError: it belongs to a config with other data, process or network.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / 'config.json'
  new = json.loads(config.to_json_best_effort())
  if path.is_file():
    old = json.loads(path.read_text())
    for key, ours, theirs in _differences(new, old):
      # Where the same data lie, and how they are computed with, may change.
      harmless = key in ('data.path', 'model.remat', 'model.dtype')
      if key.split('.')[0] in _FIXED and not harmless:
        raise ValueError(
          f'{workdir} belongs to a run with config.{key}={theirs!r}, not '
          f'{ours!r}: choose another --workdir, or that value.'
        )
  if write and jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(new, indent=1) + '\n')


def _reason(error):
  """The first line of an error, cut short: Orbax's are pages long."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:160]


class Checkpoints:
  """The checkpoints in workdir/checkpoints; a context manager."""

  def __init__(self, workdir, *, keep_every=None):
    """Opens them.

    Args:
      workdir: of the run.
      keep_every: keep all whose step is a multiple of it, besides the best and
        the last two; None to open them for reading only.
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
        policy.EveryNSteps(keep_every),
      ]
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
    except ValueError as error:  # A file of metrics is cut.
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
    """Steps that can be restored, in order."""
    return sorted(self._manager.all_steps())

  @property
  def last(self):
    """The last step, or None."""
    return self._manager.latest_step()

  @property
  def best(self):
    """The step of the smallest test loss; the last if none was measured."""
    step = self._manager.best_step()
    return self.last if step is None else step

  def select(self, which):
    """Steps that `config.eval.checkpoint` names.

    Args:
      which: 'last', 'best', 'all', a step, or 'first:last' (inclusive).

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
    """Begins to save; it is done when this returns only for the caller.

    Args:
      step: number of training steps taken.
      state: pytree of arrays.
      ema: averaged parameters.
      loss: test loss, by which the best is chosen.
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
    """Returns when all that was saved is on disk."""
    self._manager.wait_until_finished()

  def restore(self, step, like, item):
    """Reads one item.

    Args:
      step: one of `steps`.
      like: pytree of `jax.ShapeDtypeStruct` with shardings.
      item: 'state' or 'ema'.

    Raises:
      ValueError: it is damaged, or of another network.
    """
    try:
      args = ocp.args.Composite(**{item: ocp.args.StandardRestore(like)})
      return self._manager.restore(step, args=args)[item]
    except Exception as error:  # The type that Orbax raises for a cut file.
      raise ValueError(
        f'Checkpoint {self._folder}/{step} cannot be read (damaged, or of '
        f'another network): {_reason(error)}'
      ) from error


def restore_ema(workdir, like, which='last'):
  """Averaged parameters of a run, on the default device.

  Args:
    workdir: of the run.
    like: pytree of shapes and dtypes: `experiment.abstract_params(config)`.
    which: as `Checkpoints.select`; the last of those it names.
  """
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), like
  )
  with Checkpoints(workdir) as checkpoints:
    step = checkpoints.select(which)[-1]
    return checkpoints.restore(step, like, 'ema')
