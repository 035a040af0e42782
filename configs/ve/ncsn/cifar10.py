r"""NCSN, CIFAR-10: FID 25.32, IS 8.87.

python main.py --mode train --workdir W \
  --config configs/ve/ncsn/cifar10.py
"""

from configs.base import annealed, cifar10, compose, ncsn, ve


def get_config():
  return compose(
    cifar10,
    ve,
    ncsn,
    annealed(10, snr=0.316, steps=100),
    {'sde.sigma_max': 1.0, 'training.ema_rate': 0.0},
  )
