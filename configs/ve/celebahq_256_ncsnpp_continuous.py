r"""NCSN++ cont. (VE), CelebA-HQ at 256 pixels.

python main.py --mode train --workdir W \
  --config configs/ve/celebahq_256_ncsnpp_continuous.py
"""

from configs.base import celebahq_256, compose, ncsnpp_256, ve


def get_config():
  return compose(celebahq_256, ve, ncsnpp_256, {'sde.sigma_max': 348.0})
