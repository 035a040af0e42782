r"""DDPM, CIFAR-10: FID 3.24 (ODE 3.37), 3.28 bits/dim.

python main.py --mode train --workdir W \
  --config configs/vp/ddpm/cifar10.py
"""

from configs.base import cifar10, compose, ddpm, discrete, vp


def get_config():
  return compose(cifar10, vp, ddpm, discrete)
