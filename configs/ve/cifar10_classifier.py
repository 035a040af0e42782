r"""Noise-conditional classifier, Wide ResNet 28-10; CIFAR-10 (App. I.1).

python main.py --mode train --workdir W \
  --config configs/ve/cifar10_classifier.py
"""

from configs.base import cifar10, classifier, compose, ve


def get_config():
  return compose(cifar10, ve, classifier)
