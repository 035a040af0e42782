r"""NCSN++ (EDM), CIFAR-10: FID 1.99; 1.98 with data.augment=0.12.

python main.py --mode train --workdir W \
  --config configs/edm/cifar10_ncsnpp.py
"""

from configs.base import cifar10, compose, edm, ncsnpp, ve


def get_config():
  change = {'model.ch_mult': (2, 2, 2), 'model.dropout': 0.13}
  return compose(cifar10, ve, ncsnpp, edm, change)
