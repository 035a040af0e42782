r"""NCSN with techniques 1, 2, 4, 5 of NCSNv2, CelebA.

python main.py --mode train --workdir W \
  --config configs/ve/ncsn/celeba_1245.py
"""

from configs.base import annealed, celeba, compose, ncsn, ve


def get_config():
  return compose(
    celeba, ve, ncsn, annealed(500, snr=0.128, steps=5), {'sde.sigma_max': 90.0}
  )
