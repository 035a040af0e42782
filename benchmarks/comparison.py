"""Compare evaluation with pytorch-fid and torch-fidelity on two sets of images.

  python -m benchmarks.comparison --folder F train=DIR_OR_NPZ test=DIR_OR_NPZ

Each set is NAME=PATH, where PATH is a folder of images of one size, or an .npz
file; NAME=PATH:KEY names the array in it. The features of every installed
network are written to F in chunks. Chunks that exist are not computed again, so
the program can be stopped at any time, and packages that cannot be installed
together can be run in environments of their own. Then it prints, for the images
that all networks have seen:

- the largest difference of features, for both input conventions;
- FID, ours and theirs, each from its own features;
- KID of 100 x 1000 images in the same subsets (seed 2020), and Inception Score
  in the same splits: ours and that of torch-fidelity. Random projections of
  features replace logits, because some files of weights have none.

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
from PIL import Image

import evaluation
from data import sources
from features import extract, statistics, weights
from runtime.files import atomic

# Our networks by their input convention, and those that they should equal.
PAIRS = {'ours_pytorch_fid': 'pytorch_fid', 'ours_tensorflow': 'torch_fidelity'}
SEED = 2020  # The seed of torch-fidelity.


def installed(*modules):
  """Return whether all modules can be imported."""
  return all(importlib.util.find_spec(module) for module in modules)


# --- Networks ---


def torch_state(arrays):
  """Return a state_dict for the networks of pytorch-fid and torch-fidelity."""
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
  """Return a function of torch tensors for all images, in numpy.

  Args:
    function: function of a uint8 tensor [B, C, H, W] that returns [B, D].
    images: uint8 [N, H, W, C].
    batch_size: images at a time.

  Returns:
    [N, D].
  """
  import torch

  outputs = []
  with torch.inference_mode():
    for i in range(0, len(images), batch_size):
      x = torch.from_numpy(images[i : i + batch_size]).permute(0, 3, 1, 2)
      outputs.append(function(x).numpy())
  return np.concatenate(outputs)


def pytorch_fid_network(arrays):
  """Return pytorch-fid as a function (images, batch_size) -> [N, 2048]."""
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
  """Return torch-fidelity as a function (images, batch_size) -> [N, 2048]."""
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
  """Return our network as a function (images, batch_size) -> [N, 2048]."""
  ours = extract.FeatureExtractor(weights.load_weights(path), variant=variant)
  return lambda images, batch_size: ours(images)['pool_3']


def networks(path):
  """Return the networks that are installed, by name."""
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


# --- Images and features ---


def read_set(where, count):
  """Return the first `count` images of a set, uint8 [N, H, W, 3]."""
  path, _, key = where.partition(':')
  if path.endswith('.npz'):
    with np.load(path) as file:
      return file[key or file.files[0]][:count]
  files = sources.image_files(pathlib.Path(path))[:count]
  return np.stack(
    [
      np.asarray(Image.open(pathlib.Path(path, f)).convert('RGB'))
      for f in files
    ]
  )


def extract_all(args, sets):
  """Compute the features that are missing, chunk by chunk for all networks."""
  found = networks(args.weights)
  images = {name: read_set(where, args.images) for name, where in sets.items()}
  for start in range(0, args.images, args.chunk):
    for set_name, x in images.items():
      for network, function in found.items():
        path = args.folder / f'{network}_{set_name}_{start}.npy'
        part = x[start : start + args.chunk]
        if path.exists() or not len(part):
          continue
        with atomic(path) as temporary, open(temporary, 'wb') as file:
          np.save(file, function(part, args.batch_size))
        print(path, flush=True)


def read_features(folder, network, set_name, chunk):
  """Return features [N, 2048] of the first chunks without a gap, or None."""
  parts, start = [], 0
  while (path := folder / f'{network}_{set_name}_{start}.npy').exists():
    parts.append(np.load(path))
    start += chunk
  return np.concatenate(parts) if parts else None


# --- Report ---


def line(what, ours, theirs):
  """Print a line of the report."""
  gap = abs(ours - theirs) / abs(theirs)
  print(f'{what:34}{ours:14.8f}{theirs:14.8f}{gap:12.1e}', flush=True)


def moments(x):
  """Return the moments of features [N, D]."""
  found = statistics.Moments()
  found.update(x)
  return found


def their_fid(network, real, fake):
  """Return the FID of features as another project computes it."""
  if network == 'torch_fidelity':
    import torch
    from torch_fidelity import metric_fid

    both = [
      metric_fid.fid_features_to_statistics(torch.from_numpy(x))
      for x in (fake, real)
    ]
    result = metric_fid.fid_statistics_to_metric(*both, False)
    return result['frechet_inception_distance']
  from pytorch_fid import fid_score

  a, b = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (fake, real))
  return fid_score.calculate_frechet_distance(*a, *b)


def report_features(args, names):
  """Print the largest differences of features."""
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
  """Print scores, ours and theirs."""
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
  """Print KID and Inception Score of our features and of theirs."""
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
  # These logits are large enough for a score far from 1.
  random = np.random.default_rng(0).standard_normal((fake.shape[1], 1008))
  logits, their_logits = (np.float64(x) @ random for x in (fake, their_fake))
  for splits in (1, 10):
    want = metric_isc.isc_features_to_metric(
      torch.from_numpy(their_logits), splits, shuffle=False
    )['inception_score_mean']
    for what, x in {'the same': their_logits, 'own': logits}.items():
      got = evaluation.inception_score(x, splits=splits)
      line(f'IS, {splits} splits, {what} projections', got.value, want)


def main():
  """Compute features, then print the report."""
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
