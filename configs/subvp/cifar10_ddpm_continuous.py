r"""DDPM cont. (sub-VP), CIFAR-10: FID 3.56 (ODE), 3.05 bits/dim.

python main.py --mode train --workdir W \
  --config configs/subvp/cifar10_ddpm_continuous.py
"""

from configs.base import cifar10, compose, ddpm, subvp


def get_config():
  return compose(cifar10, subvp, ddpm)
