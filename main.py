"""Trains, samples and evaluates: python main.py --config C --workdir W --mode M.

Modes: train; eval (loss, bits/dim, FID and the like of checkpoints, or of
--samples); sample; stats (reference statistics of the config's dataset).
"""

import os
import pathlib
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

FLAGS = flags.FLAGS
MODES = ('train', 'eval', 'sample', 'stats')
config_flags.DEFINE_config_file('config', None, 'Configuration.')
flags.DEFINE_string('workdir', None, 'Folder of the run.')
flags.DEFINE_enum('mode', None, MODES, 'What to do.')
flags.DEFINE_string('eval_folder', 'eval', 'Folder of results in workdir.')
flags.DEFINE_string('samples', '', 'Evaluate this .npz or folder of images.')
flags.mark_flags_as_required(['config', 'workdir', 'mode'])


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Unknown argument {argv[1]!r}.')
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(
    pathlib.Path('~/.cache/score_sde/jax').expanduser()
  )
  # A second start finds its programs compiled.
  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  if any(name in os.environ for name in ('SLURM_NTASKS', 'JAX_COORDINATOR')):
    jax.distributed.initialize()

  import run_lib

  config, workdir = FLAGS.config, FLAGS.workdir
  try:
    if FLAGS.mode == 'train':
      run_lib.train(config, workdir)
  except (ValueError, OSError, FloatingPointError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(main)
