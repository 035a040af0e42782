"""The mode `eval`: loss, bits/dim, samples and their metrics of checkpoints.

An evaluation is a list of evaluators, each `(run, folder) -> {name: metric}`.
Work is done in batches, each written completely or not at all in a folder whose
name says what it is of (the step, and a hash of all that the samples depend
on). A batch that exists is not made again, and nothing else is read: an
evaluation that was killed continues where it stopped. Features are kept beside
the samples, by the network that made them.

With several hosts, which share the folder, each saves what its devices made.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import evaluation
import experiment
import likelihood
import run_lib
from checkpoints.workdir import Checkpoints
from commands import points, stats, trained
from commands.trained import Run
from configs import schema
from data import batches, datasets
from features import extract as extracting
from features.statistics import ReferenceStats
from reporting import pictures, results
from runtime.devices import (
  all_hosts,
  barrier,
  check_divisible,
  local_rows,
  make_layout,
)
from runtime.files import digest, load_npz, save_npz, write_json
from runtime.progress import Progress, say

Evaluator = Callable[[Run, pathlib.Path], dict[str, Any]]


def _host_file(folder, name, host=None):
  """Return where a host keeps its part of a batch."""
  host = jax.process_index() if host is None else host
  suffix = f'_host_{host}' if jax.process_count() > 1 else ''
  return folder / f'{name}{suffix}.npz'


def _as_dicts(metrics):
  return {name: dataclasses.asdict(metric) for name, metric in metrics.items()}


# ----------------------------------------------------------------------- loss


def loss_evaluator(model, test_set, layout) -> Evaluator:
  """Return an evaluator of the test loss and, of classifiers, the accuracy."""
  eval_loss = run_lib.make_eval_loss(model, layout)
  batch = model.config.eval.batch_size

  def evaluate_loss(run, folder):
    path = folder / 'loss.json'
    if not all_hosts(path.is_file()):
      means = run_lib.test_loss(eval_loss, run.params, test_set, batch, layout)
      metrics = {
        name: evaluation.Metric(value=value, count=len(test_set))
        for name, value in means.items()
      }
      if jax.process_index() == 0:
        write_json(path, _as_dicts(metrics))
      barrier('loss')
    return json.loads(path.read_text())

  return evaluate_loss


# ----------------------------------------------------------------- likelihood


def _bits_of_pass(compute, run, test_set, paths, repeat):
  """Compute and write what is missing of one pass over the test set."""
  config, batch = run.model.config, run.model.config.eval.batch_size
  missing = [i for i, path in enumerate(paths) if not all_hosts(path.is_file())]
  if not missing:
    return
  rng = jax.random.fold_in(jax.random.key(config.seed), repeat)
  progress = Progress('bits/dim', len(paths), 'batches', start=missing[0])
  for number, images, mask in run_lib.eval_batches(
    test_set, batch, run.layout, start=missing[0]
  ):
    if number not in missing:
      continue
    bits, error, nfe, success = compute(
      run.params, jax.random.fold_in(rng, number), images['image']
    )
    if not success:
      raise FloatingPointError(
        f'The ODE solver failed on test batch {number}; larger '
        'config.sampling.rtol and atol may help.'
      )
    mask = multihost_utils.process_allgather(mask, tiled=True)
    bits, error = (np.asarray(v)[np.asarray(mask) > 0] for v in (bits, error))
    save_npz(paths[number], bits=bits, error=error, nfe=np.asarray(nfe))
    progress(number + 1)


def _summary(passes, dims):
  """Return {'bits_per_dim': .., 'nats': ..} of the batches of each pass."""
  bits = [np.concatenate([part['bits'] for part in parts]) for parts in passes]
  per_image = np.mean(bits, axis=0)
  metric = evaluation.Metric(
    value=float(per_image.mean()),
    count=len(per_image),
    std_error=float(per_image.std(ddof=1) / math.sqrt(len(per_image))),
  )
  parts = [part for parts in passes for part in parts]
  errors = np.concatenate([part['error'] for part in parts])
  probe_error = float(np.sqrt(np.sum(errors**2)) / len(errors))
  bits = dataclasses.asdict(metric) | {
    'probe_error': None if math.isnan(probe_error) else probe_error,
    'repeats': len(passes),
    'nfe': float(np.mean([float(part['nfe']) for part in parts])),
  }
  nats = dict(bits)
  for key in ('value', 'std_error', 'probe_error'):
    if bits[key] is not None:
      nats[key] = bits[key] * likelihood.nats_per_bit(dims)
  return {'bits_per_dim': bits, 'nats': nats}


def likelihood_evaluator(model, test_set, layout) -> Evaluator:
  """Return an evaluator of bits/dim, and nats, of the test set.

  They are means over `config.eval.bpd_repeats` dequantisations of every image,
  each {'value', 'std_error', 'probe_error', 'count', 'repeats', 'nfe'}.
  `std_error` is the standard error over images; `probe_error` is the part of it
  that more probes would lower: 0 with the exact trace, and None with a single
  probe, whose error is not known.
  """
  compute = jax.jit(
    model.bits_per_dim,
    in_shardings=(layout.replicated, None, layout.split),
    out_shardings=layout.replicated,
  )
  chosen = model.config.eval
  name = f'bpd_{chosen.bpd_trace}_{chosen.bpd_probes}_{chosen.bpd_eps:g}'
  numbers = range(math.ceil(len(test_set) / chosen.batch_size))

  def evaluate_likelihood(run, folder):
    passes = []
    for repeat in range(chosen.bpd_repeats):
      paths = [_host_file(folder, f'{name}_{repeat}_{i}') for i in numbers]
      _bits_of_pass(compute, run, test_set, paths, repeat)
      passes.append([load_npz(path) for path in paths])
    return _summary(passes, math.prod(model.shape(1)))

  return evaluate_likelihood


# -------------------------------------------------------------------- samples


def _feature_file(folder, name, extract, host=None):
  """Return where a host keeps the features of its part of a batch."""
  logits = '-logits' if getattr(extract, 'with_logits', False) else ''
  name = f'{name}-{extracting.identity_of(extract)}{logits}'
  return _host_file(folder, name, host)


def _read_features(folder, names, extract, count):
  """Yield what the files of all hosts hold of the first `count` images."""
  for name in names:
    for host in range(jax.process_count()):
      part = load_npz(_feature_file(folder, name, extract, host))
      part = {key: rows[:count] for key, rows in part.items()}
      count -= len(part['pool_3'])
      if len(part['pool_3']):
        yield part


def _make_batches(run, folder, extract):
  """Make this host's part of all batches of samples, and of their features.

  Returns:
    The names of the batches.
  """
  chosen = run.model.config.eval
  size = chosen.batch_size
  names = [f'samples_{i}' for i in range(math.ceil(chosen.num_samples / size))]
  drawn = trained.draw(
    run,
    len(names) * size,
    size,
    split=True,
    skip=lambda i: all_hosts(_host_file(folder, names[i]).is_file()),
  )
  for number, found in drawn:
    path = _host_file(folder, names[number])
    if found is not None:
      images = run.model.to_data(local_rows(found.x))
      save_npz(path, images=images, nfe=np.asarray(found.nfe))
    scored = _feature_file(folder, names[number], extract)
    if not scored.is_file():
      images = load_npz(path)['images']
      save_npz(scored, **extracting.outputs_of(images, extract))
  return names


def _read_samples(folder, names, count):
  """Return the first `count` images, and the mean NFE of all batches."""
  files = [
    load_npz(_host_file(folder, name, host))
    for name in names
    for host in range(jax.process_count())
  ]
  images = np.concatenate([file['images'] for file in files])
  return images[:count], float(np.mean([file['nfe'] for file in files]))


def _scores(config, folder, names, extract, reference, count):
  """Return metrics of the first `count` images, on the first host only."""
  barrier('features')
  if jax.process_index():
    return {}
  scores = evaluation.score_samples(
    _read_features(folder, names, extract, count),
    reference,
    seed=config.seed,
    allow_few=config.eval.allow_few_samples,
  )
  return _as_dicts(scores)


@dataclasses.dataclass(frozen=True)
class Judge:
  """What samples are compared by: an extractor and reference statistics."""

  extract: Callable
  reference: ReferenceStats | None  # None on hosts that compute no metrics.

  @classmethod
  def of(cls, config, workdir, count):
    """Return that of a config; say at once if there will be no FID."""
    extract = extracting.extractor(config.eval)
    reference = stats.reference(config, workdir, extract)
    few = reference and evaluation.too_few(count, reference.dimensions)
    if few and not config.eval.allow_few_samples:
      say(f'warning: no FID: {few}')
    return cls(extract, reference)

  @property
  def facts(self):
    """What results say about it."""
    return {
      'inception_variant': extracting.variant_of(self.extract),
      'reference': {
        key: getattr(self.reference, key, None)
        for key in ('count', 'fingerprint')
      },
    }


def sample_evaluator(judge) -> Evaluator:
  """Return an evaluator that draws images and compares them with the data."""

  def evaluate_samples(run, folder):
    config = run.model.config
    count = config.eval.num_samples
    names = _make_batches(run, folder, judge.extract)
    result = {'sampler': trained.sampler_of(config), 'count': count}
    result |= _scores(
      config, folder, names, judge.extract, judge.reference, count
    )
    if jax.process_index() == 0:
      images, result['nfe'] = _read_samples(folder, names, count)
      pictures.save_grid(folder / 'samples.png', images[:64])
      say(f'Samples are in {folder}/samples.png.')
    return result

  return evaluate_samples


# ------------------------------------------------------------------- commands


def evaluate(config, workdir, eval_folder='eval'):
  """Evaluate the checkpoints that config.eval.checkpoint names.

  Writes workdir/eval_folder/step_N-HASH/result-HASH.json, with config, step,
  seed, counts, sampler, NFE and versions beside the metrics; samples.png there;
  and a table and curves of all results in the folder.

  Raises:
    FileNotFoundError, ValueError: there is no such checkpoint, data or weights;
      it never waits for one.
  """
  model, layout = experiment.build(config), make_layout()
  workdir, chosen = pathlib.Path(workdir), config.eval
  check_divisible(chosen.batch_size, 'config.eval.batch_size')
  with Checkpoints(workdir) as saved:
    steps = saved.select(chosen.checkpoint)
    experiment.claim(config, workdir, write=False)
    test_set = datasets.load(config.data, 'test')
    facts, evaluators = trained.facts(config), []
    if chosen.enable_loss:
      evaluators.append(loss_evaluator(model, test_set, layout))
    if chosen.enable_bpd:
      evaluators.append(likelihood_evaluator(model, test_set, layout))
    if chosen.enable_sampling and config.data.dims:
      evaluators.append(points.evaluator(test_set))
    elif chosen.enable_sampling:
      judge = Judge.of(config, workdir, chosen.num_samples)
      facts |= judge.facts
      evaluators.append(sample_evaluator(judge))
    # What else results depend on, besides what their folder is named by.
    settings = schema.marked(config, 'result')
    key = digest(settings, facts.get('inception_variant'))[:8]
    for step in steps:
      run = trained.restore_step(model, layout, saved, workdir, step)
      name = f'{run.name}-{test_set.fingerprint[:8]}'
      folder = workdir / eval_folder / name
      folder.mkdir(parents=True, exist_ok=True)
      say(f'Checkpoint {step}: results go to {folder}.')
      result = {'step': step}
      for evaluator in evaluators:
        result |= evaluator(run, folder)
      if jax.process_index() == 0:
        write_json(folder / f'result-{key}.json', result | facts)
      barrier(f'step_{step}')
  if jax.process_index() == 0:
    summarize(workdir / eval_folder)


def summarize(folder):
  """Print all results in a folder, and write them as table and curves."""
  paths = sorted(folder.glob('step_*-*/result-*.json'))
  found = [json.loads(path.read_text()) for path in paths]
  results.save_results(folder, found, schema.names_marked('cost'))


def evaluate_images(config, workdir, path, eval_folder='eval'):
  """Score user-supplied images, a folder or an .npz, against config.data.

  They are taken in a fixed random order, because they may be sorted by class.
  Writes workdir/eval_folder/NAME.json.
  """
  schema.check(config)
  images = datasets.user_images(config.data, path)
  judge = Judge.of(config, workdir, len(images))
  extract, batch = judge.extract, config.eval.batch_size
  host, hosts = jax.process_index(), jax.process_count()
  path, out = pathlib.Path(path), pathlib.Path(workdir) / eval_folder
  key = digest(images.fingerprint, batch, hosts)[:8]
  folder = out / f'images_{path.stem}-{key}'
  names = [f'images_{i}' for i in range(math.ceil(len(images) / batch))]
  order = batches.permutation(len(images), 0, 0)
  progress = Progress('features', len(images), 'images')
  for number, name in enumerate(names):
    file = _feature_file(folder, name, extract)
    members = order[number * batch : (number + 1) * batch]
    if not file.is_file():
      mine = members[host::hosts]
      # A host without a share of a small batch shows the others the format.
      some = images.fetch(mine if len(mine) else members)
      outputs = extracting.outputs_of(some, extract)
      outputs = {k: rows[: len(mine)] for k, rows in outputs.items()}
      save_npz(file, **outputs)
    progress(number * batch + len(members))
  result = {'images': str(path), 'count': len(images)}
  result |= {'fingerprint': images.fingerprint}
  result |= _scores(
    config, folder, names, extract, judge.reference, len(images)
  )
  if host == 0:
    result |= trained.facts(config) | judge.facts
    write_json(out / f'{path.stem}.json', result)
    say(results.table([result]))
    say(f'Results are in {out / path.stem}.json.')
