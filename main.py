"""Train, sample from and evaluate score-based models.

  python main.py --config configs/quickstart.py --workdir W --mode train
  python main.py --workdir W --mode eval

Every mode but train, stats and import reads the config of the run in workdir if
there is no --config. --config.KEY=VALUE overrides a key; --help_config prints
all keys.
"""

import ast
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import warnings

import jax
from absl import app, flags

import experiment
import run_lib
from commands import control, encode, evaluate, exchange, sample, stats
from configs import schema
from runtime.devices import divide_cpu, keep_programs, num_cores
from runtime.files import check_local
from runtime.progress import say

FLAGS = flags.FLAGS
# Flags that one mode alone reads.
MODE_OF = {
  'samples': 'eval',
  'eval_folder': 'eval',
  'checkpoint': 'import',
  'output': 'export',
}
MODES = {
  'train': lambda config: run_lib.train(config, FLAGS.workdir),
  'eval': lambda config: _evaluate(config),
  'sample': lambda config: _sample(config),
  'encode': lambda config: encode.encode(config, FLAGS.workdir),
  'stats': lambda config: stats.stats(config, FLAGS.workdir),
  'import': lambda config: exchange.import_released(
    config, FLAGS.workdir, FLAGS.checkpoint
  ),
  'export': lambda config: exchange.export(config, FLAGS.workdir, FLAGS.output),
}


class _PathParser(flags.ArgumentParser):
  """Parses a path; ~ is the home folder, which no shell sees in --flag=~/x."""

  def parse(self, argument):
    check_local(argument)
    return os.path.expanduser(argument)


def _define_path(name, meaning, default=''):
  serializer = flags.ArgumentSerializer()
  flags.DEFINE(_PathParser(), name, default, meaning, FLAGS, serializer)


_define_path(
  'config', "A file of configs/, or a run's config.json; '' for workdir's."
)
_define_path('workdir', 'Folder of the run.')
flags.DEFINE_enum('mode', None, MODES, 'What to do.')
_define_path('eval_folder', 'Folder of results in workdir.', 'eval')
_define_path('samples', 'Evaluate this .npz or folder of images.')
_define_path('checkpoint', 'Released checkpoint to import.')
_define_path('output', 'FILE.safetensors, or folder for diffusers.')
flags.DEFINE_string(
  'coordinator',
  '',
  "HOST:PORT of process 0, if several; 'auto' on a TPU slice or SLURM.",
)
flags.DEFINE_integer('num_processes', 1, 'Number of processes.')
flags.DEFINE_integer('process_id', 0, 'Number of this process, from 0.')
flags.DEFINE_integer(
  'cpu_devices', 0, 'Devices that CPU cores become; 0 for a number that suits.'
)
flags.DEFINE_bool('help_config', False, 'Print all keys of configs.')


def _evaluate(config):
  if FLAGS.samples:
    images = FLAGS.samples, FLAGS.eval_folder
    evaluate.evaluate_images(config, FLAGS.workdir, *images)
  else:
    evaluate.evaluate(config, FLAGS.workdir, FLAGS.eval_folder)


def _sample(config):
  command = control if config.control.name else sample
  if not config.control.name:
    control.check_no_label(config)
  command.sample(config, FLAGS.workdir)


class _TupleParser(flags.ArgumentParser):
  """Parses '(1, 2)', '[1, 2]' and '1,2'."""

  def parse(self, argument):
    if isinstance(argument, tuple):
      return argument
    try:
      value = ast.literal_eval(argument)
    except (SyntaxError, ValueError):
      raise ValueError(f'{argument!r} is no tuple such as (1, 2)') from None
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


class _WordsParser(flags.ArgumentParser):
  """Parses 'a,b'."""

  def parse(self, argument):
    if isinstance(argument, tuple):
      return argument
    return tuple(word for word in argument.split(',') if word)


def define_overrides():
  """Define a flag --config.KEY for every key of `configs.schema`."""
  define = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
  }
  for path, key in schema.KEYS.items():
    name, wanted = f'config.{path}', key.option.type
    if key.option.table is None and isinstance(key.option.default, tuple):
      serializer = flags.ArgumentSerializer()
      words = wanted == tuple[str, ...]
      parser = _WordsParser() if words else _TupleParser()
      flags.DEFINE(parser, name, None, key.option.meaning, FLAGS, serializer)
    else:
      make = define.get(wanted, flags.DEFINE_string)
      make(name, None, key.option.meaning)


def read_config():
  """Return the ConfigDict that the flags ask for."""
  if FLAGS.config:
    config = experiment.load_config(FLAGS.config)
  elif FLAGS.mode in ('train', 'import'):
    raise ValueError(
      f'--mode {FLAGS.mode} needs --config, such as configs/quickstart.py.'
    )
  else:
    config = experiment.run_config(FLAGS.workdir)
  for path in schema.KEYS:
    if FLAGS[f'config.{path}'].present:
      schema.override(config, path, FLAGS[f'config.{path}'].value)
  return config


def configure_jax():
  """Keep compiled programs, and let hosts find each other."""
  keep_programs()
  join_hosts()


def join_hosts():
  """Let the hosts that the flags speak of find each other.

  Raises:
    ValueError: JAX does not find out which hosts belong together, or no host
      has the name of the coordinator.
  """
  several_tasks = int(os.environ.get('SLURM_STEP_NUM_TASKS', '1')) > 1
  if FLAGS.coordinator == 'auto' or (several_tasks and not FLAGS.coordinator):
    try:
      jax.distributed.initialize()  # SLURM or the TPU tell all that is needed.
    except (ValueError, RuntimeError) as error:
      raise ValueError(
        f'--coordinator=auto: {error} Where JAX knows neither SLURM nor a TPU '
        'slice, use --coordinator HOST:PORT, --num_processes and --process_id.'
      ) from error
  elif FLAGS.coordinator:
    host, _, port = FLAGS.coordinator.rpartition(':')
    try:  # JAX would wait for minutes, or abort.
      socket.getaddrinfo(host.strip('[]'), port)
    except OSError as error:
      raise ValueError(f'--coordinator={FLAGS.coordinator}: {error}') from None
    jax.distributed.initialize(
      FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id
    )


def divide_cores(config):
  """Make devices of the cores of a CPU, if this process works alone."""
  if jax.distributed.is_initialized() and not FLAGS.cpu_devices:
    return
  schema.check(config)
  batch = config.eval.batch_size
  if FLAGS.mode == 'train':
    parts = config.training.grad_accumulation
    batch = config.training.batch_size // parts
  count = divide_cpu(batch, wanted=FLAGS.cpu_devices)
  if count > 1 and jax.default_backend() == 'cpu':
    say(f'{count} devices of {num_cores()} cores (--cpu_devices).')


def _check_modes():
  """Raise flags.Error for a flag that the mode does not read."""
  for name, mode in MODE_OF.items():
    if FLAGS[name].present and FLAGS.mode != mode:
      hint = ''
      if name == 'checkpoint':
        hint = '; config.eval.checkpoint chooses one of a run'
      raise flags.Error(
        f'--{name} is for --mode {mode}, not {FLAGS.mode}: leave it out{hint}.'
      )


def _check_processes():
  """Raise flags.Error for numbers of processes that cannot be."""
  number, count = FLAGS.process_id, FLAGS.num_processes
  if not 0 <= FLAGS.cpu_devices <= 4096:
    raise flags.Error(
      f'--cpu_devices={FLAGS.cpu_devices} needs to be 1 or more, or 0 for a '
      'number that suits.'
    )
  if count < 1 or not 0 <= number < count:
    raise flags.Error(
      f'--process_id={number} needs to be from 0 to --num_processes={count} '
      'less 1.'
    )
  if count > 1 and not FLAGS.coordinator:
    raise flags.Error(
      f'--num_processes={count} needs --coordinator HOST:PORT, or each process '
      'works alone.'
    )
  address = re.fullmatch(r'.+:([0-9]{1,5})', FLAGS.coordinator)
  if FLAGS.coordinator not in ('', 'auto') and not (
    address and 0 < int(address[1]) < 2**16
  ):
    raise flags.Error(
      f'--coordinator={FLAGS.coordinator} needs to be HOST:PORT, with a port '
      'from 1 to 65535.'
    )
  if count > 1 and FLAGS.coordinator == 'auto':
    raise flags.Error(
      f'--num_processes={count} is found by --coordinator=auto: leave it out.'
    )


def parse(argv):
  """Parse the command line once; exit with one line if it is wrong."""
  try:
    rest = FLAGS(argv)[1:]
    if rest:
      raise flags.Error(f'Unknown argument {rest[0]!r}.')
    if not FLAGS.help_config:
      for name in ('mode', 'workdir'):
        if not FLAGS[name].value:
          raise flags.Error(f'--{name} is missing; see --help.')
      _check_modes()
      _check_processes()
  except flags.Error as error:
    unknown = getattr(error, 'flagname', '')
    if unknown.startswith('config.'):
      error = schema.unknown(unknown.removeprefix('config.'))
    sys.exit(f'error: {error}')
  return argv[:1]


@contextlib.contextmanager
def _terminable():
  """Let SIGTERM end a command as Ctrl-C does: parts of files are removed.

  Training has handlers of its own, which save. A second signal stops at once.
  """

  def stop(number, frame):
    del frame
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(signal.Signals(number).name)

  # Python allows handlers in the main thread only.
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _text(error):
  """Return the one line of an error."""
  if isinstance(error, OSError) and error.filename and error.strerror:
    return f'{error.filename}: {error.strerror}.'
  text = error.args[0] if isinstance(error, KeyError) else error
  return ' '.join(str(text).split())


def main(argv):
  del argv
  if FLAGS.help_config:
    print(schema.text())
    return
  warnings.formatwarning = lambda text, *_, **__: f'warning: {text}\n'
  try:
    with _terminable():
      configure_jax()
      config = read_config()
      divide_cores(config)
      config = experiment.completed(config, FLAGS.workdir)
      MODES[FLAGS.mode](config)
  except KeyboardInterrupt as stop:
    name = stop.args[0] if stop.args else 'SIGINT'
    sys.exit(f'error: Stopped by {name}; what was written stays.')
  except (ValueError, KeyError, OSError, FloatingPointError) as error:
    sys.exit(f'error: {_text(error)}')
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
      sys.exit(
        'error: Out of memory: use a smaller config.training.batch_size or '
        'config.eval.batch_size, more config.training.grad_accumulation, or '
        'config.model.remat=True.'
      )
    raise


define_overrides()

if __name__ == '__main__':
  app.run(main, flags_parser=parse)
