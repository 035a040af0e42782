r"""Measure the speed of evaluation, ours and that of common packages.

  python -m benchmarks.evaluation [--images 64] [--batch_sizes 16 32] \
    [--cpu_devices 2]

It prints images per second of the Inception network: ours, and that of
pytorch-fid if torch and pytorch-fid are installed, with the same weights,
images and batches. It also prints the seconds of the Frechet distance in 2048
dimensions: ours, and with the matrix square root of scipy.

The programs run in turn, and the fastest round counts, so that other load on
the machine affects all of them. CPU seconds are those of all threads together,
including threads that wait actively for others.
"""

import argparse
import pathlib
import time

import numpy as np
import scipy.linalg

import evaluation
from benchmarks import comparison
from features import extract, statistics, weights
from runtime.devices import divide_cpu


def add_cpu_devices(parser):
  """Add the option --cpu_devices to a parser."""
  parser.add_argument(
    '--cpu_devices',
    type=int,
    default=1,
    help='devices that the CPU is divided into, each with a part of a batch',
  )


def in_turn(functions, rounds):
  """Call functions in turn, so that other load affects all of them.

  Returns:
    [seconds, CPU seconds] of each function and round, [F, rounds, 2], and the
    results of the first calls, which also compile and are not counted.
  """
  results = [f() for f in functions]  # The first call compiles.
  times = [[] for _ in functions]
  for _ in range(rounds):
    for function, seconds in zip(functions, times, strict=True):
      start = time.perf_counter(), time.process_time()
      function()
      end = time.perf_counter(), time.process_time()
      seconds.append(np.subtract(end, start))
  return np.array(times), results


def time_features(args):
  """Print images per second of the Inception networks."""
  rng = np.random.default_rng(0)
  shape = (args.images, args.resolution, args.resolution, 3)
  images = rng.integers(0, 256, shape, np.uint8)
  path = args.weights or weights.find_weights()
  params = weights.load_weights(path)
  theirs = None
  if comparison.installed('torch', 'pytorch_fid'):
    arrays = weights.read_arrays(pathlib.Path(path))
    theirs = comparison.pytorch_fid_network(arrays)
  print(f'\nInception features of {args.images} images')
  print('                  batch   images/s  images/CPU s')
  for size in args.batch_sizes:
    ours = extract.FeatureExtractor(
      params, variant='pytorch_fid', batch_size=size
    )
    functions = {'ours': lambda ours=ours: ours(images)['pool_3']}
    if theirs:
      functions['pytorch-fid'] = lambda size=size: theirs(images, size)
    times, results = in_turn(functions.values(), args.rounds)
    for name, seconds in zip(functions, times.min(axis=1), strict=True):
      rate, cpu_rate = args.images / seconds
      print(f'{name:18}{size:5d}{rate:11.2f}{cpu_rate:14.2f}', flush=True)
    gap = np.abs(results[0] - results[-1]).max()
    print(f'largest difference {gap:.1e}', flush=True)


def time_frechet(args):
  """Print the seconds of the Frechet distance."""
  rng = np.random.default_rng(0)
  moments = []
  for scale in (1.0, 1.2):
    x = rng.gamma(1.0, scale, (args.samples, 2048))
    moments.append(statistics.Moments())
    moments[-1].update(x)
  a, b = moments

  def scipy_distance():
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma)
    trace = np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root.real)
    return ((a.mu - b.mu) ** 2).sum() + trace

  ours = lambda: evaluation.frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
  times, results = in_turn([ours, scipy_distance], args.rounds)
  print(f'\nFrechet distance, 2048 dimensions, {args.samples} samples each')
  print('              seconds  CPU s     distance')
  for name, (s, cpu), distance in zip(
    ('ours', 'scipy sqrtm'), times.min(axis=1), results, strict=True
  ):
    print(f'{name:12}{s:9.2f}{cpu:7.1f}{distance:13.6f}')


def main():
  """Run both measurements."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--images', type=int, default=64)
  parser.add_argument('--resolution', type=int, default=32)
  parser.add_argument('--batch_sizes', type=int, nargs='+', default=[16, 32])
  parser.add_argument('--samples', type=int, default=10_000)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--weights', help='file; downloaded by default')
  add_cpu_devices(parser)
  args = parser.parse_args()
  divide_cpu(wanted=args.cpu_devices)
  time_frechet(args)
  time_features(args)


if __name__ == '__main__':
  main()
