r"""NCSN++ cont. (VE), LSUN bedroom at 256 pixels.

python main.py --mode train --workdir W \
  --config configs/ve/bedroom_ncsnpp_continuous.py
"""

from configs.base import bedroom, compose, ncsnpp_256, ve


def get_config():
  return compose(bedroom, ve, ncsnpp_256, {'sde.sigma_max': 378.0})
