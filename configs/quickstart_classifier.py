r"""A classifier of noisy digits, to guide configs/quickstart.py with.

python main.py --mode train --workdir W \
  --config configs/quickstart_classifier.py
"""

from configs import quickstart
from configs.base import classifier


def get_config():
  config = quickstart.get_config()
  with config.unlocked():
    classifier(config)
    config.model.update(blocks_per_group=1, channel_multiplier=2)
    config.training.n_iters = 1000
  return config.lock()
