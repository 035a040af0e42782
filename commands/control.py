"""Controlled generation by `--mode sample`: what config.control asks for.

Classes ('classifier', 'labels') give a grid of samples with a column for each
class; inverse problems ('inpaint', 'colorize', ...) take images, measure them,
and draw original, measurement and reconstructions side by side.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import controllable_generation
import experiment
import run_lib
from checkpoints.workdir import restore_ema
from commands import evaluate
from controllable_generation import METHODS, OPERATORS
from data import datasets, sources
from reporting.pictures import save_samples
from runtime.files import save_npz
from runtime.progress import Progress, say

CLASSES = ('classifier', 'labels')
CONTROLS = (*CLASSES, *OPERATORS)
# Above the noise of any process: there, a solver has gone astray.
DIVERGED = 1e4


def check(config):
  """Raises a ValueError, with the mend, for a control that cannot run."""
  control, data = config.control, config.data
  name = control.name
  experiment.check(config)
  experiment.make_sampler(config, 1)
  if name not in CONTROLS:
    raise ValueError(f'config.control.name={name!r} is none of {CONTROLS}.')
  if name == 'labels' and not experiment.num_labels(config):
    raise ValueError(
      "config.control.name='labels' needs a network that was trained with "
      'config.model.num_labels; another can be guided by a classifier.'
    )
  if name == 'classifier' and not control.classifier_workdir:
    raise ValueError(
      "config.control.name='classifier' needs config.control."
      "classifier_workdir, of a run with a classifier's config."
    )
  if name in CLASSES:
    return
  if data.dims:
    raise ValueError(f'config.control.name={name!r} is for images, not points.')
  if control.method not in METHODS:
    raise ValueError(
      f'config.control.method={control.method!r} is none of {[*METHODS]}.'
    )
  if control.method == 'projection' and not OPERATORS[name].orthonormal:
    raise ValueError(
      f'config.control.name={name!r} is no projection: set config.control.'
      "method to 'pigdm' or 'dps'."
    )
  if control.method == 'dps' and control.noise_std <= 0:
    raise ValueError(
      "config.control.method='dps' divides by config.control.noise_std: set "
      'it above 0, 0.05 say.'
    )
  if control.fresh_noise and config.sampling.method != 'pc':
    raise ValueError(
      'config.control.fresh_noise needs config.sampling.method=pc: other '
      'solvers take the score to be a function.'
    )
  if name == 'colorize' and data.num_channels != 3:
    raise ValueError(
      f"config.control.name='colorize' needs 3 channels, not "
      f'config.data.num_channels={data.num_channels}.'
    )
  if name == 'super_resolution' and data.image_size % control.factor:
    raise ValueError(
      f'config.control.factor={control.factor} does not divide '
      f'config.data.image_size={data.image_size}.'
    )


# ------------------------------------------------------------------- classes


def load_classifier(config):
  """(logits_fn(params, x, t), params, classes) of control.classifier_workdir.

  Raises:
    ValueError: it is no classifier, or one of another process or range.
  """
  workdir = pathlib.Path(config.control.classifier_workdir)
  if not (workdir / 'config.json').is_file():
    raise FileNotFoundError(
      f'config.control.classifier_workdir={workdir} has no config.json: train '
      "or import a classifier there, with a classifier's config."
    )
  text = (workdir / 'config.json').read_text()
  theirs = ml_collections.ConfigDict(json.loads(text))
  if not experiment.is_classifier(theirs):
    raise ValueError(f'{workdir} is no run of a classifier.')
  ours, other = (experiment.make_sde(c).continuous for c in (config, theirs))
  if ours != other or config.data.centered != theirs.data.centered:
    raise ValueError(
      f'The classifier in {workdir} was trained for other noise: {other} with '
      f'data.centered={theirs.data.centered}, the model for {ours} with '
      f'data.centered={config.data.centered}.'
    )
  params = restore_ema(workdir, experiment.abstract_params(theirs))

  def logits_fn(params, x, t):
    return experiment.make_logits_fn(theirs, params)(x, t)

  return logits_fn, params, theirs.model.num_outputs


def _guided_by(logits_fn, scale):
  """wrap(score_fn, sde, label=, classifier=) -> the score given a class."""

  def wrap(score_fn, sde, *, label, classifier):
    def log_prob(x, t):
      logp = jax.nn.log_softmax(logits_fn(classifier, x, t))
      return jnp.take_along_axis(logp, label[:, None], 1)[:, 0]

    return controllable_generation.classifier_guidance(
      score_fn, sde, log_prob=log_prob, scale=scale
    )

  return wrap


# --------------------------------------------------------- inverse problems


def make_mask(config):
  """The known pixels, bool [H, W], of config.control.mask."""
  control, size = config.control, config.data.image_size
  mask = np.ones((size, size), bool)
  if control.mask == 'center':
    edge = size // 4
    mask[edge : size - edge, edge : size - edge] = False
  elif control.mask == 'half':
    mask[:, size // 2 :] = False
  elif control.mask == 'random':
    mask = np.random.default_rng(config.seed).random(mask.shape) < control.known
  elif pathlib.Path(control.mask).is_file():
    fit = {'size': size, 'channels': 1}
    image = sources.decode_file(pathlib.Path(control.mask), **fit)
    mask = image[..., 0] > 127
  else:
    raise ValueError(
      f"config.control.mask={control.mask!r} is neither 'center', 'half' nor "
      "'random', nor an image file (white: known)."
    )
  if mask.all() or not mask.any():
    raise ValueError('config.control.mask leaves no pixel known, or all.')
  return mask


def make_operator(config):
  """A(x) of config.control, for x [B, H, W, C] in the model's range."""
  control = config.control
  values = {
    'mask': make_mask(config) if control.name == 'inpaint' else None,
    'factor': control.factor,
    'width': control.width,
    'gain': control.gain,
    'centered': config.data.centered,
  }
  operator = OPERATORS[control.name]
  options = {name: values[name] for name in operator.options}
  return functools.partial(operator.function, **options)


def make_wrap(config, operator):
  """wrap(score_fn, sde, y=) -> the score given measurements y."""
  control = config.control
  options = {'operator': operator, 'noise_std': control.noise_std}
  if control.method != 'projection':
    options |= {'scale': control.scale, 'ramp': control.ramp}
  elif control.fresh_noise:
    options['rng'] = jax.random.key(config.seed)
  if control.method == 'pigdm':
    options['data_std'] = control.data_std
  return functools.partial(METHODS[control.method], **options)


def picture(config, y, shape):
  """Measurements as images in the model's range, of a shape [B, H, W, C]."""
  operator = make_operator(config)
  if OPERATORS[config.control.name].orthonormal:
    return controllable_generation.transpose(operator, shape)(y)
  if y.shape == shape:
    return y
  # Half a spectrum: its root, so that more than the mean is seen.
  y = jnp.sqrt(y / jnp.max(y, axis=(1, 2), keepdims=True))
  y = jnp.pad(y, [(0, 0), (0, 0), (0, shape[2] - y.shape[2]), (0, 0)])
  return datasets.scaler(y, centered=config.data.centered)


def _originals(config):
  """uint8 [N, H, W, C]: the first images of control.images or the test set."""
  control = config.control
  if control.images:
    dataset = datasets.anyones(config.data, control.images)
  else:
    dataset = datasets.load(config.data, 'test')
  return dataset.fetch(np.arange(min(control.num_images, len(dataset))))


# ------------------------------------------------------------------- command


def _draw(config, workdir, wrap, count, split, everywhere):
  """(uint8 [count, H, W, C], nfe, step): samples under a control.

  Args:
    config, workdir: of the run.
    wrap: as in `experiment.make_sampler`.
    count: number of samples.
    split: what `wrap` is given for each sample, numpy arrays [count, ...].
    everywhere: what it is given for all, a pytree.
  """
  step, params, layout, batch = run_lib.restore(config, workdir, count)
  sample = experiment.make_sampler(config, batch, wrap=wrap)
  # The rows of what is given lie on the devices of their samples.
  make = jax.jit(
    lambda params, rng, rows, rest: sample(params, rng, **rows, **rest),
    in_shardings=(layout.replicated, None, layout.split, layout.replicated),
    out_shardings=layout.replicated,
  )

  def spread(v):
    return jax.make_array_from_callback(v.shape, layout.split, v.__getitem__)

  progress = Progress('samples', count, 'images')
  images = []
  for start in range(0, count, batch):
    members = np.arange(start, start + batch) % count
    rows = {key: spread(value[members]) for key, value in split.items()}
    rng = jax.random.fold_in(jax.random.key(config.seed), start // batch)
    x, nfe, success = make(params, rng, rows, everywhere)
    run_lib.check_success(config, success)
    x = np.asarray(x)
    if not np.all(np.abs(x) < DIVERGED):  # Nor is a NaN below it.
      raise FloatingPointError(
        f'Samples went astray (above {DIVERGED:g}, or not a number): set '
        'config.control.scale lower, config.control.ramp or noise_std higher, '
        'or take more config.sampling.num_steps.'
      )
    images.append(experiment.to_data(config, x))
    progress(min(count, start + batch))
  return np.concatenate(images)[:count], nfe, step


def _sample_classes(config, workdir):
  control, count = config.control, config.sampling.num_samples
  if control.name == 'classifier':
    logits_fn, params, classes = load_classifier(config)
    wrap, everywhere = (
      _guided_by(logits_fn, control.scale),
      {'classifier': params},
    )
  else:
    classes, wrap, everywhere = experiment.num_labels(config), None, {}
  if not -1 <= control.label < classes:
    raise ValueError(
      f'config.control.label={control.label} is no class of {classes}; -1 '
      'takes all in turn.'
    )
  one = control.label >= 0
  label = np.full(count, control.label) if one else np.arange(count) % classes
  split = {'label': label.astype(np.int32)}
  images, nfe, step = _draw(config, workdir, wrap, count, split, everywhere)
  columns = None if one else classes
  return {'images': images, **split, 'nfe': nfe}, images, columns, step


def _sample_inverse(config, workdir):
  control = config.control
  originals = _originals(config)
  x0 = datasets.scaler(
    jnp.float32(originals) / 255, centered=config.data.centered
  )
  operator = make_operator(config)
  y = operator(x0)
  noise = jax.random.normal(jax.random.key(config.seed + 1), y.shape)
  y = np.asarray(y + control.noise_std * noise)
  count, repeats = len(originals), control.repeats
  split = {'y': np.repeat(y, repeats, axis=0)}
  found, nfe, step = _draw(
    config, workdir, make_wrap(config, operator), count * repeats, split, {}
  )
  found = found.reshape(count, repeats, *found.shape[1:])
  shown = datasets.inverse_scaler(
    picture(config, y, x0.shape), centered=config.data.centered
  )
  shown = experiment.to_data(config, shown)
  rows = np.concatenate([originals[:, None], shown[:, None], found], axis=1)
  arrays = {'images': found, 'originals': originals, 'measurements': y}
  grid = rows.reshape(-1, *rows.shape[2:])
  return arrays | {'nfe': nfe}, grid, rows.shape[1], step


def sample(config, workdir):
  """Writes workdir/samples/NAME-step_N-HASH.npz and .png of a control.

  The .npz holds uint8 `images`, `nfe` and, of classes, `label`; of inverse
  problems `images` are [N, repeats, H, W, C], with `originals` and
  `measurements` beside them. In the picture of an inverse problem a row is an
  original, its measurement and the reconstructions.
  """
  check(config)
  run = _sample_classes if config.control.name in CLASSES else _sample_inverse
  arrays, grid, columns, step = run(config, workdir)
  if jax.process_index() == 0:
    name = f'{config.control.name}-step_{step}-{evaluate.identity(config)}'
    path = pathlib.Path(workdir) / 'samples' / f'{name}.npz'
    save_npz(path, **{k: np.asarray(v) for k, v in arrays.items()})
    picture_path = path.with_suffix('.png')
    save_samples(picture_path, grid, columns=columns)
    say(f'{int(arrays["nfe"])} NFE each: {path} and .png.')
