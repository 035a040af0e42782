"""Evaluation, sampling, import and export of a tiny run, end to end."""

import json
import signal
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import evaluation
import experiment
import run_lib
from checkpoints.workdir import restore_ema
from commands import evaluate, exchange, sample, stats, trained
from data import datasets, pixels
from features import extract as extracting
from features import statistics
from runtime.devices import make_layout
from runtime.files import load_npz, save_npz
from solvers.base import Samples
from tests import tiny

# The network does not matter here.
pytestmark = pytest.mark.usefixtures('quick_network', 'shared_programs')


class Pixels:
  """Stand in for the Inception network: a few projections of the pixels."""

  variant = 'tensorflow'
  calls = 0

  def __call__(self, images, progress=None):
    del progress
    Pixels.calls += 1
    flat = np.float32(images.reshape(len(images), -1)) / 255
    basis = np.random.default_rng(0).standard_normal((flat.shape[1], 6))
    return {'pool_3': np.float32(flat @ basis), 'logits': None}


def get_config():
  config = tiny.get_config()
  config.eval.update(batch_size=100, num_samples=250, bpd_repeats=2)
  config.eval.update(enable_bpd=True, bpd_probes=4)
  config.sampling.update(corrector='none', num_steps=4, rtol=1e-2, atol=1e-2)
  return config


# Evaluates in another process. Arguments: the run, an .npz of images, the name
# of the folder of results ('killed': the process kills itself when it has
# written samples twice and features once) and, with two processes, the number
# of this one and a port.
WORKER = """
import os, signal, sys
import jax
workdir, theirs, name, *process = sys.argv[1:]
jax.config.update('jax_num_cpu_devices', 1)
if process:
  jax.distributed.initialize('127.0.0.1:' + process[1], 2, int(process[0]))
from commands import evaluate, stats
from features import extract
from tests.commands import test_evaluate
from tests import tiny
tiny.quick_network().start()
extract.extractor = stats.extractor = lambda chosen: test_evaluate.Pixels()
save, saved = evaluate.save_npz, []
def save_and_die(path, **arrays):
  save(path, **arrays)
  saved.append(path.name)
  if name == 'killed' and sum('samples_' in n for n in saved) == 3:
    os.kill(os.getpid(), signal.SIGKILL)
evaluate.save_npz = save_and_die
config = test_evaluate.get_config()
config.eval.enable_bpd = name != 'killed'
evaluate.evaluate(config, workdir, name)
evaluate.evaluate_images(config, workdir, theirs, name)
"""


def start(*arguments, cache):
  return tiny.start(
    WORKER,
    *arguments,
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.1',
    SCORE_SDE_CACHE=str(cache),
  )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Return (config, workdir) of a run of a few steps."""
  workdir = tmp_path_factory.mktemp('run')
  config = get_config()
  run_lib.train(config, workdir)
  return config, workdir


def use(extractor, monkeypatch):
  """Let all commands use a feature extractor, in place of the config's."""
  for module in (extracting, stats):
    monkeypatch.setattr(module, 'extractor', lambda chosen: extractor())


@pytest.fixture(autouse=True)
def no_inception(monkeypatch, tmp_path):
  monkeypatch.setenv('SCORE_SDE_CACHE', str(tmp_path / 'cache'))
  use(Pixels, monkeypatch)


def only_result(folder):
  (path,) = folder.glob('result-*.json')
  return path, json.loads(path.read_text())


def test_evaluation_goes_on_where_it_stopped(run, capsys):
  config, workdir = run
  evaluate.evaluate(config, workdir)
  (folder,) = (workdir / 'eval').glob('step_*')
  path, first = only_result(folder)
  assert first['fid']['count'] == 250 and first['fid']['value'] > 0
  assert first['fid']['std_error'] > 0
  assert first['test_loss']['count'] == first['bits_per_dim']['count'] == 297
  bits, nats = first['bits_per_dim'], first['nats']
  assert bits['repeats'] == 2
  assert 0 < bits['probe_error'] < bits['std_error']
  for key in ('value', 'std_error', 'probe_error'):
    np.testing.assert_allclose(nats[key], bits[key] * 64 * np.log(2))
  assert (first['step'], first['seed'], first['nfe']) == (8, 42, 4)
  assert first['sampler']['predictor'] == 'reverse_diffusion'
  assert first['config']['eval']['num_samples'] == first['count'] == 250
  assert first['inception_variant'] == 'tensorflow'
  assert first['reference']['count'] == 1500
  assert set(first['versions']) == {'jax', 'flax', 'numpy'}
  assert first['is_1_split']['value'] is None and first['is_1_split']['note']
  assert 'fid' in capsys.readouterr().out
  assert (folder / 'samples.png').is_file()
  for name in ('results.png', 'results.txt', 'results.json'):
    assert (workdir / 'eval' / name).is_file()

  # As if killed after most batches: only what is missing is made again.
  path.unlink()
  for file in folder.glob('samples_1*.npz'):
    file.unlink()
  # Files of another evaluation are not read.
  np.savez(folder / 'samples_7.npz', pool_3=np.full((100, 6), 1e6))
  Pixels.calls = 0
  evaluate.evaluate(config, workdir)
  assert Pixels.calls == 2  # A batch, and one image for the dimension.
  _, second = only_result(folder)
  for metric in ('fid', 'test_loss', 'bits_per_dim'):
    assert first[metric] == second[metric]


def test_killed_and_resumed(run, tmp_path):
  """It is killed between the samples of a batch and their features."""
  config, workdir = run
  config = config.copy_and_resolve_references()
  config.eval.enable_bpd = False
  worker = start(workdir, 'none.npz', 'killed', cache=tmp_path / 'cache')
  _, err = worker.communicate()
  assert worker.returncode == -signal.SIGKILL, err
  (folder,) = (workdir / 'killed').glob('step_*')
  left = {path: path.stat().st_mtime_ns for path in folder.glob('*.npz')}
  names = sorted(path.name for path in left if 'samples' in path.name)
  assert names == ['samples_0-tensorflow.npz', 'samples_0.npz', 'samples_1.npz']
  assert not list(folder.glob('result-*.json'))
  evaluate.evaluate(config, workdir, 'killed')
  assert left == {path: path.stat().st_mtime_ns for path in left}
  evaluate.evaluate(config, workdir, 'whole')
  results = [
    json.loads((workdir / name / 'results.json').read_text())
    for name in ('killed', 'whole')
  ]
  assert results[0] == results[1]


@pytest.mark.slow
def test_two_hosts_share_the_work(run, tmp_path):
  """Each host makes its half, and the numbers are those of one host."""
  config, workdir = run
  theirs = tmp_path / 'theirs.npz'
  images = datasets.load(config.data, 'test').fetch(np.arange(201))
  np.savez(theirs, images=images)
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  workers = [
    start(workdir, theirs, 'two', i, port, cache=tmp_path / 'cache')
    for i in range(2)
  ]
  outputs = [worker.communicate() for worker in workers]
  for worker, (_, err) in zip(workers, outputs, strict=True):
    assert worker.returncode == 0, err
  assert 'All results' in outputs[0][0]
  assert 'results' not in outputs[1][0]
  evaluate.evaluate(config, workdir, 'one')
  evaluate.evaluate_images(config, workdir, theirs, 'one')
  two, one = (
    json.loads((workdir / name / 'results.json').read_text())[0]
    | {'theirs': json.loads(next((workdir / name).glob('theirs*')).read_text())}
    for name in ('two', 'one')
  )
  for metric in ('fid', 'test_loss', 'bits_per_dim', 'precision'):
    assert two[metric]['count'] == one[metric]['count']
    assert two[metric]['value'] == pytest.approx(one[metric]['value'], rel=1e-2)
  assert two['reference'] == one['reference']
  assert two['theirs']['fid']['value'] == pytest.approx(
    one['theirs']['fid']['value'], rel=1e-5
  )
  shares = {
    path.name.removesuffix('.npz').split('_host_')[1]: len(
      load_npz(path)['pool_3']
    )
    for path in (workdir / 'two').rglob('samples_0-*.npz')
  }
  assert shares == {'0': 50, '1': 50}
  shares = [
    len(load_npz(path)['pool_3'])
    for path in sorted((workdir / 'two').rglob('images_*-*.npz'))
  ]
  assert shares == [50, 50, 50, 50, 1, 0]


def test_more_samples_are_added_to_those_that_are_there(run, monkeypatch):
  """Another feature network needs new features, but no new samples."""
  config, workdir = run
  config = config.copy_and_resolve_references()
  config.eval.update(enable_loss=False, enable_bpd=False, num_samples=150)
  evaluate.evaluate(config, workdir, 'grown')
  config.eval.update(num_samples=250, enable_loss=True)
  Pixels.calls = 0
  evaluate.evaluate(config, workdir, 'grown')
  assert Pixels.calls == 2
  results = json.loads((workdir / 'grown' / 'results.json').read_text())
  assert [r['count'] for r in results] == [150, 250]
  (folder,) = (workdir / 'grown').glob('step_*')
  made = {path: path.stat().st_mtime_ns for path in folder.glob('*_?.npz')}
  assert len(made) == 3

  class WithLogits(Pixels):
    with_logits = True

    def __call__(self, images, progress=None):
      return super().__call__(images) | {'logits': np.ones((len(images), 4))}

  use(WithLogits, monkeypatch)
  evaluate.evaluate(config, workdir, 'grown')
  assert made == {path: path.stat().st_mtime_ns for path in made}
  result = json.loads((workdir / 'grown' / 'results.json').read_text())[-1]
  assert result['is_10_splits']['value'] == pytest.approx(1)


def test_other_samplers_have_folders_of_their_own(run):
  config, workdir = run
  before = trained.identity(config, 'weights')
  assert trained.identity(config, 'other weights') != before
  for key, value in {
    'sampling.num_steps': 5,
    'sampling.rounding': 'truncate',
    'seed': 1,
    'training.weighting': 'likelihood',
    'eval.batch_size': 50,
  }.items():
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({key: value})
    assert trained.identity(other, 'weights') != before
  for key, value in {
    'eval.stats_path': 'somewhere',
    'eval.num_samples': 7,
    'eval.enable_bpd': False,
    'training.log_freq': 9,
    'data.path': 'elsewhere',
  }.items():
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({key: value})
    assert trained.identity(other, 'weights') == before


def test_other_weights_have_a_folder_of_their_own(run, tmp_path):
  """So has another training, whose weights differ, and another test set."""
  config, workdir = run
  other = tiny.get_config(training__weighting='likelihood')
  run_lib.train(other, tmp_path)
  ours, theirs = (trained.restore(config, w) for w in (workdir, tmp_path))
  assert ours.step == theirs.step == 8
  assert ours.name.startswith('step_8-') and ours.name != theirs.name
  again = trained.restore(config, workdir)
  assert again.name == ours.name
  config = config.copy_and_resolve_references()
  config.eval.update(enable_bpd=False, enable_sampling=False)
  evaluate.evaluate(config, workdir, 'named')
  (folder,) = (workdir / 'named').glob('step_*')
  test_set = datasets.load(config.data, 'test')
  assert folder.name == f'{ours.name}-{test_set.fingerprint[:8]}'


def test_no_checkpoint_is_an_error_not_a_wait(run, tmp_path):
  config, workdir = run
  with pytest.raises(FileNotFoundError, match='train with this'):
    evaluate.evaluate(config, tmp_path)
  missing = config.copy_and_resolve_references()
  missing.eval.checkpoint = '123'
  with pytest.raises(ValueError, match="no checkpoint '123'"):
    evaluate.evaluate(missing, workdir)


def test_statistics_of_something_else_are_refused(run, tmp_path):
  config, _ = run
  config = config.copy_and_resolve_references()
  path = tmp_path / 'stats.npz'
  config.eval.stats_path = str(path)
  extract = Pixels()
  with pytest.raises(FileNotFoundError, match='--mode stats'):
    stats.reference(config, tmp_path, extract)
  stats.stats(config, tmp_path)
  found = statistics.load_stats(path)
  train = datasets.load(config.data, 'train')
  assert found.count == 1500 and found.fingerprint == train.fingerprint
  images = np.float64(Pixels()(train.fetch(np.arange(1500)))['pool_3'])
  np.testing.assert_allclose(found.mu, images.mean(0), rtol=1e-5)
  assert stats.reference(config, tmp_path, extract).count == 1500
  arrays = load_npz(path)
  for name, value in {
    'variant': 'pytorch_fid',
    'resolution': 32,
    'fingerprint': '0',
  }.items():
    save_npz(path, **(arrays | {name: value}))
    with pytest.raises(ValueError, match=f'the {name} {value}, not'):
      stats.reference(config, tmp_path, extract)
  foreign = {'mu': found.mu[:4], 'sigma': found.sigma[:4, :4]}
  save_npz(path, **foreign)
  with pytest.raises(ValueError, match='the dimensions 4, not 6'):
    stats.reference(config, tmp_path, extract)
  save_npz(path, mu=found.mu, sigma=found.sigma)
  with pytest.warns(UserWarning, match='do not say their fingerprint'):
    stats.reference(config, tmp_path, extract)


def test_statistics_go_on_where_they_stopped(run, tmp_path, monkeypatch):
  """Killed in the third chunk, the first two are taken from disk."""
  config, _ = run
  config = config.copy_and_resolve_references()
  config.eval.stats_path = str(tmp_path / 'whole.npz')
  stats.stats(config, tmp_path)
  monkeypatch.setattr(stats, 'CHUNK', 512)
  config.eval.stats_path = str(tmp_path / 'resumed.npz')

  class Killed(Pixels):
    def __call__(self, images, progress=None):
      if Pixels.calls == 5:  # Of 256 images each.
        raise KeyboardInterrupt
      return super().__call__(images, progress)

  Pixels.calls = 0
  with pytest.raises(KeyboardInterrupt):
    stats.stats(config, tmp_path, Killed())
  Pixels.calls = 0
  stats.stats(config, tmp_path)
  assert Pixels.calls == 4  # Of the last 988 images.
  whole, resumed = (
    statistics.load_stats(tmp_path / f'{name}.npz')
    for name in ('whole', 'resumed')
  )
  assert whole.count == resumed.count == 1500
  np.testing.assert_allclose(resumed.mu, whole.mu)
  np.testing.assert_allclose(resumed.sigma, whole.sigma)
  rows = lambda stats: sorted(stats.features.tolist())
  assert rows(resumed) == rows(whole)
  assert not list((tmp_path / 'stats').iterdir())


@pytest.mark.parametrize('kind', ['npz', 'folder'])
def test_user_images_are_scored(run, tmp_path, kind):
  config, _ = run
  images = datasets.load(config.data, 'test').fetch(np.arange(240))
  path = tmp_path / ('theirs.npz' if kind == 'npz' else 'theirs')
  if kind == 'npz':
    np.savez(path, arr_0=images)
  else:
    path.mkdir()
    for i, image in enumerate(images):
      Image.fromarray(image[..., 0]).save(path / f'{i:03}.png')
  evaluate.evaluate_images(config, tmp_path, path)
  (written,) = (tmp_path / 'eval').glob('theirs*.json')
  result = json.loads(written.read_text())
  assert result['fid']['count'] == result['count'] == 240
  # The FID does not depend on the order of the features.
  train = datasets.load(config.data, 'train').fetch(np.arange(1500))
  moments = [statistics.Moments(), statistics.Moments()]
  for m, x in zip(moments, (images, train), strict=True):
    m.update(Pixels()(x)['pool_3'])
  with pytest.warns(UserWarning, match='240 images'):
    want = evaluation.fid(*moments).value
  assert result['fid']['value'] == pytest.approx(want, rel=1e-4)

  # It continues after a kill; changed images are other images.
  Pixels.calls = 0
  file = sorted((tmp_path / 'eval').glob('images_theirs*/*.npz'))[1]
  file.unlink()
  evaluate.evaluate_images(config, tmp_path, path)
  assert Pixels.calls == 2
  again = json.loads(written.read_text())
  assert again['fid'] == result['fid']
  if kind == 'npz':
    np.savez(path, arr_0=255 - images)
  else:
    Image.fromarray(255 - images[0, ..., 0]).save(path / '000.png')
  evaluate.evaluate_images(config, tmp_path, path)
  (other,) = {*(tmp_path / 'eval').glob('theirs*.json')} - {written}
  again = json.loads(other.read_text())
  assert again['fid'] != result['fid'] and again['count'] == 240


def test_images_that_do_not_fit_are_refused(run, tmp_path):
  """Images are not resized, because scores depend on how it is done."""
  config, _ = run
  with pytest.raises(FileNotFoundError, match='--samples'):
    evaluate.evaluate_images(config, tmp_path, tmp_path / 'nothing')
  np.savez(tmp_path / 'large.npz', images=np.zeros((3, 16, 16, 1), np.uint8))
  with pytest.raises(ValueError, match='16x16, but data.image_size is 8'):
    evaluate.evaluate_images(config, tmp_path, tmp_path / 'large.npz')
  (tmp_path / 'large').mkdir()
  picture = Image.fromarray(np.zeros((16, 8), np.uint8))
  picture.save(tmp_path / 'large' / 'a.png')
  with pytest.raises(ValueError, match=r'a\.png is 16x8, but'):
    evaluate.evaluate_images(config, tmp_path, tmp_path / 'large')
  np.savez(tmp_path / 'rgb.npz', images=np.zeros((3, 8, 8, 3), np.uint8))
  with pytest.raises(ValueError, match='num_channels is 1'):
    evaluate.evaluate_images(config, tmp_path, tmp_path / 'rgb.npz')


def test_sample_writes_images(run):
  config, workdir = run
  sample.sample(config, workdir)
  (path,) = (workdir / 'samples').glob('*.npz')
  with np.load(path) as file:
    assert file['images'].shape == (64, 8, 8, 1)
    assert file['images'].dtype == np.uint8 and file['nfe'] == 4
  with Image.open(path.with_suffix('.png')) as picture:
    assert min(picture.size) >= 512


def test_sample_shows_the_way_to_the_images(run, tmp_path):
  config, workdir = run
  config = config.copy_and_resolve_references()
  config.sampling.update(method='heun', grid='edm', frames=3, num_samples=5)
  sample.sample(config, workdir)
  (film,) = (workdir / 'samples').glob('*_frames.gif')
  with np.load(str(film).replace('_frames.gif', '.npz')) as file:
    assert file['images'].shape == (5, 8, 8, 1)
    assert file['nfe'] == 2 * 3 + 1  # Three steps, and the mean of x_0.
    assert file['frames'].shape == (3, 5, 8, 8, 1)
    # States from the prior, whose sigma_max is 10, to the images.
    assert 8 < file['frames'][0].std() < 12
    last = pixels.to_uint8(file['frames'][-1])
    np.testing.assert_array_equal(last, file['images'])
    assert file['frame_times'][0] == 1 and file['frame_times'][-1] == 0
  with Image.open(film) as pictures:
    assert pictures.n_frames == 3
    # Noise is shown with the contrast of data, not black and white.
    first = np.asarray(pictures.convert('L'))
    assert 40 < first[first < 255].std() < 90
  with Image.open(film.with_suffix('.png')) as strip:
    assert strip.size[0] > strip.size[1] / 2
  config.sampling.frames = 1
  with pytest.raises(ValueError, match='frames=1'):
    sample.sample(config, workdir)


@pytest.mark.parametrize(
  'method,key', [('ode', 'rtol'), ('adaptive_sde', 'sde_rtol')]
)
def test_a_solver_that_fails_says_what_may_help(run, method, key):
  config = run[0].copy_and_resolve_references()
  config.sampling.method = method
  failed = Samples(
    x=jnp.zeros((2, 8, 8, 1)),
    nfe=jnp.asarray(7),
    success=jnp.asarray(False),
    frames=jnp.zeros((0, 2, 8, 8, 1)),
    times=jnp.zeros(0),
  )
  with pytest.raises(FloatingPointError, match=f'sampling.{key}'):
    experiment.check_samples(config, failed, np.inf)
  experiment.check_samples(config, failed._replace(success=True), np.inf)
  for bad in (np.nan, np.inf, 1e5):
    diverged = failed._replace(success=True, x=failed.x.at[1, 2].set(bad))
    with pytest.raises(FloatingPointError, match='diverged'):
      experiment.check_samples(config, diverged, trained.DIVERGED)


def test_export_and_import_are_a_round_trip(run, tmp_path):
  config, workdir = run
  path = tmp_path / 'model.safetensors'
  exchange.export(config, workdir, str(path))
  exchange.import_released(config, tmp_path / 'new', path)
  like = experiment.build(config).abstract_params()
  ours = restore_ema(workdir, like)
  theirs = restore_ema(tmp_path / 'new', like)
  tiny.tree_equal(ours, theirs)
  with pytest.raises(ValueError, match='already'):
    exchange.import_released(config, tmp_path / 'new', path)


def test_notebook_from_an_exported_file(run, tmp_path):
  """The lines of the README need no flags and no workdir."""
  path = str(tmp_path / 'model.safetensors')
  exchange.export(*run, path)
  # From here on, as in a notebook.
  model, params = experiment.load(path)
  tiny.tree_equal(params, restore_ema(run[1], model.abstract_params()))
  draw = jax.jit(model.make_sample(16))
  images, nfe, success, *_ = draw(params, jax.random.key(0))
  assert images.shape == (16, 8, 8, 1) and np.isfinite(images).all()
  assert nfe == model.config.sampling.num_steps and success
  pictures = model.sample(params, jax.random.key(0), 16)
  np.testing.assert_array_equal(pictures, pixels.to_uint8(images))


# ------------------------------------------------ likelihoods within a batch


def test_one_test_image_has_no_standard_error():
  part = {'bits': np.array([3.0]), 'error': np.array([np.nan]), 'nfe': 50}
  found = evaluate._summary([[part]], 64)
  for metric in found.values():
    assert metric['std_error'] is metric['probe_error'] is None
    assert metric['value'] > 0 and metric['count'] == 1
  part |= {'bits': np.array([3.0, 4.0]), 'error': np.array([0.1, 0.1])}
  found = evaluate._summary([[part]], 64)
  assert found['bits_per_dim']['std_error'] == pytest.approx(0.5)


def points_model(monkeypatch, score):
  """Return an Experiment of points with another score, and some points."""
  config = experiment.load_config('configs/toy/rings_vp.py')
  with config.unlocked():
    config.eval.update(bpd_trace='exact', batch_size=100, bpd_repeats=1)
  model = experiment.build(config)
  scores = lambda self, params, **_: lambda x, t: score(x)
  monkeypatch.setattr(experiment.Experiment, 'score_fn', scores)
  return model, np.random.default_rng(0).normal(size=(100, 2))


def test_long_likelihoods_report_progress(monkeypatch):
  """In a batch; the numbers are those of one call, bit for bit."""
  model, x = points_model(
    monkeypatch, lambda x: -x * (1 + 0.1 * jnp.sin(9 * x))
  )
  x, key, reports = np.float32(x), jax.random.key(1), []
  compute = evaluate._compile_bits(model, make_layout())
  bits, _, found = compute({}, key, x, lambda *report: reports.append(report))
  whole, _, nfe, success = jax.jit(model.bits_per_dim)({}, key, x)
  np.testing.assert_array_equal(bits, whole)
  assert success and found.success and int(found.nfe) == int(nfe)
  times, evaluations = zip(*reports, strict=True)
  assert len(reports) > 1 and list(times) == sorted(times) and times[-1] == 1
  assert evaluations[0] == 2 + 6 * evaluate.STRETCH
  assert evaluations[-1] == int(nfe)


def test_a_score_that_is_not_finite_is_named(monkeypatch, tmp_path):
  """At once, and without advice about tolerances."""
  model, _ = points_model(monkeypatch, lambda x: x * jnp.nan)
  layout = make_layout()
  run = trained.Run(
    model=model, workdir=tmp_path, step=1, params={}, layout=layout
  )
  test_set = datasets.load(model.config.data, 'test')
  bits = evaluate.bits_of(model, layout)
  compute = evaluate.likelihood_evaluator(model, test_set, bits)
  with pytest.raises(FloatingPointError) as error:
    compute(run, tmp_path)
  line = str(error.value)
  assert 'test batch 0: the score is not finite at t = 1e-05' in line
  assert 'rtol' not in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize('method', ['ode', 'adaptive_sde'])
def test_samples_of_a_score_that_is_not_finite(monkeypatch, tmp_path, method):
  model, _ = points_model(monkeypatch, lambda x: x * jnp.nan)
  with model.config.unlocked():
    model.config.sampling.method = method
  model = experiment.build(model.config)
  run = trained.Run(
    model=model, workdir=tmp_path, step=1, params={}, layout=make_layout()
  )
  with pytest.raises(FloatingPointError, match='is not finite at t = 1[.]'):
    next(trained.draw(run, 8, 8))
