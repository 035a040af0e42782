r"""NCSN++ cont. (VE), LSUN church at 256 pixels.

python main.py --mode train --workdir W \
  --config configs/ve/church_ncsnpp_continuous.py
"""

from configs.base import church, compose, ncsnpp_256, ve


def get_config():
  return compose(church, ve, ncsnpp_256, {'sde.sigma_max': 380.0})
