r"""NCSN++ cont. (sub-VP), CIFAR-10.

python main.py --mode train --workdir W \
  --config configs/subvp/cifar10_ncsnpp_continuous.py
"""

from configs.base import cifar10, compose, ncsnpp, subvp


def get_config():
  return compose(cifar10, subvp, ncsnpp)
