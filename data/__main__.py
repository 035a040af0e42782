"""Prepare data sets, measure them, and look after the cache folder.

python -m data prepare celeba --data_dir DIR     (needs TensorFlow)
python -m data sigma_max cifar10
python -m data cache celeba --path DIR --image_size 64   (decodes it once)
python -m data cache [--clear [NAME ...]]
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys

from data import arrays, datasets, pixels, prepare, sources, toy
from runtime.files import cache_dir, check_local


def prepare_dataset(args):
  """Write a data set of tensorflow-datasets in the format that we read."""
  source = datasets.DATASETS[args.dataset]
  if not isinstance(source, prepare.Prepared):
    raise ValueError(f'{args.dataset} needs no preparation')
  data_dir, name = source.where(args)
  done = prepare.prepare(name, data_dir, args.manual_dir)
  print(f'{args.dataset} is ready in {done}')


def _section(args):
  """Return the section `data` of a config that the arguments describe."""
  return datasets.Data(
    dataset=args.dataset,
    path=args.path,
    image_size=args.image_size,
    num_channels=args.num_channels,
    background=args.background,
    shape=(2,) if args.dataset in toy.DISTRIBUTIONS else (),
    centered=args.dataset == 'arrays',
    random_flip=False,
  )


def print_sigma_max(args):
  """Print the largest distance between two training images."""
  section = _section(args)
  train = datasets.load(section, 'train')
  if args.dataset == 'arrays':  # The model sees them scaled.
    found = arrays.complete(section)
    scale = arrays.Scale(found['mean'], found['std'])
    raw = train.fetch
    read = lambda indices: (scale(raw(indices)), None)
    train = dataclasses.replace(train, read=read)
  value = pixels.sigma_max(train, num_images=args.num_images)
  print(f'sigma_max = {value:.2f}, of {args.num_images or "all"} images')


def _num_bytes(path):
  """Return the size of a file, or of all files in a folder."""
  files = [
    pathlib.Path(folder, name)
    for folder, _, names in os.walk(path)
    for name in names
  ]
  return sum(file.lstat().st_size for file in files or [path])


def _decode(args):
  """Write the decoded images of both splits of a data set into the cache."""
  config = _section(args)
  for split in ('train', 'test'):
    found = datasets.load(config, split, keep=True)
    folder = sources.kept_at(config, found.fingerprint)
    print(f'{len(found)} images for {split} are in {folder}')


def show_cache(args):
  """Decode a data set into the cache folder; else list or clear the folder.

  Raises:
    ValueError: a name to remove is not there, the folder is not only a cache,
      or a data set cannot be decoded.
  """
  if args.dataset:
    if args.clear is not None:
      raise ValueError(f'--clear does not go with the data set {args.dataset}')
    _decode(args)
    return
  folder = cache_dir()
  entries = sorted(folder.iterdir()) if folder.is_dir() else []
  sizes = [_num_bytes(entry) for entry in entries]
  lines = [
    (entry.name, size) for entry, size in zip(entries, sizes, strict=True)
  ]
  for name, size in [*lines, (f'in {folder}', sum(sizes))]:
    print(f'{size / 2**20:10.1f} MiB  {name}')
  if args.clear is None:
    return
  # A wrong $SCORE_SDE_CACHE must not cost the user's own files.
  for place in (pathlib.Path.home(), pathlib.Path.cwd()):
    if place.resolve().is_relative_to(folder.resolve()):
      raise ValueError(f'{folder} holds {place}: it is not emptied')
  if missing := set(args.clear) - {entry.name for entry in entries}:
    raise ValueError(f'{folder} has no {", ".join(sorted(missing))}')
  for entry in entries:
    if not args.clear or entry.name in args.clear:
      if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
      else:
        entry.unlink()
      print(f'removed {entry.name}')


def _parser():
  parser = argparse.ArgumentParser(prog='python -m data')
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  def command(function, name, nargs=None):
    added = commands.add_parser(name, help=function.__doc__.splitlines()[0])
    added.set_defaults(function=function)
    add = added.add_argument
    add('dataset', nargs=nargs, metavar='NAME', choices=datasets.DATASETS)
    path = {'type': os.path.expanduser, 'default': ''}
    add('--path', '--data_dir', **path, help='data.path')
    add('--image_size', type=int, default=32, help='in pixels')
    add('--num_channels', type=int, default=3, help='1, 3 or 4')
    add('--background', default='white', help='data.background')
    return added

  added = command(prepare_dataset, 'prepare')
  added.add_argument(
    '--manual_dir', type=os.path.expanduser, help='files that you downloaded'
  )
  added = command(print_sigma_max, 'sigma_max')
  added.add_argument('--num_images', type=int, help='size of a random subset')
  added = command(show_cache, 'cache', nargs='?')
  added.add_argument(
    '--clear', nargs='*', metavar='NAME', help='remove these, or everything'
  )
  return parser


def main(argv=None):
  """Run a command; exit with one line if it cannot be done."""
  args = _parser().parse_args(argv)
  try:
    for path in (args.path, getattr(args, 'manual_dir', None) or ''):
      check_local(path)
    args.function(args)
  except (AssertionError, ImportError, OSError, ValueError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
