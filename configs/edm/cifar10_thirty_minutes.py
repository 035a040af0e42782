r"""DDPM++ (EDM), told the class, CIFAR-10: for thirty minutes of one GPU.

python main.py --mode train --workdir W \
  --config configs/edm/cifar10_thirty_minutes.py

`benchmarks.thirty_minutes` sets training.n_iters by the clock. No score has
been measured yet.
"""

from configs.base import cifar10, compose, conditional, ddpmpp, edm, vp


def get_config():
  change = {'model.num_res_blocks': 2, 'model.dropout': 0.05}
  change |= {'model.dtype': 'bfloat16', 'data.on_device': True}
  change |= {'training.batch_size': 256, 'training.n_iters': 30_720}
  change |= {'training.n_jitted_steps': 20, 'training.log_freq': 100}
  change |= {'training.ema_lengths': (0.05, 0.1), 'optim.warmup': 1000}
  change |= {'optim.schedule': 'linear', 'eval.ema_length': (0.04, 0.06, 0.1)}
  return compose(cifar10, vp, ddpmpp, edm, conditional(10), change)
