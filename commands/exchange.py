"""Weights from and for elsewhere: `--mode import` and `--mode export`."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

import experiment
import run_lib
from checkpoints import diffusers, formats
from checkpoints.workdir import Checkpoints, claim_workdir, restore_ema
from runtime.progress import say


def import_released(config, workdir, path):
  """Makes a workdir of one of the paper's released checkpoints.

  JAX (`checkpoint_N`), PyTorch (`*.pth`) or a safetensors file of `export`.
  Training then goes on from it, with Adam's moments where the file has them.
  The workdir appears whole, by one renaming, or not at all.

  Raises:
    ValueError: the file is damaged or of another network; or workdir has
      something in it already. Nothing is written then.
  """
  workdir = pathlib.Path(workdir)
  if not path:
    raise ValueError('--mode import needs --checkpoint FILE.')
  experiment.check(config)
  if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise ValueError(f'{workdir} exists already: choose another --workdir.')
  found = formats.load(path, config)
  optimizer = experiment.make_optimizer(config)
  state = run_lib.TrainState(
    np.int32(found.step),
    found.params,
    formats.optimizer_state(optimizer, found),
    found.ema_params,
  )
  state = jax.tree.map(jnp.asarray, state)
  # Beside it, so that a process that dies leaves no half of a workdir.
  part = workdir.with_name(workdir.name + '.part')
  shutil.rmtree(part, ignore_errors=True)
  claim_workdir(config, part)
  with Checkpoints(part, keep_every=1) as saved:
    saved.save(int(found.step), run_lib.without_ema(state), state.ema)
    saved.wait()
  part.replace(workdir)
  say(f'{path} is checkpoint {found.step} of {workdir}.')


def export(config, workdir, path):
  """Writes averaged parameters for use elsewhere.

  Args:
    config: a ConfigDict.
    workdir: of the run.
    path: FILE.safetensors, with the config in its metadata, which `released`
      reads; or a folder for diffusers.

  Raises:
    ValueError: there is no such checkpoint, or diffusers cannot represent the
      network exactly. Nothing is written then.
  """
  if not path:
    raise ValueError(
      '--mode export needs --output FILE.safetensors or, for diffusers, a '
      'folder.'
    )
  to_file = str(path).endswith('.safetensors')
  if not to_file:
    diffusers.check(config)
  like = experiment.abstract_params(config)
  which = config.eval.checkpoint
  with Checkpoints(workdir) as saved:
    step = saved.select(which)[-1]
  ema = restore_ema(workdir, like, step)
  if to_file:
    formats.export(path, config, ema, step=step)
    note = ''
  else:
    pipeline = diffusers.export(path, config, ema)
    note = (
      f', a {pipeline} of diffusers'
      if pipeline
      else "/unet, diffusers' UNet2DModel; it has no pipeline for its process"
    )
  say(f'Checkpoint {step} of {workdir} is in {path}{note}.')
