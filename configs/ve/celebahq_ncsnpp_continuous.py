r"""NCSN++ cont. (VE), CelebA-HQ at 1024 pixels.

python main.py --mode train --workdir W \
  --config configs/ve/celebahq_ncsnpp_continuous.py
"""

from configs.base import celebahq_1024, compose, ncsnpp_1024, ve


def get_config():
  return compose(celebahq_1024, ve, ncsnpp_1024, {'sde.sigma_max': 1348.0})
