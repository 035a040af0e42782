r"""DDPM++ (DDPM), CIFAR-10: FID 2.78, IS 9.64.

python main.py --mode train --workdir W \
  --config configs/vp/cifar10_ddpmpp.py
"""

from configs.base import cifar10, compose, ddpmpp, discrete, vp


def get_config():
  return compose(cifar10, vp, ddpmpp, discrete)
