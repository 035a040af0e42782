"""Measure images/s of decoding against reading the cache of decoded images.

  python -m benchmarks.data [--path DIR] [--image_size 256] [--processes 2]

Without --path, photographs are imitated: smooth random colours with fine noise,
as PNG and JPEG files of --file_size pixels. Batches are those of training, in
random order. For each kind of file one line is printed: files decoded by all
processors, then `python -m data cache`, then its files read by one process, and
by several at the same time. Every rate is the total of all processes, and the
median of --repeats.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import tempfile
import time

import numpy as np
from PIL import Image

from data import __main__ as command_line
from data import batches, datasets, sources


def imitate(folder, count, size, suffix):
  """Write images whose files have about the size of those of photographs."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(count):
    smooth = rng.integers(0, 256, (16, 16, 3), np.uint8)
    image = Image.fromarray(smooth).resize(
      (size, size), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(image) + rng.normal(0, 3, (size, size, 1))
    image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    image.save(folder / f'{i:05}{suffix}', quality=90)


def rate(path, args, number=0, *, decode=False):
  """Return images per second of training batches, of one process.

  Args:
    path: folder of images.
    args: of the command line.
    number: number of the process, which is the seed of the order.
    decode: whether files are decoded, even if there is a cache.
  """
  if decode:
    sources.MEMORY_LIMIT = 0
  config = datasets.Data(
    dataset='folder', path=str(path), image_size=args.image_size
  )
  train = datasets.load(config, 'train')
  fetch = functools.partial(
    batches.train_batch, train, batch_size=args.batch_size, seed=number
  )
  steps = args.decoded_steps if decode else args.cached_steps
  begun = time.perf_counter()
  for _ in batches.prefetch(fetch, range(steps)):
    pass
  return steps * args.batch_size / (time.perf_counter() - begun)


def measure(path, args):
  """Return (decoded, cached in one process, cached in several) in images/s."""
  median = lambda function: np.median([function() for _ in range(args.repeats)])
  decoded = median(lambda: rate(path, args, decode=True))
  sizes = ['--path', str(path), '--image_size', str(args.image_size)]
  command_line.main(['cache', 'folder', *sizes])
  one = median(lambda: rate(path, args))
  several = concurrent.futures.ProcessPoolExecutor(
    args.processes, multiprocessing.get_context('spawn')
  )
  with several as pool:
    work = functools.partial(rate, path, args)
    total = median(lambda: sum(pool.map(work, range(args.processes))))
  return decoded, one, total


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--path', type=pathlib.Path, help='folder of images')
  for name, default in (
    ('image_size', 256),
    ('file_size', 256),
    ('count', 1000),
    ('batch_size', 64),
    ('decoded_steps', 20),
    ('cached_steps', 200),
    ('repeats', 3),
    ('processes', 2),
  ):
    parser.add_argument(f'--{name}', type=int, default=default)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    os.environ['SCORE_SDE_CACHE'] = str(pathlib.Path(folder, 'cache'))
    paths = [args.path] if args.path else []
    for suffix in () if args.path else ('.png', '.jpg'):
      paths.append(pathlib.Path(folder, suffix[1:]))
      imitate(paths[-1], args.count, args.file_size, suffix)
    for path in paths:
      decoded, one, several = measure(path, args)
      print(
        f'{path.name}: decoded {decoded:.0f} images/s, cached {one:.0f} '
        f'({one / decoded:.1f} times), in {args.processes} processes '
        f'{several:.0f}',
        flush=True,
      )


if __name__ == '__main__':
  main()
