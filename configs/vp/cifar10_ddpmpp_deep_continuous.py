r"""DDPM++ cont. deep (VP), CIFAR-10: FID 2.41, IS 9.68, 3.13 bits/dim.

python main.py --mode train --workdir W \
  --config configs/vp/cifar10_ddpmpp_deep_continuous.py
"""

from configs.base import cifar10, compose, ddpmpp, deep, vp


def get_config():
  return compose(cifar10, vp, ddpmpp, deep)
