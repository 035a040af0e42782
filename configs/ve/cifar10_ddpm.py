r"""DDPM trained with SMLD, CIFAR-10: FID 3.60.

python main.py --mode train --workdir W \
  --config configs/ve/cifar10_ddpm.py
"""

from configs.base import cifar10, compose, ddpm, discrete, ve


def get_config():
  return compose(cifar10, ve, ddpm, discrete)
