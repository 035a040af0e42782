r"""DDPM++ as a rectified flow (Liu et al. 2023), CIFAR-10: FID 2.58 by RK45.

python main.py --mode train --workdir W \
  --config configs/flow/cifar10_ddpmpp.py
"""

from configs.base import cifar10, compose, ddpmpp, flow, vp


def get_config():
  change = {
    'model.dropout': 0.15,
    'training.ema_rate': 0.999999,
    'training.ema_warmup': True,
  }
  return compose(cifar10, vp, ddpmpp, flow, change)
