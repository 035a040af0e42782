r"""DDPM, LSUN bedroom at 256 pixels.

python main.py --mode train --workdir W \
  --config configs/vp/ddpm/bedroom.py
"""

from configs.base import bedroom, compose, ddpm_256, discrete, vp


def get_config():
  return compose(bedroom, vp, ddpm_256, discrete)
