r"""A curve in the plane, data without a density, under VE.

python main.py --mode train --workdir W \
  --config configs/toy/curve_ve.py
"""

from configs.base import compose, mlp, toy, ve


def get_config():
  return compose(ve, mlp, toy('curve'), {'sde.sigma_max': 5.0})
