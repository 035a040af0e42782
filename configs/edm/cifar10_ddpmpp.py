r"""DDPM++ (EDM), CIFAR-10: FID 2.05; 1.97 with data.augment=0.12.

python main.py --mode train --workdir W \
  --config configs/edm/cifar10_ddpmpp.py
"""

from configs.base import cifar10, compose, ddpmpp, edm, vp


def get_config():
  change = {'model.ch_mult': (2, 2, 2), 'model.dropout': 0.13}
  return compose(cifar10, vp, ddpmpp, edm, change)
