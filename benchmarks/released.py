"""Reading time and peak memory of a full-size checkpoint of the JAX release.

  python -m benchmarks.released [--config configs/ve/...py] [--checkpoint FILE]

Without a file it writes one of random numbers, in that release's format, to a
temporary folder. Peak memory is that of the whole process.
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
  """Parameters, their average and Adam's moments, all random."""
  rng = np.random.default_rng(0)
  draw = lambda s: rng.standard_normal(s.shape, np.float32)
  like = experiment.abstract_params(experiment.load_config(config_path))
  moments = lambda s: {'grad_ema': draw(s), 'grad_sq_ema': draw(s)}
  adam = {'step': np.int32(1), 'param_states': jax.tree.map(moments, like)}
  state = {
    'step': np.int32(1),
    'params_ema': jax.tree.map(draw, like),
    'optimizer': {'target': jax.tree.map(draw, like), 'state': adam},
  }
  path.write_bytes(serialization.msgpack_serialize(state))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--config', default='configs/ve/cifar10_ncsnpp_continuous.py'
  )
  parser.add_argument('--checkpoint', type=pathlib.Path)
  args = parser.parse_args()
  config = experiment.load_config(args.config)
  with tempfile.TemporaryDirectory() as folder:
    path = args.checkpoint
    if path is None:
      path = pathlib.Path(folder) / 'checkpoint_1'
      # In a process of its own, whose memory does not count.
      spawn = multiprocessing.get_context('spawn')
      child = spawn.Process(target=write_checkpoint, args=(path, args.config))
      child.start()
      child.join()
    start = time.perf_counter()
    loaded = formats.load(path, config)
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
