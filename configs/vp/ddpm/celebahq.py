r"""DDPM, CelebA-HQ at 256 pixels.

python main.py --mode train --workdir W \
  --config configs/vp/ddpm/celebahq.py
"""

from configs.base import celebahq_256, compose, ddpm_256, discrete, vp


def get_config():
  return compose(celebahq_256, vp, ddpm_256, discrete)
