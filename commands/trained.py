"""A finished run: its weights, what results of it are named by, its samples.

All commands that sample do it with `draw`, in batches over all devices. What is
random in a batch is a function of the seed and the number of the batch.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np

import experiment
from checkpoints.workdir import Checkpoints
from configs import schema
from data import conditions, datasets
from experiment import Experiment
from runtime.devices import (
  Layout,
  check_divisible,
  each_its_part,
  make_layout,
  replicated,
)
from runtime.files import digest
from runtime.progress import Progress
from solvers.base import Samples

# Larger than the noise of any process: larger values mean that sampling
# diverged.
DIVERGED = 1e4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A checkpoint of a run.

  Attributes:
    model: the Experiment of the config that the command was given.
    workdir: folder of the run.
    step: training steps taken.
    params: averaged parameters, on all devices.
    layout: where arrays live.
  """

  model: Experiment
  workdir: pathlib.Path
  step: int
  params: Any
  layout: Layout

  @functools.cached_property
  def name(self) -> str:
    """Name of results: the step, and a hash of all that samples depend on.

    It covers weights and config, but not the number of samples: a larger number
    adds to the samples that are there.
    """
    weights = map(np.asarray, jax.tree.leaves(self.params))
    key = identity(self.model.config, *weights)
    return f'step_{self.step}-{key}'


def identity(config, *more) -> str:
  """Return eight hexadecimal digits of all that samples depend on.

  Args:
    config: a ConfigDict.
    *more: further values and arrays.
  """
  wanted = schema.marked(config, 'samples')
  return digest(wanted, *more)[:8]


def restore_step(model, layout, saved, workdir, step, length=None) -> Run:
  """Return a checkpoint as a Run; arguments are those of `Run`.

  `saved` are the open `Checkpoints` of workdir; for `length` see
  `experiment.restore_average`.
  """
  like = replicated(model.abstract_params(), layout)
  params = experiment.restore_average(saved, step, like, length)
  return Run(
    model=model,
    workdir=pathlib.Path(workdir),
    step=step,
    params=model.network_params(params),
    layout=layout,
  )


def restore(config, workdir, model=None) -> Run:
  """Return the last checkpoint that config.eval.checkpoint names, as a Run.

  Args:
    config: a ConfigDict.
    workdir: folder of the run.
    model: the Experiment of the config, if it has been built already.

  Raises:
    FileNotFoundError, ValueError: there is none, or it is of another config.
  """
  model, lengths = model or experiment.build(config), config.eval.ema_length
  config = model.config
  if len(lengths) > 1:
    raise ValueError(
      f'config.eval.ema_length={lengths} needs to be one length: only --mode '
      'eval takes several.'
    )
  with Checkpoints(workdir, fall_back=True) as saved:
    experiment.claim(config, workdir, write=False)
    length = lengths[0] if lengths else None
    restored = functools.partial(
      restore_step, model, make_layout(), saved, workdir, length=length
    )
    return saved.restore_first(config.eval.checkpoint, restored)[1]


def facts(config) -> dict[str, Any]:
  """Return what a number needs beside it to be trusted and made again."""
  versions = {m.__name__: m.__version__ for m in (jax, flax, np)}
  return {
    'seed': config.seed,
    'config': experiment.json_of(config),
    'versions': versions,
  }


def sampler_of(config) -> dict[str, Any]:
  """Return the options of the sampler and its guidance, by name."""
  guidance = schema.own_guidance(config)
  return {
    path.partition('.')[2]: value
    for path, value in schema.marked(config, 'samples').items()
    if path.startswith('sampling.') or path in guidance
  }


# ------------------------------------------------------------------- samples


def conditions_of(model, count: int) -> dict[str, np.ndarray]:
  """Return what samples of a network that is told conditions are given.

  Args:
    model: an Experiment.
    count: number of samples.

  Returns:
    {} if it is told none; else rows for `draw`: 'condition', those of
    config.control.condition, or the first of the test set, then with 'label'
    for a network that is told classes.

  Raises:
    FileNotFoundError, ValueError: there are none, or they do not suit it.
  """
  path = model.config.control.condition
  if path:
    return {'condition': conditions.read(path, model.config.data)}
  if not model.condition:
    return {}
  test_set = datasets.load(model.config.data, 'test')
  experiment.check_conditions(model, test_set)
  return model.given(test_set, min(count, len(test_set)))


def batch_size(config, count: int) -> int:
  """Return the size of batches of samples that divides by all devices."""
  devices = jax.device_count()
  size = min(config.eval.batch_size, math.ceil(count / devices) * devices)
  check_divisible(size, 'config.eval.batch_size')
  return size


def jit_sample(model, layout, size, guide=None, frames=0, split=False):
  """Return make(params, rng, rows, shared) -> Samples; see `draw`."""
  sample = model.make_sample(size, guide=guide, frames=frames)
  everywhere = layout.replicated

  def make(params, rng, rows, shared):
    found = sample(params, rng, **rows, **shared)
    return found._replace(x=each_its_part(found.x, layout))

  return jax.jit(
    make,
    in_shardings=(everywhere, None, layout.split, everywhere),
    out_shardings=Samples(
      x=layout.split if split else everywhere,
      nfe=everywhere,
      success=everywhere,
      frames=everywhere,
      times=everywhere,
      not_finite_at=everywhere,
      label=layout.split if split else everywhere,
    ),
  )


def draw(
  run: Run,
  count: int,
  size: int,
  *,
  guide: Callable | None = None,
  rows: Mapping[str, np.ndarray] | None = None,
  shared: Mapping[str, Any] | None = None,
  frames: int = 0,
  split: bool = False,
  skip: Callable[[int], bool] = lambda number: False,
) -> Iterator[tuple[int, Samples | None]]:
  """Yield (number, samples) of each batch; the last holds more than `count`.

  Args:
    run: weights and Experiment.
    count: number of samples in all.
    size: samples of a batch, divisible by the number of devices.
    guide: a Guidance, guide(score_fn, sde, **rows, **shared) -> score_fn.
    rows: what each sample is guided by, arrays [count, ...], or of fewer
      rows, which are repeated.
    shared: what all samples are guided by, pytrees.
    frames: states to record; 0 for none.
    split: whether samples stay on the devices that made them, rather than
      being sent to all hosts.
    skip: skip(number) tells that a batch is not needed: its samples are None.

  Raises:
    FloatingPointError: the solver did not arrive, or samples diverged.
  """
  layout, rows = run.layout, rows or {}
  make = jit_sample(run.model, layout, size, guide, frames, split)

  def spread(v):
    return jax.make_array_from_callback(v.shape, layout.split, v.__getitem__)

  progress = Progress('samples', count, run.model.kind)
  for number, start in enumerate(range(0, count, size)):
    found = None
    if not skip(number):
      members = np.arange(start, start + size) % count
      mine = {k: spread(v[members % len(v)]) for k, v in rows.items()}
      rng = jax.random.fold_in(jax.random.key(run.model.config.seed), number)
      found = make(run.params, rng, mine, shared or {})
      limit = DIVERGED if guide else math.inf
      experiment.check_samples(run.model.config, found, limit)
    yield number, found
    progress(min(count, start + size))


def draw_all(run: Run, count: int, **options):
  """Return (samples [count, ...] as data sets hold them, NFE).

  Args:
    run, count: as for `draw`.
    **options: guide, rows and shared of `draw`.
  """
  size = batch_size(run.model.config, count)
  batches = [found for _, found in draw(run, count, size, **options)]
  x = np.concatenate([run.model.to_data(found.x) for found in batches])
  return x[:count], float(batches[-1].nfe)
