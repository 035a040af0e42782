"""Progress lines, the log over a resumption, and pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from reporting import results as results_lib
from reporting.pictures import save_grid, save_trajectory
from runtime import progress as progress_lib
from runtime.progress import Log, Progress, duration


@pytest.mark.parametrize(
  ('seconds', 'text'), [(0.9, '0:00:00'), (61, '0:01:01'), (36e4, '100:00:00')]
)
def test_duration(seconds, text):
  assert duration(seconds) == text


def test_progress(monkeypatch, capsys):
  now = [100.0]
  monkeypatch.setattr(progress_lib.time, 'monotonic', lambda: now[0])
  progress = Progress('step', 50, 'steps', start=10, interval=5)
  now[0] = 104.0
  progress(11)  # Too early for a line.
  now[0] = 110.0
  progress(30, 'loss 0.5')
  now[0] = 111.0
  progress(50)  # The last one always comes.
  assert capsys.readouterr().out.splitlines() == [
    'step 30/50 loss 0.5 2 steps/s 0:00:10 left',
    'step 50/50 3.64 steps/s 0:00:00 left',
  ]


def test_progress_without_progress(monkeypatch, capsys):
  monkeypatch.setattr(progress_lib.time, 'monotonic', lambda: 0.0)
  Progress('step', 50, 'steps', interval=0)(0)
  assert capsys.readouterr().out == 'step 0/50 0 steps/s ? left\n'


def read(workdir):
  lines = (workdir / 'train.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_log_goes_on_where_the_checkpoint_was(tmp_path):
  with Log(tmp_path, resumed_at=0) as log:
    for step in (1, 2, 3):
      log.write(step, loss=np.float32(step / 4))
  with (tmp_path / 'train.jsonl').open('a') as file:
    file.write('{"step": 4, "lo')  # Killed while writing.
  with Log(tmp_path, resumed_at=2) as log:
    log.write(3, loss=7, test_loss=8)
  assert read(tmp_path) == [
    {'step': 1, 'loss': 0.25},
    {'step': 2, 'loss': 0.5},
    {'step': 3, 'loss': 7.0, 'test_loss': 8.0},
  ]
  events = list((tmp_path / 'tensorboard').iterdir())
  assert events and all('tfevents' in event.name for event in events)


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_grid(tmp_path, channels):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (5, 2, 3, channels), np.uint8)
  path = tmp_path / 'new' / 'grid.png'
  save_grid(path, images, scale_to=19)
  with Image.open(path) as picture:
    assert picture.mode == {1: 'L', 3: 'RGB', 4: 'RGBA'}[channels]
    assert picture.size == (3 * 6 + 2 * 2, 2 * 4 + 2)
    pixels = np.array(picture).reshape(10, 22, channels)
  # Two rows of three, twice as large, two white pixels between them.
  for i, image in enumerate(images):
    row, column = divmod(i, 3)
    place = np.s_[6 * row : 6 * row + 4, 8 * column : 8 * column + 6]
    np.testing.assert_array_equal(
      pixels[place], image.repeat(2, 0).repeat(2, 1)
    )
    pixels[place] = 255
  assert (pixels == 255).all()
  assert [file.name for file in path.parent.iterdir()] == ['grid.png']


def test_large_images_are_not_enlarged(tmp_path):
  path = tmp_path / 'grid.png'
  save_grid(path, np.zeros((4, 300, 300, 3), np.uint8))
  with Image.open(path) as picture:
    assert picture.size == (602, 602)


def result(step, nfe, fid, **sampler):
  return {
    'step': step,
    'nfe': nfe,
    'count': 100,
    'inception_variant': 'tensorflow',
    'sampler': {'method': 'pc', 'num_steps': nfe, 'num_samples': 64} | sampler,
    'fid': {'value': fid, 'std_error': 0.25, 'note': 'FID of 100 images.'},
    'is_1_split': {'value': None, 'note': 'no logits'},
  }


@pytest.fixture
def axes(monkeypatch):
  """What is drawn, kept from being closed."""
  from matplotlib import pyplot as plt

  figures = []
  monkeypatch.setattr(plt, 'close', figures.append)
  yield lambda: figures[-1].axes
  monkeypatch.undo()
  plt.close('all')


def drawn(ax):
  """{label: ([x], [y])} of an axis."""
  return {
    bars.get_label(): tuple(list(v) for v in bars[0].get_data())
    for bars in ax.containers
  }


def test_curves(tmp_path, axes):
  results = [
    {'step': 1, 'nfe': 10, 'fid': {'value': 9.0, 'std_error': None}},
    {'step': 2, 'loss': {'value': 0.5, 'std_error': 0.1}},
  ]
  path = tmp_path / 'curves.png'
  results_lib.save_curves(path, results, ['loss', 'bpd', 'fid'])
  with Image.open(path) as picture:
    # Panels of loss, FID, and FID against NFE.
    assert picture.size == (1200, 300)
  loss, fid, fid_nfe = axes()
  assert list(drawn(loss).values()) == [([2], [0.5])]
  assert fid.get_xlabel() == 'step' and fid_nfe.get_xlabel() == 'NFE'


def test_each_sampler_has_its_line(tmp_path, axes):
  """Against NFE those with other steps are one line; against step they differ.

  Settings that do not vary are not in the legend.
  """
  results = [
    result(8, 10, 9.0, predictor='none'),
    result(8, 20, 5.0, predictor='none'),
    result(8, 5, 7.0, predictor='heun'),
    result(8, 15, 4.0, predictor='heun'),
    result(4, 10, 20.0, predictor='none'),
  ]
  results_lib.save_curves(tmp_path / 'curves.png', results, ['fid'])
  over_steps, over_nfe = axes()
  assert drawn(over_nfe) == {
    'none, step 8': ([10, 20], [9, 5]),
    'heun, step 8': ([5, 15], [7, 4]),
    'none, step 4': ([10], [20]),
  }
  assert drawn(over_steps)['num_steps 10, none'] == ([4, 8], [20, 9])
  assert len(drawn(over_steps)) == 4
  shown = [text.get_text() for text in over_nfe.get_legend().get_texts()]
  assert shown == list(drawn(over_nfe))


def test_table(tmp_path, capsys):
  results = [
    result(8, 20, 5.0, predictor='none'),
    result(4, 10, 12.3456, predictor='none'),
  ]
  results_lib.save_results(tmp_path, results)
  lines = (tmp_path / 'results.txt').read_text().splitlines()
  assert [' '.join(line.split()) for line in lines] == [
    'of settings NFE N fid is_1_split',
    'step 4 num_steps 10 10 100 12.346 +- 0.25 n/a',
    'step 8 num_steps 20 20 100 5 +- 0.25 n/a',
    'fid: FID of 100 images.',
    'is_1_split: no logits',
  ]
  assert lines[1].index('12.346') == lines[0].index('fid')
  assert '\n'.join(lines) in capsys.readouterr().out
  saved = json.loads((tmp_path / 'results.json').read_text())
  assert [r['step'] for r in saved] == [4, 8]
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'results.json',
    'results.png',
    'results.txt',
  ]


def test_no_curves_of_nothing(tmp_path):
  results_lib.save_curves(tmp_path / 'curves.png', [{'step': 1}], ['fid'])
  assert not any(tmp_path.iterdir())


def test_trajectories_are_strips_and_films(tmp_path):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (5, 12, 8, 8, 3), np.uint8)
  save_trajectory(tmp_path / 'images.png', images)
  with Image.open(tmp_path / 'images.png') as strip:
    pixels = np.asarray(strip)
  # Rows are the first eight examples, columns the frames.
  scale = 1024 // (5 * 8)
  cell = 8 * scale + 2
  assert pixels.shape == (8 * cell - 2, 5 * cell - 2, 3)
  found = pixels[2 * cell :: scale][:8, 3 * cell :: scale][:, :8]
  np.testing.assert_array_equal(found, images[3, 2])
  save_trajectory(tmp_path / 'points.png', rng.normal(size=(4, 99, 2)))
  for name, count in (('images', 5), ('points', 4)):
    with Image.open(tmp_path / f'{name}.gif') as film:
      assert film.n_frames == count
  assert not list(tmp_path.glob('*.part'))
