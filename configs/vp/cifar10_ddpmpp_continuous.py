r"""DDPM++ cont. (VP), CIFAR-10: FID 2.55, IS 9.58, 3.16 bits/dim (paper).

python main.py --mode train --workdir W \
  --config configs/vp/cifar10_ddpmpp_continuous.py
"""

from configs.base import cifar10, compose, ddpmpp, vp


def get_config():
  return compose(cifar10, vp, ddpmpp)
