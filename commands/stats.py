"""Reference statistics of the data set of a config: read, or computed once.

The raw training images, each once, go through the feature extractor. Their
statistics are kept in the cache folder; the name of the file contains the data
set, its fingerprint and the extractor. The images are divided into chunks,
whose statistics are files in workdir until all are there: hosts share the
chunks, and a run that was killed continues with those that are missing. The
result does not depend on the number of hosts.
"""

import dataclasses
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from commands import points
from configs import schema
from data import datasets
from features import statistics
from features.extract import extractor, features_of, identity_of, variant_of
from runtime.devices import all_hosts, barrier, on_first_host
from runtime.files import cache_dir, check_output
from runtime.progress import Progress, say

CHUNK = 2_500  # Images between two saves.
BATCH = 256  # Images that are read at once.
NUM_FEATURES = 10_000  # Features that are kept for metrics of neighbours.


def check_images(config):
  """Raise ValueError for arrays without an extractor of the user's own."""
  data = config.data
  if (data.shape or data.dataset == 'arrays') and not config.eval.extractor:
    raise ValueError(f'config.data.dataset={data.dataset!r}: {points.NO_FID}')


def _path(config, dataset, extract):
  """Return the path of the statistics of a data set."""
  if config.eval.stats_path:
    path = pathlib.Path(config.eval.stats_path)
    if path.is_dir():
      raise IsADirectoryError(
        f'config.eval.stats_path={path} is a folder: name a file in it.'
      )
    return path
  name = (
    f'{dataset.name.replace("/", "_")}_{dataset.fetch([0]).shape[1]}_'
    f'{identity_of(extract)}_{dataset.fingerprint[:16]}.npz'
  )
  return cache_dir() / 'stats' / name


def reference(config, workdir, extract):
  """Return statistics of the training images; compute them if necessary.

  Args:
    config: a config, of which the sections data and eval are used.
    workdir: folder where hosts put their shares.
    extract: a feature extractor.

  Returns:
    The `statistics.ReferenceStats`. On hosts other than the first, which
    computes the metrics, None if its cache does not have them.

  Raises:
    FileNotFoundError: there is nothing at config.eval.stats_path.
    ValueError: the statistics there are of other images, or of another
      resolution, variant or size of features.
  """
  dataset = datasets.load(config.data, 'train')
  path = _path(config, dataset, extract)
  there = np.asarray(path.is_file())
  if jax.process_count() > 1:
    there = multihost_utils.broadcast_one_to_all(there)
  if not there:
    if config.eval.stats_path:
      raise FileNotFoundError(
        f'config.eval.stats_path={path} does not exist: make it with '
        '--mode stats, or leave it empty.'
      )
    stats(config, workdir, extract)
  if jax.process_index() and not path.is_file():
    return None
  found = statistics.load_stats(path)
  one = features_of(dataset.fetch([0]), extract)
  statistics.check_compatible(
    found,
    dimensions=one.shape[-1],
    variant=variant_of(extract),
    resolution=dataset.fetch([0]).shape[1],
    fingerprint=dataset.fingerprint,
  )
  return found


def stats(config, workdir, extract=None):
  """Compute and store statistics of the raw training images, each once.

  They are written to config.eval.stats_path, or into the cache folder.

  Args:
    config: a config, of which the sections data and eval are used.
    workdir: folder where hosts put their shares.
    extract: a feature extractor; None for that of the config.

  Raises:
    ValueError: the data are arrays, and there is no extractor of the user's.
  """
  schema.check(config)
  check_images(config)
  dataset = datasets.load(config.data, 'train')
  extract = extract or extractor(config.eval)
  path = _path(config, dataset, extract)
  _check_same(path, dataset, extract)
  folder = pathlib.Path(workdir) / 'stats'
  for output in (folder, path.parent):
    on_first_host(check_output, output)
  chunks = _chunks(len(dataset))
  key = f'{dataset.fingerprint[:16]}-{identity_of(extract)}'
  paths = [folder / f'{key}-{start}_{stop}.npz' for start, stop in chunks]
  _compute_chunks(dataset, extract, chunks, paths)
  barrier('stats')
  if jax.process_index() == 0:
    whole = statistics.load_stats(paths[0])
    for part in paths[1:]:
      whole = statistics.merge_stats([whole, statistics.load_stats(part)])
    # Data sets can be in the order of their classes, so features are shuffled.
    order = np.random.default_rng(0).permutation(len(whole.features))
    dataclasses.replace(whole, features=whole.features[order]).save(path)
    for part in paths:
      part.unlink()
    say(f'Statistics of {whole.count} images are in {path}.')
  barrier('stats_written')


def _check_same(path, dataset, extract):
  """Raise ValueError if other statistics are at a path: they are not replaced.

  Args:
    path: path of the file to be written.
    dataset: the training images.
    extract: the feature extractor.
  """
  if not path.is_file():
    return
  there = statistics.load_stats(path)
  ours = dataset.fingerprint, variant_of(extract)
  if (there.fingerprint, there.variant) != ours:
    raise ValueError(
      f'config.eval.stats_path={path} has statistics of other images or other '
      'features: choose another path, or remove the file.'
    )


def _chunks(count):
  """Return [(start, stop)] of the chunks of images."""
  starts = range(0, max(count - CHUNK, 0) + 1, CHUNK)
  # The last chunk is long, because a single image has no covariance.
  return list(zip(starts, [*starts[1:], count], strict=True))


def _compute_chunks(dataset, extract, chunks, paths):
  """Compute and save this host's share of the chunks that are missing.

  Args:
    dataset: the training images.
    extract: a feature extractor.
    chunks: [(start, stop)] of all chunks.
    paths: paths of their files.
  """
  missing = [
    pair
    for pair in zip(chunks, paths, strict=True)
    if not all_hosts(pair[1].is_file())
  ]
  mine = missing[jax.process_index() :: jax.process_count()]
  count, keep = len(dataset), min(NUM_FEATURES, len(dataset))
  total, done = sum(stop - start for (start, stop), _ in mine), 0
  progress = Progress('reference features', total, 'images')
  for (start, stop), path in mine:
    chunk = statistics.compute_stats(
      (
        dataset.fetch(np.arange(i, min(i + BATCH, stop)))
        for i in range(start, stop, BATCH)
      ),
      extract,
      fingerprint=dataset.fingerprint,
      num_features=keep * stop // count - keep * start // count,
      progress=lambda n, done=done: progress(done + n),
    )
    chunk.save(path)
    done += stop - start
