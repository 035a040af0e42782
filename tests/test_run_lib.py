"""Training on many devices and hosts, killed and resumed, and diverging."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from PIL import Image

import experiment
import run_lib
from checkpoints.workdir import Checkpoints
from data import datasets
from runtime.devices import (
  Layout,
  bytes_per_device,
  make_layout,
  replicated,
  to_global,
)
from runtime.progress import Log
from solvers.base import Samples
from tests import tiny

OVERRIDES = {'training__n_iters': 12}
# What happens to a run is tested on points, whose programs compile quickly.
CONFIG = tiny.points(**OVERRIDES)
# What devices and hosts compute is tested with convolutions and pictures; a
# corrector, which needs means of all devices, is in the pictures of points.
PICTURES = OVERRIDES | {
  'training__snapshot_sampling': True,
  'training__snapshot_freq': 4,
}
CONVOLUTIONS = PICTURES | {'sampling__corrector': 'none'}

# Trains in another process. Arguments: workdir, number of devices and, with two
# processes, the number of this one and a port.
WORKER = f"""
import sys
import jax
workdir, devices, *process = sys.argv[1:]
jax.config.update('jax_num_cpu_devices', int(devices))
if process:
  jax.distributed.initialize('127.0.0.1:' + process[1], 2, int(process[0]))
import run_lib
from tests import tiny
run_lib.train(tiny.get_config(**{CONVOLUTIONS}), workdir)
"""

# The same, and trains on points. Then it compares data that devices hold with
# those of the host, and tries 12 examples on 8 devices.
EIGHT = f"""{WORKER}
import experiment
from checkpoints.workdir import Checkpoints
from data import datasets
from runtime import devices
run_lib.train(tiny.points(**{PICTURES}), workdir + '_points')
layout, batches = devices.make_layout(), []
for held in (False, True):
  model = experiment.build(tiny.points(data__on_device=held))
  dataset = datasets.load(model.config.data, 'train')
  place = run_lib.make_place(model, dataset, layout)
  batches.append(place(run_lib.make_fetch(model, dataset)(3)))
tiny.tree_equal(*batches)
for plain, held in zip(*map(jax.tree.leaves, batches)):
  assert plain.sharding == held.sharding == layout.microbatches
try:
  run_lib.train(tiny.points(training__batch_size=12), workdir + '_12')
except ValueError as error:
  print('REFUSED', error)

# With the state split over the devices: begins it, continues the whole state of
# a workdir for 4 steps, and restores it on 4 devices.
devices.SMALLEST_SPLIT = 64
config = tiny.points(training__shard_state=True, training__n_iters=8)
model = experiment.build(config)
like, state = run_lib.abstract_state(model, layout), run_lib.make_init(
  model, layout)[1]()
for wanted, found in zip(*map(jax.tree.leaves, (like, state))):
  assert found.sharding == wanted.sharding
params = model.init_params(jax.random.key(config.seed))
tiny.tree_equal((state.params, state.ema), (params, params))
run_lib.train(config, workdir + '_split')
mesh = jax.sharding.Mesh(jax.devices()[:4], ('data',))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
four = layout._replace(replicated=whole)
with Checkpoints(workdir + '_split') as saved:
  state, step = run_lib.restore_or_init(model, four, saved)
wanted = devices.bytes_per_device(run_lib.abstract_state(model, four))
print('RESTORED', step, wanted, *[
  sum(s.data.nbytes for v in jax.tree.leaves(state)
      for s in v.addressable_shards if s.device == device)
  for device in jax.devices()
])
"""

# Trains in a workdir, but is killed as soon as it has logged step 9.
KILLED = f"""
import os, signal, sys
import run_lib
from runtime.progress import Log
from tests import tiny
write = Log.write
def write_and_die(self, step, **scalars):
  write(self, step, **scalars)
  if step == 9:
    os.kill(os.getpid(), signal.SIGKILL)
Log.write = write_and_die
run_lib.train(tiny.points(**{OVERRIDES}), sys.argv[1])
"""


pytestmark = pytest.mark.usefixtures('shared_programs')

# Programs that compile quickly are not worth a file.
start = functools.partial(
  tiny.start, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.1'
)


def last_moment():
  """Return what hooks see at the end of a training of eight steps."""
  return run_lib.Moment(
    step=8,
    state=run_lib.TrainState(step=8, params={}, opt_state={}, ema={}),
    losses=np.zeros(1),
    first=False,
    stopping='',
    finished=True,
  )


def logged(workdir, name='loss'):
  """Return {step: value} of a scalar in train.jsonl; check the steps."""
  lines = (pathlib.Path(workdir) / 'train.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  steps = [record['step'] for record in records]
  assert steps == sorted(set(steps))
  return {r['step']: r[name] for r in records if name in r}


@functools.cache
def abstract(config):
  """Return the shapes of the state of a frozen config's training."""
  layout, model = make_layout(), experiment.build(config)
  init, _ = run_lib.make_init(model, layout)
  return replicated(jax.eval_shape(init, model.abstract_params()), layout)


def restored(workdir, step, config=CONFIG):
  """Return the arrays of a checkpoint, by path."""
  like = abstract(ml_collections.FrozenConfigDict(config))
  with Checkpoints(workdir) as saved:
    arrays = saved.restore(step, run_lib.without_ema(like), 'state')
    arrays['ema'] = saved.restore(step, like.ema, 'ema')
  return {
    jax.tree_util.keystr(path): np.asarray(value)
    for path, value in jax.tree_util.tree_leaves_with_path(arrays)
  }


def assert_same(workdir, other):
  """Check that losses and the last checkpoint are the same, bit by bit."""
  assert logged(workdir) == logged(other)
  ours, theirs = logged(workdir, 'test_loss'), logged(other, 'test_loss')
  for step in (4, 8, 12):
    assert ours[step] == theirs[step]
  ours, theirs = restored(workdir, 12), restored(other, 12)
  assert ours.keys() == theirs.keys()
  for path, value in ours.items():
    np.testing.assert_array_equal(value, theirs[path], err_msg=path)


def assert_close(workdir, other):
  """Check losses up to the order of sums."""
  for name in ('loss', 'test_loss'):
    ours, theirs = logged(workdir, name), logged(other, name)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(
      list(ours.values()), list(theirs.values()), rtol=1e-4
    )


def assert_close_pictures(workdir, other):
  ours, theirs = samples(workdir), samples(other)
  assert np.abs(ours - theirs).max() <= 1
  assert np.mean(ours != theirs) < 0.01


def samples(workdir):
  with Image.open(pathlib.Path(workdir) / 'samples' / 'step_12.png') as image:
    return np.asarray(image).astype(int)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Return the workdir of a run on points that is not interrupted."""
  workdir = tmp_path_factory.mktemp('finished')
  run_lib.train(tiny.points(**PICTURES), workdir)
  return workdir


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """Return the workdir of a run with convolutions and a picture."""
  workdir = tmp_path_factory.mktemp('pictures')
  run_lib.train(tiny.get_config(**CONVOLUTIONS), workdir)
  return workdir


@pytest.fixture
def copied(finished, tmp_path):
  """Return a copy of that workdir, to continue from."""
  shutil.copytree(finished, tmp_path / 'run')
  return tmp_path / 'run'


def test_uninterrupted(finished, pictures):
  for workdir in (finished, pictures):
    losses = logged(workdir)
    assert list(losses) == list(range(1, 13))
    assert np.isfinite(list(losses.values())).all()
    assert list(logged(workdir, 'test_loss')) == [4, 8, 12]
  # 64 images, which are still noisy after three steps.
  assert samples(pictures).shape == (8 * 64 + 7 * 2,) * 2
  assert 20 < samples(pictures).std() < 128


@pytest.fixture(scope='module')
def eight(finished, tmp_path_factory):
  """Return the folder that 8 devices trained in, and what they printed."""
  folder = tmp_path_factory.mktemp('eight')
  shutil.copytree(finished, folder / 'run_split')
  for step in ('8', '12'):
    shutil.rmtree(folder / 'run_split' / 'checkpoints' / step)
  worker = start(EIGHT, folder / 'run', 8)
  out, err = worker.communicate()
  assert worker.returncode == 0, err
  return folder, out


def test_eight_devices_are_as_one(finished, pictures, eight):
  folder, out = eight
  assert '8 cpu device(s)' in out
  for ours, theirs in (('run', pictures), ('run_points', finished)):
    assert_close(folder / ours, theirs)
    assert_close_pictures(folder / ours, theirs)
  # Twelve images do not divide by eight devices: one line, and no workdir.
  line = re.search('REFUSED (.*)', out)[1]
  assert line.startswith('config.training.batch_size')
  assert line.endswith('=12 does not divide by the 8 devices: use 16, say.')
  assert not (folder / 'run_12').exists()


def test_split_state_is_as_whole(finished, eight, capsys):
  """One device trains 4 steps, eight the next 4, and one the last 4."""
  folder, out = eight
  workdir = folder / 'run_split'
  # Whole on one device, an eighth and the small arrays on each of eight.
  model = experiment.build(CONFIG)
  whole = bytes_per_device(run_lib.abstract_state(model, make_layout()))
  out = out[out.index('Resuming at step 4.') :]
  mib = float(re.search(r'8 cpu device\(s\), (\S+) MiB of state', out)[1])
  assert mib * 2**20 < 0.4 * whole
  # Eight devices to four.
  step, wanted, *found = map(int, re.search('RESTORED (.*)', out)[1].split())
  assert step == 8 and found == [wanted] * 4 + [0] * 4
  assert mib * 2**20 < wanted < 0.6 * whole
  # Eight devices to one, whole: sampling and training.
  draws = []
  for trained in (workdir, finished):
    model, params = experiment.load(trained, 8)
    draws.append(model.sample(params, jax.random.key(0), 4))
  np.testing.assert_allclose(*draws, rtol=1e-4, atol=1e-4)
  run_lib.train(CONFIG, workdir)
  assert 'Resuming at step 8.' in capsys.readouterr().out
  assert_close(workdir, finished)
  for step in (8, 12):
    arrays = restored(workdir, step)
    for path, value in restored(finished, step).items():
      np.testing.assert_allclose(
        arrays[path], value, rtol=1e-4, atol=1e-5, err_msg=path
      )


@pytest.mark.slow
@pytest.mark.parametrize('split', [False, True])
def test_two_processes_are_as_one(pictures, tmp_path, split):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  workdir = tmp_path / 'run'
  options = CONVOLUTIONS | {'training__shard_state': split}
  program = WORKER.replace(str(CONVOLUTIONS), str(options))
  workers = [start(program, workdir, 1, i, port) for i in range(2)]
  outputs = [worker.communicate() for worker in workers]
  for worker, (_, err) in zip(workers, outputs, strict=True):
    assert worker.returncode == 0, err
  assert '2 cpu device(s)' in outputs[0][0]
  assert 'cpu device(s)' not in outputs[1][0]
  assert_close(workdir, pictures)
  assert_close_pictures(workdir, pictures)
  # One process can read what two processes saved.
  ours, theirs = (
    restored(w, 12, tiny.get_config()) for w in (workdir, pictures)
  )
  for path, value in ours.items():
    np.testing.assert_allclose(
      value, theirs[path], rtol=1e-2, atol=1e-4, err_msg=path
    )


def test_killed_and_resumed(finished, tmp_path):
  killed = start(KILLED, tmp_path)
  _, err = killed.communicate()
  assert killed.returncode == -signal.SIGKILL, err
  assert max(logged(tmp_path)) == 9
  run_lib.train(CONFIG, tmp_path)
  assert_same(tmp_path, finished)


def test_stopped_by_signals_and_resumed(finished, tmp_path, monkeypatch, capfd):
  """One signal arrives during step 6, the other after what step 9 logs."""
  send = lambda number: os.kill(os.getpid(), number)

  def make_train_steps(*args):
    train_steps = run_lib_make_train_steps(*args)

    def stopped(state, batches):
      if state.step == 5:
        send(signal.SIGTERM)
      return train_steps(state, batches)

    return stopped

  def write(self, step, **scalars):
    log_write(self, step, **scalars)
    if step == 9:
      send(signal.SIGINT)

  run_lib_make_train_steps, log_write = run_lib.make_train_steps, Log.write
  handlers = lambda: [
    signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
  ]
  before = handlers()
  monkeypatch.setattr(run_lib, 'make_train_steps', make_train_steps)
  monkeypatch.setattr(Log, 'write', write)
  for name, step in (('SIGTERM', 6), ('SIGINT', 10)):
    run_lib.train(CONFIG, tmp_path)
    said = capfd.readouterr()
    assert f'Stopped by {name}; step {step} is saved.' in said.out
    assert f'{name}: the run saves and stops' in said.err
    assert handlers() == before
    with Checkpoints(tmp_path) as saved:
      assert saved.last == step
  assert 'Resuming at step 6.' in said.out
  run_lib.train(CONFIG, tmp_path)
  assert 'Resuming at step 10.' in capfd.readouterr().out
  assert_same(tmp_path, finished)


@pytest.mark.parametrize(('parts', 'together'), [(1, 1), (2, 1), (2, 4)])
def test_batches_of_data_on_devices_are_the_same(parts, together, monkeypatch):
  plain = tiny.get_config()
  model = experiment.build(plain)
  dataset, layout = datasets.load(plain.data, 'train'), make_layout()
  found = {}
  for on_device in (False, True):
    config = tiny.get_config(
      data__on_device=on_device,
      training__grad_accumulation=parts,
      training__n_jitted_steps=together,
      training__n_iters=4000,
    )
    one = dataclasses.replace(model, config=config)
    fetch = run_lib.make_fetch(one, dataset)
    place = run_lib.make_place(one, dataset, layout)
    # Step 188 begins an epoch, so that 186 to 190 are in two.
    host = [fetch(step) for step in (0, 186, 187, 189)]
    found[on_device] = [jax.tree.map(np.asarray, place(b)) for b in host]
    crossed = sum(v.nbytes for v in jax.tree.leaves(host[0]))
    assert crossed == (8 * together * (8 if on_device else 64 + 4))
  for a, b in zip(*found.values(), strict=True):
    assert a.keys() == b.keys() == {'image', 'label'}
    for key, value in a.items():
      assert value.dtype == b[key].dtype
      np.testing.assert_array_equal(value, b[key])


@pytest.mark.parametrize('held', [False, True])
def test_several_steps_in_a_call(finished, tmp_path, capsys, held):
  """Data are fetched by the host, or held by the devices."""
  config = tiny.points(
    training__n_iters=12,
    training__n_jitted_steps=4,
    training__log_freq=4,
    data__on_device=held,
  )
  run_lib.train(config, tmp_path)
  line = 'Every device holds the training data, 1.1 MiB.'
  assert (line in capsys.readouterr().out.splitlines()) == held
  single = list(logged(finished).values())
  np.testing.assert_allclose(
    list(logged(tmp_path).values()),
    np.mean(np.reshape(single, (3, 4)), 1),
    rtol=1e-6,
  )
  ours, theirs = restored(tmp_path, 12), restored(finished, 12)
  for path, value in ours.items():
    np.testing.assert_array_equal(value, theirs[path], path)


def test_data_too_large_for_devices(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'sysconf', lambda name: 600)  # 600 pages of 600.
  config = tiny.get_config(data__on_device=True)
  message = r'on_device=True: .* 0\.00 GiB, more than 25% of the .* to False\.'
  with pytest.raises(ValueError, match=message):
    run_lib.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_resumed_between_multiples_of_a_call(copied):
  """Logs and checkpoints are due after a resume at 12, in calls of 8 steps."""
  config = tiny.points(
    training__n_iters=34,
    training__n_jitted_steps=8,
    training__log_freq=8,
    training__eval_freq=16,
    training__checkpoint_freq=16,
  )
  run_lib.train(config, copied)
  assert list(logged(copied))[12:] == [16, 24, 32]
  assert list(logged(copied, 'test_loss'))[3:] == [16, 32, 34]


def test_resumed_rates_are_the_configs(copied):
  config = tiny.points(
    training__n_iters=14, training__ema_rate=0.0, optim__lr=0.0
  )
  run_lib.train(config, copied)
  before, after = restored(copied, 12), restored(copied, 14)
  compared = 0
  for path, value in before.items():
    if path.startswith("['params']"):
      compared += 1
      np.testing.assert_array_equal(after[path], value, path)
      average = path.replace('params', 'ema', 1)
      np.testing.assert_array_equal(after[average], value, path)
      assert np.any(before[average] != value) or not value.any()
  assert compared > 20
  assert after["['step']"] == 14


@pytest.mark.parametrize('what', ['loss', 'average'])
def test_not_finite(copied, monkeypatch, what):
  """A loss that is not finite stops the run, and bad weights are not saved."""

  def make_train_steps(*_):
    def train_steps(state, batches):
      loss = jnp.ones(len(batches['image']))
      if state.step == 13:
        if what == 'loss':
          loss = loss.at[0].set(jnp.nan)
        else:
          nan = jax.tree.map(lambda v: v * jnp.nan, state.ema)
          state = state._replace(ema=nan)
      return state._replace(step=state.step + 1), loss

    return train_steps

  monkeypatch.setattr(run_lib, 'make_train_steps', make_train_steps)
  config = tiny.points(
    training__n_iters=20, training__checkpoint_freq=2, training__log_freq=5
  )
  before = restored(copied, 12)
  with pytest.raises(FloatingPointError, match='step 14 is not finite.* 12'):
    run_lib.train(config, copied)
  with Checkpoints(copied) as saved:
    assert saved.last == 12
  for path, value in restored(copied, 12).items():
    np.testing.assert_array_equal(value, before[path], path)


def test_diverging(copied):
  """A learning rate that is much too large stops the run."""
  config = tiny.points(training__n_iters=20, optim__lr=1e30)
  with pytest.raises(FloatingPointError, match='step 14 is not finite.* 12'):
    run_lib.train(config, copied)


# --------------------------------------------- one compiled call, on a toy


def take_steps(
  monkeypatch, *, parts=1, together=1, scan=False, noise=0.0, **overrides
):
  """Return parameters, averages and losses of 4 steps of SGD on 8 images.

  The loss is the squared distance of w to each image, plus noise.
  """

  def loss_fn(params, rng, batch, fraction):
    del fraction
    z = noise * jax.random.normal(rng, batch['image'].shape)
    x = batch['image'] / 255 + z
    return jnp.mean((x - params['w']) ** 2, axis=(1, 2, 3))

  config = tiny.get_config(
    training__ema_rate=0.5, training__grad_accumulation=parts, **overrides
  )
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 2, 2, 1), np.uint8)
  images = images.reshape(4, parts, 8 // parts, 2, 2, 1)
  layout = make_layout()
  optimizer = optax.sgd(1.0)
  params = {'w': jnp.zeros((1, 2, 2, 1))}
  model = types.SimpleNamespace(
    config=config,
    loss=loss_fn,
    optimizer=optimizer,
    abstract_params=lambda: params,
  )
  with monkeypatch.context() as patch:
    if scan:
      patch.setattr(Layout, 'platform', 'gpu')
    train_steps = run_lib.make_train_steps(model, layout)
  state = run_lib.TrainState(
    jnp.zeros((), jnp.int32),
    params,
    optimizer.init(params),
    jax.tree.map(jnp.copy, params),
  )
  state = jax.device_put(state, layout.replicated)
  step_losses = []
  for i in range(0, 4, together):
    batches = {'image': images[i : i + together]}
    batches = to_global(layout.microbatches, batches)
    state, loss = train_steps(state, batches)
    step_losses.extend(np.asarray(loss))
  assert int(state.step) == 4
  return state.params['w'], state.ema['w'], np.stack(step_losses)


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('parts', [1, 2, 4])
@pytest.mark.parametrize('together', [1, 4])
def test_parts_and_steps_do_not_change_training(
  monkeypatch, scan, parts, together
):
  plain = take_steps(monkeypatch, parts=1, together=1)
  other = take_steps(monkeypatch, parts=parts, together=together, scan=scan)
  for a, b in zip(plain, other, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  assert plain[2].shape == (4,)
  # w moves half of the way to the mean of each batch; its average is slower.
  assert 0.1 < float(plain[1].mean()) < float(plain[0].mean()) < 0.9


def test_memory_of_test_losses_and_pictures(monkeypatch, tmp_path):
  """They are computed on no more images at a time than the config allows."""
  config = tiny.get_config(
    training__batch_size=8, training__grad_accumulation=4, eval__batch_size=16
  )
  sizes, layout = [], make_layout()
  model = types.SimpleNamespace(
    config=config,
    kind='images',
    make_sample=lambda n: sizes.append(n) or (lambda *_: None),
  )
  run_lib.draw_snapshot(model, layout, tmp_path)
  test_loss = lambda *args, limit: sizes.append(args[3]) or {'test_loss': 0.0}
  monkeypatch.setattr(run_lib, 'test_loss', test_loss)
  saved = types.SimpleNamespace(last=None)
  run_lib.watch_test_loss(model, layout, None, saved)(last_moment())
  assert sizes == [16, 2]


@pytest.mark.parametrize('prng', ['rbg', 'unsafe_rbg'])
def test_generators_of_random_numbers(monkeypatch, copied, prng):
  plain, other, again, single = (
    take_steps(monkeypatch, noise=1.0, **options)
    for options in (
      {},
      {'training__prng': prng},
      {'training__prng': prng},
      {'training__prng': prng, 'together': 4, 'scan': True},
    )
  )
  assert np.abs(plain[2] - other[2]).max() > 1e-3
  for a, b, c in zip(other, again, single, strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a, c, rtol=1e-6)
  # The network with dropout takes its keys.
  config = tiny.points(training__prng=prng)
  model, layout = experiment.build(config), make_layout()
  step = run_lib.make_one_step(model, layout, True)
  batch = {'image': np.zeros((1, *model.shape(8)), np.uint8)}
  batch['label'] = np.zeros((1, 8), np.int32)
  _, loss = jax.eval_shape(step, run_lib.abstract_state(model, layout), batch)
  assert loss.shape == ()
  # A run keeps its generator.
  with pytest.raises(ValueError, match="training.prng='threefry2x32', not"):
    run_lib.train(config, copied)


def test_scan_draws_the_noise_of_single_steps(monkeypatch):
  single = take_steps(monkeypatch, parts=2, together=1, noise=1.0)
  scan = take_steps(monkeypatch, parts=2, together=4, scan=True, noise=1.0)
  quiet = take_steps(monkeypatch, parts=2, together=1)
  for a, b, c in zip(single, scan, quiet, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert np.all(np.abs(a - c) > 1e-4)


def test_half_precision_with_less_memory():
  """With bfloat16, remat and accumulation, state and losses stay float32."""
  config = tiny.get_config(
    model__dtype='bfloat16', model__remat=True, training__grad_accumulation=2
  )
  layout, model = make_layout(), experiment.build(config)
  init, _ = run_lib.make_init(model, layout)
  state = jax.eval_shape(init, model.abstract_params())
  batches = {
    'image': jax.ShapeDtypeStruct((3, 2, 4, 8, 8, 1), jnp.uint8),
    'label': jax.ShapeDtypeStruct((3, 2, 4), jnp.int32),
  }
  train_steps = run_lib.make_train_steps(model, layout)
  program = jax.make_jaxpr(train_steps)(state, batches)
  text = str(program)
  assert 'bf16' in text and 'remat' in text
  after, step_losses = jax.eval_shape(train_steps, state, batches)
  assert step_losses.shape == (3,) and step_losses.dtype == jnp.float32
  same = jax.tree.map(
    lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after
  )
  assert jax.tree.all(same)


# ------------------------------------------------------------ frequencies of 0


def test_never_evaluated_and_never_kept(tmp_path):
  """With frequencies of 0 there is one log line, checkpoint and picture."""
  config = tiny.points(
    training__n_iters=3,
    training__log_freq=0,
    training__eval_freq=0,
    training__checkpoint_freq=0,
    training__snapshot_freq=0,
    training__snapshot_sampling=True,
  )
  run_lib.train(config, tmp_path)
  assert logged(tmp_path) == {}
  # The last checkpoint has a test loss, because the best is chosen by it.
  assert list(logged(tmp_path, 'test_loss')) == [3]
  with Checkpoints(tmp_path) as saved:
    assert saved.steps == [3]
  pictures = [path.name for path in (tmp_path / 'samples').iterdir()]
  assert pictures == ['step_3.png']


@pytest.mark.parametrize('key', ['eval_freq', 'snapshot_freq'])
def test_one_frequency_of_zero(tmp_path, monkeypatch, key):
  """The others stay as they are, and a resumed run works as well."""
  steps = lambda state, _: (state._replace(step=state.step + 1), np.zeros(1))
  monkeypatch.setattr(run_lib, 'make_train_steps', lambda *_: steps)
  monkeypatch.setattr(run_lib, 'test_loss', lambda *_, limit: {'test_loss': 0})
  frequency = {f'training__{key}': 0}
  run_lib.train(tiny.points(training__n_iters=6, **frequency), tmp_path)
  run_lib.train(tiny.points(training__n_iters=9, **frequency), tmp_path)
  assert list(logged(tmp_path)) == list(range(1, 10))
  assert list(logged(tmp_path, 'test_loss')) == [4, 6, 8, 9]
  with Checkpoints(tmp_path) as saved:
    assert {8, 9} <= set(saved.steps)


def test_due():
  moment = run_lib.Moment(
    step=6, state=None, losses=None, first=False, stopping=False, finished=False
  )
  assert moment.due(3) and moment.due(0, 6) and moment.due(4, 2)
  assert not moment.due(0) and not moment.due(4, 0) and not moment.due()


@pytest.mark.parametrize('dims', [0, 2])
def test_a_snapshot_of_bad_samples_is_a_warning(dims, tmp_path, capsys):
  """Training goes on, and no picture of them is written."""
  config = tiny.get_config()
  if dims:
    config = experiment.load_config('configs/toy/rings_vp.py')
  model = experiment.build(config)
  shape = (64, *model.shape(1)[1:])
  samples = Samples(
    x=jnp.full(shape, jnp.nan),
    nfe=jnp.asarray(3),
    success=jnp.asarray(True),
    frames=jnp.zeros((0, *shape)),
    times=jnp.zeros(0),
  )
  stub = dataclasses.replace(model)
  object.__setattr__(stub, 'make_sample', lambda n: lambda params, rng: samples)
  hook = run_lib.draw_snapshot(stub, make_layout(), tmp_path)
  hook(last_moment())
  assert 'warning: no picture of samples at step 8' in capsys.readouterr().out
  assert not list(tmp_path.iterdir())
