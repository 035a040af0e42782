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
import functools
import glob
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import evaluation
import experiment
import likelihood
import run_lib
from checkpoints.workdir import Checkpoints
from commands import ood, points, stats, trained
from commands.trained import Run
from configs import schema
from data import batches, datasets
from data import ood as other_sets
from features import extract as extracting
from features.statistics import ReferenceStats
from reporting import pictures, results
from runtime.devices import (
  all_hosts,
  barrier,
  check_divisible,
  local_rows,
  make_layout,
  on_first_host,
)
from runtime.files import (
  check_output,
  digest,
  load_npz,
  save_npz,
  write_json,
)
from runtime.progress import Progress, say
from solvers import ode

Evaluator = Callable[[Run, pathlib.Path], dict[str, Any]]


def _part(folder, name, host, hosts):
  """Return where one of some hosts keeps its part of a batch."""
  suffix = f'_of_{hosts}_host_{host}' if hosts > 1 else ''
  return folder / f'{name}{suffix}.npz'


def _my_part(folder, name):
  """Return where this host keeps its part of a batch."""
  return _part(folder, name, jax.process_index(), jax.process_count())


def _parts(folder, name):
  """Return the files of a batch in order, or [] if it is not complete.

  Any number of hosts may have written them: an evaluation that several hosts
  begin can be finished by another number of hosts.
  """
  counts = {1} | {
    int(path.stem.rpartition('_of_')[2].partition('_host_')[0])
    for path in folder.glob(f'{glob.escape(name)}_of_*_host_0.npz')
  }
  for hosts in sorted(counts):
    paths = [_part(folder, name, host, hosts) for host in range(hosts)]
    if all(path.is_file() for path in paths):
      return paths
  return []


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


# Attempted steps of the ODE solver between two reports of progress.
STRETCH = 5


def jit_bits(model, layout):
  """Return (begin, proceed), the programs of a likelihood in stretches.

  Both are called with (params, rng, image, condition, state), where the state
  is None for `begin`, and return (bits, error, found, done, state).
  """
  whole, split = layout.replicated, layout.split
  y = split, layout.one_step
  state = ode.OdeState(
    t=whole, y=y, slope=y, h=whole, rejected=whole, steps=whole, stuck=whole,
    finite=whole,
  )  # fmt: skip

  def stretch(params, rng, image, condition, state):
    end = None if state is None else state.steps + STRETCH
    bits, error, found = model.bits_so_far(
      params, rng, image, state, end, condition
    )
    state, found = found.state, found._replace(state=None, z=None)
    return bits, error, found, ode.arrived_or_stuck(state, 1.0), state

  return tuple(
    jax.jit(
      stretch,
      in_shardings=(whole, None, split, split, start),
      out_shardings=(whole, whole, whole, whole, state),
    )
    for start in (None, state)
  )


def _compile_bits(model, layout):
  """Return compute(params, rng, image, report, condition=None).

  It returns (bits, error, found), which are those of `Experiment.bits_per_dim`,
  in stretches. Between two of them report(t, nfe) is called with the time that
  was reached.
  """
  begin, proceed = jit_bits(model, layout)

  def compute(params, rng, image, report, condition=None):
    given = params, rng, image, condition
    *found, done, state = begin(*given, None)
    while not done and state.steps < ode.MAX_STEPS:
      *found, done, state = proceed(*given, state)
      report(float(state.t), int(found[2].nfe))
    return found

  return compute


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
    key, image = jax.random.fold_in(rng, number), images['image']
    condition = images['condition'] if run.model.condition else None

    def report(t, nfe, number=number):
      progress(number, f'batch {number} is at t = {t:.3g} after {nfe} NFE')

    bits, error, found = compute(run.params, key, image, report, condition)
    if not found.success:
      what = f'The ODE solver failed on test batch {number}'
      keys = 'config.sampling.rtol', 'config.sampling.atol'
      raise FloatingPointError(
        experiment.why_failed(what, found.not_finite_at, keys)
      )
    bits, error = run_lib.without_padding(mask, bits, error)
    if jax.process_index() == 0:
      nfe = np.asarray(found.nfe)
      save_npz(paths[number], bits=bits, error=error, nfe=nfe)
    progress(number + 1)
  barrier('bits')


UNITS = (
  'minus the log-density of an example, in units of the data (of images: grey '
  'levels).'
)


def _summary(passes, dims):
  """Return {'bits_per_dim': .., 'nats': ..} of the batches of each pass."""
  bits = [np.concatenate([part['bits'] for part in parts]) for parts in passes]
  per_image = np.mean(bits, axis=0)
  metric = evaluation.Metric(
    value=float(per_image.mean()),
    count=len(per_image),
    std_error=evaluation.standard_error(per_image),
  )
  parts = [part for parts in passes for part in parts]
  errors = np.concatenate([part['error'] for part in parts])
  probe_error = float(np.sqrt(np.sum(errors**2)) / len(errors))
  bits = dataclasses.asdict(metric) | {
    'probe_error': None if math.isnan(probe_error) else probe_error,
    'repeats': len(passes),
    'nfe': float(np.mean([float(part['nfe']) for part in parts])),
  }
  nats = bits | {'note': UNITS}
  for key in ('value', 'std_error', 'probe_error'):
    if bits[key] is not None:
      nats[key] = bits[key] * likelihood.nats_per_bit(dims)
  return {'bits_per_dim': bits, 'nats': nats}


def bits_of(model, layout):
  """Return bits(run, folder, dataset, tag, repeat=0) -> parts of all batches.

  What it computes is kept in the folder, batch by batch, in files with the tag.
  """
  compute, chosen = _compile_bits(model, layout), model.config.eval
  name = f'bpd_{chosen.bpd_trace}_{chosen.bpd_probes}_{chosen.bpd_eps!r}'

  def bits(run, folder, dataset, tag, repeat=0):
    numbers = range(math.ceil(len(dataset) / chosen.batch_size))
    paths = [folder / f'{name}_{tag}_{i}.npz' for i in numbers]
    _bits_of_pass(compute, run, dataset, paths, repeat)
    return [load_npz(path) for path in paths]

  return bits


def likelihood_evaluator(model, test_set, bits) -> Evaluator:
  """Return an evaluator of bits/dim, and nats, of the test set.

  They are means over `config.eval.bpd_repeats` dequantisations of every image,
  each {'value', 'std_error', 'probe_error', 'count', 'repeats', 'nfe'}.
  `std_error` is the standard error over images; `probe_error` is the part of it
  that more probes would lower: 0 with the exact trace, and None with a single
  probe, whose error is not known. `bits` is that of `bits_of`.
  """

  def evaluate_likelihood(run, folder):
    passes = [
      bits(run, folder, test_set, repeat, repeat)
      for repeat in range(model.config.eval.bpd_repeats)
    ]
    return _summary(passes, math.prod(model.shape(1)))

  return evaluate_likelihood


def nats_of(model, bits):
  """Return nats(run, folder, dataset) -> [N], -log p(x) of each example."""
  per_bit = likelihood.nats_per_bit(math.prod(model.shape(1)))

  def nats(run, folder, dataset):
    parts = bits(run, folder, dataset, dataset.fingerprint)
    return per_bit * np.concatenate([part['bits'] for part in parts])

  return nats


# -------------------------------------------------------------------- samples


def _feature_name(name, extract):
  """Return the name of the features of a batch."""
  logits = '-logits' if getattr(extract, 'with_logits', False) else ''
  return f'{name}-{extracting.identity_of(extract)}{logits}'


def _read_features(folder, names, extract, count):
  """Yield the features of each batch, of the first `count` images in all."""
  for name in names:
    paths = _parts(folder, _feature_name(name, extract))
    parts = [load_npz(path) for path in paths]
    batch = {
      key: np.concatenate([part[key] for part in parts])[:count]
      for key in parts[0]
    }
    count -= len(batch['pool_3'])
    yield batch


def _make_batches(run, folder, extract, test_set):
  """Make this host's part of all batches of samples, and of their features.

  Of a network that is told conditions, they are those of the test set.

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
    rows=run.model.given(test_set, min(chosen.num_samples, len(test_set))),
    split=True,
    skip=lambda i: all_hosts(_parts(folder, names[i])),
  )
  for number, found in drawn:
    name, images = names[number], None
    if found is not None:
      images = run.model.to_data(local_rows(found.x))
      arrays = {'images': images, 'nfe': np.asarray(found.nfe)}
      if found.label is not None:
        arrays['label'] = local_rows(found.label)
      save_npz(_my_part(folder, name), **arrays)
    scored = _feature_name(name, extract)
    if not all_hosts(_parts(folder, scored)):
      if images is None:
        images = _share(_read_samples(folder, [name])[0])
      outputs = extracting.outputs_of(images, extract)
      save_npz(_my_part(folder, scored), **outputs)
  return names


def _share(rows):
  """Return the rows of this host, one after the other, of those of a batch."""
  return np.array_split(rows, jax.process_count())[jax.process_index()]


def _read_samples(folder, names):
  """Return the images of batches, and the mean NFE of the batches."""
  batches = [
    [load_npz(path) for path in _parts(folder, name)] for name in names
  ]
  images = np.concatenate(
    [part['images'] for parts in batches for part in parts]
  )
  return images, float(np.mean([parts[0]['nfe'] for parts in batches]))


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
    logits_hint=getattr(extract, 'logits_hint', ''),
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
  def key(self):
    """What results depend on: a hash of the statistics, and the variant."""
    mean = getattr(self.reference, 'mu', None)
    return digest(mean, self.facts)

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


def sample_evaluator(judge, test_set) -> Evaluator:
  """Return an evaluator that draws images and compares them with the data."""

  def evaluate_samples(run, folder):
    config = run.model.config
    count = config.eval.num_samples
    names = _make_batches(run, folder, judge.extract, test_set)
    result = {'sampler': trained.sampler_of(config), 'count': count}
    result |= _scores(
      config, folder, names, judge.extract, judge.reference, count
    )
    if jax.process_index() == 0:
      images, result['nfe'] = _read_samples(folder, names)
      picture = folder / 'samples.png'
      # An earlier evaluation may have had more.
      if len(images) >= 64 or not picture.is_file():
        pictures.save_grid(picture, images[:64])
      say(f'Samples are in {picture}.')
    return result

  return evaluate_samples


# ------------------------------------------------------------------- commands


def evaluate(config, workdir, eval_folder='eval'):
  """Evaluate the checkpoints that config.eval.checkpoint names.

  Writes workdir/eval_folder/step_N-HASH-DATA/result-HASH.json, with config,
  step, seed, counts, sampler, NFE and versions beside the metrics; samples.png
  there; and a table and curves of all results in the folder. With several
  lengths in config.eval.ema_length each has a result, and the curves are over
  them too.

  Raises:
    FileNotFoundError, ValueError: there is no such checkpoint, data or weights;
      it never waits for one.
  """
  model, layout = experiment.build(config), make_layout()
  config = model.config
  workdir, chosen = pathlib.Path(workdir), config.eval
  check_divisible(chosen.batch_size, 'config.eval.batch_size')
  on_first_host(check_output, workdir / eval_folder)
  with Checkpoints(workdir) as saved:
    steps = saved.select(chosen.checkpoint)  # Says at once if there is none.
    if chosen.ema_length:
      experiment.averages_until(saved, steps[-1])
    experiment.claim(config, workdir, write=False)
    test_set = datasets.load(config.data, 'test')
    experiment.check_conditions(model, test_set)
    elsewhere = other_sets.load(config.data, chosen, test_set)
    facts, evaluators, judged_by = trained.facts(config), [], ''
    if chosen.enable_loss:
      evaluators.append(loss_evaluator(model, test_set, layout))
    bits = bits_of(model, layout)  # Compiled once, if it is called.
    if chosen.enable_bpd:
      evaluators.append(likelihood_evaluator(model, test_set, bits))
    if elsewhere:
      nats = nats_of(model, bits)
      evaluators.append(ood.evaluator(model, elsewhere, layout, nats))
    judge = None
    if chosen.enable_sampling and config.data.shape and not chosen.extractor:
      say(points.NO_FID)
    elif chosen.enable_sampling:
      judge = Judge.of(config, workdir, chosen.num_samples)
      facts, judged_by = facts | judge.facts, judge.key
    if chosen.enable_sampling and config.data.shape:
      evaluators.append(points.evaluator(test_set, judge))
    elif chosen.enable_sampling:
      evaluators.append(sample_evaluator(judge, test_set))
    # What else results depend on, besides what their folder is named by.
    key = digest(schema.marked(config, 'result'), judged_by)[:8]
    for length in chosen.ema_length or [None]:
      restored = functools.partial(
        trained.restore_step, model, layout, saved, workdir, length=length
      )
      for step, run in saved.restore_each(chosen.checkpoint, restored):
        name = f'{run.name}-{test_set.fingerprint[:8]}'
        folder = workdir / eval_folder / name
        folder.mkdir(parents=True, exist_ok=True)
        say(f'Checkpoint {step}: results go to {folder}.')
        result = {'step': step}
        if length:
          result['ema_length'] = length
        for evaluator in evaluators:
          result |= evaluator(run, folder)
        if jax.process_index() == 0:
          write_json(folder / f'result-{key}.json', result | facts)
        barrier(f'step_{step}')
  if jax.process_index() == 0:
    summarize(workdir / eval_folder)


def summarize(folder):
  """Print all results in a folder, and write them as table and curves."""
  found = []
  for path in sorted(folder.glob('step_*-*/result-*.json')):
    try:
      found.append(json.loads(path.read_text()))
    except ValueError:
      say(f'warning: {path} is damaged, and left out.')
  results.save_results(folder, found, schema.names_marked('cost'))


def evaluate_images(config, workdir, path, eval_folder='eval'):
  """Score user-supplied images, a folder or an .npz, against config.data.

  They are taken in a fixed random order, because they may be sorted by class.
  Writes workdir/eval_folder/NAME-HASH.json: the whole name of the folder or
  file, and a hash of its images and of what they are compared with.
  """
  config = experiment.completed(config)
  out = pathlib.Path(workdir) / eval_folder
  on_first_host(check_output, out)
  if config.data.shape:
    _evaluate_arrays(config, workdir, path, out)
    return
  images = datasets.user_images(config.data, path)
  judge = Judge.of(config, workdir, len(images))
  extract, batch = judge.extract, config.eval.batch_size
  whole_name = pathlib.Path(path).resolve().name
  key = digest(images.fingerprint, batch)[:8]
  folder = out / f'images_{whole_name}-{key}'
  names = [f'images_{i}' for i in range(math.ceil(len(images) / batch))]
  order = batches.permutation(len(images), 0, 0)
  progress = Progress('features', len(images), 'images')
  for number, name in enumerate(names):
    scored = _feature_name(name, extract)
    members = order[number * batch : (number + 1) * batch]
    if not all_hosts(_parts(folder, scored)):
      mine = _share(members)
      # A host without a share of a small batch shows the others the format.
      some = images.fetch(mine if len(mine) else members)
      outputs = extracting.outputs_of(some, extract)
      outputs = {k: rows[: len(mine)] for k, rows in outputs.items()}
      save_npz(_my_part(folder, scored), **outputs)
    progress(number * batch + len(members))
  result = {'images': str(path), 'count': len(images)}
  result |= {'fingerprint': images.fingerprint}
  result |= _scores(
    config, folder, names, extract, judge.reference, len(images)
  )
  result |= judge.facts
  _write_of_user(config, out / whole_name, result, judge.key)


def _write_of_user(config, path, result, judged_by):
  """Write and print the result of user-supplied examples to PATH-HASH.json."""
  if jax.process_index():
    return
  settings = schema.marked(config, 'result')
  key = digest(result['fingerprint'], settings, judged_by)[:8]
  written = path.with_name(f'{path.name}-{key}.json')
  write_json(written, result | trained.facts(config))
  say(results.table([result]))
  say(f'Results are in {written}.')


def _evaluate_arrays(config, workdir, path, out):
  """Score user-supplied arrays against the test set; see `evaluate_images`."""
  model, path = experiment.build(config), pathlib.Path(path).expanduser()
  x, fingerprint = datasets.user_arrays(config.data, path)
  test = batches.some_of(
    datasets.load(config.data, 'test'), max(len(x), points.COMPARED)
  )
  result = {'images': str(path), 'count': len(x), 'fingerprint': fingerprint}
  metrics, judged_by = points.distances(model, x, test), ''
  if config.eval.extractor:
    judge = Judge.of(config, workdir, len(x))
    metrics |= points.features(config, x, judge)
    result, judged_by = result | judge.facts, judge.key
  else:
    say(points.NO_FID)
  result |= _as_dicts(metrics)
  _write_of_user(config, out / path.resolve().name, result, judged_by)
