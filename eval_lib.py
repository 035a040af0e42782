"""Evaluation of checkpoints: loss, bits/dim, samples and their metrics.

Work is done in batches, each written whole under a folder whose name says what
it is of (checkpoint step, and a hash of all that the numbers depend on). A
batch that exists is not made again, and nothing else is read: an evaluation
that was killed goes on where it stopped, and counts nothing twice.

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

import checkpoints
import data_sources
import datasets
import evaluation
import experiment
import features
import reporting
import run_lib
from models import inception_weights

METRICS = (
  'test_loss', 'bits_per_dim', 'fid', 'kid', 'is_1_split', 'is_10_splits',
  'precision', 'recall', 'density', 'coverage',
)  # fmt: skip


def _config_dict(config):
  return json.loads(config.to_json_best_effort())


def _barrier(name):
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


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
  """Bits/dim of a dataset, {'value', 'std_error', 'count', 'repeats', 'nfe'}.

  The mean over `config.eval.bpd_repeats` dequantisations of every image; the
  standard error is that over images.
  """
  compute = jax.jit(
    experiment.make_bits_per_dim(config),
    in_shardings=(layout.replicated, None, layout.split),
    out_shardings=layout.replicated,
  )
  batch, repeats = config.eval.batch_size, config.eval.bpd_repeats
  num_batches = math.ceil(len(dataset) / batch)
  progress = reporting.Progress('bits/dim', repeats * num_batches, 'batches')
  passes, nfe = [], []
  for repeat in range(repeats):
    paths = [
      _host_file(folder, f'bpd_{repeat}_{number}')
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
      bits, evaluations, success = compute(
        params, jax.random.fold_in(rng, number), images['image']
      )
      if not success:
        raise FloatingPointError(
          f'The ODE solver failed on test batch {number}; larger '
          'config.sampling.rtol and atol may help.'
        )
      mask = multihost_utils.process_allgather(mask, tiled=True)
      bits = np.asarray(bits)[np.asarray(mask) > 0]
      evaluation.save_npz(paths[number], bits=bits, nfe=np.asarray(evaluations))
      progress(repeat * num_batches + number + 1)
    saved = [evaluation.load_npz(path) for path in paths]
    passes.append(np.concatenate([part['bits'] for part in saved]))
    nfe += [float(part['nfe']) for part in saved]
  per_image = np.mean(passes, axis=0)
  metric = evaluation.Metric(
    value=float(per_image.mean()),
    count=len(per_image),
    std_error=float(per_image.std(ddof=1) / math.sqrt(len(per_image))),
  )
  more = {'repeats': repeats, 'nfe': float(np.mean(nfe))}
  return dataclasses.asdict(metric) | more


# ------------------------------------------------------------------ samples


def _local(array):
  """This host's rows of an array split along axis 0."""
  shards = {s.index[0].start or 0: s.data for s in array.addressable_shards}
  return np.concatenate([np.asarray(shards[k]) for k in sorted(shards)])


def _make_batches(config, params, layout, folder, extract):
  """Makes (this host's part of) all batches of samples; returns their names."""
  batch = config.eval.batch_size
  sample = jax.jit(
    experiment.make_sampler(config, batch),
    in_shardings=(layout.replicated, None),
    out_shardings=(layout.split, layout.replicated, layout.replicated),
  )
  names = [
    f'samples_{i}' for i in range(math.ceil(config.eval.num_samples / batch))
  ]
  progress = reporting.Progress('samples', len(names) * batch, 'images')
  for number, name in enumerate(names):
    path = _host_file(folder, name)
    if not _all_have(path):
      rng = jax.random.fold_in(jax.random.key(config.seed), number)
      images, nfe, success = sample(params, rng)
      if not success:
        raise FloatingPointError(
          'The ODE solver failed; larger config.sampling.rtol and atol may '
          'help.'
        )
      images = datasets.to_uint8(_local(images), config.sampling.rounding)
      outputs = extract(images)
      arrays = {k: v for k, v in outputs.items() if v is not None}
      evaluation.save_npz(path, images=images, nfe=np.asarray(nfe), **arrays)
    progress((number + 1) * batch)
  _barrier('samples')
  return names


def _read_batches(names, folder, count):
  """The first `count` samples of all hosts' files, as arrays by name."""
  files = [
    evaluation.load_npz(_host_file(folder, name, host))
    for name in names
    for host in range(jax.process_count())
  ]
  keys = [k for k in files[0] if k != 'nfe']
  arrays = {k: np.concatenate([f[k] for f in files])[:count] for k in keys}
  return arrays, float(np.mean([f['nfe'] for f in files]))


def extractor(config):
  """The Inception network of config.eval, on this host's devices."""
  params = inception_weights.load_weights(config.eval.inception_path or None)
  return features.FeatureExtractor(
    params, variant=config.eval.inception_variant
  )


# --------------------------------------------------------------- references


def _stats_path(config, dataset):
  if config.eval.stats_path:
    return pathlib.Path(config.eval.stats_path)
  name = (
    f'{dataset.name.replace("/", "_")}_{config.data.image_size}_'
    f'{config.eval.inception_variant}_{dataset.fingerprint[:16]}.npz'
  )
  return data_sources.cache_dir() / 'stats' / name


def reference(config, extract=None):
  """Statistics of the training images, computed if they are not there yet.

  Raises:
    ValueError: those at config.eval.stats_path are of other images, another
      resolution or another variant.
  """
  dataset = datasets.load(config.data, 'train')
  path = _stats_path(config, dataset)
  if not path.is_file():
    if config.eval.stats_path:
      raise FileNotFoundError(
        f'config.eval.stats_path={path} does not exist: make it with '
        '--mode stats, or leave it empty.'
      )
    stats(config, path, extract)
  found = features.load_stats(path)
  features.check_compatible(
    found,
    variant=config.eval.inception_variant,
    resolution=config.data.image_size,
    fingerprint=dataset.fingerprint,
  )
  return found


def stats(config, path=None, extract=None):
  """Computes and stores statistics of the raw training images, each once.

  Args:
    config: its data and eval sections say of what and how.
    path: the .npz to write; None for config.eval.stats_path, or the cache.
    extract: a feature extractor; None for the Inception network.
  """
  dataset = datasets.load(config.data, 'train')
  path = pathlib.Path(path or _stats_path(config, dataset))
  extract = extract or extractor(config)
  host, hosts = jax.process_index(), jax.process_count()
  mine = np.arange(host, len(dataset), hosts)
  progress = reporting.Progress('reference features', len(mine), 'images')
  part = features.compute_stats(
    (dataset.fetch(mine[i : i + 256]) for i in range(0, len(mine), 256)),
    extract,
    num_features=10_000 // hosts,
    progress=progress,
  )
  part_path = lambda i: path.with_suffix(f'.host_{i}.npz')
  part.save(part_path(host))
  _barrier('stats')
  if host == 0:
    whole = features.merge_stats(
      [features.load_stats(part_path(i)) for i in range(hosts)]
    )
    # Named by the dataset, which is known without reading all its images.
    dataclasses.replace(whole, fingerprint=dataset.fingerprint).save(path)
    for i in range(hosts):
      part_path(i).unlink()
    reporting.say(f'Statistics of {whole.count} images are in {path}.')
  _barrier('stats_written')


# --------------------------------------------------------------------- eval


def _versions():
  return {m.__name__: m.__version__ for m in (jax, flax, np)}


def _write_json(path, value):
  checkpoints.write_text(path, json.dumps(value, indent=1) + '\n')


def _metrics(scores):
  return {name: dataclasses.asdict(metric) for name, metric in scores.items()}


def _evaluate_step(config, step, params, layout, folder, tools):
  """All that config.eval asks for of one checkpoint, as a dict."""
  result = {'step': step}
  test_set = datasets.load(config.data, 'test')
  if config.eval.enable_loss:
    path = folder / 'loss.json'
    if not path.is_file():
      loss = run_lib.test_loss(
        tools['loss'], params, test_set, config.eval.batch_size, layout
      )
      metric = evaluation.Metric(value=loss, count=len(test_set))
      _write_json(path, dataclasses.asdict(metric))
    result['test_loss'] = json.loads(path.read_text())
  if config.eval.enable_bpd:
    result['bits_per_dim'] = bits_per_dim(
      config, params, test_set, layout, folder
    )
  if config.eval.enable_sampling:
    names = _make_batches(config, params, layout, folder, tools['extract'])
    arrays, nfe = _read_batches(names, folder, config.eval.num_samples)
    scores = evaluation.score_samples(
      arrays['pool_3'],
      arrays.get('logits'),
      tools['reference'],
      seed=config.seed,
      allow_few=config.eval.allow_few_samples,
    )
    result |= {'nfe': nfe} | _metrics(scores)
    if jax.process_index() == 0:
      grid = folder / 'samples.png'
      reporting.save_grid(grid, arrays['images'][:64])
      reporting.say(f'Samples are in {grid}.')
  return result


# Sections that numbers depend on, besides the checkpoint.
_SECTIONS = ('seed', 'data', 'sde', 'model', 'training', 'sampling', 'eval')
_IRRELEVANT = ('checkpoint', 'inception_path', 'stats_path', 'path')


def _identity(config):
  """Eight hexadecimal digits of all that the numbers depend on."""
  parts = {k: v for k, v in _config_dict(config).items() if k in _SECTIONS}
  for section in parts.values():
    if isinstance(section, dict):
      for key in _IRRELEVANT:
        section.pop(key, None)
  for key in list(parts['training']):
    if key not in ('times', 'weighting', 'reduction', 'eps'):
      parts['training'].pop(key)
  text = json.dumps([parts, jax.process_count()], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def evaluate(config, workdir, eval_folder='eval'):
  """Evaluates the checkpoints that config.eval.checkpoint names.

  Writes workdir/eval_folder/step_N-HASH/result.json, with config, step, seed,
  counts, sampler, NFE and versions beside the metrics; samples.png there; and
  a table and curves over all results in the folder.

  Raises:
    FileNotFoundError, ValueError: no such checkpoint, data or weights; it
      never waits for one.
  """
  experiment.check(config)
  workdir = pathlib.Path(workdir)
  run_lib.check_divisible(config.eval.batch_size, 'config.eval.batch_size')
  with checkpoints.Checkpoints(workdir) as saved:
    steps = saved.select(config.eval.checkpoint)
    checkpoints.claim_workdir(config, workdir, write=False)
    layout = run_lib.make_layout()
    tools = {'loss': run_lib.make_eval_loss(config, layout)}
    if config.eval.enable_sampling:
      tools['extract'] = extractor(config)
      tools['reference'] = reference(config, tools['extract'])
    like = run_lib.replicated(experiment.abstract_params(config), layout)
    for step in steps:
      folder = workdir / eval_folder / f'step_{step}-{_identity(config)}'
      folder.mkdir(parents=True, exist_ok=True)
      params = saved.restore(step, like, 'ema')
      reporting.say(f'Checkpoint {step}: results go to {folder}.')
      result = _evaluate_step(config, step, params, layout, folder, tools)
      result |= {
        'seed': config.seed,
        'sampler': _config_dict(config)['sampling'],
        'inception_variant': config.eval.inception_variant,
        'config': _config_dict(config),
        'versions': _versions(),
      }
      if jax.process_index() == 0:
        _write_json(folder / 'result.json', result)
  if jax.process_index() == 0:
    _summarize(workdir / eval_folder)


def _read_images(path, data):
  """All images of a folder or an .npz, uint8 [N, H, W, C]."""
  path = pathlib.Path(path)
  fit = {'size': data.image_size, 'channels': data.num_channels}
  if path.suffix == '.npz':
    images, _, _ = data_sources.read_npz(path, 'all')
    return data_sources.fit_array(images, where=str(path), **fit)
  files = data_sources.image_files(path) if path.is_dir() else []
  if not files:
    raise FileNotFoundError(
      f'--samples {path} is neither an .npz nor a folder with images in it.'
    )
  return np.stack(
    [data_sources.decode_file(path / file, **fit) for file in files]
  )


def evaluate_images(config, workdir, path, eval_folder='eval'):
  """Scores images of anyone's, a folder or an .npz, against config.data.

  Writes workdir/eval_folder/NAME.json.
  """
  images = _read_images(path, config.data)
  extract = extractor(config)
  wanted = reference(config, extract)
  outputs = extract(
    images, reporting.Progress('features', len(images), 'images')
  )
  scores = evaluation.score_samples(
    outputs['pool_3'],
    outputs['logits'],
    wanted,
    seed=config.seed,
    allow_few=config.eval.allow_few_samples,
  )
  result = {
    'images': str(path),
    **_metrics(scores),
    'inception_variant': config.eval.inception_variant,
    'config': _config_dict(config),
    'versions': _versions(),
  }
  if jax.process_index() == 0:
    out = (
      pathlib.Path(workdir) / eval_folder / f'{pathlib.Path(path).stem}.json'
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_json(out, result)
    _print_table([result])
    reporting.say(f'Results are in {out}.')


def _show(metric):
  if metric['value'] is None:
    return metric.get('note') or 'not available'
  text = f'{metric["value"]:.4f}'
  if metric.get('std_error'):
    text += f' +- {metric["std_error"]:.4f}'
  return f'{text}  (N = {metric["count"]})'


def _print_table(results):
  for result in results:
    what = result.get('images') or f'step {result["step"]}'
    reporting.say(f'--- {what}')
    for name in METRICS:
      if name in result:
        reporting.say(f'{name:>14}  {_show(result[name])}')


def _summarize(folder):
  """Table, JSON and curves of all results under a folder."""
  results = [
    json.loads(path.read_text())
    for path in sorted(folder.glob('step_*-*/result.json'))
  ]
  results.sort(key=lambda result: result['step'])
  _print_table(results)
  _write_json(folder / 'results.json', results)
  reporting.save_curves(folder / 'results.png', results, METRICS)
  reporting.say(f'All results are in {folder}/results.json and .png.')


# ------------------------------------------------------------------- sample


def sample(config, workdir):
  """Writes samples of a checkpoint: workdir/samples/step_N-HASH.npz and .png.

  As many as config.sampling.num_samples; the .npz holds them as uint8
  `images` and the number of score evaluations as `nfe`.
  """
  experiment.check(config)
  workdir, count = pathlib.Path(workdir), config.sampling.num_samples
  devices = jax.device_count()
  batch = min(config.eval.batch_size, math.ceil(count / devices) * devices)
  run_lib.check_divisible(batch, 'config.eval.batch_size')
  layout = run_lib.make_layout()
  with checkpoints.Checkpoints(workdir) as saved:
    step = saved.select(config.eval.checkpoint)[-1]
    checkpoints.claim_workdir(config, workdir, write=False)
    like = run_lib.replicated(experiment.abstract_params(config), layout)
    params = saved.restore(step, like, 'ema')
  make = run_lib.make_sample(config, layout, batch)
  progress = reporting.Progress('samples', count, 'images')
  images = []
  for number in range(math.ceil(count / batch)):
    rng = jax.random.fold_in(jax.random.key(config.seed), number)
    x, nfe, success = make(params, rng)
    if not success:
      raise FloatingPointError(
        'The ODE solver failed; larger config.sampling.rtol and atol may help.'
      )
    images.append(datasets.to_uint8(np.asarray(x), config.sampling.rounding))
    progress(min(count, (number + 1) * batch))
  images = np.concatenate(images)[:count]
  if jax.process_index() == 0:
    path = workdir / 'samples' / f'step_{step}-{_identity(config)}.npz'
    evaluation.save_npz(path, images=images, nfe=np.asarray(nfe))
    reporting.save_grid(path.with_suffix('.png'), images[:400])
    reporting.say(f'{count} samples, {int(nfe)} NFE each: {path} and .png.')
