"""A run of seconds: NCSN++ with few channels, on handwritten digits.

It is a config file as well: python main.py --config tests/tiny.py ...
"""

import contextlib
import os
import pathlib
import subprocess
import sys
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import models
from configs.base import compose, mlp, ncsnpp, toy, ve
from models import layers

ROOT = pathlib.Path(__file__).parents[1]
# Compiled programs of the tests, of subprocesses as well.
CACHE = str(ROOT / '.pytest_cache' / 'jax')


def start(program, *arguments, **environment):
  """Start a Python program in another process, with texts for its output.

  Args:
    program: source text.
    *arguments: its arguments.
    **environment: further variables.
  """
  return subprocess.Popen(
    [sys.executable, '-c', program, *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': CACHE} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


RUN = {
  'sde.sigma_max': 10.0,
  'model.nf': 8,
  'training.batch_size': 8,
  'training.n_iters': 8,
  'training.n_jitted_steps': 1,
  'training.log_freq': 1,
  'training.eval_freq': 4,
  'training.checkpoint_freq': 4,
  'training.snapshot_freq': 1000,
  'training.snapshot_sampling': False,
  'training.ema_rate': 0.9,
  'training.ema_warmup': False,
  'optim.lr': 1e-3,
  'optim.warmup': 0,
  'sampling.num_steps': 3,
}
DIGITS = {
  'data.dataset': 'digits',
  'data.image_size': 8,
  'data.num_channels': 1,
  'model.ch_mult': (1,),
  'model.attn_resolutions': (),
  'model.num_res_blocks': 1,
}


def dotted(overrides):
  return {key.replace('__', '.'): v for key, v in overrides.items()}


def tree_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def get_config(**overrides):
  """Return the config; overrides are dotted keys with __ for the dot."""
  return compose(ve, ncsnpp, DIGITS, RUN, dotted(overrides))


class Convolutions(models.NCSNpp):
  """Two convolutions that are configured and told the same as NCSN++."""

  @nn.compact
  def __call__(self, x, cond, label=None, *_, train, augment=None):
    del train, augment
    told = self.noise_features(cond)
    if self.num_labels:
      told = layers.add_label(told, label, self.num_labels)
    told = nn.Dense(self.nf)(told)[:, None, None]
    # Smooth at all noise levels, so that ODEs can be solved back and forth.
    x = x / jnp.sqrt(1 + cond**2)[:, None, None, None]
    h = nn.tanh(nn.Conv(self.nf, (3, 3))(x) + told)
    init = layers.default_init(self.init_scale)
    return nn.Conv(x.shape[-1], (3, 3), kernel_init=init)(h)


def quick_network():
  """Return a context in which `Convolutions` take the place of NCSN++.

  It is for tests of files and commands: NCSN++ compiles for many seconds.
  """
  return mock.patch.dict(models.MODELS, ncsnpp=Convolutions)


def shared_programs():
  """Return a context in which trainings of one config share their programs.

  How often something is done may differ. Otherwise each training compiles for a
  second.
  """
  import experiment  # Here, as main.py takes this file for a config.
  import run_lib

  often = 'log_freq', 'eval_freq', 'checkpoint_freq', 'snapshot_freq'

  def shared(make):
    made = {}

    def get(model, *more):
      if not isinstance(model, experiment.Experiment):
        return make(model, *more)
      config = model.config.to_dict()
      for key in (*often, 'snapshot_sampling'):
        del config['training'][key]
      key = repr(config), model.network, *more
      if key not in made:
        made[key] = make(model, *more)
      return made[key]

    return get

  init = shared(lambda model: jax.jit(model._init))
  stack = contextlib.ExitStack()
  for owner, name, function in (
    (experiment.Experiment, 'init_params', lambda m, rng: init(m)(rng)),
    (run_lib, 'make_train_steps', shared(run_lib.make_train_steps)),
    (run_lib, 'make_eval_loss', shared(run_lib.make_eval_loss)),
  ):
    stack.enter_context(mock.patch.object(owner, name, function))
  return stack


def points(**overrides):
  """Return that of a run on points, whose programs compile in a second.

  Batches are large because a test loss takes as many points at a time.
  """
  few = {'training.batch_size': 128}
  return compose(ve, mlp, toy('rings'), RUN, few, dotted(overrides))
