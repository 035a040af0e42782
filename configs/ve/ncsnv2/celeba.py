r"""NCSNv2, CelebA at 64 pixels.

python main.py --mode train --workdir W \
  --config configs/ve/ncsnv2/celeba.py
"""

from configs.base import annealed, celeba, compose, ncsnv2, ve


def get_config():
  return compose(
    celeba,
    ve,
    ncsnv2,
    annealed(500, snr=0.128, steps=5),
    {'sde.sigma_max': 90.0},
  )
