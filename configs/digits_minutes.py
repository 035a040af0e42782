"""EDM on handwritten digits, told the class, in a few minutes on a CPU.

python -m benchmarks.dry_run --workdir D --minutes 8
"""

from configs.base import compose, conditional, ddpmpp, digits, edm, vp


def get_config():
  return compose(
    vp,
    ddpmpp,
    edm,
    conditional(10),
    digits,
    {
      'data.on_device': True,
      'model.nf': 24,
      'model.ch_mult': (1, 2),
      'model.num_res_blocks': 1,
      'model.attn_resolutions': (4,),
      'model.dropout': 0.0,
      'training.batch_size': 64,
      'training.n_iters': 1600,
      'training.ema_lengths': (0.05, 0.1),
      'training.ema_rate': 0.995,
      'optim.schedule': 'linear',
      'optim.warmup': 100,
      'eval.batch_size': 64,
      'eval.num_samples': 256,
      'eval.ema_length': (0.05, 0.1),
      # No weights are needed: eight projections of the pixels.
      'eval.extractor': 'benchmarks.crash:features',
    },
  )
