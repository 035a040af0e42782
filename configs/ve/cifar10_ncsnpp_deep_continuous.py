r"""NCSN++ cont. deep (VE), CIFAR-10: FID 2.20, IS 9.89.

python main.py --mode train --workdir W \
  --config configs/ve/cifar10_ncsnpp_deep_continuous.py
"""

from configs.base import cifar10, compose, deep, ncsnpp, ve


def get_config():
  return compose(cifar10, ve, ncsnpp, deep)
