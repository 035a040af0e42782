r"""The checkerboard, under sub-VP.

python main.py --mode train --workdir W \
  --config configs/toy/checkerboard_subvp.py
"""

from configs.base import compose, mlp, subvp, toy


def get_config():
  return compose(subvp, mlp, toy('checkerboard'))
