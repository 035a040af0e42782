r"""Show on a CPU that `benchmarks.thirty_minutes` survives two kills.

  python -m benchmarks.dry_run --workdir D --minutes 8

The options are those of `benchmarks.thirty_minutes`, but the config is
configs/digits_minutes.py and --few is 64 by default. The whole runs twice. The
second time it has the plan of the first, and is killed (SIGKILL) in training
and in sampling. Everything but times and speeds must be the same, and both must
end in time. Where other programs run, more of the time has to be left free, as
by --margin 0.6.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import time

from absl import app

from benchmarks import thirty_minutes
from runtime.files import write_json

SAME = 'images', 'loss', 'test_loss', 'compared', 'final'
DEFAULTS = '--config=configs/digits_minutes.py', '--few=64'


def command(workdir):
  """Return the command of a run."""
  module = [sys.executable, '-m', 'benchmarks.thirty_minutes']
  return [*module, *DEFAULTS, *sys.argv[1:], f'--workdir={workdir}']


def finish(workdir):
  """Repeat the command until the table is there, and return the result."""
  path = workdir / 'thirty_minutes.json'
  while not path.is_file():
    subprocess.run(command(workdir), check=True)
  return json.loads(path.read_text())


def kill(workdir, when):
  """Run until when() is true, and kill with SIGKILL."""
  with subprocess.Popen(command(workdir)) as process:
    while process.poll() is None and not when():
      time.sleep(0.05)
    if process.poll() is not None:
      raise ValueError('The run ended before it was killed.')
    process.kill()
  print('Killed.', flush=True)


def compare(folder):
  """Make both runs; exit with one line if they differ or take too long."""
  limit = 60 * thirty_minutes.FLAGS.minutes
  whole, killed = finish(folder / 'whole'), folder / 'killed'
  killed.mkdir()
  shutil.copy(folder / 'whole' / 'plan.json', killed)
  # The time that was used when the plan was made.
  write_json(killed / 'clock.json', {'seconds': whole['plan']['seconds']})
  saved = lambda: [int(p.name) for p in killed.glob('checkpoints/*[0-9]')]
  kill(killed, lambda: max(saved(), default=0) > whole['plan']['steps'] / 3)
  kill(killed, lambda: any(killed.glob('eval/*/samples_0.npz')))
  again = finish(killed)
  for name, result in (('not killed', whole), ('killed twice', again)):
    print(f'{name}: {result["seconds"]:.0f} s of {limit:.0f} s')
  if differ := [key for key in SAME if whole[key] != again[key]]:
    sys.exit(f'error: These differ: {", ".join(differ)}.')
  if max(whole['seconds'], again['seconds']) > limit:
    sys.exit('error: A run took longer than --minutes.')
  print(f'The same in both: {", ".join(SAME)}.')


def main(argv):
  del argv
  workdir = thirty_minutes.FLAGS.workdir
  try:
    if not workdir:
      raise ValueError('--workdir is missing.')
    compare(pathlib.Path(workdir).expanduser().absolute())
  except (ValueError, OSError, subprocess.CalledProcessError) as error:
    sys.exit(f'error: {error}')


def parse(argv):
  """Return the arguments that are no flags."""
  return thirty_minutes.parse([argv[0], *DEFAULTS, *argv[1:]])


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
