"""Test `--mode sample` with config.control, on networks of a few channels."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import controllable_generation
import experiment
import optimization
import run_lib
from checkpoints.workdir import Checkpoints, restore_ema
from commands import control, evaluate, exchange
from configs import base
from data import datasets
from experiment import load_config
from runtime.files import load_npz
from tests import tiny

# The network does not matter here.
pytestmark = pytest.mark.usefixtures('quick_network')


def get_config(**overrides):
  """Return the config of `tiny.get_config` with a few test images."""
  few = {'control__num_images': 3, 'control__repeats': 2}
  # Without a corrector the sampler is compiled in half the time.
  few |= {'sampling__num_samples': 20, 'sampling__corrector': 'none'}
  return tiny.get_config(**few | overrides)


def classifier_config():
  config = tiny.get_config(training__n_iters=2)
  with config.unlocked():
    base.classifier(config)
    config.model.update(blocks_per_group=1, channel_multiplier=1)
    config.training.update(n_iters=2, checkpoint_freq=2, eval_freq=2)
  return config.lock()


def unbuilt(config):
  """Return an Experiment of which only the config is checked."""
  fields = ('sde', 'network', 'conditioning', 'loss_fn', 'optimizer', 'sampler')
  return experiment.Experiment(config=config, **dict.fromkeys(fields))


def untrained(config, workdir):
  """Return a workdir with parameters as they are initialised."""
  params = experiment.build(config).init_params(jax.random.key(0))
  experiment.claim(config, workdir)
  with Checkpoints(workdir, keep_every=1) as saved:
    saved.save(1, {'params': params}, params)
    saved.wait()
  return workdir


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return untrained(get_config(), tmp_path_factory.mktemp('model') / 'run')


@pytest.fixture(scope='module')
def classifier_run(tmp_path_factory):
  """Return the workdir of a classifier that was trained for two steps."""
  folder = tmp_path_factory.mktemp('classifier') / 'run'
  run_lib.train(classifier_config(), folder)
  return folder


def results(workdir, name):
  """Return (arrays of the only .npz, its picture [H, W])."""
  (path,) = (workdir / 'samples').glob(f'{name}-step_*.npz')
  picture = np.asarray(PIL.Image.open(path.with_suffix('.png')))
  return load_npz(path), picture


# Overrides of config.control, and what the error must say.
WRONG = [
  ({'name': 'magic'}, 'is unknown'),
  ({'name': 'labels'}, 'num_labels'),
  ({'name': 'classifier'}, 'classifier_workdir'),
  ({'name': 'inpaint', 'method': 'magic'}, 'is unknown'),
  ({'name': 'deblur'}, "method to 'mmps', 'pigdm', 'diffpir' or 'dps'"),
  ({'name': 'overexposed', 'method': 'ddrm'}, 'is not linear'),
  ({'name': 'inpaint', 'method': 'ddrm'}, "sampling.predictor='ddim'"),
  ({'name': 'own'}, 'needs config.control.operator'),
  ({'name': 'own', 'operator': 'none:f'}, 'no module:function'),
  ({'name': 'inpaint', 'method': 'dps'}, 'above 0'),
  ({'name': 'colorize'}, '3 channels'),
  ({'name': 'super_resolution', 'factor': 3}, 'does not divide'),
]


@pytest.mark.parametrize(('options', 'line'), WRONG)
def test_check_says_what_to_change(options, line):
  config = get_config(**{f'control__{k}': v for k, v in options.items()})
  with pytest.raises(ValueError, match=line):
    control.make_task(unbuilt(config))


OUT_OF_RANGE = {
  'factor': 0, 'repeats': 0, 'num_images': 0, 'known': 1.0, 'width': 0.0,
  'gain': 0.0, 'noise_std': -0.1, 'data_std': 0.0, 'ramp': -1.0, 'label': -2,
}  # fmt: skip


@pytest.mark.parametrize(('key', 'value'), OUT_OF_RANGE.items())
def test_an_option_out_of_range_is_refused(key, value, tmp_path):
  """The workdir is empty, so that the check comes before all work."""
  config = get_config(control__name='inpaint', **{f'control__{key}': value})
  with pytest.raises(ValueError, match=f'config.control.{key}={value}'):
    control.sample(config, tmp_path)


def test_controls_are_checked_before_weights_are_loaded(tmp_path):
  config = get_config(control__name='super_resolution', control__factor=3)
  with pytest.raises(ValueError, match='use one of 1, 2, 4, 8'):
    control.sample(config, tmp_path)


def test_check_of_samplers_and_points():
  config = get_config(
    control__name='inpaint', control__fresh_noise=True, sampling__method='ode'
  )
  with pytest.raises(ValueError, match='sampling.method=pc'):
    control.make_task(unbuilt(config))
  config = get_config(control__name='super_resolution', data__shape=(2,))
  with pytest.raises(ValueError, match='not points'):
    control.make_task(unbuilt(config))


# Arrays of a file, and what the error must say; inpaint makes [N, 32, 1] here.
Y = np.zeros((3, 32, 1), np.float32)
BAD_MEASUREMENTS = [
  (
    {'measurements': Y[:, :5]},
    r'of shape \(3, 5, 1\), but .* makes \[N, 32, 1\]',
  ),
  ({'measurements': Y[:0]}, r'of shape \(0, 32, 1\)'),
  ({'measurements': Y + np.nan}, 'has 96 values that are no finite numbers'),
  ({'measurements': Y + 1j}, 'of type complex64'),
  ({'measurements': np.full(Y.shape, 'a')}, 'of type <U1'),
  ({'images': Y}, "has no array 'measurements', but images"),
]


@pytest.mark.parametrize(('arrays', 'line'), BAD_MEASUREMENTS)
def test_measurements_that_cannot_be_used(arrays, line, tmp_path):
  path = tmp_path / 'y.npz'
  np.savez(path, **arrays)
  config = get_config(control__name='inpaint', control__measurements=str(path))
  with pytest.raises(ValueError, match=line) as error:
    control.make_task(unbuilt(config))
  assert str(path) in str(error.value)


def test_measurements_of_a_file(tmp_path):
  """They are used as they are, and shown without originals."""
  y = np.random.default_rng(0).random((3, 32, 1), np.float32)
  np.save(tmp_path / 'y.npy', y)
  config = get_config(
    control__name='inpaint', control__measurements=str(tmp_path / 'y.npy')
  )
  task = control.make_task(unbuilt(config))
  np.testing.assert_array_equal(task.rows['y'], np.repeat(y, 2, axis=0))
  arrays, rows, columns = task.present(np.zeros((6, 8, 8, 1), np.uint8))
  assert columns == 3 and len(rows) == 9 and 'originals' not in arrays
  known = np.rint(255 * y[:, 0, 0])
  np.testing.assert_allclose(rows[::3][:, 0, 0, 0], known, atol=1)


def test_an_operator_of_ones_own_of_points(tmp_path, monkeypatch):
  """Points are measured by a function of the user; its code names the files."""
  module, names = tmp_path / 'of_points.py', []
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)
  for comment in ('', '# Another version.'):
    module.write_text(f'total = lambda x: x.sum(1, keepdims=True){comment}\n')
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, 'of_points', raising=False)
    config = load_config('configs/toy/rings_vp.py')
    with config.unlocked():
      config.control.update(
        name='own', operator='of_points:total', method='mmps', noise_std=0.1
      )
    task = control.make_task(unbuilt(config))
    names.append(task.identity)
  assert names[0] != names[1]
  assert task.originals.shape == (8, 2) and task.measurements.shape == (8, 1)
  np.testing.assert_allclose(
    task.measurements[:, 0], task.originals.sum(1), atol=0.5
  )
  points = np.zeros((32, 2), np.float32)
  arrays, rows, _ = task.present(points)
  assert arrays['points'].shape == (8, 4, 2) and rows is points


def test_masks(tmp_path):
  def make(**options):
    options = {'name': 'inpaint', **options}
    config = get_config(**{f'control__{k}': v for k, v in options.items()})
    operator, _ = control.inverse_problem(unbuilt(config))
    return operator.pixels((8, 8))

  half, center = make(mask='half'), make(mask='center')
  assert half[:, :4].all() and not half[:, 4:].any()
  assert center.sum() == 48 and not center[2:6, 2:6].any()
  share = make(mask='random', known=0.5).mean()
  assert 0.25 < share < 0.75
  drawn = np.zeros((8, 8), np.uint8)
  drawn[:3] = 255
  path = tmp_path / 'mask.png'
  PIL.Image.fromarray(drawn).save(path)
  np.testing.assert_array_equal(make(mask=str(path)), drawn > 0)
  with pytest.raises(ValueError, match='nor an image file'):
    make(mask='quarter')
  with pytest.raises(ValueError, match='no pixel'):
    make(mask='random', known=0.9999)


def test_complex_measurements_and_ddrm(workdir):
  """They pass through the sharded sampler; each image has two samples."""
  config = get_config(
    control__name='fourier', control__method='ddrm', control__known=0.5,
    sampling__predictor='ddim', sampling__eta=0.85, sampling__num_steps=2,
  )  # fmt: skip
  control.sample(config, workdir)
  arrays, _ = results(workdir, 'fourier')
  assert arrays['images'].shape == (3, 2, 8, 8, 1)
  y = arrays['measurements']
  assert y.shape == (3, 4, 5, 1) and y.dtype == np.complex64
  operator, _ = control.inverse_problem(unbuilt(config))
  x = jnp.float32(arrays['originals']) / 255
  np.testing.assert_allclose(y, operator(x), atol=1e-5)


def test_inpainting_keeps_known_pixels(workdir):
  config = get_config(control__name='inpaint')
  control.sample(config, workdir)
  arrays, picture = results(workdir, 'inpaint')
  images, originals = arrays['images'], arrays['originals']
  assert images.shape == (3, 2, 8, 8, 1) and images.dtype == np.uint8
  first = datasets.load(config.data, 'test').fetch(np.arange(3))
  np.testing.assert_array_equal(originals, first)
  operator, _ = control.inverse_problem(unbuilt(config))
  mask = operator.pixels((8, 8))
  known = np.broadcast_to(originals[:, None], images.shape)[:, :, mask]
  np.testing.assert_array_equal(images[:, :, mask], known)
  assert np.any(images[:, 0] != images[:, 1])
  # A row is an original, its measurement and two reconstructions.
  size = (picture.shape[1] + 2) // 4
  scale = (size - 2) // 8
  at = lambda i, j: picture[i * size :, j * size :][: 8 * scale, : 8 * scale]
  for i in range(3):
    shown = at(i, 0)[::scale, ::scale]
    np.testing.assert_array_equal(shown, originals[i, ..., 0])
    shown = at(i, 3)[::scale, ::scale]
    np.testing.assert_array_equal(shown, images[i, 1, ..., 0])


def test_samples_that_diverge_are_an_error(workdir, monkeypatch):
  config = get_config(control__name='inpaint', control__method='pigdm')

  class Nowhere(controllable_generation.PiGDM):
    def __call__(self, score_fn, sde, **_):
      return lambda x, t: x * np.nan

  methods = controllable_generation.METHODS
  monkeypatch.setitem(methods, 'pigdm', Nowhere)
  with pytest.raises(FloatingPointError, match='config.control.ramp'):
    control.sample(config, workdir)


def test_samples_of_each_label(tmp_path):
  config = get_config(control__name='labels', sampling__final_denoise=False)
  with config.unlocked():
    config.model.num_labels = 10
  workdir = untrained(config.lock(), tmp_path / 'run')
  control.sample(config, workdir)
  arrays, _ = results(workdir, 'labels')
  assert arrays['images'].shape == (20, 8, 8, 1)
  np.testing.assert_array_equal(arrays['label'], np.arange(20) % 10)
  config.control.label = 10
  with pytest.raises(ValueError, match='no class of 10'):
    control.sample(config, workdir)


def test_classifier_trains_evaluates_guides_and_travels(
  workdir, classifier_run, tmp_path
):
  theirs = classifier_config()
  evaluate.evaluate(theirs, classifier_run)
  table = (classifier_run / 'eval' / 'results.txt').read_text()
  assert all(name in table for name in experiment.ACCURACIES)

  file = tmp_path / 'classifier.safetensors'
  exchange.export(theirs, classifier_run, file)
  imported = tmp_path / 'imported'
  exchange.import_released(theirs, imported, file)
  like = experiment.build(theirs).abstract_params()
  jax.tree.map(
    np.testing.assert_array_equal,
    restore_ema(imported, like),
    restore_ema(classifier_run, like),
  )

  config = get_config(
    control__name='classifier', control__label=7, control__scale=2.0,
    sampling__final_denoise=False,
  )  # fmt: skip
  config.control.classifier_workdir = str(imported)
  control.sample(config, workdir)
  arrays, _ = results(workdir, 'classifier')
  assert arrays['images'].shape == (20, 8, 8, 1)
  assert set(arrays['label']) == {7}
  with pytest.raises(ValueError, match='other noise'):
    control.load_classifier(experiment.build(get_config(
      control__classifier_workdir=str(imported), sde__sigma_max=9.0
    )))  # fmt: skip
  config.control.classifier_workdir = str(workdir)
  with pytest.raises(ValueError, match='no run of a classifier'):
    control.load_classifier(experiment.build(config))


def test_a_weaker_checkpoint_guides(workdir, tmp_path):
  """With scale 1, or with itself, it is not guided; other weights guide."""

  def images(**options):
    options = {'scale': 3.0, **options}
    config = get_config(
      control__name='autoguidance',
      **{f'control__{key}': value for key, value in options.items()},
    )
    model = experiment.build(config)
    task = control.make_task(model, workdir)
    sample = jax.jit(model.make_sample(4, guide=task.guide))
    params = restore_ema(workdir, model.abstract_params())
    return np.asarray(sample(params, jax.random.key(0), **task.shared).x)

  model = experiment.build(get_config())
  params = restore_ema(workdir, model.abstract_params())
  other = tmp_path / 'other'
  experiment.claim(model.config, other)
  with Checkpoints(other, keep_every=1) as saved:
    for step in (1, 2):
      weaker = jax.tree.map(lambda v, s=step: s * v + 0.01 * s, params)
      saved.save(step, {'params': params}, weaker)
      saved.wait()
  itself, plain = images(), images(scale=1.0)
  np.testing.assert_allclose(itself, plain, atol=1e-3)
  last = images(weak_workdir=str(other))
  first = images(weak_workdir=str(other), weak_checkpoint=1)
  assert np.abs(last - plain).max() > 0.01
  assert np.abs(first - last).max() > 0.01
  with pytest.raises(FileNotFoundError, match='weak_workdir=.* no config.json'):
    images(weak_workdir=str(tmp_path / 'none'))
  config = get_config(control__name='autoguidance', sde__sigma_max=9.0)
  with pytest.raises(ValueError, match='weak_workdir=.* for other noise'):
    control.make_task(experiment.build(config), workdir)
  config = get_config(control__name='autoguidance', control__scale=2.0)
  control.sample(config, workdir)
  arrays, _ = results(workdir, 'autoguidance')
  assert arrays['images'].shape == (20, 8, 8, 1)


def test_a_network_told_the_class_makes_the_class():
  """It is trained on three classes of points; without a class it makes all."""
  config = base.compose(
    base.vp, base.mlp, base.arrays(),
    {
      'data.shape': (2,), 'data.mean': (0.0,), 'data.std': (1.0,),
      'model.num_labels': 3, 'model.input_scale': 0.0,
      'training.condition_dropout': 0.2, 'sampling.num_steps': 60,
    },
  )  # fmt: skip
  means = jnp.float32([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
  model = experiment.build(config)
  params = model.init_params(jax.random.key(0))
  optimizer = optimization.make_optimizer(optimization.Adam(
    lr=5e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, warmup=20,
    grad_clip=1.0,
  ))  # fmt: skip

  def step(state, i):
    params, opt_state = state
    rng = jax.random.fold_in(jax.random.key(1), i)
    label = jax.random.randint(rng, (256,), 0, 3)
    points = means[label] + 0.2 * jax.random.normal(rng, (256, 2))
    batch = {'image': points, 'label': label}
    loss = lambda p: model.loss(p, rng, batch).mean()
    updates, opt_state = optimizer.update(
      jax.grad(loss)(params), opt_state, params
    )
    params = jax.tree.map(jnp.add, params, updates)
    return (params, opt_state), None

  train = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(600))[0])
  params, _ = train((params, optimizer.init(params)))

  config.sampling.eps = 1e-3
  label = jnp.arange(600) % 3
  x = jax.jit(experiment.build(config).make_sample(600))(
    params, jax.random.key(2), label=label
  ).x
  x = np.asarray(x)
  nearest = np.argmin(((x[:, None] - means[None]) ** 2).sum(-1), 1)
  assert np.mean(nearest == label) > 0.97
  config.control.scale = 0.0
  free = jax.jit(experiment.build(config).make_sample(600))(
    params, jax.random.key(2)
  ).x
  free = np.asarray(free)
  nearest = np.argmin(((free[:, None] - means[None]) ** 2).sum(-1), 1)
  share = np.bincount(nearest, minlength=3) / 600
  np.testing.assert_allclose(share, 1 / 3, atol=0.12)


def test_a_mask_may_be_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  drawn = np.zeros((8, 8), np.uint8)
  drawn[:4] = 255
  PIL.Image.fromarray(drawn).save(tmp_path / 'mask.png')
  config = tiny.get_config(control__name='inpaint', control__mask='~/mask.png')
  config = experiment.build(config).config
  operator = control._build(control.OPERATORS, config, 'name')
  np.testing.assert_array_equal(operator.pixels((8, 8)), drawn > 0)
