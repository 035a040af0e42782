"""Reference statistics of the data set of a config: read, or computed once.

The raw training images, each once, go through the feature extractor. Their
statistics are kept in the cache folder; the name of the file contains the data
set, its fingerprint and the extractor. A run that was killed continues after
the images that it saved last. With several hosts each computes a share, and
workdir is where the shares meet.
"""

import dataclasses
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from data import datasets
from features import statistics
from features.extract import extractor, features_of, identity_of, variant_of
from runtime.devices import barrier
from runtime.files import cache_dir
from runtime.progress import Progress, say

CHUNK = 2_500  # Images between two saves.
BATCH = 256  # Images that are read at once.
NUM_FEATURES = 10_000  # Features that are kept for metrics of neighbours.


def _path(config, dataset, extract):
  """Return the path of the statistics of a data set."""
  if config.eval.stats_path:
    return pathlib.Path(config.eval.stats_path)
  name = (
    f'{dataset.name.replace("/", "_")}_{config.data.image_size}_'
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
    resolution=config.data.image_size,
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
  """
  dataset = datasets.load(config.data, 'train')
  extract = extract or extractor(config.eval)
  hosts = jax.process_count()
  key = f'{dataset.fingerprint[:16]}-{identity_of(extract)}'
  folder = pathlib.Path(workdir) / 'stats'
  paths = [folder / f'{key}-{i}_of_{hosts}.npz' for i in range(hosts)]
  _compute_share(dataset, extract, paths[jax.process_index()])
  barrier('stats')
  if jax.process_index() == 0:
    whole = statistics.merge_stats([_load_share(p, dataset) for p in paths])
    # Data sets can be in the order of their classes, so features are shuffled.
    order = np.random.default_rng(0).permutation(len(whole.features))
    path = _path(config, dataset, extract)
    dataclasses.replace(whole, features=whole.features[order]).save(path)
    for share in paths:
      share.unlink()
    say(f'Statistics of {whole.count} images are in {path}.')
  barrier('stats_written')


def _load_share(path, dataset):
  """Return the share of a host; the name of its file says of which data set.

  Shares that an older version has begun have a fingerprint of another kind.
  """
  share = statistics.load_stats(path)
  return dataclasses.replace(share, fingerprint=dataset.fingerprint)


def _compute_share(dataset, extract, path):
  """Compute the statistics of this host's images, and save them at intervals.

  Args:
    dataset: the training images.
    extract: a feature extractor.
    path: path of the file. What it holds is not computed again.
  """
  host, hosts = jax.process_index(), jax.process_count()
  mine = np.arange(host, len(dataset), hosts)
  keep = min(NUM_FEATURES // hosts, len(mine))
  share = _load_share(path, dataset) if path.is_file() else None
  done = share.count if share else 0
  progress = Progress('reference features', len(mine), 'images', start=done)
  while done < len(mine):
    # The last chunk is long, because a single image has no covariance.
    stop = len(mine) if len(mine) - done < 2 * CHUNK else done + CHUNK
    chunk = statistics.compute_stats(
      (
        dataset.fetch(mine[i : min(i + BATCH, stop)])
        for i in range(done, stop, BATCH)
      ),
      extract,
      fingerprint=dataset.fingerprint,
      num_features=keep * stop // len(mine) - keep * done // len(mine),
      progress=lambda n, done=done: progress(done + n),
    )
    share = statistics.merge_stats([share, chunk]) if share else chunk
    share.save(path)
    done = stop
