r"""NCSN++ (SMLD), CIFAR-10: FID 2.45, IS 9.73.

python main.py --mode train --workdir W \
  --config configs/ve/cifar10_ncsnpp.py
"""

from configs.base import cifar10, compose, discrete, ncsnpp, ve


def get_config():
  return compose(
    cifar10, ve, ncsnpp, discrete, {'model.embedding_type': 'positional'}
  )
