r"""DDPM that is not told the noise level, CIFAR-10.

python main.py --mode train --workdir W \
  --config configs/vp/ddpm/cifar10_unconditional.py
"""

from configs.base import cifar10, compose, ddpm, discrete, vp


def get_config():
  return compose(cifar10, vp, ddpm, discrete, {'model.conditional': False})
