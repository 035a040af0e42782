r"""NCSN with technique 5 of NCSNv2 (averaged parameters), CIFAR-10.

python main.py --mode train --workdir W \
  --config configs/ve/ncsn/cifar10_5.py
"""

from configs.base import annealed, cifar10, compose, ncsn, ve


def get_config():
  return compose(
    cifar10,
    ve,
    ncsn,
    annealed(10, snr=0.316, steps=100),
    {'sde.sigma_max': 1.0},
  )
