r"""DDPM cont. (VP), CIFAR-10: FID 3.69 (ODE), 3.21 bits/dim.

python main.py --mode train --workdir W \
  --config configs/vp/ddpm/cifar10_continuous.py
"""

from configs.base import cifar10, compose, ddpm, vp


def get_config():
  return compose(cifar10, vp, ddpm)
