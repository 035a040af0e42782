r"""NCSN with techniques 1, 2, 4, 5 of NCSNv2, CIFAR-10.

python main.py --mode train --workdir W \
  --config configs/ve/ncsn/cifar10_1245.py
"""

from configs.base import annealed, cifar10, compose, ncsn, ve


def get_config():
  return compose(cifar10, ve, ncsn, annealed(232, snr=0.176, steps=5))
