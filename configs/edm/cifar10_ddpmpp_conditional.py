r"""DDPM++ (EDM), told the class, with augmentation; CIFAR-10: FID 1.79.

python main.py --mode train --workdir W \
  --config configs/edm/cifar10_ddpmpp_conditional.py
"""

from configs.base import cifar10, compose, conditional, ddpmpp, edm, vp


def get_config():
  change = {'model.ch_mult': (2, 2, 2), 'model.dropout': 0.13}
  # All images have their class: the network is not trained without.
  change |= {'data.augment': 0.12, 'data.random_flip': False}
  change |= {'training.condition_dropout': 0.0}
  return compose(cifar10, vp, ddpmpp, edm, conditional(10), change)
