r"""NCSNv2, CIFAR-10: FID 10.87, IS 8.40.

python main.py --mode train --workdir W \
  --config configs/ve/ncsnv2/cifar10.py
"""

from configs.base import annealed, cifar10, compose, ncsnv2, ve


def get_config():
  return compose(cifar10, ve, ncsnv2, annealed(232, snr=0.176, steps=5))
