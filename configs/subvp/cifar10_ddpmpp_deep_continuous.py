r"""DDPM++ cont. deep (sub-VP), CIFAR-10: FID 2.41, IS 9.57, 2.99 bits/dim.

python main.py --mode train --workdir W \
  --config configs/subvp/cifar10_ddpmpp_deep_continuous.py
"""

from configs.base import cifar10, compose, ddpmpp, deep, subvp


def get_config():
  return compose(cifar10, subvp, ddpmpp, deep)
