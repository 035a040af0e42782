"""Evaluation of checkpoints: loss, bits/dim, samples and their metrics.

Work is done in batches, each written whole under a folder whose name says what
it is of (checkpoint step, and a hash of all that the samples depend on). A
batch that exists is not made again, and nothing else is read: an evaluation
that was killed goes on where it stopped, and counts nothing twice. Features
are kept beside the samples, by the network that made them.

With several hosts, sharing the folder, each saves what its devices made.
"""

import dataclasses
import hashlib
import json
import math
import pathlib

import flax
import jax
import numpy as np
from jax.experimental import multihost_utils

import evaluation
import experiment
import likelihood
import run_lib
from checkpoints.workdir import Checkpoints, claim_workdir
from commands import points, stats
from data import datasets, sources
from features import statistics
from reporting import results
from reporting.pictures import save_grid, save_samples, save_trajectory
from runtime.devices import barrier, check_divisible, make_layout, replicated
from runtime.files import load_npz, save_npz, write_text
from runtime.progress import Progress, say


def _config_dict(config):
  return json.loads(config.to_json_best_effort())


def _host_file(folder, name, host=None):
  """Where a host keeps its part of a batch; a host alone needs no number."""
  host = jax.process_index() if host is None else host
  suffix = f'_host_{host}' if jax.process_count() > 1 else ''
  return folder / f'{name}{suffix}.npz'


def _all_have(path):
  """Whether every host has its part, so that all skip the same batches."""
  have = np.asarray(path.is_file())
  if jax.process_count() > 1:
    have = multihost_utils.process_allgather(have)
  return bool(np.all(have))


# --------------------------------------------------------------- likelihood


def bits_per_dim(config, params, dataset, layout, folder):
  """Negative log-likelihoods of a dataset, {'bits_per_dim': .., 'nats': ..}.

  The mean over `config.eval.bpd_repeats` dequantisations of every image, in
  bits/dim and in nats per image (or point), each {'value', 'std_error',
  'probe_error', 'count', 'repeats', 'nfe'}. `std_error` is the standard error
  over images; `probe_error` the part of it that more probes would lower, 0 with
  the exact trace and None with a single probe, which does not know it.
  """
  compute = jax.jit(
    experiment.make_bits_per_dim(config),
    in_shardings=(layout.replicated, None, layout.split),
    out_shardings=layout.replicated,
  )
  batch, repeats = config.eval.batch_size, config.eval.bpd_repeats
  num_batches = math.ceil(len(dataset) / batch)
  progress = Progress('bits/dim', repeats * num_batches, 'batches')
  options = config.eval
  name = f'bpd_{options.bpd_trace}_{options.bpd_probes}_{options.bpd_eps:g}'
  passes, errors, nfe = [], [], []
  for repeat in range(repeats):
    paths = [
      _host_file(folder, f'{name}_{repeat}_{number}')
      for number in range(num_batches)
    ]
    missing = [i for i, path in enumerate(paths) if not _all_have(path)]
    rng = jax.random.fold_in(jax.random.key(config.seed), repeat)
    start = missing[0] if missing else num_batches
    for number, images, mask in run_lib.eval_batches(
      dataset, batch, layout, start=start
    ):
      if number not in missing:
        continue
      bits, error, evaluations, success = compute(
        params, jax.random.fold_in(rng, number), images['image']
      )
      if not success:
        raise FloatingPointError(
          f'The ODE solver failed on test batch {number}; larger '
          'config.sampling.rtol and atol may help.'
        )
      mask = multihost_utils.process_allgather(mask, tiled=True)
      bits, error = (np.asarray(v)[np.asarray(mask) > 0] for v in (bits, error))
      save_npz(
        paths[number], bits=bits, error=error, nfe=np.asarray(evaluations)
      )
      progress(repeat * num_batches + number + 1)
    saved = [load_npz(path) for path in paths]
    passes.append(np.concatenate([part['bits'] for part in saved]))
    errors += [part['error'] for part in saved]
    nfe += [float(part['nfe']) for part in saved]
  per_image = np.mean(passes, axis=0)
  metric = evaluation.Metric(
    value=float(per_image.mean()),
    count=len(per_image),
    std_error=float(per_image.std(ddof=1) / math.sqrt(len(per_image))),
  )
  errors = np.concatenate(errors)
  probe_error = float(np.sqrt(np.sum(errors**2)) / len(errors))
  more = {
    'probe_error': None if math.isnan(probe_error) else probe_error,
    'repeats': repeats,
    'nfe': float(np.mean(nfe)),
  }
  bits = dataclasses.asdict(metric) | more
  nats, dims = dict(bits), math.prod(experiment.image_shape(config, 1))
  for key in ('value', 'std_error', 'probe_error'):
    if bits[key] is not None:
      nats[key] = bits[key] * likelihood.nats_per_bit(dims)
  return {'bits_per_dim': bits, 'nats': nats}


# ------------------------------------------------------------------ samples


def _local(array):
  """This host's rows of an array split along axis 0."""
  shards = {s.index[0].start or 0: s.data for s in array.addressable_shards}
  return np.concatenate([np.asarray(shards[k]) for k in sorted(shards)])


def _feature_file(folder, name, extract, host=None):
  """Where a host keeps the features of its part of a batch."""
  logits = '-logits' if getattr(extract, 'with_logits', False) else ''
  name = f'{name}-{statistics.identity_of(extract)}{logits}'
  return _host_file(folder, name, host)


def _read_features(folder, names, extract, count):
  """Yields what all hosts' files hold of the first `count` images."""
  for name in names:
    for host in range(jax.process_count()):
      part = load_npz(_feature_file(folder, name, extract, host))
      part = {key: rows[:count] for key, rows in part.items()}
      count -= len(part['pool_3'])
      if len(part['pool_3']):
        yield part


def _make_batches(config, params, layout, folder, extract):
  """Makes (this host's part of) all batches of samples and their features.

  Returns:
    The batches' names.
  """
  batch = config.eval.batch_size
  sample = jax.jit(
    experiment.make_sampler(config, batch),
    in_shardings=(layout.replicated, None),
    out_shardings=(layout.split, layout.replicated, layout.replicated),
  )
  names = [
    f'samples_{i}' for i in range(math.ceil(config.eval.num_samples / batch))
  ]
  progress = Progress('samples', len(names) * batch, 'images')
  for number, name in enumerate(names):
    path = _host_file(folder, name)
    if not _all_have(path):
      rng = jax.random.fold_in(jax.random.key(config.seed), number)
      images, nfe, success = sample(params, rng)
      run_lib.check_success(config, success)
      images = datasets.to_uint8(_local(images), config.sampling.rounding)
      save_npz(path, images=images, nfe=np.asarray(nfe))
    scored = _feature_file(folder, name, extract)
    if not scored.is_file():
      images = load_npz(path)['images']
      save_npz(scored, **statistics.outputs_of(images, extract))
    progress((number + 1) * batch)
  return names


def _read_samples(folder, names, count):
  """The first `count` images, and the mean NFE of all batches."""
  files = [
    load_npz(_host_file(folder, name, host))
    for name in names
    for host in range(jax.process_count())
  ]
  images = np.concatenate([file['images'] for file in files])
  return images[:count], float(np.mean([file['nfe'] for file in files]))


# --------------------------------------------------------------------- eval


def _write_json(path, value):
  write_text(path, json.dumps(value, indent=1) + '\n')


def _scores(config, folder, names, extract, reference, count):
  """Metrics, as dicts, of the first `count` images; on the first host only."""
  barrier('features')
  if jax.process_index():
    return {}
  scores = statistics.score_samples(
    _read_features(folder, names, extract, count),
    reference,
    seed=config.seed,
    allow_few=config.eval.allow_few_samples,
  )
  return {name: dataclasses.asdict(metric) for name, metric in scores.items()}


def _provenance(config, tools):
  """What a number needs beside it to be trusted, and made again."""
  facts = {'seed': config.seed}
  if 'reference' in tools:
    facts['inception_variant'] = statistics.variant_of(tools['extract'])
    facts['reference'] = {
      key: getattr(tools['reference'], key, None)
      for key in ('count', 'fingerprint')
    }
  versions = {m.__name__: m.__version__ for m in (jax, flax, np)}
  return facts | {'config': _config_dict(config), 'versions': versions}


def _tools(config, workdir):
  """The feature extractor and the reference statistics, before long work."""
  extract = stats.extractor(config)
  reference = stats.reference(config, workdir, extract)
  return {'extract': extract, 'reference': reference}


def _say_if_few(config, count, reference):
  """Tells at once that there will be no FID."""
  few = reference and evaluation.too_few(count, reference.dimensions)
  if few and not config.eval.allow_few_samples:
    say(f'warning: no FID: {few}')


def _evaluate_step(config, step, params, layout, folder, tools):
  """All that config.eval asks for of one checkpoint, as a dict."""
  result = {'step': step}
  test_set = tools['test_set']
  if config.eval.enable_loss:
    path = folder / 'loss.json'
    if not _all_have(path):
      means = run_lib.test_loss(
        tools['loss'], params, test_set, config.eval.batch_size, layout
      )
      metrics = {
        name: evaluation.Metric(value=value, count=len(test_set))
        for name, value in means.items()
      }
      if jax.process_index() == 0:
        _write_json(
          path, {k: dataclasses.asdict(v) for k, v in metrics.items()}
        )
      barrier('loss')
    result |= json.loads(path.read_text())
  if config.eval.enable_bpd:
    result |= bits_per_dim(config, params, test_set, layout, folder)
  if config.eval.enable_sampling and config.data.dims:
    result |= {'sampler': _config_dict(config)['sampling']}
    result |= {'count': config.eval.num_samples}
    result |= points.evaluate(config, params, test_set, folder)
  elif config.eval.enable_sampling:
    count, extract = config.eval.num_samples, tools['extract']
    names = _make_batches(config, params, layout, folder, extract)
    result |= {'sampler': _config_dict(config)['sampling'], 'count': count}
    result |= _scores(config, folder, names, extract, tools['reference'], count)
    if jax.process_index() == 0:
      images, result['nfe'] = _read_samples(folder, names, count)
      save_grid(folder / 'samples.png', images[:64])
      say(f'Samples are in {folder}/samples.png.')
  return result


def _digest(*parts):
  """Eight hexadecimal digits of plain values."""
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def identity(config, *more):
  """Eight hexadecimal digits of all that samples, loss and bits/dim depend on.

  Not the number of samples: a larger one adds to those that are there.
  """
  parts = _config_dict(config)
  keep = {
    'training': ('objective', 'times', 'weighting', 'reduction', 'eps'),
    'eval': ('batch_size',),
    'data': [k for k in parts['data'] if k != 'path'],
    'sampling': parts['sampling'].keys() - {*results.OF_SAMPLE},
  }
  parts |= {
    section: {k: v for k, v in parts[section].items() if k in keys}
    for section, keys in keep.items()
  }
  del parts['optim']
  return _digest(parts, jax.process_count(), *more)


def evaluate(config, workdir, eval_folder='eval'):
  """Evaluates the checkpoints that config.eval.checkpoint names.

  Writes workdir/eval_folder/step_N-HASH/result-HASH.json, with config, step,
  seed, counts, sampler, NFE and versions beside the metrics; samples.png there;
  and a table and curves over all results in the folder.

  Raises:
    FileNotFoundError, ValueError: no such checkpoint, data or weights; it
      never waits for one.
  """
  experiment.check(config)
  workdir = pathlib.Path(workdir)
  check_divisible(config.eval.batch_size, 'config.eval.batch_size')
  with Checkpoints(workdir) as saved:
    steps = saved.select(config.eval.checkpoint)
    claim_workdir(config, workdir, write=False)
    layout = make_layout()
    tools = {
      'loss': run_lib.make_eval_loss(config, layout),
      'test_set': datasets.load(config.data, 'test'),
    }
    if config.eval.enable_sampling and not config.data.dims:
      tools |= _tools(config, workdir)
      _say_if_few(config, config.eval.num_samples, tools['reference'])
    like = replicated(experiment.abstract_params(config), layout)
    key = identity(config, tools['test_set'].fingerprint)
    facts = _provenance(config, tools)
    # What else the result depends on, but not which checkpoints and where.
    settings = dict(facts['config']['eval'])
    for place in ('checkpoint', 'inception_path', 'stats_path'):
      del settings[place]
    name = _digest(settings, facts.get('inception_variant'))
    for step in steps:
      folder = workdir / eval_folder / f'step_{step}-{key}'
      folder.mkdir(parents=True, exist_ok=True)
      params = saved.restore(step, like, 'ema')
      say(f'Checkpoint {step}: results go to {folder}.')
      result = _evaluate_step(config, step, params, layout, folder, tools)
      if jax.process_index() == 0:
        _write_json(folder / f'result-{name}.json', result | facts)
      barrier(f'step_{step}')
  if jax.process_index() == 0:
    folder = workdir / eval_folder
    paths = sorted(folder.glob('step_*-*/result-*.json'))
    results.save_results(folder, [json.loads(p.read_text()) for p in paths])


def evaluate_images(config, workdir, path, eval_folder='eval'):
  """Scores images of anyone's, a folder or an .npz, against config.data.

  They are taken in a fixed random order, since they may lie in order of
  classes. Writes workdir/eval_folder/NAME.json.
  """
  images = datasets.anyones(config.data, path)
  tools = _tools(config, workdir)
  _say_if_few(config, len(images), tools['reference'])
  extract, batch = tools['extract'], config.eval.batch_size
  host, hosts = jax.process_index(), jax.process_count()
  path, out = pathlib.Path(path), pathlib.Path(workdir) / eval_folder
  key = _digest(images.fingerprint, batch, hosts)
  folder = out / f'images_{path.stem}-{key}'
  names = [f'images_{i}' for i in range(math.ceil(len(images) / batch))]
  order = sources.permutation(len(images), 0, 0)
  progress = Progress('features', len(images), 'images')
  for number, name in enumerate(names):
    file = _feature_file(folder, name, extract)
    members = order[number * batch : (number + 1) * batch]
    if not file.is_file():
      mine = members[host::hosts]
      # A host without a share of a small batch shows the others the format.
      some = images.fetch(mine if len(mine) else members)
      outputs = statistics.outputs_of(some, extract)
      outputs = {k: rows[: len(mine)] for k, rows in outputs.items()}
      save_npz(file, **outputs)
    progress(number * batch + len(members))
  result = {'images': str(path), 'count': len(images)}
  result |= {'fingerprint': images.fingerprint}
  result |= _scores(
    config, folder, names, extract, tools['reference'], len(images)
  )
  if host == 0:
    result |= _provenance(config, tools)
    _write_json(out / f'{path.stem}.json', result)
    say(results.table([result]))
    say(f'Results are in {out / path.stem}.json.')


# ------------------------------------------------------------------- sample


def _viewable(config, frames, times):
  """States on the way as data look: noise as strong as the data, not stronger.

  About the mean of alpha x_0 they are scaled by s / |(alpha s, sigma)|, where
  s = 1/4 is about the spread of images in [0, 1]. Points stay as they are.
  """
  if config.data.dims:
    return frames
  alpha, sigma = experiment.make_sde(config).marginal(times)
  centre, noise = (
    (0.5, sigma / 2) if config.data.centered else (alpha / 2, sigma)
  )
  scale = 0.25 / np.hypot(0.25 * alpha, noise)
  column = lambda v: np.reshape(v, (-1,) + (1,) * (frames.ndim - 1))
  centre = np.broadcast_to(centre, alpha.shape)
  return 0.5 + (frames - column(centre)) * column(scale)


def sample(config, workdir):
  """Writes samples of a checkpoint: workdir/samples/step_N-HASH.npz and .png.

  As many as config.sampling.num_samples; the .npz holds them as uint8 `images`
  (or float32 `points`) and the number of score evaluations as `nfe`. With
  config.sampling.frames, the way of those of the first batch is there too:
  float32 `frames` [F, B, ..] at `frame_times` [F], and as pictures
  step_N-HASH_frames.png and .gif.
  """
  experiment.check(config)
  workdir, count = pathlib.Path(workdir), config.sampling.num_samples
  step, params, layout, batch = run_lib.restore(config, workdir, count)
  make = run_lib.make_sample(
    config, layout, batch, frames=config.sampling.frames
  )
  what = 'points' if config.data.dims else 'images'
  progress = Progress('samples', count, what)
  samples, film = [], {}
  for number in range(math.ceil(count / batch)):
    rng = jax.random.fold_in(jax.random.key(config.seed), number)
    x, nfe, success, *way = make(params, rng)
    run_lib.check_success(config, success)
    samples.append(experiment.to_data(config, x))
    if way and not film:
      film = {'frames': np.asarray(way[0]), 'frame_times': np.asarray(way[1])}
      film['frames'] = film['frames'][:, :count]
    progress(min(count, (number + 1) * batch))
  samples = np.concatenate(samples)[:count]
  if jax.process_index() == 0:
    path = workdir / 'samples' / f'step_{step}-{identity(config)}.npz'
    save_npz(path, **{what: samples}, nfe=np.asarray(nfe), **film)
    shown = samples if config.data.dims else samples[:400]
    save_samples(path.with_suffix('.png'), shown)
    say(f'{count} samples, {int(nfe)} NFE each: {path} and .png.')
    if film:
      frames = experiment.to_data(config, _viewable(config, *film.values()))
      path = path.with_name(path.stem + '_frames.png')
      save_trajectory(path, frames)
      say(f'The way to them: {path} and .gif.')
