"""Measure the time and memory of reading a checkpoint of the JAX release.

  python -m benchmarks.released [--config configs/ve/...py] [--checkpoint FILE]

Without a file, a checkpoint of random numbers in the release's format is
written to a temporary folder and read. The peak memory is that of the whole
process.
"""

import argparse
import multiprocessing
import pathlib
import resource
import tempfile
import time

import jax
import numpy as np
from flax import serialization

import experiment
from checkpoints import formats


def write_checkpoint(path, config_path):
  """Write random parameters, averages and moments of Adam."""
  rng = np.random.default_rng(0)
  draw = lambda s: rng.standard_normal(s.shape, np.float32)
  model = experiment.build(experiment.load_config(config_path))
  like = model.abstract_params()
  moments = lambda s: {'grad_ema': draw(s), 'grad_sq_ema': draw(s)}
  adam = {'step': np.int32(1), 'param_states': jax.tree.map(moments, like)}
  state = {
    'step': np.int32(1),
    'params_ema': jax.tree.map(draw, like),
    'optimizer': {'target': jax.tree.map(draw, like), 'state': adam},
  }
  path.write_bytes(serialization.msgpack_serialize(state))


def main():
  """Read the checkpoint, and print what that took."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--config', default='configs/ve/cifar10_ncsnpp_continuous.py'
  )
  parser.add_argument('--checkpoint', type=pathlib.Path)
  args = parser.parse_args()
  model = experiment.build(experiment.load_config(args.config))
  with tempfile.TemporaryDirectory() as folder:
    path = args.checkpoint
    if path is None:
      path = pathlib.Path(folder) / 'checkpoint_1'
      # A process of its own writes, so that its memory does not count.
      spawn = multiprocessing.get_context('spawn')
      child = spawn.Process(target=write_checkpoint, args=(path, args.config))
      child.start()
      child.join()
    start = time.perf_counter()
    loaded = formats.load(path, model.network, model.shape(1))
    seconds = time.perf_counter() - start
    size = path.stat().st_size
  peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  count = sum(v.size for v in jax.tree.leaves(loaded.params))
  print(
    f'{count / 1e6:.2f}M parameters, {size / 2**20:.0f} MiB: {seconds:.1f} s, '
    f'peak memory {peak / 2**20:.0f} MiB, {peak / size:.2f} x the file'
  )


if __name__ == '__main__':
  main()
