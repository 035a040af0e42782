r"""NCSN++ cont. (VE), FFHQ at 1024 pixels.

python main.py --mode train --workdir W \
  --config configs/ve/ffhq_ncsnpp_continuous.py
"""

from configs.base import compose, ffhq_1024, ncsnpp_1024, ve


def get_config():
  return compose(
    ffhq_1024,
    ve,
    ncsnpp_1024,
    {'sde.sigma_max': 1348.0, 'training.reduction': 'mean'},
  )
