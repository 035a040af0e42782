r"""Measure speed and memory of a config, in training and in sampling.

  python -m benchmarks.speed --config configs/quickstart.py \
    [--config.training.batch_size=256] [--steps 100] [--peak_tflops 989]

No data are needed, because images are zeros. Compilation is cold unless
JAX_COMPILATION_CACHE_DIR names a folder of an earlier run. A table is printed
and, in the last line, the same numbers as JSON. The program runs on one host
and uses all of its devices.
"""

# ruff: noqa: E402 (imports are part of the time to the first step)
import time

BEGUN = time.perf_counter()

import json
import math
import resource
import sys

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

import experiment
import run_lib
from configs import schema
from runtime.devices import check_divisible, divide_cpu, make_layout, to_global

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
flags.DEFINE_integer('steps', 50, 'Smallest number of training steps.')
flags.DEFINE_integer('sampling_steps', 50, 'Largest number of sampling steps.')
flags.DEFINE_integer('sampling_batch', 64, 'Samples made at once.')
flags.DEFINE_float(
  'peak_tflops', None, 'Peak of one device at model.dtype, in TFLOP/s.'
)
flags.DEFINE_integer(
  'cpu_devices', 0, 'Devices that CPU cores become; 0 for a number that suits.'
)
flags.mark_flag_as_required('config')


def peak_memory():
  """Return ('device', peak bytes of one device); on CPUs ('process', ..)."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return 'device', stats['peak_bytes_in_use']
  unit = 1 if sys.platform == 'darwin' else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return 'process', unit * peak


def training_flops(model, params, batch):
  """Return the operations of loss and gradient in a step, as XLA counts them.

  They are counted before optimisation and for one part of a batch, because XLA
  counts the body of a loop once.
  """
  mean_loss = lambda params, rng, batch: model.loss(params, rng, batch).mean()
  lowered = jax.jit(jax.value_and_grad(mean_loss)).lower(
    params, jax.random.key(0), batch
  )
  cost = lowered.cost_analysis() or {}
  parts = model.config.training.grad_accumulation
  return cost.get('flops', math.nan) * parts


def time_training(model, layout, steps):
  """Return (results, averaged parameters) of at least `steps` steps."""
  training = model.config.training
  _, place = run_lib.make_init(model, layout)
  state = place()
  train_steps = run_lib.make_train_steps(model, layout)
  zeros = jax.tree.map(
    lambda v: np.zeros(v.shape, v.dtype), run_lib.abstract_batches(model)
  )
  n, batch = len(zeros['image']), {k: v[0, 0] for k, v in zeros.items()}
  batches = to_global(layout.microbatches, zeros)

  state, losses = jax.block_until_ready(train_steps(state, batches))
  first_call = time.perf_counter() - BEGUN
  if not np.isfinite(losses).all():
    raise ValueError('The loss is not finite.')

  start, calls = time.perf_counter(), math.ceil(steps / n)
  for _ in range(calls):
    state, losses = train_steps(state, batches)
  jax.block_until_ready(losses)
  seconds = (time.perf_counter() - start) / (calls * n)

  flops = training_flops(model, state.params, batch)
  results = {
    # A compiled call takes n steps: the other n - 1 do not count as start-up.
    'seconds_to_first_step': first_call - (n - 1) * seconds,
    'training_batch': training.batch_size,
    'seconds_per_training_step': seconds,
    'training_images_per_second': training.batch_size / seconds,
    'training_tflops': flops / seconds / 1e12,
  }
  return results, jax.device_put(state.ema, layout.replicated)


def time_sampling(config, layout, params, batch_size, steps):
  """Return results of `steps` steps of the predictor-corrector sampler."""
  num_steps = config.sampling.num_steps
  steps = min(steps, num_steps)
  with config.unlocked():
    config.sampling.update(method='pc', num_steps=steps)
  sample = jax.jit(
    experiment.build(config).make_sample(batch_size),
    in_shardings=(layout.replicated, None),
    out_shardings=layout.replicated,
  )

  def seconds():
    start = time.perf_counter()
    jax.block_until_ready(sample(params, jax.random.key(0)))
    return time.perf_counter() - start

  first, second = seconds(), seconds()
  return {
    'seconds_to_compile_sampler': first - second,
    'sampling_batch': batch_size,
    'seconds_per_sampling_step': second / steps,
    # Samples with the number of steps that the config had.
    'samples_per_second': batch_size * steps / second / num_steps,
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Unknown argument {argv[1]!r}.')
  # Programs that compile quickly are kept as well.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  config = FLAGS.config
  try:
    schema.check(config)
    part = config.training.batch_size // config.training.grad_accumulation
    # Before JAX starts, which building an experiment does.
    divide_cpu(part, FLAGS.sampling_batch, wanted=FLAGS.cpu_devices)
    model = experiment.build(config)
    check_divisible(
      part,
      'config.training.batch_size (divided by grad_accumulation)',
    )
    check_divisible(FLAGS.sampling_batch, '--sampling_batch')
    layout = make_layout()
    training, ema = time_training(model, layout, FLAGS.steps)
    where, after_training = peak_memory()
    sampling = time_sampling(
      config, layout, ema, FLAGS.sampling_batch, FLAGS.sampling_steps
    )
  except ValueError as error:
    sys.exit(f'error: {error}')

  device = jax.devices()[0]
  results = {
    'devices': f'{jax.device_count()} x {device.device_kind}',
    'jax': jax.__version__,
    **training,
    **sampling,
    f'{where}_peak_mib_after_training': after_training / 2**20,
    f'{where}_peak_mib': peak_memory()[1] / 2**20,
  }
  if FLAGS.peak_tflops:
    peak = FLAGS.peak_tflops * jax.device_count()
    results['share_of_peak_flops'] = training['training_tflops'] / peak
  for name, value in results.items():
    shown = f'{value:.4g}' if isinstance(value, float) else value
    print(f'{name.replace("_", " "):34} {shown}')
  print(json.dumps(results))


if __name__ == '__main__':
  app.run(main)
