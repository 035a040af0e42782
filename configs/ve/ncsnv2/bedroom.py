r"""NCSNv2, LSUN bedroom at 128 pixels.

python main.py --mode train --workdir W \
  --config configs/ve/ncsnv2/bedroom.py
"""

from configs.base import annealed, bedroom, compose, ncsnv2_128, ve


def get_config():
  return compose(
    bedroom,
    ve,
    ncsnv2_128,
    annealed(1086, snr=0.095, steps=3),
    {'sde.sigma_max': 190.0},
  )
