"""Test learning rates, optimizers and averages against closed forms."""

import json
import shutil
from unittest import mock

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import experiment
import optimization
import run_lib
from commands import evaluate, sample
from configs import schema
from runtime import options
from tests import tiny

pytestmark = pytest.mark.usefixtures('shared_programs')

# ------------------------------------------------------------------ schedules

STEPS, N_ITERS, BATCH = np.arange(1200), 1000, 16


def rates(**changes):
  """Return the rates after 0, 1, .. steps, of a section of a config."""
  section = schema.defaults()['optim'] | {'lr': 0.1} | changes
  adam = options.build(
    optimization.OPTIMIZERS,
    section,
    'optim.optimizer',
    n_iters=N_ITERS,
    batch_size=BATCH,
  )
  return np.asarray(jax.jit(jax.vmap(adam.rate))(jnp.asarray(STEPS)))


def test_the_papers_rates_are_as_before():
  before = lambda count: 0.1 * jnp.minimum(count / 300, 1.0)
  want = jax.jit(jax.vmap(before))(jnp.asarray(STEPS))
  np.testing.assert_array_equal(rates(warmup=300), want)
  count = jnp.asarray(7)
  assert optimization.Adam(lr=0.1, warmup=0).rate(count) == 0.1
  found = optimization.Adam(lr=0.1, warmup=300).rate(count)
  assert float(found) == float(before(count))


@pytest.mark.parametrize('warmup', [0, 200])
@pytest.mark.parametrize(('horizon', 'end'), [(0, N_ITERS), (700, 700)])
def test_linear_and_cosine_are_those_of_optax(warmup, horizon, end):
  common = {'warmup': warmup, 'horizon': horizon}
  rise = optax.linear_schedule(0.0, 0.1, warmup)
  for name, fall in (
    ('linear', optax.linear_schedule(0.1, 0.0, end - warmup)),
    ('cosine', optax.cosine_decay_schedule(0.1, end - warmup)),
  ):
    want = optax.join_schedules([rise, fall], [warmup]) if warmup else fall
    found = rates(schedule=name, **common)
    np.testing.assert_allclose(found, want(STEPS), atol=1e-7)
    assert found[end] == 0 < found[end - 1]


def test_inverse_square_root():
  want = 0.1 * np.sqrt(200 / np.maximum(STEPS, 200))
  want *= np.minimum(STEPS / 50, 1)
  found = rates(schedule='inverse_sqrt', warmup=50, decay_from=200)
  np.testing.assert_allclose(found, want, rtol=1e-6)
  # Without decay_from it begins where the warm-up ends.
  found = rates(schedule='inverse_sqrt', warmup=200)
  np.testing.assert_allclose(found[800], 0.1 / 2, rtol=1e-6)


@pytest.mark.parametrize('schedule', [*optimization.SCHEDULES])
def test_images_are_steps_times_the_batch(schedule):
  has = [o.name for o in options.declared(optimization.SCHEDULES[schedule])]
  steps = {'warmup': 100, 'decay_from': 300, 'horizon': 900}
  steps = {k: v for k, v in steps.items() if k in (*has, 'warmup')}
  images = {k: v * BATCH for k, v in steps.items()}
  np.testing.assert_allclose(
    rates(schedule=schedule, unit='images', **images),
    rates(schedule=schedule, **steps),
    atol=1e-7,
  )


def test_a_horizon_before_the_decay_is_refused():
  with pytest.raises(ValueError, match='config.optim.horizon=200 is not after'):
    rates(schedule='cosine', warmup=300, horizon=200)


def trained(config, workdir):
  """Train; return (losses, averaged parameters) of the run."""
  run_lib.train(config, workdir)
  lines = (workdir / 'train.jsonl').read_text().splitlines()
  _, params = experiment.load(workdir)
  return [json.loads(line)['loss'] for line in lines], params


def stopped(workdir, step):
  """Return a copy of a workdir, of the time when it had done some steps."""
  parts = workdir.with_name('parts')
  shutil.copytree(workdir, parts)
  for path in (parts / 'checkpoints').iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  assert (parts / 'checkpoints' / str(step)).exists()
  return parts


def test_a_resumed_run_has_the_rates_of_one_without_a_stop(tmp_path):
  config = tiny.points(training__n_iters=6, training__checkpoint_freq=3)
  config.optim.update(schedule='cosine', warmup=2, horizon=6)
  whole = trained(config, tmp_path / 'whole')
  parts = trained(config, stopped(tmp_path / 'whole', 3))
  jax.tree.map(np.testing.assert_array_equal, parts, whole)
  config.optim.schedule = 'constant'
  other, _ = trained(config, tmp_path / 'other')
  assert other[:3] == whole[0][:3]
  assert other[4:] != whole[0][4:]


# ----------------------------------------------------------------- optimizers


def _step(optimizer, grads, params, state):
  updates, state = optimizer.update(grads, state, params)
  return optax.apply_updates(params, updates), state


def make_optimizer(**changes):
  return optimization.make_optimizer(optimization.Adam(**changes))


def test_warmup_starts_at_zero_and_adam_moves_by_lr():
  optimizer = make_optimizer(lr=0.1, warmup=4, grad_clip=0.0)
  params, moves = {'w': jnp.ones(3)}, []
  state = optimizer.init(params)
  for _ in range(6):
    new, state = _step(optimizer, {'w': jnp.full(3, 2.0)}, params, state)
    moves.append(float((params['w'] - new['w'])[0]))
    params = new
  # A constant gradient makes Adam's direction 1.
  want = [0, 0.025, 0.05, 0.075, 0.1, 0.1]
  np.testing.assert_allclose(moves, want, atol=1e-6)


def test_lr_is_not_part_of_the_state():
  """Check that a resumed run takes the learning rate of its new config."""
  params, grads = {'w': jnp.ones(3)}, {'w': jnp.ones(3)}
  first = make_optimizer(lr=0.1, warmup=0, grad_clip=1.0)
  second = make_optimizer(lr=0.3, warmup=0, grad_clip=1.0)
  params, state = _step(first, grads, params, first.init(params))
  moved, _ = _step(second, grads, params, state)
  np.testing.assert_allclose(params['w'] - moved['w'], 0.3, rtol=1e-4)


def test_clipping_is_by_global_norm():
  optimizer = make_optimizer(lr=1.0, warmup=0, grad_clip=1.0)
  clipped = optimizer.init({'a': jnp.zeros(1), 'b': jnp.zeros(1)})
  grads = {'a': jnp.asarray([30.0]), 'b': jnp.asarray([40.0])}
  _, state = optimizer.update(grads, clipped, grads)
  mu = optax.tree.get(state, 'mu')
  np.testing.assert_allclose([mu['a'][0], mu['b'][0]], [0.06, 0.08], rtol=1e-5)


@pytest.mark.parametrize('largest', [1.0, 1e3])
def test_clipping_is_that_of_optax(largest):
  """The numbers are the same, and the sums for GPUs add up to the same norm."""
  shapes = (3, 3, 8, 16), (16,), (7, 5), ()
  keys = jax.random.split(jax.random.key(0), len(shapes))
  grads = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
  ours, theirs = (
    jax.jit(lambda grads, clip=clip: clip.update(grads, clip.init(grads))[0])
    for clip in (
      optimization.clip_by_norm(largest),
      optax.clip_by_global_norm(largest),
    )
  )
  jax.tree.map(np.testing.assert_array_equal, ours(grads), theirs(grads))
  norm = optax.tree.norm(grads)
  np.testing.assert_allclose(optimization._few_sums(grads), norm, rtol=1e-6)
  assert 1.0 < norm < 1e3


def test_ema_decay():
  assert optimization.ema_decay(1, rate=0.999, warmup=False) == 0.999
  np.testing.assert_allclose(
    optimization.ema_decay(1, rate=0.999, warmup=True), 2 / 11
  )
  np.testing.assert_allclose(
    optimization.ema_decay(10**6, rate=0.999, warmup=True), 0.999
  )


@pytest.mark.parametrize(
  'values', [{'beta2': 1.0}, {'warmup': 0.5}, {'grad_clip': -1.0}]
)
def test_options_out_of_range_are_refused(values):
  with pytest.raises(ValueError, match=f'Adam: {[*values][0]}='):
    optimization.Adam(**values)


def orthogonalised(m):
  """Return Muon's five Newton-Schulz steps of a matrix (Jordan et al. 2024)."""
  x = m.T if m.shape[0] > m.shape[1] else m
  x = x / np.linalg.norm(x)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x.T if m.shape[0] > m.shape[1] else x


@pytest.mark.parametrize('shape', [(3, 3, 2, 8), (1, 1, 3, 5)])
def test_muon_of_a_kernel_is_orthogonalised_momentum(shape):
  rng, matrix = np.random.default_rng(0), (np.prod(shape[:-1]), shape[-1])
  settings = {'lr': 0.1, 'warmup': 4, 'weight_decay': 0.01, 'grad_clip': 0.0}
  optimizer = optimization.make_optimizer(
    optimization.Muon(**settings, muon_beta=0.9)
  )
  params = {'kernel': jnp.asarray(rng.normal(size=shape), jnp.float32)}
  state, momentum = optimizer.init(params), np.zeros(matrix)
  for step in range(4):
    grad = rng.normal(size=matrix)
    momentum = 0.9 * momentum + 0.1 * grad
    # Nesterov's look ahead; each average is divided by its sum of weights.
    ahead = 0.9 * momentum / (1 - 0.9 ** (step + 2))
    ahead += 0.1 * grad / (1 - 0.9 ** (step + 1))
    direction = 0.2 * np.sqrt(max(matrix)) * orthogonalised(ahead)
    decayed = direction + 0.01 * np.asarray(params['kernel']).reshape(matrix)
    want = -0.1 * step / 4 * decayed
    grads = {'kernel': jnp.asarray(grad.reshape(shape), jnp.float32)}
    updates, state = optimizer.update(grads, state, params)
    found = np.asarray(updates['kernel']).reshape(matrix)
    np.testing.assert_allclose(found, want, atol=2e-6)
    params = optax.apply_updates(params, updates)


def test_muon_leaves_the_rest_to_adam():
  shapes = {'bias': (4,), 'dense': (4, 4), 'gain': (1, 1, 1, 4), 'k': (3, 3, 1)}
  settings = {'lr': 0.1, 'warmup': 0, 'weight_decay': 0.1}
  params = {k: jnp.ones(shape) for k, shape in shapes.items()}
  grads = {k: jnp.full(shape, 0.3) for k, shape in shapes.items()}
  moved = []
  for cls in (optimization.Adam, optimization.Muon):
    optimizer = optimization.make_optimizer(cls(**settings))
    move = lambda p, o=optimizer: _step(o, grads, p, o.init(p))[0]
    moved.append(jax.jit(move)(params))
  jax.tree.map(np.testing.assert_array_equal, *moved)


def test_a_resumed_run_with_muon_is_as_one_without_a_stop(
  quick_network, tmp_path
):
  config = tiny.get_config(
    optim__optimizer='muon', training__noise='optimal', training__n_iters=4,
    training__checkpoint_freq=2, training__eval_freq=0,
  )  # fmt: skip
  whole = trained(config, tmp_path / 'whole')
  parts = trained(config, stopped(tmp_path / 'whole', 2))
  jax.tree.map(np.testing.assert_array_equal, parts, whole)
  config.optim.optimizer = 'adam'
  with pytest.raises(ValueError, match="with config.optim.optimizer='muon'"):
    run_lib.train(config, tmp_path / 'parts')


# ------------------------------------------------------------------- averages


def test_exponents_are_those_of_the_paper():
  # Karras et al. 2024, Section 3.1, gives 6.94 and 16.97.
  np.testing.assert_allclose(optimization.exponent(0.10), 6.94, atol=5e-3)
  np.testing.assert_allclose(optimization.exponent(0.05), 16.97, atol=5e-3)
  for g in (0.0, 0.5, 6.94, 100.0):
    length = np.sqrt(g + 1) / ((g + 2) * np.sqrt(g + 3))
    np.testing.assert_allclose(optimization.exponent(length), g, atol=1e-8)


def test_an_average_weights_steps_by_its_profile():
  steps, length = 300, 0.1
  params = np.random.default_rng(0).normal(size=(steps, 5)).astype(np.float32)
  averages = optimization.start_averages(jnp.full(5, 9.0), [length])
  (found,), _ = jax.lax.scan(
    lambda a, now: (
      (optimization.update_averages({length: a[0]}, *now)[length],),
      None,
    ),
    (averages[length],),
    (params, jnp.arange(1, steps + 1)),
  )
  # The integral of the profile over each step.
  g = optimization.exponent(length)
  weights = np.diff((np.arange(steps + 1) / steps) ** (g + 1))
  np.testing.assert_allclose(found, weights @ params, atol=2e-6)


SNAPSHOTS = [(t, s) for t in range(250, 2001, 250) for s in (0.05, 0.1)]


@pytest.mark.parametrize(
  ('snapshots', 'length'),
  [(SNAPSHOTS, 0.08), (SNAPSHOTS, 0.2), (SNAPSHOTS[-4:], 0.06)],
)
def test_combination_is_that_of_quadrature(snapshots, length):
  x, dx = np.linspace(0, 2000, 400_001, retstep=True)

  def profile(step, length):
    g = optimization.exponent(length)
    inside = np.where(x <= step, x, 0)
    return (g + 1) * inside**g / float(step) ** (g + 1) * np.sqrt(dx)

  basis = np.stack([profile(*snapshot) for snapshot in snapshots], axis=1)
  wanted = profile(2000, length)
  # The last weight is 1 less the others.
  rest = np.linalg.lstsq(
    basis[:, :-1] - basis[:, -1:], wanted - basis[:, -1], rcond=None
  )[0]
  want = np.append(rest, 1 - rest.sum())
  found, error = optimization.combination(snapshots, 2000, length)
  np.testing.assert_allclose(found, want, atol=2e-4)
  missed = np.linalg.norm(basis @ want - wanted) / np.linalg.norm(wanted)
  np.testing.assert_allclose(error, missed, rtol=1e-3, atol=1e-5)


def test_any_length_is_combined_from_two():
  """Combine averages of a noisy path, and compare with one that was kept."""
  steps, every, lengths = 4096, 128, (0.05, 0.08, 0.1)
  time = np.arange(1, steps + 1)[:, None] / steps
  noise = np.random.default_rng(0).normal(size=(steps, 8))
  path = 3 + np.exp(-5 * time) + 0.01 * noise + np.sin(3 * time)

  def take(averages, now):
    averages = optimization.update_averages(averages, *now)
    return averages, averages

  path = jnp.asarray(path, jnp.float32)
  start = optimization.start_averages(path[0], lengths)
  _, kept = jax.lax.scan(take, start, (path, jnp.arange(1, steps + 1)))
  snapshots = [
    (t, s) for t in range(every, steps + 1, every) for s in (0.05, 0.1)
  ]
  weights, error = optimization.combination(snapshots, steps, 0.08)
  found = sum(
    w * kept[s][t - 1] for w, (t, s) in zip(weights, snapshots, strict=True)
  )
  assert error < 2e-3
  np.testing.assert_allclose(found, kept[0.08][-1], atol=1e-5)
  # The averages themselves differ much more.
  assert np.abs(kept[0.05][-1] - kept[0.08][-1]).min() > 1e-2


STEPS_OF_RUN = 32


def averaged_config(*lengths, n_iters=STEPS_OF_RUN, every=4):
  config = tiny.points(
    training__n_iters=n_iters, training__snapshot_freq=every,
    training__checkpoint_freq=0, training__eval_freq=0,
  )  # fmt: skip
  config.training.ema_lengths = lengths
  config.eval.update(enable_bpd=False, enable_sampling=False)
  return config


def newer_emitter():
  """Return a context of XLA's default emitter, as two programs are compared."""
  jit, newer = jax.jit, {'xla_cpu_use_fusion_emitters': True}

  def compiled(*args, compiler_options=None, **kwargs):
    options = {**(compiler_options or {}), **newer}
    return jit(*args, compiler_options=options, **kwargs)

  return mock.patch.object(jax, 'jit', compiled)


@pytest.fixture(scope='module')
def averaged(tmp_path_factory):
  """Return the workdir of a run that keeps averages of two lengths."""
  workdir = tmp_path_factory.mktemp('averaged') / 'run'
  with newer_emitter():
    run_lib.train(averaged_config(0.05, 0.1), workdir)
  return workdir


def flat(workdir, length=None):
  _, params = experiment.load(workdir, ema_length=length)
  return np.asarray(jax.flatten_util.ravel_pytree(params)[0])


def test_a_run_has_averages_of_any_length(averaged, tmp_path, capsys):
  run_lib.train(averaged_config(0.08, every=16), tmp_path / 'whole')
  tracked = flat(tmp_path / 'whole', 0.08)
  combined = flat(averaged, 0.08)
  assert (
    'with a relative error of its profile of 0.011' in capsys.readouterr().out
  )
  scale = np.abs(flat(averaged, 0.05) - tracked).max()
  assert np.abs(combined - tracked).max() < 0.1 * scale
  # A kept length is what was kept, and the constant average is as before.
  with newer_emitter():
    run_lib.train(averaged_config(every=16), tmp_path / 'plain')
  np.testing.assert_array_equal(flat(tmp_path / 'plain'), flat(averaged))
  # A stop changes nothing.
  parts = stopped(tmp_path / 'whole', 16)
  run_lib.train(averaged_config(0.08, every=16), parts)
  np.testing.assert_array_equal(flat(parts, 0.08), tracked)
  # Averages begin at the first step or not at all.
  with pytest.raises(ValueError, match=r'no averages of the lengths \[0.1\]'):
    run_lib.train(averaged_config(0.08, 0.1, n_iters=40), parts)
  with pytest.raises(ValueError, match='config.eval.ema_length needs averages'):
    flat(tmp_path / 'plain', 0.08)


def test_a_sweep_of_lengths_is_one_command(averaged):
  config = averaged_config(0.05, 0.1)
  config.eval.ema_length = 0.06, 0.08, 0.1
  evaluate.evaluate(config, averaged)
  results = json.loads((averaged / 'eval' / 'results.json').read_text())
  assert [r['ema_length'] for r in results] == [0.06, 0.08, 0.1]
  assert len({r['test_loss']['value'] for r in results}) == 3
  assert len([*(averaged / 'eval').glob('step_32-*')]) == 3
  assert (averaged / 'eval' / 'results.png').is_file()
  assert 'ema_length 0.08' in (averaged / 'eval' / 'results.txt').read_text()
  with pytest.raises(ValueError, match='needs to be one length'):
    sample.sample(config, averaged)


def test_a_damaged_average_is_left_out(averaged, tmp_path, capsys):
  shutil.copytree(averaged, tmp_path / 'run')
  path = tmp_path / 'run' / 'checkpoints' / '28' / 'average_0.1'
  shutil.rmtree(path)
  path.mkdir()
  combined = flat(tmp_path / 'run', 0.08)
  said = capsys.readouterr().out
  assert '/28 cannot be read' in said and 'combined of 14' in said
  np.testing.assert_allclose(combined, flat(averaged, 0.08), atol=1e-3)
