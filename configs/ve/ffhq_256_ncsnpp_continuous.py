r"""NCSN++ cont. (VE), FFHQ at 256 pixels.

python main.py --mode train --workdir W \
  --config configs/ve/ffhq_256_ncsnpp_continuous.py
"""

from configs.base import compose, ffhq_256, ncsnpp_256, ve


def get_config():
  return compose(ffhq_256, ve, ncsnpp_256, {'sde.sigma_max': 348.0})
