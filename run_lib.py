"""Training and sampling over all devices of all hosts.

One program runs on every host; arrays are global. The state is replicated, the
batch is split along the only axis of the mesh, and `jax.jit` puts in the
communication: means over the batch are means over all devices' examples, and
random numbers do not depend on the number of devices.
"""

import collections
import math
import pathlib
import signal
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax

import experiment
import losses
from checkpoints.workdir import Checkpoints, claim_workdir
from data import datasets
from reporting.pictures import save_samples
from runtime.devices import (
  Layout,
  check_divisible,
  make_layout,
  replicated,
  to_global,
)
from runtime.progress import Log, Progress, say

# Images of the test set whose loss is logged in training, with fixed noise.
EVAL_IMAGES = 1024
# Samples in a snapshot's picture: a grid of images, or a cloud of points.
SNAPSHOT_IMAGES, SNAPSHOT_POINTS = 64, 2048
# What the loss sees of a batch.
_FIELDS = ('image', 'label')


def _row(tree, i):
  return jax.tree.map(lambda v: v[i], tree)


class TrainState(typing.NamedTuple):
  """All that changes in training. step counts the steps taken."""

  step: jax.Array
  params: typing.Any
  opt_state: typing.Any
  ema: typing.Any


# ---------------------------------------------------------------- training


def make_init(config, layout):
  """init() -> TrainState on the devices, replicated."""
  optimizer = experiment.make_optimizer(config)

  def init(params):
    zeros = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(zeros, params, optimizer.init(params), ema)

  def place():
    params = experiment.init_params(config, jax.random.key(config.seed))
    # Made on the devices by jit: device_put may alias, and aliases of a
    # donated buffer would be deleted with it.
    return jax.jit(init, out_shardings=layout.replicated)(params)

  return init, place


def make_train_steps(config, layout):
  """train_steps(state, batches) -> (state, losses [n]).

  Takes n steps in one compiled call on batches {'image', 'label'}, each
  [n, parts, B / parts, ...], n of them as there are. What is random at a step
  is a function of seed and step alone. The state is donated: pass each one
  once.
  """
  loss_fn = experiment.make_loss_fn(config, train=True)
  optimizer = experiment.make_optimizer(config)
  training = config.training
  base_rng = jax.random.key(config.seed)
  # XLA's gradient of a convolution's kernel is some 30 times slower within a
  # loop on CPUs: there the loops are Python's.
  shapes = jax.tree.leaves(experiment.abstract_params(config))
  convolves = any(shape.ndim > 2 for shape in shapes)
  unrolled = convolves and jax.default_backend() == 'cpu'

  def mean_loss(params, rng, batch):
    return jnp.mean(loss_fn(params, rng, batch))

  def gradient(params, rng, batch):
    """Mean loss and gradient over the parts of a batch, one at a time."""
    parts = batch['image'].shape[0]
    if parts == 1:
      return jax.value_and_grad(mean_loss)(params, rng, _row(batch, 0))

    def part(total, inputs):
      i, batch = inputs
      key = jax.random.fold_in(rng, i)
      value = jax.value_and_grad(mean_loss)(params, key, batch)
      return jax.tree.map(lambda a, b: a + b / parts, total, value), None

    total = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    if unrolled:
      for i in range(parts):
        total, _ = part(total, (i, _row(batch, i)))
      return total
    return jax.lax.scan(part, total, (jnp.arange(parts), batch))[0]

  def one_step(state, batch):
    rng = jax.random.fold_in(base_rng, state.step)
    loss, grads = gradient(state.params, rng, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    decay = losses.ema_decay(
      step, rate=training.ema_rate, warmup=training.ema_warmup
    )
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    return TrainState(step, params, opt_state, ema), loss

  def compiled(function, sharding):
    return jax.jit(
      function,
      in_shardings=(layout.replicated, sharding),
      out_shardings=layout.replicated,
      donate_argnums=0,
    )

  if not unrolled:
    scan = lambda state, batches: jax.lax.scan(one_step, state, batches)
    return compiled(scan, layout.microbatches)

  call = compiled(one_step, layout.one_step)

  def one_at_a_time(state, batches):
    step_losses = []
    for i in range(len(batches['image'])):
      state, loss = call(state, _row(batches, i))
      step_losses.append(loss)
    return state, jnp.stack(step_losses)

  return one_at_a_time


def make_eval_loss(config, layout):
  """eval_loss(params, number, batch, mask) -> ({name: sum}, count).

  The sums of `experiment.make_test_fn`, with the same noise for the same batch
  number, so checkpoints compare.
  """
  test_fn = experiment.make_test_fn(config)

  def eval_loss(params, number, batch, mask):
    rng = jax.random.fold_in(jax.random.key(config.seed + 1), number)
    values = test_fn(params, rng, batch)
    sums = {name: jnp.sum(v * mask) for name, v in values.items()}
    return sums, jnp.sum(mask)

  return jax.jit(
    eval_loss,
    in_shardings=(layout.replicated, None, layout.split, layout.split),
    out_shardings=layout.replicated,
  )


def eval_batches(dataset, batch_size, layout, start=0):
  """Yields (number, {'image', 'label'}, mask), global, of a whole dataset."""
  batches = datasets.eval_batches(
    dataset,
    batch_size=batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    start=start,
  )
  for number, batch in enumerate(batches, start):
    batch = to_global(layout.split, {k: batch[k] for k in (*_FIELDS, 'mask')})
    mask = batch.pop('mask')
    yield number, batch, mask


def test_loss(eval_loss, params, dataset, batch_size, layout, limit=None):
  """{name: mean per example} over (at least `limit` images of) a dataset."""
  total, count = collections.Counter(), 0.0
  for number, batch, mask in eval_batches(dataset, batch_size, layout):
    part, n = eval_loss(params, number, batch, mask)
    total.update({name: float(v) for name, v in part.items()})
    count += float(n)
    if limit and count >= limit:
      break
  return {name: value / count for name, value in total.items()}


def _check_finite(values, first_step, last_good):
  """Raises FloatingPointError naming the step of the first bad loss."""
  if not np.isfinite(values).all():
    bad = first_step + int(np.argmin(np.isfinite(values)))
    raise FloatingPointError(
      f'The loss at step {bad} is not finite. The last good checkpoint is '
      f'{last_good}; a lower config.optim.lr may help.'
    )


def call_starts(start, end, n):
  """Steps before which calls of n steps begin; they end at multiples of n.

  A run that is resumed off the beat finds it again with its first call.
  """
  return [start, *range(start - start % n + n, end, n)]


def make_fetch(config, dataset):
  """fetch(step) -> this host's share of batches, each [n, parts, b, ...]."""
  training = config.training
  parts = training.grad_accumulation

  def fetch(step):
    n = min(
      training.n_jitted_steps - step % training.n_jitted_steps,
      training.n_iters - step,
    )
    batches = [
      datasets.train_batch(
        dataset,
        number,
        batch_size=training.batch_size // parts,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      )
      for number in range(step * parts, (step + n) * parts)
    ]
    fields = {k: np.stack([batch[k] for batch in batches]) for k in _FIELDS}
    return jax.tree.map(lambda v: v.reshape(n, parts, *v.shape[1:]), fields)

  return fetch


class _Interrupt:
  """Turns a SIGTERM into a flag, so that a run can save and stop.

  Not on several hosts, which hear of it at different steps: there it kills, and
  the run goes on from its last checkpoint.
  """

  def __enter__(self):
    self.requested = False
    self._alone = jax.process_count() == 1
    if self._alone:
      self._before = signal.signal(signal.SIGTERM, self._request)
    return self

  def _request(self, *_):
    self.requested = True

  def __exit__(self, *_):
    if self._alone:
      signal.signal(signal.SIGTERM, self._before)


def train(config, workdir):
  """Trains, from the last checkpoint of workdir if there is one.

  Writes there config.json, train.jsonl, tensorboard/, checkpoints/ and
  samples/step_N.png. A run that is killed and started again gives the numbers
  of one that was not.

  Raises:
    ValueError: the config, the data or the workdir cannot be used.
    FloatingPointError: a loss is not finite; checkpoints stay as they are.
  """
  begun = time.monotonic()
  training, workdir = config.training, pathlib.Path(workdir)
  experiment.check(config)
  check_divisible(
    training.batch_size // training.grad_accumulation,
    'config.training.batch_size (divided by grad_accumulation)',
  )
  train_set = datasets.load(config.data, 'train')
  test_set = datasets.load(config.data, 'test')
  experiment.check_labels(config, train_set)
  claim_workdir(config, workdir)
  layout = make_layout()
  init, place = make_init(config, layout)

  with (
    Checkpoints(workdir, keep_every=training.snapshot_freq) as saved,
    _Interrupt() as interrupt,
  ):
    start = saved.last
    if start is None:
      state, start = place(), 0
    else:
      like = jax.eval_shape(init, experiment.abstract_params(config))
      like = replicated(like, layout)
      ema = saved.restore(start, like.ema, 'ema')
      state = TrainState(
        **saved.restore(start, without_ema(like), 'state'), ema=ema
      )
      say(f'Resuming at step {start}.')
    if start >= training.n_iters:
      say(f'Nothing to do: {start} of {training.n_iters} steps done.')
      return

    train_steps = make_train_steps(config, layout)
    eval_loss = make_eval_loss(config, layout)
    if training.snapshot_sampling:
      sample = make_sample(config, layout, _snapshot_size(config))
    num_params = sum(v.size for v in jax.tree.leaves(state.params))
    say(
      f'{config.model.name}, {num_params / 1e6:.2f}M parameters, '
      f'{jax.device_count()} {jax.devices()[0].platform} device(s), '
      f'{len(train_set)} images of {train_set.name}; compiling.'
    )

    def measure():
      return test_loss(
        eval_loss,
        state.ema,
        test_set,
        training.batch_size,
        layout,
        limit=EVAL_IMAGES,
      )

    progress = Progress('step', training.n_iters, 'steps', start=start)
    fetched = datasets.prefetch(
      make_fetch(config, train_set),
      call_starts(start, training.n_iters, training.n_jitted_steps),
    )
    with Log(workdir, resumed_at=start) as log:
      clock, clock_step = time.monotonic(), start
      for before, batches in fetched:
        state, step_losses = train_steps(
          state, to_global(layout.microbatches, batches)
        )
        step = before + len(batches['image'])
        # This waits for the device; the next batch is being fetched meanwhile.
        step_losses = np.asarray(step_losses)
        _check_finite(step_losses, before + 1, saved.last)
        if before == start:
          waited = time.monotonic() - begun
          say(f'First step done after {waited:.1f} s.')
          clock, clock_step = time.monotonic(), step

        due = lambda freq, step=step: step % freq == 0
        # Read once: what is said at the end must be what was done here.
        stopping = interrupt.requested
        finished = step == training.n_iters or stopping
        scalars = {}
        if due(training.log_freq):
          now = time.monotonic()
          taken = (step - clock_step) * training.batch_size
          scalars['loss'] = step_losses.mean()
          if taken:
            scalars['images_per_second'] = taken / (now - clock)
          clock, clock_step = now, step
        saving = due(training.checkpoint_freq) or due(training.snapshot_freq)
        if due(training.eval_freq) or saving or finished:
          scalars |= measure()
          _check_finite([scalars['test_loss']], step, saved.last)
        if scalars:
          log.write(step, **scalars)
          note = ' '.join(f'{k} {v:.4g}' for k, v in scalars.items())
          progress(step, note)
        if saving or finished:
          saved.save(
            step, without_ema(state), state.ema, loss=scalars['test_loss']
          )
        snapshot = due(training.snapshot_freq) or finished
        if training.snapshot_sampling and snapshot and not stopping:
          images, _, _ = sample(state.ema, jax.random.key(config.seed))
          if jax.process_index() == 0:
            path = workdir / 'samples' / f'step_{step}.png'
            save_samples(path, experiment.to_data(config, images))
            say(f'Samples are in {path}.')
        if stopping:
          saved.wait()
          say(f'Stopped by SIGTERM; step {step} is saved.')
          break
      saved.wait()


def without_ema(state):
  """The item `state` of a checkpoint: all but the averaged parameters."""
  return {k: v for k, v in state._asdict().items() if k != 'ema'}


# ---------------------------------------------------------------- sampling


def _snapshot_size(config):
  """About as many samples as a picture shows, as many on every device."""
  n = SNAPSHOT_POINTS if config.data.dims else SNAPSHOT_IMAGES
  return math.ceil(n / jax.device_count()) * jax.device_count()


class Run(typing.NamedTuple):
  """A trained model, and how to sample from it.

  Attributes:
    step: of the checkpoint.
    params: its averaged parameters, on all devices.
    layout: where arrays live.
    batch_size: of samples, at most config.eval.batch_size.
  """

  step: int
  params: typing.Any
  layout: Layout
  batch_size: int


def restore(config, workdir, count) -> Run:
  """The last checkpoint of config.eval.checkpoint, to make `count` samples of.

  Raises:
    FileNotFoundError, ValueError: there is none, or it is of another config.
  """
  devices = jax.device_count()
  batch = min(config.eval.batch_size, math.ceil(count / devices) * devices)
  check_divisible(batch, 'config.eval.batch_size')
  layout = make_layout()
  with Checkpoints(workdir) as saved:
    step = saved.select(config.eval.checkpoint)[-1]
    claim_workdir(config, workdir, write=False)
    like = replicated(experiment.abstract_params(config), layout)
    return Run(step, saved.restore(step, like, 'ema'), layout, batch)


def make_sample(config, layout, batch_size, *, frames=0):
  """sample(params, rng) -> (images [B, ...] on every host, nfe, success).

  With frames, two more: see `experiment.make_sampler`.
  """
  sample = experiment.make_sampler(config, batch_size, frames=frames)
  return jax.jit(
    sample,
    in_shardings=(layout.replicated, None),
    out_shardings=layout.replicated,
  )


def check_success(config, success):
  """Raises if an adaptive solver did not arrive; the others always do."""
  if not success:
    kind = 'sde_' if config.sampling.method == 'adaptive_sde' else ''
    raise FloatingPointError(
      f'The solver {config.sampling.method!r} did not reach t = eps; larger '
      f'config.sampling.{kind}rtol and {kind}atol may help.'
    )
