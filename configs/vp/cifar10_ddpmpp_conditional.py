r"""DDPM++ cont. (VP), told the class, for classifier-free guidance; CIFAR-10.

python main.py --mode train --workdir W \
  --config configs/vp/cifar10_ddpmpp_conditional.py
"""

from configs.base import cifar10, compose, conditional, ddpmpp, vp


def get_config():
  return compose(cifar10, vp, ddpmpp, conditional(10))
