"""Two hosts give what one gives, and one finishes what two began."""

import json
import pathlib
import shutil
import socket

import jax
import numpy as np
import pytest

import experiment
from checkpoints.workdir import Checkpoints
from commands import control, encode, evaluate, sample
from data import datasets
from features import extract as extracting
from runtime.files import load_npz
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
# Arguments: images, workdir, and the number of this host and a port if there
# are two hosts, which find each other by the flags of launch/kubernetes.yaml.
# One host has two devices, and finishes another evaluation.
WORKER = """
import sys
import jax
images, workdir, *host = sys.argv[1:]
jax.config.update('jax_num_cpu_devices', 1 if host else 2)
if host:
  import main
  from tests import test_launch
  *_, command = test_launch.pod(hosts=2, host=host[0])
  main.parse([*command[1:], '--coordinator=127.0.0.1:' + host[1]])
  main.join_hosts()
from commands import evaluate
from tests.commands import test_hosts
test_hosts.work(workdir, images)
if not host:
  evaluate.evaluate(test_hosts.get_config(), workdir + '_begun')
"""


class Brightness:
  """Stand in for the Inception network: sums of pixels, which are exact."""

  variant = 'tensorflow'

  def __call__(self, images, progress=None):
    del progress
    rows = np.float32(images.reshape(len(images), -1))
    return {'pool_3': np.stack([rows[:, i::4].sum(1) for i in range(4)], 1)}


def get_config():
  config = tiny.get_config()
  config.eval.update(batch_size=50, num_samples=120, enable_bpd=True)
  config.eval.update(bpd_repeats=1, bpd_probes=2, allow_few_samples=True)
  config.sampling.update(corrector='none', num_steps=2, rtol=0.1, atol=0.1)
  config.sampling.num_samples = 12
  config.control.update(num_images=3, repeats=2)
  return config


def work(workdir, images):
  """Evaluate, sample, encode and control as `--mode` does."""
  extracting.extractor = lambda chosen: Brightness()
  config = get_config()
  evaluate.evaluate(config, workdir)
  evaluate.evaluate_images(config, workdir, images)
  sample.sample(config, workdir)
  encode.encode(config, workdir)
  config.control.name = 'inpaint'
  control.sample(config, workdir)


@pytest.fixture
def untrained(tmp_path):
  """Return a workdir with a checkpoint of random weights."""
  config = get_config()
  params = experiment.build(config).init_params(jax.random.key(0))
  # Weights that are initialised with zeros give samples of noise alone.
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  params = tree.unflatten(
    [v + 0.05 * rng.standard_normal(v.shape, np.float32) for v in leaves]
  )
  experiment.claim(config, tmp_path / 'run')
  with Checkpoints(tmp_path / 'run', keep_every=1) as saved:
    saved.save(1, {'params': params}, params)
    saved.wait()
  return tmp_path / 'run'


def start(folder, *arguments):
  return tiny.start(WORKER, *arguments, SCORE_SDE_CACHE=str(folder))


def wait(workers):
  """Check that all processes succeed."""
  errors = [worker.communicate()[1] for worker in workers]
  for worker, error in zip(workers, errors, strict=True):
    assert worker.returncode == 0, error


def results(workdir):
  """Return {name: content} of all files that do not depend on the hosts."""
  found = {}
  for path in sorted(workdir.rglob('*')):
    name = str(path.relative_to(workdir))
    if '_of_2_host_' in name or name.startswith('checkpoints'):
      continue
    if path.suffix == '.npz' and '/samples_' not in name:
      found |= {(name, k): v for k, v in load_npz(path).items()}
    elif path.suffix == '.json':
      found[name] = json.loads(path.read_text())
  return found


@pytest.mark.slow  # Each process compiles for a minute.
def test_two_hosts_are_as_one(untrained, tmp_path):
  images = tmp_path / 'theirs.npz'
  test_set = datasets.load(get_config().data, 'test')
  np.savez(images, images=test_set.fetch(np.arange(101)))
  one, two, begun = (tmp_path / name for name in ('one', 'two', 'one_begun'))
  shutil.copytree(untrained, one)
  shutil.copytree(untrained, two)
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  wait([start(tmp_path / 'c2', images, two, i, port) for i in range(2)])

  # As if the two hosts had been killed: samples of a batch and features of two
  # are missing on a host, and there is no result.
  shutil.copytree(two, begun)
  (folder,) = (begun / 'eval').glob('step_1-*')
  for name in (
    'samples_1_of_2_host_0.npz',
    'samples_1-tensorflow_of_2_host_0.npz',
    'samples_2-tensorflow_of_2_host_1.npz',
  ):
    (folder / name).unlink()
  for path in folder.glob('*.json'):
    path.unlink()
  wait([start(tmp_path / 'c1', images, one)])

  ours, theirs = results(one), results(two)
  # The parts of hosts are whole files here.
  assert theirs.keys() <= ours.keys()
  assert len(theirs) > 20
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name], value, err_msg=str(name))
  finished = json.loads((begun / 'eval' / 'results.json').read_text())
  assert finished == json.loads((two / 'eval' / 'results.json').read_text())
  assert finished[0]['fid']['count'] == 120
  made = {path.name for path in folder.glob('samples*')}
  assert {'samples_1.npz', 'samples_0_of_2_host_0.npz'} <= made
  assert 'samples_0.npz' not in made
