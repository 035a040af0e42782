"""The modes `import` and `export`: weights from elsewhere and for elsewhere."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import experiment
import run_lib
from checkpoints import diffusers, formats
from checkpoints.workdir import Checkpoints
from commands import trained
from data import record
from runtime.files import atomic, check_output, to_json
from runtime.progress import say


def import_released(config, workdir, path):
  """Make a workdir of a checkpoint that the paper released.

  It is JAX's (`checkpoint_N`), PyTorch's (`*.pth`) or a safetensors file of
  `export`. Training can continue from it, with Adam's moments if the file has
  them. The workdir appears completely or not at all.

  Raises:
    ValueError: the file is damaged or of another network, or workdir is not
      empty. Nothing is written then.
  """
  workdir = pathlib.Path(workdir)
  if not path:
    raise ValueError('--mode import needs --checkpoint FILE.')
  model = experiment.build(config)
  if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise ValueError(f'{workdir} exists already: choose another --workdir.')
  check_output(workdir.parent)
  found = formats.load(path, model.network, model.shape(1))
  number = model.num_labels or config.model.get('num_outputs', 0)
  if number and len(found.classes) not in (0, number):
    raise ValueError(
      f'{path} is damaged: it names {len(found.classes)} classes of {number}.'
    )
  state = run_lib.TrainState(
    np.int32(found.step),
    found.params,
    formats.optimizer_state(model.optimizer, found),
    found.ema_params,
  )
  state = jax.tree.map(jnp.asarray, state)
  with atomic(workdir) as part:
    experiment.claim(model.config, part)
    with Checkpoints(part, keep_every=1) as saved:
      saved.save(int(found.step), run_lib.without_ema(state), state.ema)
      saved.wait()
    if found.classes:
      record.write_classes(part, found.classes)
  say(f'{path} is checkpoint {found.step} of {workdir}.')


def export(config, workdir, path):
  """Write averaged parameters for use elsewhere.

  Args:
    config: a ConfigDict.
    workdir: of the run.
    path: FILE.safetensors, with the config in its metadata, which
      `experiment.load` reads; or a folder for diffusers.

  Raises:
    ValueError: there is no such checkpoint, or diffusers cannot represent the
      network exactly. Nothing is written then.
  """
  if not path:
    raise ValueError(
      '--mode export needs --output FILE.safetensors or, for diffusers, a '
      'folder.'
    )
  path = pathlib.Path(path)
  if path.exists():
    raise ValueError(f'{path} exists already: choose another --output.')
  check_output(path)
  model, to_file = experiment.build(config), path.suffix == '.safetensors'
  if not to_file:
    diffusers.check(model)
  run = trained.restore(config, workdir, model)
  ema = jax.tree.map(np.asarray, run.params)
  if to_file:
    text = to_json(experiment.json_of(config))
    classes = record.classes(workdir)
    formats.export(path, text, ema, step=run.step, classes=classes)
    note = ''
  else:
    pipeline = diffusers.export(path, run.model, ema)
    note = (
      f', a {pipeline} of diffusers'
      if pipeline
      else "/unet, diffusers' UNet2DModel; it has no pipeline for its process"
    )
  say(f'Checkpoint {run.step} of {workdir} is in {path}{note}.')
