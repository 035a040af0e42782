"""Files of the paper's release become runs, from which training goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiment
import run_lib
from checkpoints import formats
from checkpoints.workdir import Checkpoints, restore_ema
from commands import exchange
from data import datasets
from runtime.devices import make_layout, replicated, to_global
from tests import golden, tiny


def reduced_release(dataset):
  """Return (config, path) of a file of the paper's JAX release, reduced."""
  config = experiment.load_config('configs/ve/ffhq_256_ncsnpp_continuous.py')
  config.model.update(
    nf=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,),
    dropout=0.0,
  )  # fmt: skip
  config.data.update(dataset='npz', path=str(dataset), image_size=16)
  config.training.update(batch_size=4, n_iters=4, n_jitted_steps=1)
  config.training.snapshot_sampling = False
  return config, golden.DATA / 'released_jax.checkpoint'


def test_released_checkpoint_becomes_a_run(tmp_path):
  """The run has all that training continues from, bit by bit."""
  config, path = reduced_release('unused.npz')
  exchange.import_released(config, tmp_path / 'run', path)
  model, layout = experiment.build(config), make_layout()
  found = formats.load(path, model.network, model.shape(1))
  init, _ = run_lib.make_init(model, layout)
  like = jax.eval_shape(init, model.abstract_params())
  like = replicated(like, layout)
  with Checkpoints(tmp_path / 'run') as saved:
    assert saved.steps == [3]
    state = saved.restore(3, run_lib.without_ema(like), 'state')
    tiny.tree_equal(saved.restore(3, like.ema, 'ema'), found.ema_params)
  assert int(state['step']) == 3
  tiny.tree_equal(state['params'], found.params)
  # Adam's mu, nu and count, and the schedule's count.
  moments = formats.optimizer_state(model.optimizer, found)
  tiny.tree_equal(state['opt_state'], moments)
  counts = [v for v in jax.tree.leaves(state['opt_state']) if not v.ndim]
  assert [int(v) for v in counts] == [3, 3]


@pytest.mark.slow  # compiles a training step, on two cores for a minute
def test_training_goes_on_from_a_released_checkpoint(tmp_path):
  """Training makes the step that follows the state in the file."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (8, 16, 16, 3), np.uint8)
  np.savez(tmp_path / 'data.npz', x_train=images, x_test=images)
  config, path = reduced_release(tmp_path / 'data.npz')
  exchange.import_released(config, tmp_path / 'run', path)
  run_lib.train(config, tmp_path / 'run')
  model = experiment.build(config)
  like = model.abstract_params()
  with Checkpoints(tmp_path / 'run') as saved:
    assert saved.last == 4
  ema = restore_ema(tmp_path / 'run', like)

  found = formats.load(path, model.network, model.shape(1))
  layout = make_layout()
  state = run_lib.TrainState(
    np.int32(3),
    found.params,
    formats.optimizer_state(model.optimizer, found),
    found.ema_params,
  )
  state = jax.device_put(jax.tree.map(jnp.asarray, state), layout.replicated)
  fetch = run_lib.make_fetch(model, datasets.load(config.data, 'train'))
  batches = to_global(layout.microbatches, fetch(3))
  state, _ = run_lib.make_train_steps(model, layout)(state, batches)
  tiny.tree_equal(ema, state.ema)
  moved = jax.tree.map(lambda a, b: (a != b).any(), ema, found.ema_params)
  assert any(jax.tree.leaves(moved))
