"""Results are named by all that they are of: nothing replaces anything else."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import experiment
from checkpoints.workdir import Checkpoints
from commands import encode, evaluate, exchange, sample, stats, trained
from features import extract as extracting
from runtime.files import load_npz, save_npz
from tests import tiny
from tests.commands.test_hosts import Brightness

pytestmark = pytest.mark.usefixtures('shared_programs')


def weights(config, workdir, seed):
  """Make random weights the only checkpoint of a workdir, as of step 4."""
  params = experiment.build(config).init_params(jax.random.key(seed))
  shutil.rmtree(workdir / 'checkpoints', ignore_errors=True)
  experiment.claim(config, workdir)
  with Checkpoints(workdir, keep_every=1) as saved:
    saved.save(4, {'params': params}, params)
    saved.wait()


def points_config():
  config = tiny.points()
  config.sampling.update(method='heun', num_steps=4, num_samples=12)
  config.sampling.update(rtol=0.1, atol=0.1)
  config.eval.update(enable_sampling=False, batch_size=1000)
  return config


def names(folder, pattern='*'):
  return {path.name for path in folder.glob(pattern)}


def test_results_belong_to_weights_not_to_steps(tmp_path):
  """The same step of another training is another result, in every mode."""
  config, losses = points_config(), []
  for seed in (0, 1):
    weights(config, tmp_path, seed)
    evaluate.evaluate(config, tmp_path)
    sample.sample(config, tmp_path)
    encode.encode(config, tmp_path)
    results = json.loads((tmp_path / 'eval' / 'results.json').read_text())
    losses = [result['test_loss']['value'] for result in results]
  assert len(losses) == len(set(losses)) == 2
  assert len(names(tmp_path / 'eval', 'step_4-*')) == 2
  assert len(names(tmp_path / 'samples', '*.npz')) == 2
  assert len(names(tmp_path / 'latent')) == 2
  # And the same weights are the same result.
  evaluate.evaluate(config, tmp_path)
  assert len(names(tmp_path / 'eval', 'step_4-*')) == 2


def test_fewer_samples_replace_nothing(tmp_path):
  config = points_config()
  weights(config, tmp_path, 0)
  sample.sample(config, tmp_path)
  config.sampling.frames = 3
  sample.sample(config, tmp_path)
  config.sampling.update(frames=0, num_samples=2)
  sample.sample(config, tmp_path)
  paths = sorted((tmp_path / 'samples').glob('*.npz'), key=lambda p: p.stem)
  assert [path.stem.split('-', 2)[2] for path in paths] == ['12', '12-3', '2']
  arrays = [load_npz(path) for path in paths]
  assert [len(a['points']) for a in arrays] == [12, 12, 2]
  assert ['frames' in a for a in arrays] == [False, True, False]
  assert len(names(tmp_path / 'samples', '*.gif')) == 1

  for count in (12, 2):
    config.sampling.num_samples = count
    encode.encode(config, tmp_path)
  folders = sorted((tmp_path / 'latent').iterdir())
  counts = [len(load_npz(folder / 'codes.npz')['z']) for folder in folders]
  assert counts == [12, 2]


def test_one_image_is_encoded(tmp_path):
  """It has no pair, so there are no interpolations."""
  config = points_config()
  config.sampling.num_samples = 1
  weights(config, tmp_path, 0)
  encode.encode(config, tmp_path)
  (folder,) = (tmp_path / 'latent').iterdir()
  codes = load_npz(folder / 'codes.npz')
  assert codes['z'].shape == (1, 2)
  assert codes['interpolations'].shape == (0, 10, 2)
  assert codes['rescaled'].shape == (1, 8, 2)
  result = json.loads((folder / 'result.json').read_text())
  assert result['count'] == 1


# ---------------------------------------------------------- images of a user


@pytest.fixture
def config(monkeypatch, tmp_path):
  monkeypatch.setenv('SCORE_SDE_CACHE', str(tmp_path / 'cache'))
  for module in (extracting, stats):
    monkeypatch.setattr(module, 'extractor', lambda chosen: Brightness())
  config = tiny.get_config()
  config.eval.update(batch_size=100, allow_few_samples=True)
  return config


def folder_of_images(path, seed):
  path.mkdir(parents=True)
  images = np.random.default_rng(seed).integers(0, 256, (30, 8, 8), np.uint8)
  for i, image in enumerate(images):
    Image.fromarray(image).save(path / f'{i:02}.png')


def test_folders_of_equal_names_have_results_of_their_own(config, tmp_path):
  places = ['A/eta0.0', 'A/eta0.5', 'B/eta0.0']
  for seed, place in enumerate(places):
    folder_of_images(tmp_path / place, seed)
    evaluate.evaluate_images(config, tmp_path / 'run', tmp_path / place)
  paths = sorted((tmp_path / 'run' / 'eval').glob('*.json'))
  written = {json.loads(path.read_text())['images'] for path in paths}
  assert written == {str(tmp_path / place) for place in places}
  stems = sorted(path.stem.rpartition('-')[0] for path in paths)
  assert stems == ['eta0.0', 'eta0.0', 'eta0.5']
  # Another judge's result is another result, and repeating one is not.
  before = names(tmp_path / 'run' / 'eval')
  evaluate.evaluate_images(config, tmp_path / 'run', tmp_path / places[0])
  assert names(tmp_path / 'run' / 'eval') == before
  config.eval.extractor = 'another:one'
  evaluate.evaluate_images(config, tmp_path / 'run', tmp_path / places[0])
  assert len(names(tmp_path / 'run' / 'eval', '*.json')) == 4


def test_a_folder_is_named_wherever_the_command_runs(
  config, tmp_path, monkeypatch
):
  folder_of_images(tmp_path / 'photos', 0)
  monkeypatch.chdir(tmp_path / 'photos')
  evaluate.evaluate_images(config, tmp_path / 'run', '.')
  (path,) = (tmp_path / 'run' / 'eval').glob('*.json')
  assert path.name.startswith('photos-')


def test_statistics_of_other_images_are_not_replaced(config, tmp_path):
  path = tmp_path / 'stats.npz'
  config.eval.stats_path = str(path)
  stats.stats(config, tmp_path)
  stats.stats(config, tmp_path)  # The same may be made again.
  save_npz(path, **load_npz(path) | {'fingerprint': 'of other images'})
  before = path.read_bytes()
  with pytest.raises(ValueError, match=f'{path} has statistics of other'):
    stats.stats(config, tmp_path)
  assert path.read_bytes() == before


def test_an_export_replaces_nothing(tmp_path):
  config = points_config()
  weights(config, tmp_path, 0)
  path = tmp_path / 'missing' / 'folder' / 'model.safetensors'
  exchange.export(config, tmp_path, str(path))
  before = path.read_bytes()
  with pytest.raises(ValueError, match='exists already: choose another'):
    exchange.export(config, tmp_path, str(path))
  assert path.read_bytes() == before


def test_a_damaged_result_is_named_and_left_out(tmp_path, capsys):
  config = points_config()
  weights(config, tmp_path, 0)
  (tmp_path / 'eval' / 'step_3-a').mkdir(parents=True)
  damaged = tmp_path / 'eval' / 'step_3-a' / 'result-b.json'
  damaged.write_text('{"step": ')
  evaluate.evaluate(config, tmp_path)
  assert f'warning: {damaged} is damaged' in capsys.readouterr().out
  results = json.loads((tmp_path / 'eval' / 'results.json').read_text())
  assert [result['step'] for result in results] == [4]


def test_guidance_is_shown_beside_the_sampler():
  """Where the network is told classes, which `--mode eval` guides it to."""
  plain = trained.sampler_of(tiny.get_config())
  told = trained.sampler_of(
    tiny.get_config(model__num_labels=10, control__scale=1.5)
  )
  guidance = {'scale': 1.5, 'interval_low': 0.0, 'interval_high': math.inf}
  assert told == plain | guidance and not plain.keys() & guidance
