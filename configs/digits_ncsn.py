"""NCSN on handwritten digits, on two CPU cores: the 2019 network and sampler.

python main.py --mode train --workdir W --config configs/digits_ncsn.py
"""

from configs.base import annealed, compose, digits, ncsn, ve


def get_config():
  return compose(
    ve,
    ncsn,
    annealed(10, snr=0.316, steps=100),
    digits,
    {
      'sde.sigma_max': 1.0,
      'model.nf': 32,
      'training.batch_size': 64,
      'training.n_iters': 1500,
      'training.checkpoint_freq': 500,
      'training.snapshot_freq': 500,
      'training.ema_rate': 0.995,
      'eval.batch_size': 256,
      'eval.num_samples': 512,
      'eval.allow_few_samples': True,
    },
  )
