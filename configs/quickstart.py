"""Handwritten digits on two CPU cores in four minutes: `make quickstart`.

python main.py --mode train --workdir W --config configs/quickstart.py
"""

from configs.base import compose, ddpmpp, digits, edm, vp

# A network and an average for minutes on a CPU.
SMALL = {
  'model.nf': 24,
  'model.ch_mult': (1, 2),
  'model.num_res_blocks': 1,
  'model.attn_resolutions': (4,),
  'model.dropout': 0.0,
  'training.batch_size': 64,
  'training.ema_rate': 0.995,
  'optim.warmup': 100,
}


def get_config():
  return compose(
    vp,
    ddpmpp,
    edm,
    digits,
    SMALL,
    {
      'training.n_iters': 1500,
      'training.checkpoint_freq': 500,
      'training.snapshot_freq': 500,
      'optim.lr': 1e-3,
      'optim.schedule': 'cosine',
      'sampling.method': 'sde_dpmpp',
      'sampling.num_steps': 30,
      'eval.batch_size': 256,
      'eval.num_samples': 512,
      'eval.allow_few_samples': True,
    },
  )
