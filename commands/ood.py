"""Evaluation of how well a model tells other data from its own."""

import collections
import dataclasses
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

import evaluation
import run_lib
from data import datasets
from data import ood as sets
from reporting import pictures
from runtime.progress import say


def _log_norms(model, layout):
  """Return norms(run, dataset) -> logarithms of norms of the score, [N, L]."""
  compute = jax.jit(
    model.log_score_norms,
    in_shardings=(layout.replicated, None, layout.split),
    out_shardings=layout.replicated,
  )
  size, key = model.config.eval.batch_size, jax.random.key(model.config.seed)

  def norms(run, dataset):
    found = []
    for number, images, mask in run_lib.eval_batches(dataset, size, layout):
      rng = jax.random.fold_in(key, number)
      values = compute(run.params, rng, images['image'])
      mask = multihost_utils.process_allgather(mask, tiled=True)
      found.append(np.asarray(values)[np.asarray(mask) > 0])
    return np.concatenate(found)

  return norms


def _named(chosen):
  """Return {short name: set} of config.eval.ood."""
  short = [s if s in sets.SETS else pathlib.Path(s).stem for s in chosen]
  twice = [s for s, n in collections.Counter([*short, 'test']).items() if n > 1]
  if twice:
    raise ValueError(
      f'config.eval.ood: two sets have the name {twice[0]!r} in the results; '
      "rename one ('test' is the test set)."
    )
  return dict(zip(short, chosen, strict=True))


def evaluator(model, test_set, layout, nats):
  """Return an evaluator of AUROCs of all sets of config.eval.ood.

  A metric 'auroc_SCORE_SET' is that of a score of `evaluation.OOD_SCORES`,
  between the test set and another. Histograms of the scores are in ood.png.

  Args:
    model: the Experiment.
    test_set: Dataset of test examples.
    layout: where arrays live.
    nats: function of (run, folder, dataset) that returns -log p(x), [N].

  Raises:
    ValueError, FileNotFoundError: a set cannot be used.
  """
  config, count = model.config, model.config.eval.ood_images
  if model.condition:
    raise ValueError(
      'config.eval.ood scores p(x), but the network is told conditions: leave '
      'it empty.'
    )
  others = {'test': sets.some_of(test_set, count)} | {
    short: sets.load(config.data, name, test_set, count)
    for short, name in _named(config.eval.ood).items()
  }
  train = sets.some_of(datasets.load(config.data, 'train'), count)
  norms = _log_norms(model, layout)

  def evaluate_ood(run, folder):
    def see(dataset):
      of_score = norms(run, dataset)
      if not np.isfinite(of_score).all():
        raise FloatingPointError(
          f'The score of some examples of {dataset.name} is not finite.'
        )
      return evaluation.Seen(nats(run, folder, dataset), of_score)

    known, seen = see(train), {name: see(v) for name, v in others.items()}
    scores = {
      score: {name: function(known, v) for name, v in seen.items()}
      for score, function in evaluation.OOD_SCORES.items()
    }
    if jax.process_index() == 0:
      pictures.save_scores(folder / 'ood.png', scores)
      say(f'Histograms of scores are in {folder}/ood.png.')
    return {
      f'auroc_{score}_{name}': dataclasses.asdict(
        evaluation.auroc(of_sets['test'], of_sets[name])
      )
      for score, of_sets in scores.items()
      for name in others
      if name != 'test'
    }

  return evaluate_ood
