"""Controlled generation by `--mode sample`: what config.control asks for.

Classes ('classifier', 'labels') give a grid of samples with a column for each
class; 'autoguidance' guides by a weaker network. Inverse problems ('inpaint',
'colorize', ...) take images, measure them, and show original, measurement and
reconstructions side by side.
"""

import abc
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import experiment
from checkpoints.workdir import check_run, restore_arrays
from commands import trained
from controllable_generation import (
  CONTROLS,
  MASKS,
  METHODS,
  OPERATORS,
  Autoguidance,
  ClassifierGuidance,
  Guidance,
  Method,
  Operator,
  noise_like,
  told,
)
from data import datasets, record, sources
from reporting.pictures import save_samples
from runtime import options
from runtime.devices import on_first_host
from runtime.files import check_output, digest, load_arrays, save_npz
from runtime.progress import say


def _build(table, config, key):
  """Return the object of a table that config.control chooses by a key."""
  section = {**config.control}
  path = pathlib.Path(section['mask'])
  if path.suffix == '.npy':
    section['mask'] = load_arrays(path)
  elif section['mask'] not in MASKS and path.is_file():
    fit = sources.fit_of(config.data) | {'channels': 1}
    image = sources.decode_file(path, **fit)
    section['mask'] = image[..., 0] > 127
  owned = {'seed': config.seed, 'centered': config.data.centered}
  return options.build(table, section, f'control.{key}', **owned)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
  """What is sampled under a control, and how it is shown.

  Attributes:
    rows: what the guidance is given for each sample, arrays [count, ...].
    shared: what it is given for all samples, pytrees.
  """

  rows: dict[str, np.ndarray]
  shared: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def count(self) -> int:
    """Return the number of samples."""
    return len(next(iter(self.rows.values())))

  @property
  def identity(self) -> str:
    """Return eight hexadecimal digits of all that samples are guided by."""
    given = jax.tree.leaves((self.rows, self.shared))
    return digest(*map(np.asarray, given))[:8]

  @abc.abstractmethod
  def guide(self, score_fn, sde, **given):
    """Return the guided score; `given` are a batch of `rows`, and `shared`."""

  @abc.abstractmethod
  def present(self, images):
    """Return (arrays to be saved, images of the picture, its columns or None).

    Args:
      images: all samples, uint8 [count, H, W, C] (or points [count, D]).
    """


# ------------------------------------------------------------------- classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassTask(Task):
  """Samples of given classes, `label` [count].

  Attributes:
    guidance: guidance by labels.
    columns: columns of the picture; None for a square.
  """

  guidance: Guidance
  columns: int | None
  num_samples: int

  @property
  def count(self):
    return self.num_samples

  def guide(self, score_fn, sde, **given):
    return self.guidance(score_fn, sde, **given)

  def present(self, images):
    return {'images': images, **self.rows}, images, self.columns


def class_number(label, classes, names):
  """Return the number of a class; -1 for all in turn.

  Text is a name. It is a number where no class is named by a number, as on the
  command line.

  Args:
    label: config.control.label.
    classes: number of classes.
    names: their names; empty if they have none.

  Raises:
    ValueError: there is no such class.

  Example:
    >>> class_number('dog', 2, ('cat', 'dog')), class_number('0', 2, ())
    (1, 0)
    >>> class_number('10', 3, ('9', '10', '11')), class_number(0, 3, ())
    (1, 0)
  """
  if label in names[:classes]:
    return names.index(label)
  text, number = str(label), -1
  is_name = isinstance(label, str) and any(n.isdecimal() for n in names)
  if text.isdecimal() and not is_name:
    number = int(text)
  elif text != '-1':
    number = classes
  if number >= classes:
    hint = f'use 0 to {classes - 1}, or -1 for all in turn.'
    if names:
      hint = options.suggestion(label, names)
    raise ValueError(
      f'config.control.label={label!r} is no class of {classes}: {hint}'
    )
  return number


def _class_task(config, guidance, classes, names, **shared):
  """Return the task of sampling config.control.label, or all classes in turn.

  Without classes there are no labels.

  Raises:
    ValueError: there is no such class.
  """
  count = config.sampling.num_samples
  if not classes:
    check_no_label(config)
    return ClassTask(
      rows={}, shared=shared, guidance=guidance, columns=None, num_samples=count
    )
  label = class_number(config.control.label, classes, names)
  one = label >= 0
  if one and names:
    say(f'Class {label}: {names[label]}.')
  labels = np.full(count, label) if one else np.arange(count) % classes
  return ClassTask(
    rows={'label': labels.astype(np.int32)},
    shared=shared,
    guidance=guidance,
    columns=None if one else classes,
    num_samples=count,
  )


def check_no_label(config):
  """Raise ValueError for a class that would have no effect."""
  if str(config.control.label) != '-1':
    raise ValueError(
      f'config.control.label={config.control.label!r} has no effect on this '
      f'network with config.control.name={config.control.name!r}: leave it '
      "out, or use 'labels' with a network that is told classes, else "
      "'classifier'."
    )


def label_task(model, workdir):
  """Return the task of a network that is told the class."""
  if not model.num_labels:
    raise ValueError(
      "config.control.name='labels' needs a network that was trained with "
      "config.model.num_labels: use config.control.name='classifier' with "
      'other networks.'
    )
  guidance = _build(CONTROLS, model.config, 'name')
  names = record.classes(workdir)
  return _class_task(model.config, guidance, model.num_labels, names)


@dataclasses.dataclass(frozen=True)
class ByNetwork:
  """Guidance by a network that classifies noisy images.

  Attributes:
    guidance: guidance by the probability of a class.
    classifier: Experiment of the network.
  """

  guidance: ClassifierGuidance
  classifier: experiment.Experiment

  def __call__(self, score_fn, sde, *, label, classifier, condition=None):
    """Return the guided score.

    Args:
      score_fn: the unconditional score.
      sde: the process.
      label: classes [B].
      classifier: parameters of the classifier.
      condition: conditions [B, ...] of the score network, or None.
    """
    logits_fn = self.classifier.logits_fn(classifier)

    def log_prob(x, t):
      logp = jax.nn.log_softmax(logits_fn(x, t))
      return jnp.take_along_axis(logp, label[:, None], 1)[:, 0]

    score_fn = told(score_fn, None, condition)
    return self.guidance(score_fn, sde, log_prob=log_prob)


def _check_noise(model, other, choice):
  """Raise ValueError unless two models are of the same noisy data."""
  ours, theirs = (
    f'{m.sde.continuous} with data.centered={m.config.data.centered}'
    + (f' and {m.scale}' if m.config.data.std else '')
    for m in (model, other)
  )
  if ours != theirs or model.shape(1) != other.shape(1):
    raise ValueError(
      f'config.control.{choice} was trained for other noise or data: {theirs} '
      f'and shape {other.shape(1)[1:]}, the model for {ours} and shape '
      f'{model.shape(1)[1:]}. Train one with the config.sde and config.data of '
      'the model.'
    )


def load_classifier(model):
  """Return (Experiment, parameters) of config.control.classifier_workdir.

  Args:
    model: Experiment of the score network.

  Raises:
    FileNotFoundError: there is no run.
    ValueError: it is no classifier, or one of another process or range.
  """
  if not model.config.control.classifier_workdir:
    raise ValueError(
      "config.control.name='classifier' needs config.control."
      "classifier_workdir: set it to a run with a classifier's config."
    )
  workdir = pathlib.Path(model.config.control.classifier_workdir)
  check_run(
    workdir,
    f'control.classifier_workdir={workdir}',
    "train or import a classifier there, with a classifier's config",
  )
  classifier = experiment.build(experiment.run_config(workdir))
  if not classifier.is_classifier:
    raise ValueError(
      f'config.control.classifier_workdir={workdir} is no run of a '
      "classifier: train one there, with a classifier's config."
    )
  _check_noise(model, classifier, f'classifier_workdir={workdir}')
  return classifier, restore_arrays(workdir, classifier.abstract_params())


def classifier_task(model, workdir):
  """Return the task of a score network that a classifier guides."""
  del workdir  # The classifier knows the classes.
  guidance = _build(CONTROLS, model.config, 'name')
  classifier, params = load_classifier(model)
  classes = classifier.config.model.num_outputs
  guidance = ByNetwork(guidance, classifier)
  names = record.classes(model.config.control.classifier_workdir)
  return _class_task(model.config, guidance, classes, names, classifier=params)


# --------------------------------------------------------------- autoguidance


@dataclasses.dataclass(frozen=True)
class ByWeakNetwork:
  """Guidance by a weaker score network.

  Attributes:
    guidance: the guidance.
    network: Experiment of the weak network.
    continuous: whether the sampler needs scores in continuous time.
  """

  guidance: Autoguidance
  network: experiment.Experiment
  continuous: bool

  def __call__(self, score_fn, sde, *, weak, label=None, condition=None):
    """Return the guided score.

    Args:
      score_fn: the score.
      sde: the process.
      weak: parameters of the weak network.
      label: classes [B], or None.
      condition: conditions [B, ...], or None.
    """
    weak_fn = told(
      self.network.score_fn(weak, continuous=self.continuous),
      label if self.network.num_labels else None,
      condition if self.network.condition else None,
    )
    return self.guidance(
      score_fn, sde, weak=weak_fn, label=label, condition=condition
    )


def autoguidance_task(model, workdir):
  """Return the task of a score network that a weaker one guides.

  Raises:
    FileNotFoundError: there is no weak network.
    ValueError: it is no score network, or one of other noise or classes.
  """
  chosen = model.config.control
  folder = pathlib.Path(chosen.weak_workdir or workdir)
  choice = f'weak_workdir={str(folder)!r}'
  check_run(folder, f'control.{choice}', 'name the workdir of a trained run')
  weak = experiment.build(experiment.run_config(folder))
  if weak.is_classifier or weak.num_labels not in (0, model.num_labels):
    raise ValueError(
      f'config.control.{choice} is no score network with the classes of the '
      'model, or without classes: train one with its config.data.'
    )
  keys = experiment.OF_CONDITIONS if weak.condition else ()
  if any(weak.config.data[key] != model.config.data[key] for key in keys):
    raise ValueError(
      f'config.control.{choice} is told other conditions than the model: train '
      'one with its config.data.'
    )
  _check_noise(model, weak, choice)
  like, checkpoint = weak.abstract_params(), chosen.weak_checkpoint
  params = weak.network_params(restore_arrays(folder, like, checkpoint))
  guidance = _build(CONTROLS, model.config, 'name')
  guide = ByWeakNetwork(guidance, weak, model.sampler.continuous)
  names = record.classes(workdir)
  return _class_task(model.config, guide, model.num_labels, names, weak=params)


# --------------------------------------------------------- inverse problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseTask(Task):
  """Reconstructions of measured images, `repeats` of each.

  Attributes:
    operator, method: what measures, and what takes the measurements to a score.
    originals, shown: uint8 [N, H, W, C]: images, and pictures of what is
      measured of them; None for measurements of a file; points are not shown.
    measurements: [N, ...].
  """

  operator: Operator
  method: Method
  originals: np.ndarray | None
  shown: np.ndarray | None
  measurements: np.ndarray

  @property
  def identity(self):
    version = getattr(self.operator, 'version', None)  # Of the user's code.
    base = super().identity
    return digest(base, version)[:8] if version else base

  def guide(self, score_fn, sde, *, y, label=None, condition=None):
    score_fn = told(score_fn, label, condition)
    return self.method(score_fn, sde, operator=self.operator, y=y)

  def present(self, images):
    found = images.reshape(len(self.measurements), -1, *images.shape[1:])
    arrays = {
      'points' if images.ndim == 2 else 'images': found,
      'measurements': self.measurements,
    }
    if self.originals is not None:
      arrays['originals'] = self.originals
    if images.ndim == 2:
      return arrays, images, None
    beside = [v[:, None] for v in (self.originals, self.shown) if v is not None]
    rows = np.concatenate([*beside, found], axis=1)
    return arrays, rows.reshape(-1, *rows.shape[2:]), rows.shape[1]


def inverse_problem(model):
  """Return the operator and the method of config.control.

  Raises:
    ValueError: they do not suit each other, the images or the sampler.
  """
  config = model.config
  name = config.control.name
  operator = _build(OPERATORS, config, 'name')
  operator.check_shape(model.shape(1))
  method = _build(METHODS, config, 'method')
  if method.orthonormal_only and not operator.orthonormal:
    raise ValueError(
      f'config.control.name={name!r} is no projection: set config.control.'
      "method to 'mmps', 'pigdm', 'diffpir' or 'dps'."
    )
  if method.linear_only and not operator.linear:
    raise ValueError(
      f'config.control.name={name!r} is not linear, so that it has no singular '
      f'value decomposition for config.control.method={config.control.method!r}'
      ": use 'mmps', 'pigdm', 'diffpir' or 'dps'."
    )
  followed = config.sampling.method, config.sampling.predictor
  if method.own_steps and followed != ('pc', 'ddim'):
    raise ValueError(
      f'config.control.method={config.control.method!r} has steps of its own: '
      "set config.sampling.method='pc' and config.sampling.predictor='ddim' "
      '(in the paper with sampling.eta=0.85 and 20 steps).'
    )
  if method.linear_only:
    operator.svd(model.shape(1))  # It may be too large.
  if method.random and config.sampling.method != 'pc':
    raise ValueError(
      'config.control.fresh_noise needs config.sampling.method=pc: other '
      'samplers need a score that is not random.'
    )
  return operator, method


def _originals(config):
  """Return the first images of control.images or of the test set.

  They are uint8 [N, H, W, C], or float32 arrays.
  """
  control = config.control
  if control.images and config.data.shape:
    key = 'config.control.images'
    found, _ = datasets.user_arrays(config.data, control.images, key=key)
    return found[: control.num_images]
  if control.images:
    dataset = datasets.user_images(
      config.data, control.images, key='config.control.images', exact=False
    )
  else:
    dataset = datasets.load(config.data, 'test')
  return dataset.fetch(np.arange(min(control.num_images, len(dataset))))


def read_measurements(path, operator, shape):
  """Return the measurements [N, ...] of a file.

  Args:
    path: config.control.measurements.
    operator: what measured them.
    shape: of the data, [B, ...].

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: they are not what the operator makes, or not finite.
  """
  name = f'config.control.measurements={path!r}'
  found = load_arrays(path, 'an .npy, or an .npz with measurements')
  if isinstance(found, dict):
    if 'measurements' not in found:
      raise ValueError(
        f"{name} has no array 'measurements', but {', '.join(found) or 'none'}."
      )
    found = found['measurements']
  made = jax.eval_shape(operator, jax.ShapeDtypeStruct(shape, jnp.float32))
  if found.shape[1:] != made.shape[1:] or not found.size:
    wanted = ', '.join(map(str, ('N', *made.shape[1:])))
    raise ValueError(
      f'{name} is of shape {found.shape}, but the operator makes [{wanted}].'
    )
  is_complex = jnp.issubdtype(made.dtype, jnp.complexfloating)
  if found.dtype.kind not in ('biufc' if is_complex else 'biuf'):
    raise ValueError(
      f'{name} is of type {found.dtype}, but the operator makes {made.dtype}.'
    )
  found = found.astype(made.dtype)
  if not np.isfinite(found).all():
    raise ValueError(
      f'{name} has {np.count_nonzero(~np.isfinite(found))} values that are no '
      'finite numbers: leave out what was not measured by the operator.'
    )
  return found


def inverse_task(model, workdir):
  """Return the task of reconstructing data from measurements."""
  del workdir
  check_no_label(model.config)
  operator, method = inverse_problem(model)
  config = model.config
  shape, originals, shown = model.shape(1), None, None
  if config.control.measurements:
    y = read_measurements(config.control.measurements, operator, shape)
  else:
    originals = _originals(config)
    x0 = model.model_input(jax.random.key(0), jnp.asarray(originals))
    y = operator(x0)
    noise = noise_like(jax.random.key(config.seed + 1), y)
    y = np.asarray(y + method.noise_std * noise)
  given = trained.conditions_of(model, len(y))
  others = config.control.images or config.control.measurements
  for name, rows in given.items():
    if len(rows) != len(y) or (others and not config.control.condition):
      raise ValueError(
        f'The {len(y)} images or measurements of control need as many '
        'conditions: give config.control.condition, which has '
        f'{len(rows)} for a {name} each.'
      )
  rows = {'y': y, **given}
  if model.kind != 'points':
    shown = operator.picture(jnp.asarray(y), (len(y), *shape[1:]))
    shown = model.to_data(model.to_units(shown))
  return InverseTask(
    rows={
      k: np.repeat(v, config.control.repeats, axis=0) for k, v in rows.items()
    },
    operator=operator,
    method=method,
    originals=originals,
    shown=shown,
    measurements=y,
  )


# ------------------------------------------------------------------- command


TASKS = {
  'autoguidance': autoguidance_task,
  'classifier': classifier_task,
  'labels': label_task,
  **dict.fromkeys(OPERATORS, inverse_task),
}


def make_task(model, workdir='') -> Task:
  """Return the task of config.control.

  All checks are made before data and weights are loaded.

  Args:
    model: Experiment of a score network.
    workdir: of its run, which knows the names of classes.

  Raises:
    ValueError: the control cannot run; one line names the key and the fix.
    FileNotFoundError: there are no images, or there is no classifier.
  """
  name = model.config.control.name
  if name not in TASKS:
    raise ValueError(
      f'config.control.name={name!r} is unknown: '
      f'{options.suggestion(name, TASKS)}'
    )
  task = TASKS[name](model, workdir)
  if not model.condition or 'condition' in task.rows:
    return task
  given, order = trained.conditions_of(model, task.count), np.arange(task.count)
  given = {k: v[order % len(v)] for k, v in given.items()}
  return dataclasses.replace(task, rows=given | task.rows)


def sample(config, workdir):
  """Write samples/NAME-step_N-HASH-HASH.npz and .png of a control to a workdir.

  The second hash is of what the samples are guided by: labels, measurements,
  the weights of a classifier.
  The .npz contains uint8 `images`, `nfe` and, for classes, `label`. For inverse
  problems `images` are [N, repeats, H, W, C] (or `points` [N, repeats, D]),
  with `measurements` and, if they are known, `originals` beside them. In the
  picture of an inverse problem a row is an original, its measurement and the
  reconstructions.

  Args:
    config: a ConfigDict whose control.name is not empty.
    workdir: of a trained run.

  Raises:
    ValueError: the control cannot run.
    FloatingPointError: samples diverged.
  """
  folder = pathlib.Path(workdir) / 'samples'
  on_first_host(check_output, folder)
  model = experiment.build(config)
  task = make_task(model, workdir)
  run = trained.restore(config, workdir, model)
  images, nfe = trained.draw_all(
    run, task.count, guide=task.guide, rows=task.rows, shared=task.shared
  )
  arrays, grid, columns = task.present(images)
  if jax.process_index() == 0:
    name = f'{config.control.name}-{run.name}-{task.identity}'
    path = folder / f'{name}.npz'
    save_npz(path, **arrays, nfe=np.int32(nfe))
    save_samples(path.with_suffix('.png'), grid, columns=columns)
    say(f'{int(nfe)} NFE each: {path} and .png.')
