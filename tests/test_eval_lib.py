"""Evaluation, sampling, import and export of a tiny run, end to end."""

import json

import numpy as np
import pytest
from PIL import Image

import checkpoints
import datasets
import eval_lib
import experiment
import features
import released
import run_lib
from tests import golden, tiny


class Pixels:
  """Stands in for the Inception network: a few projections of the pixels."""

  variant = 'tensorflow'
  calls = 0

  def __call__(self, images, progress=None):
    del progress
    Pixels.calls += 1
    flat = np.float32(images.reshape(len(images), -1)) / 255
    basis = np.random.default_rng(0).standard_normal((flat.shape[1], 6))
    return {'pool_3': np.float32(flat @ basis), 'logits': None}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(config, workdir) of a run of a few steps."""
  workdir = tmp_path_factory.mktemp('run')
  config = tiny.get_config()
  config.eval.update(batch_size=100, num_samples=250, bpd_repeats=2)
  config.eval.enable_bpd = True
  config.sampling.update(corrector='none', num_steps=4, rtol=1e-2, atol=1e-2)
  run_lib.train(config, workdir)
  return config, workdir


@pytest.fixture(autouse=True)
def no_inception(monkeypatch, tmp_path):
  monkeypatch.setenv('SCORE_SDE_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(eval_lib, 'extractor', lambda config: Pixels())


def test_evaluation_goes_on_where_it_stopped(run, capsys):
  config, workdir = run
  eval_lib.evaluate(config, workdir)
  (folder,) = (workdir / 'eval').glob('step_*')
  first = json.loads((folder / 'result.json').read_text())
  assert first['fid']['count'] == 250 and first['fid']['value'] > 0
  assert first['test_loss']['count'] == first['bits_per_dim']['count'] == 297
  assert first['bits_per_dim']['repeats'] == 2
  assert first['nfe'] == 4
  assert first['config']['eval']['num_samples'] == 250
  assert first['is_1_split']['value'] is None and first['is_1_split']['note']
  assert 'fid' in capsys.readouterr().out
  assert (folder / 'samples.png').is_file()
  assert (workdir / 'eval' / 'results.png').is_file()

  # Killed after most batches: only what is missing is made again.
  (folder / 'result.json').unlink()
  (folder / 'samples_1.npz').unlink()
  # What another evaluation left behind is not read.
  np.savez(folder / 'samples_7.npz', pool_3=np.full((100, 6), 1e6))
  Pixels.calls = 0
  eval_lib.evaluate(config, workdir)
  assert Pixels.calls == 1
  second = json.loads((folder / 'result.json').read_text())
  for metric in ('fid', 'test_loss', 'bits_per_dim'):
    assert first[metric] == second[metric]


def test_other_samplers_have_folders_of_their_own(run):
  config, workdir = run
  before = eval_lib._identity(config)
  other = config.copy_and_resolve_references()
  other.sampling.num_steps = 5
  assert eval_lib._identity(other) != before
  elsewhere = config.copy_and_resolve_references()
  elsewhere.eval.stats_path = 'somewhere'
  elsewhere.training.log_freq = 1
  assert eval_lib._identity(elsewhere) == before


def test_no_checkpoint_is_an_error_not_a_wait(run, tmp_path):
  config, workdir = run
  with pytest.raises(FileNotFoundError, match='train with this'):
    eval_lib.evaluate(config, tmp_path)
  missing = config.copy_and_resolve_references()
  missing.eval.checkpoint = '123'
  with pytest.raises(ValueError, match="no checkpoint '123'"):
    eval_lib.evaluate(missing, workdir)


def test_statistics_of_something_else_are_refused(run, tmp_path):
  config, _ = run
  config = config.copy_and_resolve_references()
  config.eval.stats_path = str(tmp_path / 'stats.npz')
  with pytest.raises(FileNotFoundError, match='--mode stats'):
    eval_lib.reference(config)
  eval_lib.stats(config)
  found = features.load_stats(config.eval.stats_path)
  train = datasets.load(config.data, 'train')
  assert found.count == 1500 and found.fingerprint == train.fingerprint
  images = np.float64(Pixels()(train.fetch(np.arange(1500)))['pool_3'])
  np.testing.assert_allclose(found.mu, images.mean(0), rtol=1e-5)
  assert eval_lib.reference(config).count == 1500
  config.eval.inception_variant = 'pytorch_fid'
  with pytest.raises(ValueError, match='variant'):
    eval_lib.reference(config)


@pytest.mark.parametrize('kind', ['npz', 'folder'])
def test_anyones_images_are_scored(run, tmp_path, kind):
  config, _ = run
  images = datasets.load(config.data, 'test').fetch(np.arange(40))
  path = tmp_path / ('theirs.npz' if kind == 'npz' else 'theirs')
  if kind == 'npz':
    np.savez(path, arr_0=images)
  else:
    path.mkdir()
    for i, image in enumerate(images):
      Image.fromarray(image[..., 0]).save(path / f'{i:03}.png')
  eval_lib.evaluate_images(config, tmp_path, path)
  result = json.loads((tmp_path / 'eval' / 'theirs.json').read_text())
  assert result['fid']['count'] == 40
  with pytest.raises(FileNotFoundError, match='--samples'):
    eval_lib.evaluate_images(config, tmp_path, tmp_path / 'nothing')


def test_sample_writes_images(run):
  config, workdir = run
  eval_lib.sample(config, workdir)
  (path,) = (workdir / 'samples').glob('*.npz')
  with np.load(path) as file:
    assert file['images'].shape == (64, 8, 8, 1)
    assert file['images'].dtype == np.uint8 and file['nfe'] == 4
  with Image.open(path.with_suffix('.png')) as picture:
    assert min(picture.size) >= 512


def test_export_and_import_are_a_round_trip(run, tmp_path):
  config, workdir = run
  path = tmp_path / 'model.safetensors'
  run_lib.export(config, workdir, str(path))
  run_lib.import_released(config, tmp_path / 'new', path)
  like = experiment.abstract_params(config)
  ours = checkpoints.restore_ema(workdir, like)
  theirs = checkpoints.restore_ema(tmp_path / 'new', like)
  tree_equal(ours, theirs)
  with pytest.raises(ValueError, match='already'):
    run_lib.import_released(config, tmp_path / 'new', path)


def tree_equal(a, b):
  import jax

  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_released_checkpoint_becomes_a_run(tmp_path):
  """The genuine file, reduced: sampled and trained on like a run of ours."""
  config = experiment.load_config('configs/ve/ffhq_256_ncsnpp_continuous.py')
  config.model.update(
    nf=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,),
    dropout=0.0,
  )  # fmt: skip
  config.data.update(dataset='digits', image_size=16)
  path = golden.DATA / 'released_jax.checkpoint'
  run_lib.import_released(config, tmp_path, path)
  like = experiment.abstract_params(config)
  ema = checkpoints.restore_ema(tmp_path, like)
  tree_equal(ema, released.load(path, config).ema_params)
  with checkpoints.Checkpoints(tmp_path) as saved:
    assert saved.steps == [3]
