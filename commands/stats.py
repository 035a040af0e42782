"""Reference statistics of a config's dataset: from a file, or computed once.

Raw training images, each once, go through the feature extractor; what is left
of them is kept in the cache, by dataset, fingerprint and network. A run that
is killed goes on where it last saved. Several hosts share the work, and meet
in workdir.
"""

import dataclasses
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from data import datasets
from features import statistics, weights
from runtime.devices import barrier
from runtime.files import cache_dir
from runtime.progress import Progress, say

CHUNK = 2_500  # images between two saves
NUM_FEATURES = 10_000  # kept for KID and neighbours


def extractor(config):
  """The Inception network, or the user's own, of config.eval."""
  if config.eval.extractor:
    return statistics.find_extractor(config.eval.extractor)
  params = weights.load_weights(config.eval.inception_path or None)
  return statistics.FeatureExtractor(
    params, variant=config.eval.inception_variant
  )


def _path(config, dataset, extract):
  if config.eval.stats_path:
    return pathlib.Path(config.eval.stats_path)
  name = (
    f'{dataset.name.replace("/", "_")}_{config.data.image_size}_'
    f'{statistics.identity_of(extract)}_{dataset.fingerprint[:16]}.npz'
  )
  return cache_dir() / 'stats' / name


def reference(config, workdir, extract):
  """Statistics of the training images, computed if they are not there yet.

  Raises:
    ValueError: those at config.eval.stats_path are of other images, another
      resolution, another variant or another size of features.
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
    return None  # The first host's cache has it, and it computes the metrics.
  found = statistics.load_stats(path)
  one = statistics.features_of(dataset.fetch([0]), extract)
  statistics.check_compatible(
    found,
    dimensions=one.shape[-1],
    variant=statistics.variant_of(extract),
    resolution=config.data.image_size,
    fingerprint=dataset.fingerprint,
  )
  return found


def stats(config, workdir, extract=None):
  """Computes and stores statistics of the raw training images, each once.

  They go to config.eval.stats_path, or into the cache.

  Args:
    config: its data and eval sections say of what and how.
    workdir: where hosts put their parts.
    extract: a feature extractor; None for that of the config.
  """
  dataset = datasets.load(config.data, 'train')
  extract = extract or extractor(config)
  path = _path(config, dataset, extract)
  host, hosts = jax.process_index(), jax.process_count()
  key = f'{dataset.fingerprint[:16]}-{statistics.identity_of(extract)}'
  part_path = lambda i: (
    pathlib.Path(workdir) / 'stats' / f'{key}-{i}_of_{hosts}.npz'
  )
  mine = np.arange(host, len(dataset), hosts)
  keep = min(NUM_FEATURES // hosts, len(mine))
  part = None
  if part_path(host).is_file():
    part = statistics.load_stats(part_path(host))
  done = part.count if part else 0
  progress = Progress('reference features', len(mine), 'images', start=done)
  while done < len(mine):
    # The last chunk is not small: one image alone has no covariance.
    stop = len(mine) if len(mine) - done < 2 * CHUNK else done + CHUNK
    chunk = statistics.compute_stats(
      (
        dataset.fetch(mine[i : min(i + 256, stop)])
        for i in range(done, stop, 256)
      ),
      extract,
      num_features=keep * stop // len(mine) - keep * done // len(mine),
      progress=lambda n, done=done: progress(done + n),
    )
    part = statistics.merge_stats([part, chunk]) if part else chunk
    part.save(part_path(host))
    done = stop
  barrier('stats')
  if host == 0:
    whole = statistics.merge_stats(
      [statistics.load_stats(part_path(i)) for i in range(hosts)]
    )
    # Shuffled, as datasets may be in order of classes, and named by the
    # dataset, which is known without reading all its images.
    order = np.random.default_rng(0).permutation(len(whole.features))
    dataclasses.replace(
      whole,
      features=whole.features[order],
      fingerprint=dataset.fingerprint,
    ).save(path)
    for i in range(hosts):
      part_path(i).unlink()
    say(f'Statistics of {whole.count} images are in {path}.')
  barrier('stats_written')
