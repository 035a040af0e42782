"""The mode `sample` without a control: samples, and the way to them."""

import pathlib

import jax
import numpy as np

import experiment
from commands import trained
from reporting import pictures
from runtime.devices import on_first_host
from runtime.files import check_output, digest, save_npz
from runtime.progress import say


def viewable(model, frames, times):
  """Return states on the way, scaled so that noise is as strong as the data.

  About the mean of alpha x_0 they are scaled by s / |(alpha s, sigma)|, where
  s = 1/4 is about the spread of images in [0, 1], and 1 that of scaled arrays.
  Points of toys stay as they are.

  Args:
    model: an Experiment.
    frames: states [F, B, ...] in [0, 1], or in units of the data.
    times: their times [F].
  """
  data = model.config.data
  if data.shape and not data.std:
    return frames
  alpha, sigma = model.sde.marginal(times)
  column = lambda v: np.reshape(v, (-1,) + (1,) * (frames.ndim - 1))
  if data.shape:
    noise = column(np.hypot(alpha, sigma))
    return model.to_units(model.scale(frames) / noise)
  centre, noise = (0.5, sigma / 2) if data.centered else (alpha / 2, sigma)
  scale = 0.25 / np.hypot(0.25 * alpha, noise)
  centre = np.broadcast_to(centre, alpha.shape)
  return 0.5 + (frames - column(centre)) * column(scale)


def beside(condition, images):
  """Return (columns, images) of a picture of samples and their conditions.

  Each condition that is an 8-bit image of as many channels is followed by its
  samples. Others are not shown.

  Args:
    condition: conditions [N, ...]; sample k belongs to number k % N.
    images: uint8 [B, H, W, C], or points [B, D].
  """
  n = len(condition)
  if condition.shape[1:] != images.shape[1:] or images.dtype != np.uint8:
    return None, images
  each = max(1, len(images) // n)
  n = min(n, len(images))
  rows = [
    np.uint8(np.clip(condition[:n], 0, 255)),
    *(images[i * n : (i + 1) * n] for i in range(each)),
  ]
  columns = (1 + each) * max(1, 12 // (1 + each))
  return columns, np.stack(rows, 1).reshape(-1, *images.shape[1:])


def sample(config, workdir):
  """Write samples to workdir/samples/step_N-HASH-COUNT.npz and .png.

  There are config.sampling.num_samples of them; the .npz holds them as uint8
  `images` (of arrays as float32 `points`, `signals`, `images` or `volumes`, in
  units of the data), the number of score evaluations as `nfe` and,
  of a network that is told classes, those that were drawn as `label`. A network
  that is told conditions samples for each of config.control.condition in turn,
  or of the test set; they are `condition`, and their hash is in the name.
  With config.sampling.frames, the way of those of the first batch is there too:
  float32 `frames` [F, B, ...] at `frame_times` [F], and as pictures
  step_N-HASH-COUNT-F_frames.png and .gif, beside step_N-HASH-COUNT-F.npz.
  """
  on_first_host(check_output, pathlib.Path(workdir) / 'samples')
  model, count = experiment.build(config), config.sampling.num_samples
  rows = trained.conditions_of(model, count)
  run = trained.restore(config, workdir, model)
  size = trained.batch_size(config, count)
  samples, labels, film = [], [], {}
  batches = trained.draw(
    run, count, size, rows=rows, frames=config.sampling.frames
  )
  for number, found in batches:
    samples.append(model.to_data(found.x))
    if found.label is not None:
      labels.append(np.asarray(found.label))
    if config.sampling.frames and number == 0:
      film['frames'] = np.asarray(found.frames)[:, :count]
      film['frame_times'] = np.asarray(found.times)
  if jax.process_index():
    return
  samples = np.concatenate(samples)[:count]
  # Neither fewer samples nor those without frames replace what is there.
  told = digest(*rows.values())[:8] if rows else ''
  numbers = filter(None, (told, count, config.sampling.frames))
  name = '-'.join([run.name, *map(str, numbers)])
  path = run.workdir / 'samples' / f'{name}.npz'
  arrays = {model.kind: samples, 'nfe': np.asarray(found.nfe)}
  if labels:
    arrays['label'] = np.concatenate(labels)[:count]
  columns, shown = None, samples if model.kind == 'points' else samples[:400]
  if rows:
    condition = rows['condition']
    arrays['condition'] = condition[np.arange(count) % len(condition)]
    columns, shown = beside(condition, shown)
  save_npz(path, **arrays, **film)
  pictures.save_samples(path.with_suffix('.png'), shown, columns=columns)
  say(f'{count} samples, {int(found.nfe)} NFE each: {path} and .png.')
  if film:
    frames = model.to_data(viewable(model, *film.values()))
    path = path.with_name(path.stem + '_frames.png')
    pictures.save_trajectory(path, frames)
    say(f'The way to them: {path} and .gif.')
