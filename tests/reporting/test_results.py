"""Tables, curves and pictures of results."""

import json

import numpy as np
import pytest
from PIL import Image

from reporting import results
from reporting.pictures import save_grid, save_trajectory
from runtime.files import write_json


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
  """Keep the figures from being closed, and return the axes of the last."""
  from matplotlib import pyplot as plt

  figures = []
  monkeypatch.setattr(plt, 'close', figures.append)
  yield lambda: figures[-1].axes
  monkeypatch.undo()
  plt.close('all')


def drawn(ax):
  """Return {label: ([x], [y])} of an axis."""
  return {
    bars.get_label(): tuple(list(v) for v in bars[0].get_data())
    for bars in ax.containers
  }


def test_curves(tmp_path, axes):
  found = [
    {'step': 1, 'nfe': 10, 'fid': {'value': 9.0, 'std_error': None}},
    {'step': 2, 'loss': {'value': 0.5, 'std_error': 0.1}},
  ]
  path = tmp_path / 'curves.png'
  results.save_curves(path, found, ['loss', 'bpd', 'fid'])
  with Image.open(path) as picture:
    # Panels of loss, FID, and FID against NFE.
    assert picture.size == (1200, 300)
  loss, fid, fid_nfe = axes()
  assert list(drawn(loss).values()) == [([2], [0.5])]
  assert fid.get_xlabel() == 'step' and fid_nfe.get_xlabel() == 'NFE'


def test_each_sampler_has_its_line(tmp_path, axes):
  """Results that differ in the cost only are one line against the NFE.

  Against the step they are several. Settings that do not vary are not in the
  legend.
  """
  found = [
    result(8, 10, 9.0, predictor='none'),
    result(8, 20, 5.0, predictor='none'),
    result(8, 5, 7.0, predictor='heun'),
    result(8, 15, 4.0, predictor='heun'),
    result(4, 10, 20.0, predictor='none'),
  ]
  results.save_curves(tmp_path / 'curves.png', found, ['fid'], ['num_steps'])
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
  found = [
    result(8, 20, 5.0, predictor='none'),
    result(4, 10, 12.3456, predictor='none'),
  ]
  results.save_results(tmp_path, found)
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


def test_metrics_are_discovered(tmp_path):
  """A metric that no list names is a column and a panel; other dicts are not.

  The files are written twice, the second time from what the first time wrote.
  """
  found = [
    {'step': 4, 'mine': {'value': 1.0}, 'config': {'seed': 1}},
    {'step': 8, 'yours': {'value': 2.0}, 'mine': {'value': None, 'note': 'no'}},
  ]
  assert results.metrics(found) == ['mine', 'yours']
  names = ('true_a', 'true_b', 'c', 'a')
  pairs = [{'step': 1, name: {'value': 0.0}} for name in names]
  assert results.metrics(pairs) == ['true_b', 'c', 'a', 'true_a']
  results.save_results(tmp_path, found)
  text = (tmp_path / 'results.txt').read_text()
  again = json.loads((tmp_path / 'results.json').read_text())
  results.save_results(tmp_path, again)
  assert (tmp_path / 'results.txt').read_text() == text
  assert [' '.join(line.split()) for line in text.splitlines()] == [
    'of mine yours',
    'step 4 1',
    'step 8 n/a 2',
    'mine: no',
  ]


def test_results_of_the_first_version_are_read(tmp_path):
  """Its 'sampler' held all options, also those of other commands."""
  old = [
    {
      'step': 1,
      'sampler': {'num_samples': n, 'method': 'pc'},
      'fid': {'value': n},
    }
    for n in (1, 2)
  ]
  write_json(tmp_path / 'old.json', old)
  table = results.table(json.loads((tmp_path / 'old.json').read_text()))
  assert [line.split() for line in table.splitlines()] == [
    ['of', 'fid'],
    ['step', '1', '1'],
    ['step', '1', '2'],
  ]


def test_no_curves_of_nothing(tmp_path):
  results.save_curves(tmp_path / 'curves.png', [{'step': 1}], ['fid'])
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


def test_numbers_that_are_not_known():
  """NaN of an older file is shown as what it is: not known."""
  nan = float('nan')
  metrics = {
    'loss': {'value': 1.5, 'std_error': nan},
    'fid': {'value': nan, 'std_error': 0.1, 'note': 'why'},
    'bits': {'value': 3.0, 'std_error': None, 'probe_error': nan},
  }
  text = results.table([{'step': 1, **metrics}])
  assert 'nan' not in text and 'n/a' in text and '+-' not in text
