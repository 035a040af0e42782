"""The files of launch/: they parse, and their commands are those of main.py.

SLURM and gcloud are imitated by scripts that tell which command they were to
run; `commands` returns it with what the scheduler puts in.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from absl.testing import flagsaver

import experiment
import main
import run_lib
from tests import tiny
from tests.test_docs import check_main

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
CONFIG = 'configs/ve/cifar10_ncsnpp_continuous.py'
# Prints its arguments, one a line.
PRINT = '#!/bin/bash\nprintf "%s\\n" "$@"\n'


def output(folder, tool, *command, **env):
  """Return what a command prints when `tool` is one that prints its arguments.

  Args:
    folder: where the tool is put.
    tool: such as srun.
    *command: the command.
    **env: more variables of the environment.
  """
  (folder / tool).write_text(PRINT)
  (folder / tool).chmod(0o755)
  path = os.pathsep.join([str(folder), os.environ['PATH']])
  return subprocess.run(
    ['bash', *map(str, command)],
    env=os.environ | {'PATH': path} | env,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()


def pod(hosts=2, host=0):
  """Return (spec of the job, container, command) of kubernetes.yaml.

  Args:
    hosts: number of hosts; None for that of the file.
    host: number of the host that the command is of.
  """
  manifest = yaml.safe_load((LAUNCH / 'kubernetes.yaml').read_text())
  (job,) = manifest['spec']['replicatedJobs']
  spec = job['template']['spec']
  (container,) = spec['template']['spec']['containers']
  values = {e['name']: e.get('value', str(host)) for e in container['env']}
  values['HOSTS'] = str(hosts or values['HOSTS'])
  fill = lambda word: re.sub(r'\$\((\w+)\)', lambda m: values[m[1]], word)
  return manifest, spec, container, [fill(w) for w in container['command']]


def run_of(command):
  """Check a command line of main.py; return the values of its flags."""
  assert command[:2] == ['python', 'main.py']
  with flagsaver.flagsaver():
    check_main(main, command[2:])
    return main.FLAGS.flag_values_dict()


@pytest.mark.parametrize('name', ['slurm.sbatch', 'tpu.sh'])
def test_scripts_parse(name):
  subprocess.run(['bash', '-n', LAUNCH / name], check=True)
  done = subprocess.run(
    ['bash', LAUNCH / name], capture_output=True, text=True, check=False
  )
  assert done.returncode and 'is missing' in done.stderr


def test_slurm(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  script = LAUNCH / 'slurm.sbatch'
  more = '--config.training.batch_size=256'
  run = script, CONFIG, 'a folder', more
  words = output(tmp_path, 'srun', *run, SLURM_SUBMIT_DIR=str(ROOT))
  found = run_of(words[words.index('python') :])
  assert found['workdir'] == 'a folder' and found['mode'] == 'train'
  assert found['config.training.batch_size'] == 256
  assert found['coordinator'] == 'auto'
  lines = re.findall(r'^#SBATCH --([\w-]+)=?(\S*)$', script.read_text(), re.M)
  options = dict(lines)
  # JAX gives each process the GPU of its number on the host.
  assert options['ntasks-per-node'] == options['gpus-per-node']
  assert not {'gpus-per-task', 'gpu-bind'} & set(options)
  assert options['signal'] == 'TERM@300'  # To the steps, not to the shell.


def test_tpu(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  run = LAUNCH / 'tpu.sh', 'slice', 'zone', CONFIG, '/a folder'
  words = output(tmp_path, 'gcloud', *run, '--config.model.ch_mult=(1, 2)')
  assert words[:5] == ['compute', 'tpus', 'tpu-vm', 'ssh', 'slice']
  assert '--worker=all' in words
  remote = '\n'.join(words[words.index('--command') + 1 :])
  # What the shell of a worker makes of it.
  (tmp_path / 'score_sde').mkdir()
  (tmp_path / 'python').write_text(PRINT)
  (tmp_path / 'python').chmod(0o755)
  path = os.pathsep.join([str(tmp_path), os.environ['PATH']])
  subprocess.run(
    ['bash', '-c', f'{remote} wait'],
    cwd=tmp_path,
    env={'PATH': path},
    check=True,
  )
  log = (tmp_path / 'score_sde' / 'train.log').read_text().splitlines()
  found = run_of(['python', *log])
  assert found['workdir'] == '/a folder' and found['coordinator'] == 'auto'
  assert found['config.model.ch_mult'] == (1, 2)


def test_kubernetes(monkeypatch):
  monkeypatch.chdir(ROOT)
  manifest, spec, container, command = pod(hosts=None, host=1)
  found = run_of(command)
  assert manifest['kind'] == 'JobSet'
  assert spec['completionMode'] == 'Indexed'
  assert found['num_processes'] == spec['completions'] == spec['parallelism']
  assert found['process_id'] == 1 and found['mode'] == 'train'
  # JobSet names pods SET-JOB-REPLICA-INDEX.SET.
  name = manifest['metadata']['name']
  (job,) = manifest['spec']['replicatedJobs']
  host, port = found['coordinator'].split(':')
  assert host == f'{name}-{job["name"]}-0-0.{name}'
  assert {'containerPort': int(port)} in container['ports']
  # The workdir and the cache are on the shared volume.
  mounts = {m['name']: m['mountPath'] for m in container['volumeMounts']}
  values = {e['name']: e.get('value') for e in container['env']}
  for path in (found['workdir'], values['SCORE_SDE_CACHE']):
    assert path.startswith(f'{mounts["shared"]}/')


# ---------------------------------------------------------- two real processes

# Starts two processes as `srun --ntasks=2` does, on one host.
SRUN = f"""#!/bin/bash
shift  # --kill-on-bad-exit
[[ $1 == python ]] && shift
export SLURM_JOB_ID=$RANDOM SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
export SLURM_STEP_NUM_TASKS=2
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i {shlex.quote(sys.executable)} "$@" &
done
wait -n && wait -n
"""


@pytest.mark.slow  # Each process compiles for half a minute.
def test_slurm_trains_with_two_processes(tmp_path):
  """The script trains on two processes, and one process goes on."""
  (tmp_path / 'srun').write_text(SRUN)
  (tmp_path / 'srun').chmod(0o755)
  workdir = tmp_path / 'run'
  done = subprocess.run(
    ['bash', LAUNCH / 'slurm.sbatch', 'tests/tiny.py', workdir]
    + ['--config.training.n_iters=4', '--config.data.on_device'],
    cwd=ROOT,
    env=os.environ
    | {
      'PATH': os.pathsep.join([str(tmp_path), os.environ['PATH']]),
      'JAX_COMPILATION_CACHE_DIR': tiny.CACHE,
      'JAX_NUM_CPU_DEVICES': '1',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert '2 cpu device(s)' in done.stdout
  alone = tmp_path / 'alone'
  run_lib.train(tiny.get_config(training__n_iters=4), alone)
  run_lib.train(tiny.get_config(training__n_iters=8), workdir)
  logs = [(folder / 'train.jsonl').read_text() for folder in (workdir, alone)]
  found = [re.findall(r'"loss": ([\d.e-]+)', log) for log in logs]
  assert len(found[0]) == 8 and len(found[1]) == 4
  assert [float(v) for v in found[0][:4]] == pytest.approx(
    [float(v) for v in found[1]], rel=1e-4
  )
  assert experiment.load(workdir)
