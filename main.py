"""Trains, samples and evaluates score-based models.

  python main.py --config configs/quickstart.py --workdir W --mode train

Modes: train; eval (loss, bits/dim, FID and the like of checkpoints, or of
--samples); sample; encode (test images to latent codes, and back, between and
beyond); stats (reference statistics of the config's dataset);
import (a released --checkpoint into workdir); export (to --output).
"""

import argparse
import os
import pathlib
import sys
import warnings

import jax
from absl import app, flags
from ml_collections import config_flags

import experiment
from configs import base

FLAGS = flags.FLAGS
MODES = (
  'train', 'eval', 'sample', 'encode', 'stats', 'import', 'export',
)  # fmt: skip
config_flags.DEFINE_config_file('config', None, 'Configuration.')
flags.DEFINE_string('workdir', None, 'Folder of the run.')
flags.DEFINE_enum('mode', None, MODES, 'What to do.')
flags.DEFINE_string('eval_folder', 'eval', 'Folder of results in workdir.')
flags.DEFINE_string('samples', '', 'Evaluate this .npz or folder of images.')
flags.DEFINE_string('checkpoint', '', 'Released checkpoint to import.')
flags.DEFINE_string('output', '', 'FILE.safetensors, or folder for diffusers.')
flags.DEFINE_string('coordinator', '', 'HOST:PORT of process 0, if several.')
flags.DEFINE_integer('num_processes', 1, 'Processes in all.')
flags.DEFINE_integer('process_id', 0, 'Number of this process, from 0.')
flags.mark_flags_as_required(['config', 'workdir', 'mode'])


def run():
  import run_lib
  from commands import control, encode, evaluate, exchange, stats

  config, workdir = FLAGS.config, FLAGS.workdir
  match FLAGS.mode:
    case 'train':
      run_lib.train(config, workdir)
    case 'eval' if FLAGS.samples:
      evaluate.evaluate_images(
        config, workdir, FLAGS.samples, FLAGS.eval_folder
      )
    case 'eval':
      evaluate.evaluate(config, workdir, FLAGS.eval_folder)
    case 'sample' if config.control.name:
      control.sample(config, workdir)
    case 'sample':
      evaluate.sample(config, workdir)
    case 'encode':
      encode.encode(config, workdir)
    case 'stats':
      stats.stats(config, workdir)
    case 'import':
      exchange.import_released(config, workdir, FLAGS.checkpoint)
    case 'export':
      exchange.export(config, workdir, FLAGS.output)


def configure_jax():
  """Compiled programs are kept, and hosts find each other."""
  cache = pathlib.Path('~/.cache/score_sde/jax').expanduser()
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  if FLAGS.coordinator:
    jax.distributed.initialize(
      FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id
    )
  elif int(os.environ.get('SLURM_STEP_NUM_TASKS', '1')) > 1:
    jax.distributed.initialize()  # srun tells all that is needed.


def check_overrides(argv):
  """Exits with one line if --config.KEY names a key that does not exist."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument('--config')
  known, rest = parser.parse_known_args(argv)
  if not known.config:
    return
  try:
    config = experiment.load_config(known.config)
  except (OSError, KeyError, ValueError) as error:
    sys.exit(f'error: {error.args[-1] if error.args else error}')
  leaves = set(base.leaves(config))
  for argument in rest:
    name, dot, key = argument.lstrip('-').partition('=')[0].partition('.')
    if name == 'config' and dot and key not in leaves:
      sys.exit(f'error: {base.unknown_key(config, key)}')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Unknown argument {argv[1]!r}.')
  configure_jax()
  warnings.formatwarning = lambda text, *_, **__: f'warning: {text}\n'
  try:
    run()
  except (ValueError, OSError, FloatingPointError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  check_overrides(sys.argv[1:])
  app.run(main)
