r"""The swiss roll, under VE.

python main.py --mode train --workdir W \
  --config configs/toy/swiss_roll_ve.py
"""

from configs.base import compose, mlp, toy, ve


def get_config():
  return compose(ve, mlp, toy('swiss_roll'), {'sde.sigma_max': 5.0})
