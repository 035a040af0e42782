"""Compares evaluation with pytorch-fid and torch-fidelity on two image sets.

  python -m benchmarks.comparison --folder F train=DIR_OR_NPZ test=DIR_OR_NPZ

Each set is NAME=PATH: a folder of images of one size, or an .npz (NAME=PATH:KEY
names the array in it). Features of every installed network are written to F in
chunks; what is there is not computed again, so that it can be killed, and so
that packages which do not live together may each be run in an environment of
their own. Then it prints, over the images that all networks have seen:

- the largest difference of features, for both input conventions;
- FID, ours and theirs, each from its own features;
- KID, of 100 x 1000 images in the same subsets (seed 2020), and Inception
  Score in the same splits, of the same features: ours and torch-fidelity's.
  Where weights have no logits, random projections of features take their place.

For the two halves of CIFAR-10 in the README: --images 5000
train=cifar10.npz:x_train test=cifar10.npz:x_test.
"""

import argparse
import functools
import importlib.util
import os
import pathlib
import tempfile
from unittest import mock

import numpy as np

import evaluation

# Who agrees with whom: ours by input convention, and theirs.
PAIRS = {'ours_pytorch_fid': 'pytorch_fid', 'ours_tensorflow': 'torch_fidelity'}
SEED = 2020  # torch-fidelity's


def installed(*modules):
  return all(importlib.util.find_spec(module) for module in modules)


# ----------------------------------------------------------------- networks


def torch_state(arrays):
  """A state_dict of pytorch-fid's and torch-fidelity's networks."""
  import torch

  state = {k: torch.tensor(v) for k, v in arrays.items()}
  for name in list(state):
    if name.endswith('.bn.bias'):
      norm = name.replace('bias', 'weight')
      state.setdefault(norm, torch.ones_like(state[name]))
  state.setdefault('fc.weight', torch.zeros(1008, 2048))
  state.setdefault('fc.bias', torch.zeros(1008))
  return state


def in_batches(function, images, batch_size):
  """function(uint8 NCHW tensor) -> [B, D] of all images, uint8 NHWC."""
  import torch

  outputs = []
  with torch.inference_mode():
    for i in range(0, len(images), batch_size):
      x = torch.from_numpy(images[i : i + batch_size]).permute(0, 3, 1, 2)
      outputs.append(function(x).numpy())
  return np.concatenate(outputs)


def pytorch_fid_network(arrays):
  """(uint8 NHWC, batch_size) -> [N, 2048] by pytorch-fid."""
  import pytorch_fid.inception
  import torch

  with mock.patch.object(
    pytorch_fid.inception,
    'load_state_dict_from_url',
    lambda *_, **__: torch_state(arrays),
  ):
    network = pytorch_fid.inception.InceptionV3([3]).eval()
  network = network.to(memory_format=torch.channels_last)
  return functools.partial(
    in_batches, lambda x: network(x.float() / 255)[0][:, :, 0, 0]
  )


def torch_fidelity_network(arrays):
  """(uint8 NHWC, batch_size) -> [N, 2048] by torch-fidelity."""
  import torch
  from torch_fidelity import feature_extractor_inceptionv3 as inception

  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'weights.pth')
    torch.save(torch_state(arrays), path)
    network = inception.FeatureExtractorInceptionV3(
      'inception-v3-compat', ['2048'], feature_extractor_weights_path=path
    )
  network = network.to(memory_format=torch.channels_last)
  return functools.partial(in_batches, lambda x: network(x)[0])


def our_network(path, variant):
  """(uint8 NHWC, batch_size) -> [N, 2048] by this project."""
  from features import statistics, weights

  extract = statistics.FeatureExtractor(
    weights.load_weights(path), variant=variant
  )
  return lambda images, batch_size: extract(images)['pool_3']


def networks(path):
  """{name: extract} of all that are installed."""
  if not installed('jax'):
    return {}
  from features import weights

  path = path or weights.find_weights()
  arrays = weights.read_arrays(pathlib.Path(path))
  found = {
    f'ours_{variant}': our_network(path, variant)
    for variant in ('tensorflow', 'pytorch_fid')
  }
  if installed('torch', 'pytorch_fid'):
    found['pytorch_fid'] = pytorch_fid_network(arrays)
  if installed('torch', 'torch_fidelity'):
    found['torch_fidelity'] = torch_fidelity_network(arrays)
  return found


# ------------------------------------------------------------ images, features


def read_set(where, count):
  """The first `count` images, uint8 [N, H, W, 3]."""
  path, _, key = where.partition(':')
  if path.endswith('.npz'):
    with np.load(path) as file:
      return file[key or file.files[0]][:count]
  from PIL import Image

  from data import sources

  files = sources.image_files(pathlib.Path(path))[:count]
  return np.stack(
    [
      np.asarray(Image.open(pathlib.Path(path, f)).convert('RGB'))
      for f in files
    ]
  )


def extract_all(args, sets):
  """Computes what is missing, all networks abreast."""
  found = networks(args.weights)
  images = {name: read_set(where, args.images) for name, where in sets.items()}
  for start in range(0, args.images, args.chunk):
    for set_name, x in images.items():
      for network, extract in found.items():
        path = args.folder / f'{network}_{set_name}_{start}.npy'
        part = x[start : start + args.chunk]
        if path.exists() or not len(part):
          continue
        temporary = path.with_suffix('.part.npy')
        np.save(temporary, extract(part, args.batch_size))
        os.replace(temporary, path)
        print(path, flush=True)


def read_features(folder, network, set_name, chunk):
  """Features of consecutive chunks from the first on, [N, 2048], or None."""
  parts, start = [], 0
  while (path := folder / f'{network}_{set_name}_{start}.npy').exists():
    parts.append(np.load(path))
    start += chunk
  return np.concatenate(parts) if parts else None


# ------------------------------------------------------------------- report


def line(what, ours, theirs):
  gap = abs(ours - theirs) / abs(theirs)
  print(f'{what:34}{ours:14.8f}{theirs:14.8f}{gap:12.1e}', flush=True)


def moments(x):
  found = evaluation.Moments()
  found.update(x)
  return found


def their_fid(network, real, fake):
  if network == 'torch_fidelity':
    import torch
    from torch_fidelity import metric_fid

    statistics = [
      metric_fid.fid_features_to_statistics(torch.from_numpy(x))
      for x in (fake, real)
    ]
    result = metric_fid.fid_statistics_to_metric(*statistics, False)
    return result['frechet_inception_distance']
  from pytorch_fid import fid_score

  a, b = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (fake, real))
  return fid_score.calculate_frechet_distance(*a, *b)


def report_features(args, names):
  print('\nLargest difference of features')
  for ours, theirs in PAIRS.items():
    for name in names:
      x, y = (
        read_features(args.folder, network, name, args.chunk)
        for network in (ours, theirs)
      )
      if x is not None and y is not None:
        n = min(len(x), len(y))
        gap = np.abs(x[:n] - y[:n]).max()
        print(f'{theirs:18}{name:10}{n:6d} images {gap:12.1e}', flush=True)


def report_scores(args, names):
  print(f'\n{"":34}{"ours":>14}{"theirs":>14}{"relative":>12}')
  for ours, theirs in PAIRS.items():
    every = [
      read_features(args.folder, network, name, args.chunk)
      for network in (ours, theirs)
      for name in names
    ]
    if any(x is None for x in every) or not installed('torch', theirs):
      print(f'{theirs}: not installed here, or no features yet')
      continue
    count = min(map(len, every))
    real, fake, their_real, their_fake = (x[:count] for x in every)
    got = evaluation.fid(moments(fake), moments(real), allow_few=True)
    want = their_fid(theirs, their_real, their_fake)
    line(f'FID, {theirs}, {count} + {count}', got.value, want)
    if theirs == 'torch_fidelity':
      report_fidelity(real, fake, their_real, their_fake)


def report_fidelity(real, fake, their_real, their_fake):
  """KID and Inception Score, of our features and of theirs."""
  import torch
  from torch_fidelity import metric_isc, metric_kid

  if len(real) >= 1000:
    want = metric_kid.kid_features_to_metric(
      torch.from_numpy(their_fake),
      torch.from_numpy(their_real),
      kid_subsets=100,
      kid_subset_size=1000,
      rng_seed=SEED,
      verbose=False,
    )
    for what, pair in {
      'the same features': (their_real, their_fake),
      'own features': (real, fake),
    }.items():
      got = evaluation.kid(*pair, seed=SEED)
      theirs = want['kernel_inception_distance_mean']
      line(f'KID, {what}', got.value, theirs)
    line('KID, std', got.std, want['kernel_inception_distance_std'])
  # Certain enough that the score is far from 1.
  weights = np.random.default_rng(0).standard_normal((fake.shape[1], 1008))
  logits, their_logits = (np.float64(x) @ weights for x in (fake, their_fake))
  for splits in (1, 10):
    want = metric_isc.isc_features_to_metric(
      torch.from_numpy(their_logits), splits, shuffle=False
    )['inception_score_mean']
    for what, x in {'the same': their_logits, 'own': logits}.items():
      got = evaluation.inception_score(x, splits=splits)
      line(f'IS, {splits} splits, {what} projections', got.value, want)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('sets', nargs=2, metavar='NAME=PATH', help='real, fake')
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--images', type=int, default=5000, help='of each set')
  parser.add_argument('--chunk', type=int, default=250)
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--weights', help='file; downloaded by default')
  parser.add_argument('--report', action='store_true', help='compute nothing')
  args = parser.parse_args()
  sets = dict(s.split('=', 1) if '=' in s else (s, '') for s in args.sets)
  args.folder.mkdir(parents=True, exist_ok=True)
  if not args.report:
    extract_all(args, sets)
  report_features(args, list(sets))
  report_scores(args, list(sets))


if __name__ == '__main__':
  main()
