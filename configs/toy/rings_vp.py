r"""Two rings, under VP.

python main.py --mode train --workdir W \
  --config configs/toy/rings_vp.py
"""

from configs.base import compose, mlp, toy, vp


def get_config():
  return compose(vp, mlp, toy('rings'))
