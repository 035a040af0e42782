r"""NCSN++ trained with DDPM, CIFAR-10.

python main.py --mode train --workdir W \
  --config configs/vp/cifar10_ncsnpp.py
"""

from configs.base import cifar10, compose, discrete, ncsnpp, vp


def get_config():
  return compose(
    cifar10, vp, ncsnpp, discrete, {'sampling.predictor': 'reverse_diffusion'}
  )
