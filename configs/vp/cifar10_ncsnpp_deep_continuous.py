r"""NCSN++ cont. deep (VP), CIFAR-10.

python main.py --mode train --workdir W \
  --config configs/vp/cifar10_ncsnpp_deep_continuous.py
"""

from configs.base import cifar10, compose, deep, ncsnpp, vp


def get_config():
  return compose(cifar10, vp, ncsnpp, deep)
