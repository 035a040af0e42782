r"""DDPM++ cont. (sub-VP), CIFAR-10: FID 2.61, IS 9.56, 3.02 bits/dim.

python main.py --mode train --workdir W \
  --config configs/subvp/cifar10_ddpmpp_continuous.py
"""

from configs.base import cifar10, compose, ddpmpp, subvp


def get_config():
  return compose(cifar10, subvp, ddpmpp)
