r"""NCSN++ cont. (VP), CIFAR-10.

python main.py --mode train --workdir W \
  --config configs/vp/cifar10_ncsnpp_continuous.py
"""

from configs.base import cifar10, compose, ncsnpp, vp


def get_config():
  return compose(cifar10, vp, ncsnpp)
