"""Prepares datasets, and measures them.

python -m data prepare celeba --data_dir DIR     (needs TensorFlow)
python -m data sigma_max cifar10
"""

import argparse
import sys

from data import datasets, prepare


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m data')
  parser.add_argument('command', choices=('prepare', 'sigma_max'))
  parser.add_argument('dataset', metavar='NAME', choices=datasets.DATASETS)
  parser.add_argument('--path', '--data_dir', default='', help='data.path')
  parser.add_argument('--image_size', type=int, default=32)
  parser.add_argument('--num_channels', type=int, default=3)
  parser.add_argument('--num_images', type=int, help='a random subset')
  parser.add_argument('--manual_dir', help='files that you downloaded')
  parser.set_defaults(dims=2, centered=False)  # of points
  args = parser.parse_args(argv)
  try:
    if args.command == 'prepare':
      source = datasets.DATASETS[args.dataset]
      if not isinstance(source, datasets.Prepared):
        raise ValueError(f'{args.dataset} needs no preparation')
      data_dir, name = source.where(args)
      done = prepare.prepare(name, data_dir, args.manual_dir)
      print(f'{args.dataset} is ready in {done}')
    else:
      value = datasets.sigma_max(
        datasets.load(args, 'train'), num_images=args.num_images
      )
      print(f'sigma_max = {value:.2f}, of {args.num_images or "all"} images')
  except (AssertionError, ImportError, OSError, ValueError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
