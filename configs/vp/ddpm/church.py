r"""DDPM, LSUN church at 256 pixels.

python main.py --mode train --workdir W \
  --config configs/vp/ddpm/church.py
"""

from configs.base import church, compose, ddpm_256, discrete, vp


def get_config():
  return compose(church, vp, ddpm_256, discrete)
