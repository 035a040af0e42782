r"""Train, sample and score in a fixed time on one accelerator, in pieces.

  python -m benchmarks.thirty_minutes --workdir W --prepare
  python -m benchmarks.thirty_minutes --workdir W --minutes 30

The second command is repeated until it prints the table. It first measures how
fast the device trains, samples and computes features, and fixes the number of
steps with which everything ends in time; W/plan.json keeps it. Then it trains,
compares lengths of averages and guidances by the FID of a few samples, and
computes that of many samples, of another seed, with the best of them. The time
of all pieces counts, from their start to their end. The first command needs no
accelerator: it names files that are missing, because nothing is fetched without
--fetch_data, and computes the reference statistics.
"""

# ruff: noqa: E402 (imports are part of the time)
import time

BEGUN = time.monotonic()

import dataclasses
import json
import math
import pathlib
import shutil
import statistics
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

import evaluation
import experiment
import run_lib
from checkpoints.workdir import Checkpoints
from commands import evaluate, stats, trained
from configs import schema
from data import cifar, datasets
from features import extract, weights
from runtime import files
from runtime.clock import Clock, PieceOver, stoppable
from runtime.devices import divide_cpu, keep_programs, local_rows
from runtime.locks import lock
from runtime.progress import duration, say

# Apart from the flags of other programs that are loaded in the same process.
FLAGS = flags.FlagValues()
flags.DEFINE_flag(app.HelpFlag(), flag_values=FLAGS)
RECIPE = 'configs/edm/cifar10_thirty_minutes.py'
config_flags.DEFINE_config_file(
  'config', None, f'A file of configs/; {RECIPE} by default.', flag_values=FLAGS
)
_GUIDANCE = 'Guidances: scale, or scale:interval_low:interval_high.'
for define, name, default, meaning in (
  (flags.DEFINE_string, 'workdir', None, 'Folder of the run.'),
  (flags.DEFINE_float, 'minutes', 30, 'Device time of the whole.'),
  (flags.DEFINE_float, 'piece_minutes', 10, 'Device time of one call.'),
  (flags.DEFINE_list, 'guidance', ['1', '1.5:0.2:2'], _GUIDANCE),
  (flags.DEFINE_integer, 'few', 5000, 'Samples of a comparison.'),
  (flags.DEFINE_float, 'margin', 0.05, 'Share of the time that is left free.'),
  (flags.DEFINE_integer, 'restarts', None, 'Pieces after the first.'),
  (flags.DEFINE_float, 'restart_seconds', 30, 'Time that a restart takes.'),
  (flags.DEFINE_bool, 'prepare', False, 'Check files, compute statistics.'),
  (flags.DEFINE_bool, 'fetch_data', False, 'Download missing files first.'),
):
  define(name, default, meaning, flag_values=FLAGS)

# Checkpoints that are kept, which the averages are combined of, and checkpoints
# for each of them, which a run goes on from.
KEPT, SAVES = 8, 4
# Compiled calls and batches of samples whose speed is measured.
CALLS, BATCHES = 20, 3


def changed(config, changes):
  """Return a copy of a config with other values of dotted keys."""
  config = config.copy_and_resolve_references()
  for path, value in changes.items():
    schema.override(config, path, value)
  return config


def as_json(config):
  """Return a config as JSON files have it."""
  return json.loads(files.to_json(experiment.json_of(config)))


def logged(workdir, name):
  """Return all numbers of a name in the log of a training."""
  lines = (workdir / 'train.jsonl').read_text().splitlines()
  return [entry[name] for entry in map(json.loads, lines) if name in entry]


def control_of(guidance):
  """Return the keys of config.control of a value of --guidance."""
  names = 'scale', 'interval_low', 'interval_high'
  try:
    values = [float(v) for v in guidance.split(':')]
    keys = {f'control.{n}': v for n, v in zip(names, values, strict=False)}
    if len(values) in (1, 3):
      return keys
  except ValueError:
    pass
  raise ValueError(
    f'--guidance={guidance} is neither scale nor scale:low:high.'
  )


def evaluations(guidance):
  """Return how often the network is evaluated at each time."""
  return 1 if control_of(guidance)['control.scale'] == 1 else 2


def compared(config):
  """Return [(length, guidance)] to be compared; None is the best length."""
  first, *others = sorted(FLAGS.guidance, key=evaluations)
  lengths = [(length, first) for length in config.eval.ema_length]
  return lengths + [(None, guidance) for guidance in others]


# ----------------------------------------------------------------------- plan


def with_reference(config, workdir):
  """Return the config with statistics that serve for FID alone.

  The other metrics take longer, on the CPU, than FID; `--mode eval` computes
  them of the same samples afterwards.
  """
  path = workdir / 'reference.npz'
  if not path.is_file():
    reference = evaluate.Judge.of(config, workdir, FLAGS.few).reference
    few = evaluation.too_few(FLAGS.few, reference.dimensions)
    if few and not config.eval.allow_few_samples:
      raise ValueError(f'--few={FLAGS.few}: {few}')
    dataclasses.replace(reference, features=None).save(path)
  return changed(config, {'eval.stats_path': str(path)})


def measure(config, workdir):
  """Train and sample for a short time; return what `steps_in` needs."""
  size, every = config.eval.batch_size, config.training.n_jitted_steps
  every *= CALLS // 2
  short = {f'training.{k}_freq': 0 for k in ('eval', 'checkpoint', 'snapshot')}
  short |= {'training.n_iters': 2 * every, 'training.log_freq': every}
  short |= {'training.snapshot_sampling': False, 'eval.enable_loss': False}
  short |= {'eval.ema_length': (), 'eval.num_samples': BATCHES * size}
  config = changed(config, short | {'eval.allow_few_samples': True})
  folder, at = workdir / 'measured', [time.monotonic()]
  shutil.rmtree(folder, ignore_errors=True)  # It was not finished.
  run_lib.train(config, folder)
  trained_in = time.monotonic() - at[0]
  run = trained.restore(config, folder)
  extractor = extract.extractor(config.eval)
  at = [time.monotonic()]
  for _, found in trained.draw(run, (1 + BATCHES) * size, size, split=True):
    images = run.model.to_data(local_rows(found.x))
    extract.outputs_of(images, extractor)
    at.append(time.monotonic())
  evaluate.evaluate(config, folder)
  evaluated_in = time.monotonic() - at[-1]
  batch = (at[-1] - at[1]) / BATCHES
  rate = min(logged(folder, 'images_per_second'))
  images = config.training.batch_size * 2 * every
  return {
    'images_per_second': rate,
    'train_start': trained_in - images / rate,
    'samples_per_second': size / batch,
    'compile_sampler': max(at[1] - at[0] - batch, 0.0),
    'evaluation': max(evaluated_in - BATCHES * batch, 0.0),
  }


def steps_in(seconds, config, measured, pairs, few):
  """Return the number of steps of training in some seconds.

  Args:
    seconds: time for training and all evaluations.
    config: a ConfigDict.
    measured: images_per_second in training; train_start, the seconds before the
      first step; samples_per_second without guidance, features included;
      compile_sampler, the seconds to compile a sampler; and evaluation, those
      of an evaluation besides its samples.
    pairs: (length, guidance) of all comparisons.
    few: samples of each.

  Raises:
    ValueError: the time is too short.
  """
  rate = measured['images_per_second'] / config.training.batch_size
  rounds = [(guidance, few) for _, guidance in pairs]
  dearest = max((guidance for _, guidance in pairs), key=evaluations)
  rounds.append((dearest, config.eval.num_samples))
  guided = {guidance for guidance, _ in rounds if evaluations(guidance) > 1}
  seconds -= measured['train_start'] + len(rounds) * measured['evaluation']
  seconds -= len(guided) * measured['compile_sampler']
  for guidance, count in rounds:
    drawn = math.ceil(count / config.eval.batch_size) * config.eval.batch_size
    seconds -= evaluations(guidance) * drawn / measured['samples_per_second']
  unit = KEPT * SAVES * config.training.n_jitted_steps
  if seconds * rate < unit:
    lacks = (unit / rate - seconds) / 60
    raise ValueError(
      f'--minutes is too short by {lacks:.1f} minutes for {unit} steps and the '
      'samples: use more, or fewer samples (--few, eval.num_samples).'
    )
  return int(seconds * rate // unit) * unit


def make_plan(config, workdir, clock):
  """Return the plan of the run, which is made once and kept."""
  path, chosen = workdir / 'plan.json', {'config': as_json(config)}
  chosen |= {k: FLAGS[k].value for k in ('minutes', 'few', 'guidance')}
  if not path.is_file():
    measured = measure(with_reference(config, workdir), workdir)
    restarts = FLAGS.restarts
    if restarts is None:
      restarts = math.ceil(FLAGS.minutes / FLAGS.piece_minutes) - 1
    used, seconds = clock.seconds, 60 * FLAGS.minutes * (1 - FLAGS.margin)
    seconds -= used + restarts * FLAGS.restart_seconds
    steps = steps_in(seconds, config, measured, compared(config), FLAGS.few)
    plan = {'steps': steps, 'seconds': used, 'measured': measured}
    files.write_json(path, plan | chosen)
    say(f'The plan: {steps} steps. {path} keeps it.')
  plan = json.loads(path.read_text())
  if differ := [key for key, value in chosen.items() if plan[key] != value]:
    raise ValueError(
      f'{path} was made with another {", ".join(differ)}: use the same, or '
      'another --workdir.'
    )
  return plan


# ----------------------------------------------------------------------- work


def steps_done(workdir):
  """Return the step of the last checkpoint."""
  if not (workdir / 'checkpoints').is_dir():
    return 0
  with Checkpoints(workdir) as saved:
    return saved.last or 0


def train(config, workdir, steps, clock):
  """Return the config of the run, when it is trained."""
  every = {'snapshot': steps // KEPT, 'checkpoint': steps // KEPT // SAVES}
  changes = {f'training.{name}_freq': n for name, n in every.items()}
  changes |= {'training.n_iters': steps, 'training.snapshot_sampling': False}
  config = changed(config, changes)
  if steps_done(workdir) < steps:
    run_lib.train(config, workdir)
    if clock.over or steps_done(workdir) < steps:
      raise PieceOver
  return config


def score(config, workdir, length, guidance, count, seed):
  """Return a row of the table; what was computed before is read."""
  changes = {'eval.ema_length': (length,), 'eval.num_samples': count}
  changes |= {'eval.enable_loss': False, 'seed': seed}
  config = changed(config, control_of(guidance) | changes)
  path, wanted = workdir / 'eval' / 'results.json', as_json(config)

  def find():
    results = json.loads(path.read_text()) if path.is_file() else []
    return next((r for r in results if r['config'] == wanted), None)

  if not find():
    evaluate.evaluate(config, workdir)
  found = find()
  row = {'ema_length': length, 'guidance': guidance, 'count': count}
  row |= {'seed': seed, 'nfe': found['nfe'], 'fid': found['fid']['value']}
  return row | {'std_error': found['fid']['std_error']}


def score_all(config, workdir):
  """Return (rows of the comparisons, the row of many samples)."""
  rows, best = [], lambda: min(rows, key=lambda row: row['fid'])
  for length, guidance in compared(config):
    length = length or best()['ema_length']
    rows.append(
      score(config, workdir, length, guidance, FLAGS.few, config.seed)
    )
  chosen = best()['ema_length'], best()['guidance']
  # Another seed: the smallest of several is too small by chance.
  many, seed = config.eval.num_samples, config.seed + 1
  return rows, score(config, workdir, *chosen, many, seed)


def table(result):
  """Return a result as Markdown."""
  lines = [
    '| | |',
    '|---|---|',
    f'| device | {result["device"]} |',
    f'| minutes, of planned | {result["seconds"] / 60:.1f}, of '
    f'{result["plan"]["minutes"]:g} |',
    f'| steps | {result["plan"]["steps"]:,} |',
    f'| images seen | {result["images"]:,} |',
    f'| images/s | {result["images_per_second"]:,.0f} |',
    f'| last loss, test loss | {result["loss"]:.5g}, '
    f'{result["test_loss"]:.5g} |',
    '',
    '| EMA length | guidance | samples | seed | NFE | FID |',
    '|---|---|---|---|---|---|',
  ]
  for row in [*result['compared'], result['final']]:
    error = f' +- {row["std_error"]:.2g}' if row['std_error'] else ''
    lines.append(
      f'| {row["ema_length"]:g} | {row["guidance"]} | {row["count"]:,} | '
      f'{row["seed"]} | {row["nfe"]:g} | {row["fid"]:.4f}{error} |'
    )
  return '\n'.join(lines) + '\n'


def work(config, workdir, clock):
  """Do what remains, and write the table."""
  plan = make_plan(config, workdir, clock)
  config = train(config, workdir, plan['steps'], clock)
  rows, final = score_all(with_reference(config, workdir), workdir)
  speeds = logged(workdir, 'images_per_second')
  result = {
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'seconds': clock.seconds,
    'images': plan['steps'] * config.training.batch_size,
    'images_per_second': statistics.median(speeds),
    'loss': logged(workdir, 'loss')[-1],
    'test_loss': logged(workdir, 'test_loss')[-1],
    'compared': rows,
    'final': final,
    'plan': plan,
    'versions': trained.facts(config)['versions'],
  }
  files.write_json(workdir / 'thirty_minutes.json', result)
  files.write_text(workdir / 'thirty_minutes.md', table(result))
  say(table(result))


def run(config, workdir):
  """Work for one piece, or print the table if all is done."""
  done = workdir / 'thirty_minutes.json'
  if done.is_file():
    say(table(json.loads(done.read_text())))
    return
  workdir.mkdir(parents=True, exist_ok=True)
  limit, whole = 60 * FLAGS.piece_minutes, 60 * FLAGS.minutes
  with (
    lock(workdir / 'piece.lock'),
    stoppable(),
    # The rest is to end a compiled call and to save.
    Clock(workdir / 'clock.json', BEGUN, 0.95 * limit) as clock,
  ):
    try:
      work(config, workdir, clock)
    except KeyboardInterrupt:  # PieceOver is one.
      plan = workdir / 'plan.json'
      steps = json.loads(plan.read_text())['steps'] if plan.is_file() else '?'
      say(
        f'This piece is over, after {steps_done(workdir)} of {steps} steps: '
        'repeat the command.'
      )
    say(f'{duration(clock.seconds)} of {duration(whole)} are used.')
    if clock.seconds > whole:
      say('warning: This is more than --minutes.')


# -------------------------------------------------------------------- prepare


def check_files(config):
  """Raise FileNotFoundError if a file would have to be downloaded."""
  data, chosen, wanted = config.data, config.eval, {}
  if data.dataset == 'cifar10' and not data.path:
    wanted['data.path'] = list(cifar.MD5)
  if not chosen.extractor and not chosen.inception_path:
    wanted['eval.inception_path'] = [s.filename for s in weights.SOURCES]
  for key, names in wanted.items():
    if not any((files.cache_dir() / name).is_file() for name in names):
      raise FileNotFoundError(
        f'{files.cache_dir()} has no {" or ".join(names)}, and nothing is '
        'fetched without --fetch_data: copy one there, or name it with '
        f'--config.{key}.'
      )


def prepare(config, workdir):
  """Do what needs no accelerator."""
  model = experiment.build(config)
  for split in ('train', 'test'):
    experiment.check_labels(model, datasets.load(config.data, split))
  stats.reference(config, workdir, extract.extractor(config.eval))
  say(f'All files are there; those of {files.cache_dir()} can be copied.')


def main(argv):
  if len(argv) > 1:
    sys.exit(f'error: Unknown argument {argv[1]!r}.')
  try:
    config = FLAGS.config
    if not FLAGS.workdir:
      raise ValueError('--workdir is missing.')
    schema.check(config)
    compared(config)  # Checks --guidance.
    if not FLAGS.fetch_data:
      check_files(config)
    keep_programs()
    divide_cpu(config.training.batch_size, config.eval.batch_size)
    workdir = pathlib.Path(FLAGS.workdir).expanduser().absolute()
    (prepare if FLAGS.prepare else run)(config, workdir)
  except (ValueError, OSError, FloatingPointError) as error:
    sys.exit(f'error: {" ".join(str(error).split())}')


def parse(argv):
  """Return the arguments that are no flags; exit with one line if wrong."""
  flags.FLAGS(argv[:1])
  for argument in argv[1:]:
    path = argument.partition('=')[0].removeprefix('--config.')
    if argument.startswith('--config.') and path not in schema.KEYS:
      sys.exit(f'error: {schema.unknown(path)}')
  if not any(argument.partition('=')[0] == '--config' for argument in argv):
    argv = [argv[0], f'--config={RECIPE}', *argv[1:]]
  try:
    return FLAGS(argv)
  except (flags.Error, OSError) as error:
    sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
