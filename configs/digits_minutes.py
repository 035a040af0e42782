"""EDM on handwritten digits, told the class, in a few minutes on a CPU.

python -m benchmarks.dry_run --workdir D --minutes 8
"""

from configs.base import compose, conditional, ddpmpp, digits, edm, vp
from configs.quickstart import SMALL


def get_config():
  return compose(
    vp,
    ddpmpp,
    edm,
    conditional(10),
    digits,
    SMALL,
    {
      'data.on_device': True,
      'training.n_iters': 1600,
      'training.ema_lengths': (0.05, 0.1),
      'optim.schedule': 'linear',
      'eval.batch_size': 64,
      'eval.num_samples': 256,
      'eval.ema_length': (0.05, 0.1),
      # No weights are needed: eight projections of the pixels.
      'eval.extractor': 'benchmarks.crash:features',
    },
  )
