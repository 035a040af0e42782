"""Test the learned uncertainty in training, and that nothing else has it."""

import jax
import jax.numpy as jnp
import numpy as np

import experiment
import run_lib
from checkpoints.workdir import restore_ema
from commands import exchange, trained
from configs.base import compose, edm, mlp, toy, vp


def get_config(**changes):
  return compose(
    vp, mlp, edm, toy('mixture'),
    {
      'model.nf': 16, 'model.num_layers': 1, 'model.sigma_data': 1.0,
      'training.uncertainty': True, 'training.batch_size': 256,
      'training.n_iters': 400, 'training.snapshot_sampling': False,
      'training.reduction': 'mean', 'optim.lr': 1e-2,
      **changes,
    },
  )  # fmt: skip


def test_it_learns_the_loss_and_is_not_exported(tmp_path):
  config = get_config()
  model = experiment.build(config)
  plain = experiment.build(get_config(**{'training.uncertainty': False}))
  # At first e^u is 1, so the loss is the same.
  params = model.init_params(jax.random.key(0))
  rng = jax.random.key(1)
  batch = {'image': jnp.ones((8, 2)), 'label': jnp.zeros(8, jnp.int32)}
  network = model.network_params(params)
  np.testing.assert_allclose(
    jax.jit(model.loss)(params, rng, batch),
    jax.jit(plain.loss)(network, rng, batch),
    rtol=1e-6,
  )

  run_lib.train(config, tmp_path / 'run')
  learned = restore_ema(tmp_path / 'run', model.abstract_params())
  assert 'uncertainty' in learned
  run = trained.restore(config, tmp_path / 'run')
  assert jax.tree.structure(run.params) == jax.tree.structure(network)
  exchange.export(config, tmp_path / 'run', tmp_path / 'a.safetensors')
  _, params = experiment.load(tmp_path / 'a.safetensors')
  jax.tree.map(np.testing.assert_array_equal, params, run.params)

  # e^u is about the loss at each level, which varies by the level.
  t = jnp.float32([0.5, 1.0, 4.0]) / 80
  u = jax.jit(model._log_variance)(learned, t)
  assert np.isfinite(u).all() and np.ptp(u) > 0.1
