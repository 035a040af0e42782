r"""NCSN with technique 5 of NCSNv2 (averaged parameters), CelebA.

python main.py --mode train --workdir W \
  --config configs/ve/ncsn/celeba_5.py
"""

from configs.base import annealed, celeba, compose, ncsn, ve


def get_config():
  return compose(
    celeba, ve, ncsn, annealed(10, snr=0.316, steps=100), {'sde.sigma_max': 1.0}
  )
