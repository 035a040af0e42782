r"""Consistency fine-tuning (ECT) of a run of cifar10_ddpmpp: FID 2.15, 2 steps.

python main.py --mode train --workdir W --config.training.begin_with=EDM \
  --config configs/edm/cifar10_ect.py

EDM is the workdir of that run. The score is that of the release of Geng et al.
2024 after 200,000 steps, which has RAdam and another weighting of the levels;
in one step (sampling.middle=0) it is 3.86.
"""

from configs.base import cifar10, compose, ddpmpp, edm, vp


def get_config():
  change = {'model.ch_mult': (2, 2, 2), 'model.dropout': 0.2}
  change |= {'data.random_flip': False, 'sampling.method': 'consistency'}
  change |= {'training.objective': 'consistency', 'training.batch_size': 128}
  change |= {'training.p_mean': -1.1, 'training.p_std': 2.0}
  change |= {'training.n_iters': 200_000, 'training.ema_rate': 0.9999}
  change |= {'optim.lr': 1e-4, 'optim.warmup': 1000}
  change |= {'sampling.grid': 'uniform', 'sampling.num_steps': 1000}  # Unused.
  return compose(cifar10, vp, ddpmpp, edm, change)
