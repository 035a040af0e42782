r"""NCSN++ cont. (VE), CIFAR-10: FID 2.38, IS 9.83.

python main.py --mode train --workdir W \
  --config configs/ve/cifar10_ncsnpp_continuous.py
"""

from configs.base import cifar10, compose, ncsnpp, ve


def get_config():
  return compose(cifar10, ve, ncsnpp, {'training.n_iters': 950_000})
