"""Kill runs at random moments, repeat the command, and compare the results.

  python -m benchmarks.crash --kills 100 [--seed 0] [--folder DIR]

A model of digits is trained, evaluated and sampled from, once without a stop.
Then the same commands are killed (SIGKILL, which no process can catch) at
random moments: while they start, train, save a checkpoint, evaluate or sample.
After each kill the same command goes on. When all have finished, losses,
weights, samples and metrics are compared with those of the run without a stop,
bit by bit, and another run begins, until there were enough kills.

A table is printed, and DIR/crash.json has the same numbers. Nothing but this
program's own folder is written.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np

from checkpoints.workdir import restore_ema
from experiment import build, run_config
from runtime.files import load_npz, write_json

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 60
MODES = {
  'train': [
    f'--config.training.n_iters={STEPS}',
    '--config.training.snapshot_freq=20',
  ],
  'eval': [
    '--config.eval.extractor=benchmarks.crash:features',
    '--config.eval.num_samples=240',
    '--config.eval.batch_size=40',
    '--config.eval.allow_few_samples',
    '--config.eval.enable_bpd',
    '--config.eval.bpd_repeats=1',
    '--config.sampling.rtol=0.1',
    '--config.sampling.atol=0.1',
  ],
  'sample': ['--config.sampling.num_samples=200'],
}
# The share of kills that come before the work begins, and of those in training
# that come while a checkpoint is written.
EARLY, SAVING = 0.1, 0.5
# Kills of a command in one run, before it may finish.
AT_MOST = 3


def features(images):
  """Return features [N, 8] of images: a stand-in for the Inception network."""
  flat = np.float64(images.reshape(len(images), -1)) / 255
  basis = np.random.default_rng(0).standard_normal((flat.shape[1], 8))
  return np.float32(flat @ basis)


@dataclasses.dataclass
class Command:
  """A command of main.py, and how long it takes.

  Attributes:
    mode: what it does.
    folder: folder of the benchmark.
    begins: seconds until its work begins.
    ends: seconds until it ends.
  """

  mode: str
  folder: pathlib.Path
  begins: float = 0.0
  ends: float = 0.0

  def start(self, workdir):
    """Return the process, which writes to a log."""
    log = self.folder / 'log.txt'
    config = ['--config', 'tests/tiny.py'] if self.mode == 'train' else []
    with log.open('w') as file:
      return subprocess.Popen(
        [sys.executable, 'main.py', '--workdir', workdir, '--mode', self.mode]
        + config
        + MODES[self.mode],
        cwd=ROOT,
        env=os.environ | {'SCORE_SDE_CACHE': str(self.folder / 'cache')},
        stdout=file,
        stderr=subprocess.STDOUT,
      )

  def check(self, process):
    """Raise RuntimeError, with the log, if the process failed by itself."""
    if process.returncode:
      log = (self.folder / 'log.txt').read_text()
      raise RuntimeError(f'--mode {self.mode} failed:\n{log[-4000:]}')

  def measure(self, workdir):
    """Run without a stop and keep the times."""
    begun = time.monotonic()
    process, self.begins = self.start(workdir), 0.0
    while process.poll() is None:
      written = (self.folder / 'log.txt').read_text()
      if not self.begins and written:
        self.begins = time.monotonic() - begun
      time.sleep(0.02)
    self.check(process)
    self.ends = time.monotonic() - begun
    # A short command says nothing before it has nearly finished.
    self.begins = min(self.begins, self.ends / 2)

  def kill(self, workdir, draw):
    """Run, and kill at a random moment.

    Args:
      workdir: folder of the run.
      draw: a `random.Random`.

    Returns:
      What it was doing, or None if it finished before.
    """
    early = draw.random() < EARLY
    saving = self.mode == 'train' and draw.random() < SAVING and not early
    span = (0, self.begins) if early else (self.begins, self.ends)
    moment, pause = draw.uniform(*span), draw.uniform(0, 0.2)
    begun, process = time.monotonic(), self.start(workdir)
    writing = lambda: any((workdir / 'checkpoints').glob('*-checkpoint-tmp'))
    seen = None
    while process.poll() is None:
      now = time.monotonic() - begun
      if saving and now > moment and seen is None and writing():
        seen = now
      due = seen is not None and now > seen + pause
      if due or (not saving and now > moment):
        process.kill()
        process.wait()
        if early:
          return 'start'
        return 'saving' if saving else self.mode
      time.sleep(0.002)
    self.check(process)
    return None


def contents(workdir):
  """Return {name: number or array} of all that a run gives."""
  found = {}
  for line in (workdir / 'train.jsonl').read_text().splitlines():
    entry = json.loads(line)
    entry.pop('images_per_second', None)
    found |= {f'step {entry["step"]} {k}': v for k, v in entry.items()}
  like = build(run_config(workdir)).abstract_params()
  weights = restore_ema(workdir, like)
  found |= {
    f'weight {i}': np.asarray(leaf) for i, leaf in enumerate(_leaves(weights))
  }
  for path in sorted((workdir / 'samples').glob('*.npz')):
    found |= {f'{path.name} {k}': v for k, v in load_npz(path).items()}
  for result in json.loads((workdir / 'eval' / 'results.json').read_text()):
    for name, value in result.items():
      if isinstance(value, dict) and 'value' in value:
        found[f'{name} of step {result["step"]}'] = value['value']
  return found


def _leaves(tree):
  if isinstance(tree, dict):
    for key in sorted(tree):
      yield from _leaves(tree[key])
  else:
    yield tree


def differences(ours, theirs):
  """Return the names of all that is not the same, bit by bit."""
  same = lambda a, b: np.array_equal(
    a, b, equal_nan=np.asarray(a).dtype == float
  )
  return sorted(
    name
    for name in ours.keys() | theirs.keys()
    if name not in ours
    or name not in theirs
    or not same(np.asarray(ours[name]), np.asarray(theirs[name]))
  )


def crash(folder, kills, seed):
  """Return the numbers of the table; print progress."""
  draw, begun = random.Random(seed), time.monotonic()
  commands = [Command(mode, folder) for mode in MODES]
  # Once to compile, and once for the times.
  for name in ('compiled', 'whole'):
    for command in commands:
      command.measure(folder / name)
  for command in commands:
    print(f'{command.mode}: {command.begins:.1f} to {command.ends:.1f} s')
  whole = contents(folder / 'whole')
  counts, rounds, different = collections.Counter(), 0, []
  while counts.total() < kills:
    workdir = folder / f'killed_{rounds}'
    for command in commands:
      for _ in range(min(AT_MOST, kills - counts.total())):
        if (what := command.kill(workdir, draw)) is None:
          break  # It finished before.
        counts[what] += 1
        print(f'kill {counts.total()}: {what}', flush=True)
      else:
        process = command.start(workdir)
        process.wait()
        command.check(process)
    found = differences(contents(workdir), whole)
    different += [f'run {rounds}: {name}' for name in found]
    print(f'run {rounds}: {len(whole)} compared, {len(found)} differ')
    rounds += 1
  return {
    'kills': dict(counts),
    'runs': rounds,
    'compared': len(whole) * rounds,
    'different': different,
    'seed': seed,
    'minutes': (time.monotonic() - begun) / 60,
  }


def table(result):
  """Return the table of a result."""
  lines = ['| killed while | times |', '|---|---|']
  names = {
    'start': 'starting',
    'train': 'training',
    'saving': 'saving a checkpoint',
    'eval': 'evaluating',
    'sample': 'sampling',
  }
  lines += [f'| {names[k]} | {result["kills"].get(k, 0)} |' for k in names]
  lines.append(
    f'\n{result["runs"]} runs went on after {sum(result["kills"].values())} '
    f'kills; of {result["compared"]} losses, weights, samples and metrics '
    f'{len(result["different"])} differ from those of a run without a stop.'
  )
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(prog='python -m benchmarks.crash')
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--folder', help='Kept, with crash.json; else a new one.')
  args = parser.parse_args()
  folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix='crash-'))
  folder = folder.expanduser().absolute()
  folder.mkdir(parents=True, exist_ok=True)
  if any(folder.iterdir()):
    sys.exit(f'error: {folder} is not empty: choose another --folder.')
  result = crash(folder, args.kills, args.seed)
  write_json(folder / 'crash.json', result)
  print(table(result))
  print(f'The numbers are in {folder}/crash.json.')
  if result['different']:
    sys.exit('error: ' + ', '.join(result['different'][:10]))


if __name__ == '__main__':
  main()
