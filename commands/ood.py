"""Evaluation of how well a model tells other data from its own."""

import dataclasses

import jax
import numpy as np

import evaluation
import run_lib
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
      found += run_lib.without_padding(mask, values)
    return np.concatenate(found)

  return norms


def evaluator(model, sets, layout, nats):
  """Return an evaluator of AUROCs of all sets of config.eval.ood.

  A metric 'auroc_SCORE_SET' is that of a score of `evaluation.OOD_SCORES`,
  between the test set and another. Histograms of the scores are in ood.png.

  Args:
    model: the Experiment.
    sets: what `data.ood.load` returns.
    layout: where arrays live.
    nats: function of (run, folder, dataset) that returns -log p(x), [N].
  """
  norms = _log_norms(model, layout)

  def evaluate_ood(run, folder):
    seen = {}
    for name, dataset in sets.items():
      of_score = norms(run, dataset)
      if not np.isfinite(of_score).all():
        raise FloatingPointError(
          f'The score of some examples of {name!r} is not finite.'
        )
      seen[name] = evaluation.Seen(nats(run, folder, dataset), of_score)
    train = seen.pop('train')
    scores = {
      score: {name: function(train, v) for name, v in seen.items()}
      for score, function in evaluation.OOD_SCORES.items()
    }
    if jax.process_index() == 0:
      pictures.save_scores(folder / 'ood.png', scores)
      say(f'Histograms of scores are in {folder}/ood.png.')
    return {
      f'auroc_{score}_{name}': dataclasses.asdict(
        evaluation.auroc(of_sets['test'], values)
      )
      for score, of_sets in scores.items()
      for name, values in of_sets.items()
      if name != 'test'
    }

  return evaluate_ood
