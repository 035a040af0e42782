"""Tests of what a workdir knows of its data: a resume on others is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import experiment
import run_lib
from checkpoints.workdir import Checkpoints
from commands import control, evaluate, exchange, sample
from data import record
from runtime.files import load_npz
from tests import tiny
from tests.data.shared import numbered
from tests.data.test_folders import folder_of

# The network does not matter here.
pytestmark = pytest.mark.usefixtures('quick_network', 'shared_programs')


def config(path, steps, **changes):
  """Return a run of a network that is told two classes, on a folder."""
  changes = {
    'data__dataset': 'folder', 'data__path': str(path),
    'training__n_iters': steps, 'sampling__num_samples': 5,
    'sampling__corrector': 'none',
  } | changes  # fmt: skip
  made = tiny.get_config(**changes)
  with made.unlocked():
    made.model.num_labels = 2
  return made


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Return two folders of images of equal names and sizes, and a copy."""
  root = tmp_path_factory.mktemp('images')
  images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
  for name, x in (('a', images), ('b', 255 - images), ('copy', images)):
    (root / name).mkdir()
    folder_of(root / name / 'cat', x)
    folder_of(root / name / 'dog', x)
  return root


@pytest.fixture(scope='module')
def run(folders, tmp_path_factory):
  """Return the workdir of a run of two steps on folder a."""
  workdir = tmp_path_factory.mktemp('run') / 'run'
  run_lib.train(config(folders / 'a', 2), workdir)
  return workdir


def test_a_resume_on_other_data_is_refused(folders, run, capsys, monkeypatch):
  # What a step computes does not matter here.
  step = lambda state, _: (state._replace(step=state.step + 1), np.zeros(1))
  monkeypatch.setattr(run_lib, 'make_train_steps', lambda *_: step)
  monkeypatch.setattr(run_lib, 'test_loss', lambda *_, limit: {'test_loss': 0})
  with pytest.raises(ValueError, match='other training data .*allow_other_dat'):
    run_lib.train(config(folders / 'b', 3), run)
  with Checkpoints(run) as saved:
    assert saved.last == 2
  run_lib.train(config(folders / 'copy', 3), run)
  assert 'Resuming at step 2.' in capsys.readouterr().out
  (run / record.FILE).unlink()  # As in a workdir of an older version.
  run_lib.train(config(folders / 'a', 4), run)
  allowed = {'training__allow_other_data': True}
  run_lib.train(config(folders / 'b', 5, **allowed), run)
  assert 'warning: ' in capsys.readouterr().out
  run_lib.train(config(folders / 'b', 6), run)
  with pytest.raises(ValueError, match='other training data'):
    run_lib.train(config(folders / 'a', 7), run)


def test_training_says_what_it_is_trained_on(folders, tmp_path, capsys):
  (folders / 'copy' / 'x.gif').write_bytes(b'')
  run_lib.train(config(folders / 'copy', 1), tmp_path / 'run')
  out = capsys.readouterr().out
  assert (
    'Data: 36 images of folder and 4 for tests; 2 classes: 0 cat, 1 dog.\n'
    'Left out: 1 .gif (.png, '
  ) in out
  assert record.classes(tmp_path / 'run') == ('cat', 'dog')


def test_other_names_of_classes_are_said(tmp_path, capsys):
  named = lambda *names: dataclasses.replace(numbered(4), classes=names)
  data = named('cat', 'dog')
  record.write(tmp_path, data, data)
  record.check(tmp_path, data, data)
  assert not capsys.readouterr().out
  record.check(tmp_path, named('cats', 'dogs'), data)
  assert 'classes cat, dog of' in (out := capsys.readouterr().out)
  assert 'are now called cats, dogs, in the same order.' in out


def test_a_class_by_its_name(folders, run):
  for label, number in (('dog', 1), ('cat', 0), (1, 1), ('0', 0)):
    changes = {'control__name': 'labels', 'control__label': label}
    control.sample(config(folders / 'a', 2, **changes), run)
    newest = max(
      (run / 'samples').glob('labels-*.npz'),
      key=lambda path: path.stat().st_mtime_ns,
    )
    assert set(load_npz(newest)['label']) == {number}
  for label in ('bird', 'Dog', 2, '2', '1.5'):
    changes = {'control__name': 'labels', 'control__label': label}
    with pytest.raises(ValueError, match=f'label={label!r} is no class of 2'):
      control.sample(config(folders / 'a', 2, **changes), run)


def test_an_imported_run_knows_the_names_of_its_classes(folders, run, tmp_path):
  made, file = config(folders / 'a', 2), tmp_path / 'a.safetensors'
  exchange.export(made, run, file)
  exchange.import_released(made, tmp_path / 'new', file)
  assert record.classes(tmp_path / 'new') == ('cat', 'dog')
  record.check(tmp_path / 'new', numbered(4), numbered(2))
  made = config(folders / 'a', 2, control__name='labels', control__label='dog')
  task = control.label_task(experiment.build(made), tmp_path / 'new')
  assert set(task.rows['label']) == {1}


def test_numbers_that_are_names():
  names = ('1', '2', '10')
  assert control.class_number('10', 3, names) == 2
  assert control.class_number(2, 3, names) == 2
  assert control.class_number('-1', 3, names) == -1
  with pytest.raises(ValueError, match='no class of 3'):
    control.class_number('0', 3, names)
  with pytest.raises(ValueError, match='no class of 2'):
    control.class_number('c', 2, ('a', 'b', 'c'))


def test_samples_are_saved_with_the_classes_that_were_drawn(folders, run):
  """Those that the network was told, as JAX draws them from the key."""
  made = config(folders / 'a', 2, eval__batch_size=4 * jax.device_count())
  made.sampling.num_samples = 6 * jax.device_count()
  sample.sample(made, run)
  (path,) = (run / 'samples').glob('step_*.npz')
  label = load_npz(path)['label']
  assert label.shape == (6 * jax.device_count(),) and label.dtype == np.int32
  drawn = []
  for number in range(2):
    rng = jax.random.fold_in(jax.random.key(made.seed), number)
    rng = jax.random.fold_in(jax.random.split(rng)[1], 1)
    drawn.append(jax.random.randint(rng, (4 * jax.device_count(),), 0, 2))
  np.testing.assert_array_equal(label, np.concatenate(drawn)[: len(label)])


def means(images):
  """Return features of images: means of their rows, [N, 8]."""
  return images.mean(axis=(2, 3))


def test_evaluation_saves_samples_with_their_classes(folders, run):
  made = config(
    folders / 'a', 2, eval__batch_size=8 * jax.device_count(),
    eval__num_samples=12, eval__allow_few_samples=True, eval__enable_loss=False,
    eval__extractor='tests.data.test_record:means',
  )  # fmt: skip
  evaluate.evaluate(made, run)
  batches = list((run / 'eval').glob('step_*/samples_?.npz'))
  assert batches
  for path in batches:
    arrays = load_npz(path)
    assert len(arrays['label']) == len(arrays['images']) > 0
    assert set(arrays['label']) <= {0, 1}


def test_photos_of_any_size_are_inpainted(folders, run, tmp_path):
  x = np.random.default_rng(1).integers(0, 256, (3, 30, 20, 1), np.uint8)
  photos = folder_of(tmp_path / 'photos', x)
  changes = {'control__name': 'inpaint', 'control__images': str(photos)}
  control.sample(config(folders / 'a', 2, **changes), run)
  (path,) = (run / 'samples').glob('inpaint-*.npz')
  assert load_npz(path)['originals'].shape == (3, 8, 8, 1)
  # Other images under the same path are not written over these.
  for file in photos.iterdir():
    file.unlink()
  photos.rmdir()
  folder_of(photos, 255 - x)
  control.sample(config(folders / 'a', 2, **changes), run)
  assert len(list((run / 'samples').glob('inpaint-*.npz'))) == 2


@pytest.mark.parametrize('damage', ['', '[]', '{"train": 1}', 'null'])
def test_a_damaged_record_is_named(damage, tmp_path):
  (tmp_path / record.FILE).write_text(damage)
  with pytest.raises(ValueError, match='on.json is damaged .* remove it'):
    record.check(tmp_path, numbered(4), numbered(2))


def test_record_of_the_test_data(tmp_path):
  train, test = numbered(4), numbered(2)
  record.check(tmp_path, train, test)
  record.write(tmp_path, train, test)
  record.check(tmp_path, train, test)
  assert json.loads((tmp_path / record.FILE).read_text())['classes'] == []
  with pytest.raises(ValueError, match='other test data'):
    record.check(tmp_path, train, numbered(3))
  record.check(tmp_path, train, numbered(3), allow_other=True)
