r"""NCSN++ (SMLD), CelebA at 64 pixels.

python main.py --mode train --workdir W \
  --config configs/ve/celeba_ncsnpp.py
"""

from configs.base import celeba, compose, discrete, ncsnpp, ve


def get_config():
  return compose(
    celeba,
    ve,
    ncsnpp,
    discrete,
    {'sde.sigma_max': 90.0, 'model.embedding_type': 'positional'},
  )
