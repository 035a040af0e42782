"""The ablation: what its rows differ in, what is kept, and its table."""

import json

import jax
import numpy as np
import pytest

import experiment
import run_lib
from benchmarks import ablation
from configs import schema
from configs.toy import rings_vp
from data import datasets
from runtime.devices import make_layout


def leaves(row):
  config = ablation.config_of(row, 640)
  schema.check(config)
  return dict(schema.leaves(config)) | {'average': row.average}


def test_rows_differ_in_one_ingredient():
  groups = ablation.rows()
  base, *added = groups[ablation.PAPER][:10]
  modern, *changed = groups[ablation.MODERN][:10]
  assert len(ablation.INGREDIENTS) == 9
  for name, ingredient, one, other in zip(
    ablation.INGREDIENTS, ablation.INGREDIENTS.values(), added, changed,
    strict=True,
  ):  # fmt: skip
    inside = name in ablation.RECIPE
    assert one.name == f'+ {name}'
    assert other.name == f'{"-" if inside else "+"} {name}'
    for first, second in ((base, one), (modern, other)):
      first, second = leaves(first), leaves(second)
      differ = {k for k in first | second if first.get(k) != second.get(k)}
      if isinstance(ingredient, dict):
        assert differ == set(ingredient)
      elif isinstance(ingredient, float):
        assert differ == {'average'}
      else:
        assert {'sde.name', 'model.conditioning'} < differ
        assert not differ & {'optim.lr', 'training.batch_size', 'optim.warmup'}
  chosen = leaves(modern)
  assert chosen['sde.name'] == 'edm' and chosen['model.num_labels'] == 10
  assert chosen['optim.schedule'] == 'linear' and chosen['average'] == 0.1


@pytest.fixture(scope='module')
def trainer(tmp_path_factory):
  data = datasets.load(rings_vp.get_config().data, 'train')
  return ablation.Trainer(tmp_path_factory.mktemp('ablation'), data)


def small(**training):
  config = rings_vp.get_config()
  with config.unlocked():
    config.model.update(nf=8, num_layers=1)
    config.training.update(
      n_iters=8, batch_size=16, n_jitted_steps=2, ema_lengths=(0.1,), **training
    )
  return config


@pytest.mark.slow
def test_a_training_is_that_of_run_lib(trainer, monkeypatch):
  """It has the numbers of a run with this seed, and is not made again."""
  config, data = small(), trainer.data
  found = trainer(config, 3)
  with config.unlocked():
    config.seed = 3
  model, layout = experiment.build(config), make_layout()
  step = run_lib.make_train_steps(model, layout)
  state = run_lib.make_init(model, layout)[1]()
  fetch = run_lib.make_fetch(model, data)
  for start in range(0, 8, 2):
    state, _ = step(state, fetch(start))
    if start == 0:
      weak = jax.tree.map(np.asarray, state.averages[0.1])
  wanted = {'0.0': state.ema, '0.1': state.averages[0.1], 'weak': weak}
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, found, wanted)

  monkeypatch.setattr(trainer, '_trained', None)
  kept = trainer(small(), 3)
  jax.tree.map(np.testing.assert_array_equal, kept, found)
  with pytest.raises(TypeError):
    trainer(small(), 4)


def test_names_cover_what_trainings_depend_on(trainer):
  names = {
    trainer.name(small(), 0),
    trainer.name(small(), 1),
    trainer.name(small(), 0, 'another'),
    trainer.name(small(eps=0.1), 0),
  }
  assert len(names) == 4
  sampled = small()
  with sampled.unlocked():
    sampled.sampling.num_steps = 7
  assert trainer.name(sampled, 0) in names


def test_differences_beyond_two_standard_errors():
  """They are paired: seeds that all change alike show it clearly."""
  members = [
    {'row': 'first', 'distances': [1.0, 1.2, 1.7]},
    {'row': 'better', 'distances': [0.9, 1.0, 1.5]},
    {'row': 'the same', 'distances': [1.0, 1.5, 1.6]},
  ]
  _, better, same = ablation.compared(members)
  assert better[1] == pytest.approx(3.4 / 3)
  assert better[3:] == pytest.approx((-0.5 / 3, 0.1 / 3))
  lines = ablation.table({'rows': {'group': members}}).splitlines()
  assert lines[2] == '| first | 1.30 ± 0.21 |  |'
  assert lines[3] == '| better | 1.13 ± 0.19 | **-0.17 ± 0.03** |'
  assert lines[4].endswith('| +0.07 ± 0.12 |') and same[0] == 'the same'


def test_the_table_is_that_of_the_measurements():
  results = json.loads(ablation.RESULTS.read_text())
  assert ablation.table(results) in ablation.PAGE.read_text()
  assert results['seeds'] >= 5
  for group, members in ablation.rows().items():
    measured = [member['row'] for member in results['rows'][group]]
    assert measured == [row.name for row in members if row.name in measured]
    assert all(
      len(m['distances']) == results['seeds'] for m in results['rows'][group]
    )
