"""Training over all devices of all hosts: state, step, and a loop with hooks.

One program runs on every host; arrays are global. The state is replicated or,
with `training.shard_state`, split over the devices between steps; the batch is
split along the only axis of the mesh, and `jax.jit` inserts the communication:
means over the batch are means over the examples of all devices, and random
numbers do not depend on the number of devices.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import threading
import time
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jaxtyping import Float, PyTree

import experiment
import optimization
from checkpoints.workdir import (
  Checkpoints,
  average_item,
  check_run,
  restore_arrays,
)
from data import batches as batching
from data import datasets, record
from reporting import pictures
from runtime.devices import (
  Layout,
  bytes_per_device,
  check_divisible,
  check_memory,
  each_its_part,
  largest,
  make_layout,
  on_first_host,
  replicated,
  spread,
  to_global,
)
from runtime.files import check_output
from runtime.locks import lock
from runtime.progress import Log, Progress, say

# Images of the test set whose loss is logged in training, with fixed noise.
EVAL_IMAGES = 1024
# Samples in the picture of a snapshot: a grid of images, or a cloud of points.
SNAPSHOT_IMAGES, SNAPSHOT_POINTS = 64, 2048


def _fields(model):
  """Return what the loss sees of a batch."""
  return 'image', 'label', *(('condition',) if model.condition else ())


def _row(tree, i):
  return jax.tree.map(lambda v: v[i], tree)


class TrainState(typing.NamedTuple):
  """All that changes in training. step counts the steps taken."""

  step: jax.Array
  params: typing.Any
  opt_state: typing.Any
  ema: typing.Any
  # {length: parameters} of config.training.ema_lengths.
  averages: typing.Any = {}


# ------------------------------------------------------------- state and step


def make_init(model, layout):
  """Return init(params) -> TrainState and place() -> TrainState.

  `place` draws parameters and puts the state on all devices.
  """
  lengths = model.config.training.ema_lengths

  def init(params):
    zeros = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params)
    averages = optimization.start_averages(params, lengths)
    opt_state = model.optimizer.init(params)
    return TrainState(zeros, params, opt_state, ema, averages)

  def place():
    begin = model.config.training.begin_with
    if begin:
      params = restore_arrays(begin, model.abstract_params())
    else:
      params = model.init_params(jax.random.key(model.config.seed))
    # Made on the devices by jit: device_put may alias, and an alias of a
    # donated buffer would be deleted with it.
    return jax.jit(
      init,
      out_shardings=_shardings(abstract_state(model, layout)),
      compiler_options=experiment.RUN_ONCE,
    )(params)

  return init, place


def abstract_state(model, layout):
  """Return the TrainState as shapes, dtypes and shardings."""
  init, _ = make_init(model, layout)
  like = jax.eval_shape(init, model.abstract_params())
  share = spread if model.config.training.shard_state else replicated
  return share(like, layout)


def _shardings(like):
  """Return the shardings of a pytree of shapes, dtypes and shardings."""
  return jax.tree.map(lambda v: v.sharding, like)


def _mean_gradient(mean_loss, parts, unrolled):
  """Return gradient(params, rng, batch) -> (loss, gradient), part by part.

  Args:
    mean_loss: mean_loss(params, rng, batch) -> scalar.
    parts: number of parts that a batch is split into.
    unrolled: whether the loop over parts is Python's.
  """
  value_and_grad = jax.value_and_grad(mean_loss)
  if parts == 1:
    return lambda params, rng, batch: value_and_grad(
      params, rng, _row(batch, 0)
    )

  def gradient(params, rng, batch):
    def part(total, inputs):
      i, batch = inputs
      value = value_and_grad(params, jax.random.fold_in(rng, i), batch)
      return jax.tree.map(lambda a, b: a + b / parts, total, value), None

    total = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    if unrolled:
      for i in range(parts):
        total, _ = part(total, (i, _row(batch, i)))
      return total
    return jax.lax.scan(part, total, (jnp.arange(parts), batch))[0]

  return gradient


def make_one_step(model, layout, unrolled, seed=None):
  """Return one_step(state, batch) -> (state, loss), not compiled.

  What is random at a step is a function of the seed and the step alone. With
  `training.shard_state` each device updates its part of the state, of which all
  gather the parameters first.

  Args:
    model: the Experiment.
    layout: where arrays live.
    unrolled: whether the loop over the parts of a batch is Python's.
    seed: an integer, or an argument of a compiled function; None for that of
      the config.
  """
  training = model.config.training
  seed = model.config.seed if seed is None else seed
  base_rng = jax.random.key(seed, impl=training.prng)
  gather = split = keep = lambda tree: tree
  if training.shard_state:
    shardings = _shardings(abstract_state(model, layout))
    constrain = jax.lax.with_sharding_constraint
    gather = lambda params: constrain(params, layout.replicated)
    split = lambda grads: constrain(grads, shardings.params)
    keep = lambda state: constrain(state, shardings)

  def one_step(state, batch):
    fraction = state.step / max(training.n_iters, 1)

    def mean_loss(params, rng, batch):
      return jnp.mean(model.loss(params, rng, batch, fraction=fraction))

    gradient = _mean_gradient(mean_loss, training.grad_accumulation, unrolled)
    rng = jax.random.fold_in(base_rng, state.step)
    loss, grads = gradient(gather(state.params), rng, batch)
    updates, opt_state = model.optimizer.update(
      split(grads), state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    decay = optimization.ema_decay(
      step, rate=training.ema_rate, warmup=training.ema_warmup
    )
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    averages = optimization.update_averages(state.averages, params, step)
    return keep(TrainState(step, params, opt_state, ema, averages)), loss

  return one_step


def abstract_batches(model):
  """Return the batches of a call of training steps, as shapes and dtypes."""
  training = model.config.training
  n = min(training.n_jitted_steps, training.n_iters)
  parts = training.grad_accumulation
  shape = model.shape(training.batch_size // parts)
  dtype = np.float32 if model.config.data.shape else np.uint8
  batches = {
    'image': jax.ShapeDtypeStruct((n, parts, *shape), dtype),
    'label': jax.ShapeDtypeStruct((n, parts, shape[0]), np.int32),
  }
  if model.condition:
    shape = n, parts, shape[0], *model.config.data.condition_shape
    batches['condition'] = jax.ShapeDtypeStruct(shape, np.float32)
  return batches


def _compile_ahead(jitted, state, batch):
  """Return a jitted step that is compiled while other work goes on.

  Args:
    jitted: step(state, batch).
    state, batch: the shapes and dtypes that are expected. Batches of another
      shape are for `jitted` itself.
  """
  pool = concurrent.futures.ThreadPoolExecutor(1)
  compiled = pool.submit(lambda: jitted.lower(state, batch).compile())
  pool.shutdown(wait=False)

  def step(state, given):
    expected = given['image'].shape == batch['image'].shape
    return (compiled.result() if expected else jitted)(state, given)

  return step


def make_train_steps(model, layout, ahead=False):
  """Return train_steps(state, batches) -> (state, losses [n]).

  It takes n steps in one compiled call, on batches {'image', 'label'} of shape
  [n, parts, B / parts, ...]. The state is donated: pass each state only once.

  Args:
    model: the Experiment.
    layout: where arrays live.
    ahead: whether to compile for `abstract_batches` at once, in a thread,
      rather than at the first call.
  """
  # On CPUs, XLA's gradient of a convolution's kernel is about 30 times slower
  # inside a loop: there, the loops are Python's.
  shapes = jax.tree.leaves(model.abstract_params())
  convolves = any(shape.ndim > 2 for shape in shapes)
  unrolled = convolves and layout.platform == 'cpu'
  one_step = make_one_step(model, layout, unrolled)
  state = abstract_state(model, layout)
  shardings = _shardings(state)

  def compiled(function, sharding, axis):
    """Compile for batches of that axis and the following ones."""
    jitted = jax.jit(
      function,
      in_shardings=(shardings, sharding),
      out_shardings=(shardings, layout.replicated),
      donate_argnums=0,
    )
    if not ahead:
      return jitted
    batch = {
      name: jax.ShapeDtypeStruct(v.shape[axis:], v.dtype)
      for name, v in abstract_batches(model).items()
    }
    return _compile_ahead(jitted, state, batch)

  if not unrolled:
    scan = lambda state, batches: jax.lax.scan(one_step, state, batches)
    return compiled(scan, layout.microbatches, axis=0)

  call = compiled(one_step, layout.one_step, axis=1)

  def one_at_a_time(state, batches):
    step_losses = []
    for i in range(len(batches['image'])):
      state, loss = call(state, _row(batches, i))
      step_losses.append(loss)
    return state, jnp.stack(step_losses)

  return one_at_a_time


# ------------------------------------------------------------------ test loss


def make_eval_loss(model, layout):
  """Return eval_loss(params, number, batch, mask) -> ({name: sum}, count).

  The sums are those of `Experiment.test_metrics`. The noise is a function of
  the number of the batch, so that checkpoints compare.
  """

  def eval_loss(params, number, batch, mask):
    rng = jax.random.fold_in(jax.random.key(model.config.seed + 1), number)
    values = model.test_metrics(params, rng, batch)
    sums = {name: jnp.sum(v * mask) for name, v in values.items()}
    return sums, jnp.sum(mask)

  return jax.jit(
    eval_loss,
    in_shardings=(layout.replicated, None, layout.split, layout.split),
    out_shardings=layout.replicated,
  )


def eval_batches(dataset, batch_size, layout, start=0):
  """Yield (number, {'image', 'label'}, mask), global, of a whole data set.

  The batches hold 'condition' as well, if the data set does.
  """
  batches = batching.eval_batches(
    dataset,
    batch_size=batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    start=start,
  )
  for number, batch in enumerate(batches, start):
    del batch['index']
    batch = to_global(layout.split, batch)
    mask = batch.pop('mask')
    yield number, batch, mask


def without_padding(mask, *values):
  """Return the rows of replicated values that a mask has, in numpy."""
  rows = multihost_utils.process_allgather(mask, tiled=True) > 0
  return [np.asarray(v)[np.asarray(rows)] for v in values]


def test_loss(
  eval_loss: Callable,
  params: PyTree,
  dataset: batching.Dataset,
  batch_size: int,
  layout: Layout,
  limit: int | None = None,
) -> dict[str, float]:
  """Return {name: mean per example} over a data set.

  Args:
    eval_loss: of `make_eval_loss`.
    params: parameters.
    dataset: a Dataset.
    batch_size: examples at a time.
    layout: where arrays live.
    limit: stop after the batch with which this many examples are reached.
  """
  total, count = collections.Counter(), 0.0
  for number, batch, mask in eval_batches(dataset, batch_size, layout):
    part, n = eval_loss(params, number, batch, mask)
    total.update({name: float(v) for name, v in part.items()})
    count += float(n)
    if limit and count >= limit:
      break
  return {name: value / count for name, value in total.items()}


# -------------------------------------------------------------------- batches


def call_starts(start, end, n):
  """Return the steps before which calls of n steps begin.

  After a resume at a step that is not a multiple of n, the first call is
  shorter, so that later calls end at multiples of n.
  """
  return [start, *range(start - start % n + n, end, n)]


def _with_floats(batch):
  """Return a batch with float32 conditions, which files may have as uint8."""
  if 'condition' not in batch:
    return batch
  return batch | {'condition': batch['condition'].astype(np.float32)}


def make_fetch(model, dataset):
  """Return fetch(step) -> this host's part of batches, [n, parts, b, ...].

  With data.on_device the batches are {'index'} alone.
  """
  training = model.config.training
  parts, names = training.grad_accumulation, _fields(model)
  if model.config.data.on_device:
    names, more = ('index',), lambda index: {}
    dataset = dataclasses.replace(
      dataset, read=lambda index: (index, index), more=more
    )

  def fetch(step):
    n = min(
      training.n_jitted_steps - step % training.n_jitted_steps,
      training.n_iters - step,
    )
    batches = [
      batching.train_batch(
        dataset,
        number,
        batch_size=training.batch_size // parts,
        seed=model.config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      )
      for number in range(step * parts, (step + n) * parts)
    ]
    fields = {k: np.stack([batch[k] for batch in batches]) for k in names}
    fields = _with_floats(fields)
    return jax.tree.map(lambda v: v.reshape(n, parts, *v.shape[1:]), fields)

  return fetch


def check_on_device(model, dataset):
  """Raise ValueError if data that devices should hold are too large for them.

  Otherwise say in one line how large they are.
  """
  if model.config.data.on_device:
    size = 4 if model.config.data.shape else 1
    size = size * math.prod(model.shape(1)) + 4  # The label.
    if model.condition:
      size += dataset.more(np.arange(1))['condition'].nbytes
    size *= len(dataset)
    check_memory(size, 'config.data.on_device=True')
    say(f'Every device holds the training data, {size / 2**20:.1f} MiB.')


def make_place(model, dataset, layout):
  """Return place(batches of `make_fetch`) -> global batches.

  With data.on_device every device holds the data set and takes the rows of its
  part of a batch from it.
  """
  if not model.config.data.on_device:
    return lambda batches: to_global(layout.microbatches, batches)
  held = dataset.batch(np.arange(len(dataset)))
  held = to_global(layout.replicated, {k: held[k] for k in _fields(model)})
  take = jax.jit(
    lambda held, index: _with_floats(jax.tree.map(lambda v: v[index], held)),
    in_shardings=(layout.replicated, layout.microbatches),
    out_shardings=layout.microbatches,
  )
  return lambda batches: take(
    held, to_global(layout.microbatches, np.int32(batches['index']))
  )


# ---------------------------------------------------------------------- hooks


@dataclasses.dataclass
class Moment:
  """What hooks see after a compiled call of the training loop.

  Attributes:
    step: steps taken.
    state: the TrainState; do not keep it, its buffers are donated.
    losses: losses of the steps of this call, [n].
    first: whether it is the first call of this process.
    stopping: name of the signal that stops the run, or ''.
    finished: whether it is the last call.
    scalars: {name: number} to be logged; hooks add to it.
  """

  step: int
  state: TrainState
  losses: Float[np.ndarray, ' n']
  first: bool
  stopping: str
  finished: bool
  scalars: dict[str, float] = dataclasses.field(default_factory=dict)

  def due(self, *frequencies):
    """Whether one of the frequencies (0 for never) falls on this step."""
    return any(f and self.step % f == 0 for f in frequencies)


Hook = Callable[[Moment], None]


def _check_finite(values, first_step, last_good):
  """Raise FloatingPointError that names the step of the first bad loss."""
  if not np.isfinite(values).all():
    bad = first_step + int(np.argmin(np.isfinite(values)))
    kept = 'There is no checkpoint yet'
    if last_good is not None:
      kept = f'The last good checkpoint is {last_good}'
    raise FloatingPointError(
      f'The loss at step {bad} is not finite. {kept}; a lower config.optim.lr '
      'may help.'
    )


def watch_loss(training, saved, begun) -> Hook:
  """Return a hook that refuses bad losses and measures loss and speed."""
  clock, clock_step = begun, 0

  def hook(now):
    nonlocal clock, clock_step
    _check_finite(now.losses, now.step - len(now.losses) + 1, saved.last)
    if now.first:
      waited = time.monotonic() - begun
      say(f'First step done after {waited:.1f} s.')
      clock, clock_step = time.monotonic(), now.step
    if now.due(training.log_freq):
      now.scalars['loss'] = now.losses.mean()
      taken = (now.step - clock_step) * training.batch_size
      if taken:
        seconds = time.monotonic() - clock
        now.scalars['images_per_second'] = taken / seconds
      clock, clock_step = time.monotonic(), now.step

  return hook


def claim_workdir(config, workdir, data) -> Hook:
  """Return a hook that makes the workdir that of a config and of `data`.

  It does so after the first step, before anything else is written: a run that
  could not begin leaves the workdir to another.
  """

  def hook(now):
    if now.first:
      on_first_host(experiment.claim, config, workdir)
      on_first_host(record.write, workdir, *data)

  return hook


def watch_test_loss(model, layout, test_set, saved) -> Hook:
  """Return a hook that measures the loss of averaged parameters on test data.

  Every checkpoint has one, because the best is chosen by it.
  """
  training, eval_loss = model.config.training, make_eval_loss(model, layout)

  def hook(now):
    saving = training.checkpoint_freq, training.snapshot_freq
    if now.due(training.eval_freq, *saving) or now.finished:
      now.scalars |= test_loss(
        eval_loss,
        jax.device_put(now.state.ema, layout.replicated),
        test_set,
        # As many at a time as training has memory for.
        training.batch_size // training.grad_accumulation,
        layout,
        limit=EVAL_IMAGES,
      )
      _check_finite([now.scalars['test_loss']], now.step, saved.last)

  return hook


def write_log(log, progress) -> Hook:
  """Return a hook that writes the scalars of a step where there are any."""

  def hook(now):
    if now.scalars:
      log.write(now.step, **now.scalars)
      note = ' '.join(f'{k} {v:.4g}' for k, v in now.scalars.items())
      progress(now.step, note)

  return hook


def save_checkpoint(training, saved) -> Hook:
  """Return a hook that saves the state."""

  def hook(now):
    due = now.due(training.checkpoint_freq, training.snapshot_freq)
    if due or now.finished:
      saved.save(
        now.step,
        without_ema(now.state),
        now.state.ema,
        averages=now.state.averages,
        loss=now.scalars['test_loss'],
      )
    if now.stopping:
      saved.wait()
      say(f'Stopped by {now.stopping}; step {now.step} is saved.')

  return hook


def draw_snapshot(model, layout, folder, test_set=None) -> Hook:
  """Return a hook that draws a picture of samples.

  Args:
    model: the Experiment.
    layout: where arrays live.
    folder: of the pictures.
    test_set: Dataset whose conditions the samples have, if the network is told
      conditions.
  """
  training, devices = model.config.training, jax.device_count()
  images = min(SNAPSHOT_IMAGES, model.config.eval.batch_size)
  n = SNAPSHOT_POINTS if model.kind == 'points' else images
  # As many as a picture shows, rounded up to as many on every device.
  n = math.ceil(n / devices) * devices
  draw = model.make_sample(n)
  given = model.given(test_set, n) if test_set else {}
  given = to_global(layout.replicated, given)

  def make(params, rng, given):
    found = draw(params, rng, **given)
    return found._replace(x=each_its_part(found.x, layout))

  sample = jax.jit(
    make,
    in_shardings=(layout.replicated, None, layout.replicated),
    out_shardings=layout.replicated,
  )

  def hook(now):
    due = now.due(training.snapshot_freq) or now.finished
    if not due or now.stopping:
      return
    params = jax.device_put(now.state.ema, layout.replicated)
    found = sample(params, jax.random.key(model.config.seed), given)
    x = found.x
    try:
      experiment.check_samples(model.config, found, math.inf)
    except FloatingPointError as error:  # Training can go on without them.
      say(f'warning: no picture of samples at step {now.step}. {error}')
      return
    if jax.process_index() == 0:
      path = folder / f'step_{now.step}.png'
      pictures.save_samples(path, model.to_data(x))
      say(f'Samples are in {path}.')

  return hook


# ----------------------------------------------------------------------- loop


class _Interrupt:
  """Turn SIGTERM and SIGINT (Ctrl-C) into a flag: a run can save and stop.

  A second signal stops the process at once.
  """

  SIGNALS = signal.SIGTERM, signal.SIGINT

  def __enter__(self):
    self._received, self._before = 0, {}
    # Python allows handlers in the main thread only.
    if threading.current_thread() is threading.main_thread():
      for number in self.SIGNALS:
        self._before[number] = signal.signal(number, self._request)
    return self

  def _request(self, number, frame):
    del frame
    if self._received:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
    self._received = number
    # Not `print`, which this signal may have interrupted.
    line = f'{signal.Signals(number).name}: the run saves and stops; a second '
    os.write(2, f'{line}signal stops it at once.\n'.encode())

  def agreed(self) -> str:
    """Return the name of a signal that any host received, or ''.

    All hosts call it after the same step, and so stop at the same step.
    """
    number = largest(int(self._received))
    return signal.Signals(number).name if number else ''

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _own(workdir):
  """Keep other trainings out of a workdir; leave none that is empty."""
  if jax.process_index():
    on_first_host(int)  # The first host holds the lock for all.
    yield
    return
  fresh, held = not workdir.exists(), contextlib.ExitStack()
  try:
    with held:
      on_first_host(lambda: held.enter_context(lock(workdir / 'train.lock')))
      yield
  finally:
    for folder in (workdir / 'checkpoints', workdir) if fresh else ():
      with contextlib.suppress(OSError):  # It is not empty.
        folder.rmdir()


def without_ema(state):
  """Return the item `state` of a checkpoint: all but the averages."""
  averages = 'ema', 'averages'
  return {k: v for k, v in state._asdict().items() if k not in averages}


def _check_begin(model):
  """Check the run that config.training.begin_with names.

  Raises:
    FileNotFoundError, ValueError: there is none, or it has other parameters.
  """
  begin = model.config.training.begin_with
  if not begin:
    return
  choice = f'training.begin_with={begin!r}'
  check_run(begin, choice, 'name the workdir of a trained run')
  other = experiment.build(experiment.run_config(begin))
  shapes = [
    jax.tree.map(lambda v: v.shape, m.abstract_params()) for m in (model, other)
  ]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f'config.{choice} is a run of another network than config.model, or its '
      'loss has other parameters: choose the same config.model.'
    )
  ours, theirs = (
    f'{m.sde}, {m.conditioning} and data.centered={m.config.data.centered}'
    for m in (model, other)
  )
  if ours != theirs:
    say(f'warning: config.{choice} was trained with {theirs}, not {ours}.')


def restore_or_init(model, layout, saved):
  """Return (state, steps taken): of the last checkpoint, or a new one."""
  if saved.last is None:
    _, place = make_init(model, layout)
    return place(), 0
  like = abstract_state(model, layout)
  missing = set(like.averages) - set(saved.lengths(saved.last))
  if missing:
    raise ValueError(
      f'Checkpoint {saved.last} has no averages of the lengths '
      f'{sorted(missing)}, which are kept from the first step on: set '
      f'config.training.ema_lengths={tuple(saved.lengths(saved.last))}.'
    )

  def restore(step):
    averages = {
      length: saved.restore(step, average, average_item(length))
      for length, average in like.averages.items()
    }
    return TrainState(
      **saved.restore(step, without_ema(like), 'state'),
      ema=saved.restore(step, like.ema, 'ema'),
      averages=averages,
    )

  step, state = saved.restore_first('last', restore)
  say(f'Resuming at step {step}.')
  return state, step


def _prepare(config, workdir):
  """Return (model, training set, test set); check all that can be wrong."""
  model = experiment.build(experiment.completed(config, workdir))
  config, training = model.config, config.training
  check_divisible(
    training.batch_size // training.grad_accumulation,
    'config.training.batch_size (divided by grad_accumulation)',
  )
  train_set = datasets.load(config.data, 'train')
  test_set = datasets.load(config.data, 'test')
  experiment.check_labels(model, train_set)
  for dataset in (train_set, test_set):
    experiment.check_conditions(model, dataset)
  check_on_device(model, train_set)
  experiment.claim(config, workdir, write=False)
  allow = training.allow_other_data
  record.check(workdir, train_set, test_set, allow_other=allow)
  for line in datasets.describe(train_set, test_set):
    say(line)
  return model, train_set, test_set


def _describe(model, state, train_set):
  """Print one line of what is trained, on what."""
  num_params = sum(v.size for v in jax.tree.leaves(state.params))
  say(
    f'{model.config.model.name}, {num_params / 1e6:.2f}M parameters, '
    f'{jax.device_count()} {jax.devices()[0].platform} device(s), '
    f'{bytes_per_device(state) / 2**20:.4g} MiB of state on each, '
    f'{len(train_set)} {model.kind} of {train_set.name}; compiling.'
  )


def train(config, workdir):
  """Train, from the last checkpoint of workdir if there is one.

  Writes config.json, trained_on.json, train.jsonl, tensorboard/, checkpoints/
  and samples/step_N.png in workdir. A run that is killed and started again
  gives the same numbers as one that is not. SIGTERM or SIGINT (Ctrl-C) on any
  host saves and stops all.

  Raises:
    ValueError: the config, the data or the workdir cannot be used.
    OSError: another training runs in the workdir, or the disk is full.
    FloatingPointError: a loss is not finite; checkpoints stay as they are.
  """
  begun = time.monotonic()
  training, workdir = config.training, pathlib.Path(workdir)
  on_first_host(check_output, workdir)
  model, train_set, test_set = _prepare(config, workdir)
  config = model.config
  layout, end = make_layout(), training.n_iters
  with contextlib.ExitStack() as stack:
    stack.enter_context(_own(workdir))
    saved = stack.enter_context(
      Checkpoints(workdir, keep_every=training.snapshot_freq, fall_back=True)
    )
    interrupt = stack.enter_context(_Interrupt())
    if saved.last is None:
      _check_begin(model)
    ahead = (saved.last or 0) < end
    train_steps = make_train_steps(model, layout, ahead)
    state, start = restore_or_init(model, layout, saved)
    if start >= end:
      say(f'Nothing to do: {start} of {end} steps are done.')
      return
    log = stack.enter_context(Log(workdir, resumed_at=start))
    hooks = [
      watch_loss(training, saved, begun),
      claim_workdir(config, workdir, (train_set, test_set)),
      watch_test_loss(model, layout, test_set, saved),
      write_log(log, Progress('step', end, 'steps', start=start)),
      save_checkpoint(training, saved),
    ]
    if training.snapshot_sampling:
      hooks.append(draw_snapshot(model, layout, workdir / 'samples', test_set))
    _describe(model, state, train_set)
    place = make_place(model, train_set, layout)
    fetched = batching.prefetch(
      make_fetch(model, train_set),
      call_starts(start, end, training.n_jitted_steps),
    )
    for before, batches in fetched:
      batches = place(batches)
      state, step_losses = train_steps(state, batches)
      step = before + len(batches['image'])
      # Read once: what is said at the end must be what was done here.
      stopping = interrupt.agreed()
      moment = Moment(
        step=step,
        state=state,
        losses=np.asarray(step_losses),  # Waits for the devices.
        first=before == start,
        stopping=stopping,
        finished=bool(stopping) or step == end,
      )
      for hook in hooks:
        hook(moment)
      if stopping:
        break
    saved.wait()
