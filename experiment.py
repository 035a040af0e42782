"""From a config to an Experiment: process, network, loss, sampler, likelihood.

`build` is the one place where a config is read. It checks every key, makes all
objects and traces the network once; what it returns is passed on everywhere.
It is the interface for a notebook, too:

    model, params = experiment.load('runs/quickstart')
    images = model.sample(params, jax.random.key(0), 16)
"""

import copy
import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import traceback
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree, Shaped

import controllable_generation
import likelihood
import losses
import models
import optimization
import sampling
import sde_lib
from checkpoints import formats, workdir
from configs import schema
from data import arrays, datasets, pixels, toy
from data import conditions as conditioned
from data.augment import LABELS, augment
from models import conditions, score
from models.uncertainty import LogVariance
from runtime import options
from runtime.files import check_local
from runtime.progress import say
from solvers import ode
from solvers.base import Sampler, Samples

# uint8 images [B, H, W, C], or float arrays [B, *space, C].
Data = Shaped[ArrayLike, ' B *dims']
Conditions = Shaped[ArrayLike, ' B *condition']
PerExample = Float[Array, ' B']
Rng = Key[Array, '']

# Relative error of the profile of an average from which on a warning is due.
INEXACT = 0.1
# Options of the compiler for programs that run once: compile quickly.
RUN_ONCE = {'xla_backend_optimization_level': 0}
# Where the parameters of `LogVariance` are, beside those of the network.
UNCERTAINTY = 'uncertainty'

# Times at which the accuracy of a classifier is measured, by metric.
ACCURACIES = {f'accuracy_t{t}': t for t in (0.0, 0.25, 0.5, 0.75, 1.0)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
  """A config and the objects that it describes.

  Attributes:
    config: locked ConfigDict, checked.
    sde: forward process.
    network: flax module, called as network.apply(variables, x, cond, train=).
    conditioning: what the network is told, and what its output means.
    loss_fn: the loss as a function of a score function (or of logits).
    optimizer: optax transformation.
    sampler: sampler of config.sampling; None for a classifier.
  """

  config: ml_collections.ConfigDict
  sde: sde_lib.SDE
  network: nn.Module
  conditioning: Any
  loss_fn: losses.ScoreMatching | losses.Classification
  optimizer: optax.GradientTransformation
  sampler: Sampler | None

  # ---------------------------------------------------------------- network

  @property
  def is_classifier(self) -> bool:
    """Whether the network is a classifier, which has no score."""
    return self.config.model.name in models.CLASSIFIERS

  @property
  def num_labels(self) -> int:
    """Return the number of classes the network is told; 0 for none."""
    return self.config.model.get('num_labels', 0)

  @property
  def condition(self) -> str:
    """Return the kind of condition the network is told; '' for none."""
    return self.config.model.get('condition', '')

  @property
  def sampled(self) -> sde_lib.SDE:
    """The process that the sampler follows, of levels or in continuous time."""
    return self.sde.continuous if self.sampler.continuous else self.sde

  def shape(self, batch_size: int) -> tuple[int, ...]:
    """Return [B, H, W, C] of images, or [B, *space, C] of other data."""
    return batch_size, *datasets.example_shape(self.config.data)

  @property
  def kind(self) -> str:
    """What examples are called: points, signals, images or volumes."""
    return arrays.kind(self.shape(1)[1:])

  @property
  def scale(self) -> arrays.Scale:
    """The map from arrays to the model's range; for images it does nothing."""
    data = self.config.data
    return arrays.Scale(tuple(data.mean), tuple(data.std))

  def _init(self, rng):
    x, cond = jnp.zeros(self.shape(1)), jnp.ones(1)
    params = self.network.init(rng, x, cond, train=False)['params']
    if getattr(self.loss_fn, 'uncertainty', False):
      params[UNCERTAINTY] = LogVariance().init(rng, cond)['params']
    return params

  def network_params(self, params: PyTree) -> PyTree:
    """Return the parameters without those that only training needs."""
    return {k: v for k, v in params.items() if k != UNCERTAINTY}

  def abstract_params(self) -> PyTree:
    """Return the shapes and dtypes of the parameters, a pytree."""
    params = models.abstract_params(self.network, self.shape(1)[1:])
    if getattr(self.loss_fn, 'uncertainty', False):
      rng, level = jax.random.key(0), jnp.ones(1)
      own = jax.eval_shape(LogVariance().init, rng, level)['params']
      params = {**params, UNCERTAINTY: own}
    return params

  def init_params(self, rng: Rng) -> PyTree:
    """Return new parameters, drawn with a key."""
    return jax.jit(self._init, compiler_options=RUN_ONCE)(rng)

  def _apply(self, params, x, cond, *given, dropout_rng=None, augment=None):
    told = {} if augment is None else {'augment': augment}
    rngs = None if dropout_rng is None else {'dropout': dropout_rng}
    return self.network.apply(
      {'params': self.network_params(params)},
      x,
      cond,
      *given,
      train=rngs is not None,
      rngs=rngs,
      **told,
    )

  def score_fn(
    self, params, *, continuous=False, dropout_rng=None, augment=None
  ):
    """Return score_fn(x, t) of the network with the given parameters.

    It is score_fn(x, t, label, condition) of a network that is told them, with
    classes [B] or None, and conditions [B, ...] of `told` or None.

    Args:
      params: parameters of the network.
      continuous: whether a network that was trained on the levels of DDPM's
        chain is used in continuous time, as ODEs and likelihoods need it.
      dropout_rng: key, in training; None in evaluation.
      augment: labels of augmented images, [B, 9], in training.
    """
    sde, conditioning = self.sde, self.conditioning
    if continuous and isinstance(conditioning, score.DDPMLabel):
      sde, conditioning = sde.continuous, score.Time()
    net = functools.partial(
      self._apply, params, dropout_rng=dropout_rng, augment=augment
    )
    return score.make_score_fn(net, sde, conditioning)

  def told(
    self, condition: Conditions | None
  ) -> Float[Array, ' B *marked'] | None:
    """Return conditions as the network takes them, standardised and marked.

    Args:
      condition: in units of the data, [B, ...]; None for none.

    Raises:
      ValueError: the network is told no condition.
    """
    if condition is None:
      return None
    if not self.condition:
      raise ValueError(
        'The network is told no condition: train with config.model.condition.'
      )
    data, axes = self.config.data, (1,) * (jnp.ndim(condition) - 1)
    mean, std = (
      jnp.float32(v).reshape(*axes, -1)
      for v in (data.condition_mean, data.condition_std)
    )
    return conditions.marked((jnp.asarray(condition) - mean) / std)

  def logits_fn(self, params):
    """Return logits_fn(x, t) -> [B, classes] of a classifier."""

    def logits_fn(x, t):
      _, sigma = self.sde.marginal(t)
      return self._apply(params, x, sigma)

    return logits_fn

  # --------------------------------------------------------------- training

  def model_input(self, rng, image, *, flip=False, dequantize=False):
    """Return uint8 images (or float arrays) in the range of the model.

    Args:
      rng: key.
      image: uint8 [B, H, W, C], or float [B, *space, C].
      flip, dequantize: see `pixels.preprocess`.
    """
    x = pixels.preprocess(
      rng,
      image,
      random_flip=flip,
      uniform_dequantization=dequantize,
      centered=self.config.data.centered,
    )
    return self.scale(x)

  def to_units(self, x):
    """Return what is in the model's range in [0, 1], or in units of arrays."""
    data = self.config.data
    if data.shape:
      return self.scale.undo(x)
    return pixels.inverse_scaler(x, centered=data.centered)

  def loss(
    self,
    params: PyTree,
    rng: Rng,
    batch: dict,
    *,
    train: bool = True,
    fraction: Float[ArrayLike, ''] = 1.0,
  ) -> PerExample:
    """Return the loss of each example, [B].

    Flips, dequantisation, times, noise and dropout are all drawn with rng.

    Args:
      params: parameters of the network.
      rng: key.
      batch: 'image', uint8 [B, H, W, C] or float [B, *space, C], and 'label',
        int [B]; with model.condition also 'condition', float [B, ...].
      train: whether flips, dropout and dropout of conditions are active.
      fraction: share of the training that is done.
    """
    data = self.config.data
    rng_data, rng_loss, rng_dropout, rng_label = jax.random.split(rng, 4)
    x0 = self.model_input(
      rng_data,
      batch['image'],
      flip=train and data.random_flip,
      dequantize=data.uniform_dequantization,
    )
    label = batch['label']
    if self.is_classifier:
      return self.loss_fn(rng_loss, self.logits_fn(params), self.sde, x0, label)
    # Whatever moves an image moves the array over it: it has the same key.
    array = batch['condition'] if self.condition else None
    if self.condition == 'array':
      flip = train and data.random_flip
      array = pixels.preprocess(
        rng_data,
        jnp.float32(array),
        random_flip=flip,
        uniform_dequantization=False,
        centered=data.centered,
      )
    told = {}
    if train and data.augment:
      rng_augment = jax.random.fold_in(rng_data, 2)  # 0, 1: its split
      x0, told['augment'] = augment(rng_augment, x0, data.augment)
      if self.condition == 'array':
        array, _ = augment(rng_augment, array, data.augment)
    if train:
      told['dropout_rng'] = rng_dropout
    given = label if self.num_labels else None, self.told(array)
    if train:
      share = self.config.training.condition_dropout
      drop = jax.random.bernoulli(rng_label, share, x0.shape[:1])
      given = conditions.dropped(drop, *given, self.num_labels)
    score_fn = controllable_generation.told(
      self.score_fn(params, **told), *given
    )
    log_variance = None
    if train and self.loss_fn.uncertainty:
      log_variance = functools.partial(self._log_variance, params)
    return self.loss_fn(
      rng_loss, score_fn, self.sde, x0, log_variance, fraction, train=train
    )

  def _log_variance(self, params, t):
    level = -self.sde.log_snr(t) / 8
    return LogVariance().apply({'params': params[UNCERTAINTY]}, level)

  def test_metrics(
    self, params: PyTree, rng: Rng, batch: dict
  ) -> dict[str, PerExample]:
    """Return {name: [B]}, whose means over a data set are its metrics.

    They are 'test_loss' and, for a classifier, its accuracy at the noise levels
    of `ACCURACIES`. Args are as for `loss`.
    """
    values = {'test_loss': self.loss(params, rng, batch, train=False)}
    if not self.is_classifier:
      return values
    logits_fn = self.logits_fn(params)
    x0 = self.model_input(rng, batch['image'])  # Nothing is random here.
    z = jax.random.normal(rng, x0.shape)

    def correct(t):
      smallest = self.config.training.eps
      t = jnp.full(x0.shape[:1], jnp.maximum(t, smallest))
      found = jnp.argmax(logits_fn(self.sde.perturb(x0, t, z), t), -1)
      return jnp.float32(found == batch['label'])

    hits = jax.lax.map(correct, jnp.asarray([*ACCURACIES.values()]))
    return values | dict(zip(ACCURACIES, hits, strict=True))

  # --------------------------------------------------------------- sampling

  def to_data(
    self, x: Float[ArrayLike, '*shape']
  ) -> Shaped[np.ndarray, '*shape']:
    """Return samples as data sets hold them: uint8 images, or float32 arrays.

    Args:
      x: samples in [0, 1], [B, H, W, C], or arrays [B, *space, C] in units of
        the data.
    """
    if self.config.data.shape:
      return np.asarray(x, np.float32)
    return pixels.to_uint8(np.asarray(x), self.config.sampling.rounding)

  def make_sample(self, batch_size, *, guide=None, frames=0):
    """Return sample(params, rng, z=None, **given) -> Samples, for `jax.jit`.

    Samples (and frames) are in [0, 1], except where they fall outside it;
    arrays are in units of the data. z
    [B, ...] is the state at t = 1, drawn from the prior if it is None. A
    network that is told classes, without `guide`, is guided to the classes
    `label` [B] by config.control.scale; without `label`, to random ones. The
    samples hold them as `label`. One that is told conditions is guided to
    `condition` [B, ...] in units of the data; a `guide` is given those of
    `told`.

    Args:
      batch_size: B.
      guide: guide(score_fn, sde, **given) -> score_fn, a `Guidance`.
      frames: states to record on the way; 0 for none.
    """
    if self.sampler is None:
      raise ValueError(
        'A classifier draws no samples: use the config and workdir of a score '
        'model, with config.control.name=classifier and classifier_workdir.'
      )
    self.sampler.check_frames(frames)
    sde = self.sampled
    classes = 0 if guide else self.num_labels
    needs_condition = self.condition and not guide
    if classes or needs_condition:
      guide = options.build(
        controllable_generation.CONTROLS,
        {**self.config.control, 'name': 'labels'},
        'control.name',
      )

    def sample(params, rng, z=None, **given):
      rng, rng_prior = jax.random.split(rng)
      if classes and 'label' not in given:
        rng_label = jax.random.fold_in(rng_prior, 1)
        given['label'] = jax.random.randint(
          rng_label, (batch_size,), 0, classes
        )
      if 'condition' in given:
        given['condition'] = self.told(given['condition'])
      elif needs_condition:
        raise ValueError(
          f"The network is told a condition (model.condition='{self.condition}'"
          '): give sample(..., condition=array).'
        )
      if z is None:
        z = sde.prior_sample(rng_prior, self.shape(batch_size))
      score_fn = self.score_fn(params, continuous=self.sampler.continuous)
      if guide:
        score_fn = guide(score_fn, sde, **given)
      found = self.sampler(rng, score_fn, sde, z, frames=frames)
      return found._replace(
        x=self.to_units(found.x),
        frames=self.to_units(found.frames),
        label=given.get('label'),
      )

    return sample

  @functools.cached_property
  def _compiled(self):
    return {}

  def sample(
    self,
    params: PyTree,
    rng: Rng,
    n: int,
    *,
    label: Int[ArrayLike, '*labels'] | None = None,
    condition: Shaped[ArrayLike, '*condition'] | None = None,
  ) -> Shaped[np.ndarray, ' n *dims']:
    """Return n samples: uint8 [n, H, W, C], or float32 [n, *space, C].

    Args:
      params: parameters, such as `load` returns.
      rng: key.
      n: number of samples, all made at once.
      label: classes [n], or one for all; None for random ones.
      condition: conditions [n, ...] in units of the data, or one for all, for a
        network with model.condition.

    Raises:
      ValueError: the condition does not suit the network, or is missing.
    """
    given = {}
    if label is not None:
      if not self.num_labels:
        raise ValueError(
          'The network is told no class: train with config.model.num_labels.'
        )
      given['label'] = jnp.broadcast_to(jnp.asarray(label), (n,))
    if condition is not None:
      if not self.condition:
        self.told(condition)  # Says so.
      given['condition'] = conditioned.fitted(
        condition, self.config.data, 'condition', n
      )
    if n not in self._compiled:
      self._compiled[n] = jax.jit(self.make_sample(n))
    return self.to_data(self._compiled[n](params, rng, **given).x)

  def given(self, dataset, count: int) -> dict[str, np.ndarray]:
    """Return what the first samples are told as the first examples are.

    Args:
      dataset: a Dataset, whose conditions are repeated if it is smaller.
      count: number of samples.

    Returns:
      {} for a network that is told no condition; else {'condition': [count,
      ...]} and, if it is told classes, 'label' [count].
    """
    if not self.condition:
      return {}
    batch = dataset.batch(np.arange(count) % len(dataset))
    names = 'condition', *(('label',) if self.num_labels else ())
    return {name: np.asarray(batch[name]) for name in names}

  # ------------------------------------------------- likelihood, latent codes

  @property
  def _with_jvp(self):
    """Return this with a network that has Jacobian-vector products."""
    if getattr(self.network, 'attention', 'xla') == 'xla':
      return self  # cuDNN's attention has none, but the same parameters.
    return dataclasses.replace(
      self, network=self.network.clone(attention='xla')
    )

  def bits_per_dim(
    self,
    params: PyTree,
    rng: Rng,
    image: Data,
    condition: Conditions | None = None,
  ) -> tuple[PerExample, PerExample, Array, Array]:
    """Return (bits/dim [B], their standard errors [B], NFE, success).

    uint8 images are dequantised uniformly: the bits/dim of the 8-bit data are
    bounded from above by those of the density over [0, 256) (Theis et al.
    2016). For arrays, the bits are of the density in units of the data.

    Args:
      params: parameters of the network.
      rng: key for the dequantisation and the probes.
      image: uint8 [B, H, W, C], or float [B, *space, C].
      condition: conditions [B, ...] in units of the data, for p(x | condition);
        None for p(x), which a network with conditions knows by their dropout.
    """
    bits, error, found = self.bits_so_far(
      params, rng, image, condition=condition
    )
    return bits, error, found.nfe, found.success

  def bits_so_far(
    self,
    params,
    rng,
    image,
    state=None,
    max_steps=ode.MAX_STEPS,
    condition=None,
  ):
    """Return (bits/dim [B], standard errors [B], `likelihood.Likelihood`).

    It is `bits_per_dim` in stretches; for `state` and `max_steps` see
    `likelihood.log_likelihood`. The other arguments stay the same.
    """
    data, chosen = self.config.data, self.config.eval
    rng_data, rng_probe = jax.random.split(rng)
    x = self.model_input(rng_data, image, dequantize=True)
    probes = None
    if chosen.bpd_trace != 'exact':
      draw = likelihood.PROBES[chosen.bpd_trace]
      probes = draw(rng_probe, (chosen.bpd_probes, *x.shape))
    found = likelihood.log_likelihood(
      self._with_jvp._flow_score(params, condition),
      self.sde.continuous,
      x,
      probes,
      eps=chosen.bpd_eps,
      rtol=self.config.sampling.rtol,
      atol=self.config.sampling.atol,
      state=state,
      max_steps=max_steps,
    )
    dims = x[0].size
    width = 256 if data.shape else 2 if data.centered else 1
    logp = found.logp - self.scale.log_volume(x.shape[1:])
    bits = likelihood.bits_per_dim(logp, dims, data_width=width)
    error = found.std_error / likelihood.nats_per_bit(dims)
    return bits, error, found

  def log_score_norms(
    self, params: PyTree, rng: Rng, image: Data
  ) -> Float[Array, 'B levels']:
    """Return the logarithms of the norms of the score at ten levels, [B, 10].

    The levels are evenly spaced in log SNR, from t = eval.bpd_eps to 0.95,
    because some processes have no data left at t = 1.

    Args:
      params: parameters of the network.
      rng: key for the dequantisation.
      image: uint8 [B, H, W, C], or float [B, *space, C].
    """
    sde = self.sde.continuous
    ends = sde.log_snr(jnp.array([self.config.eval.bpd_eps, 0.95]))
    return likelihood.log_score_norms(
      self._flow_score(params),
      sde,
      self.model_input(rng, image, dequantize=True),
      sde.time(jnp.linspace(*ends, 10)),
    )

  def _flow_score(self, params, condition=None):
    """Return the score in continuous time, given conditions if there are."""
    return controllable_generation.told(
      self.score_fn(params, continuous=True), None, self.told(condition)
    )

  @property
  def flow(self) -> ode.ODE:
    """The probability-flow ODE as a sampler, without denoising at its end."""
    chosen = self.config.sampling
    return ode.ODE(
      eps=chosen.eps, rtol=chosen.rtol, atol=chosen.atol, final_denoise=False
    )

  def encode(
    self, params: PyTree, image: Data, condition: Conditions | None = None
  ) -> ode.OdeSolution:
    """Return an OdeSolution whose y are latent codes at t = 1, [B, ...].

    The images are put at t = sampling.eps, where `decode` ends.

    Args:
      params: parameters of the network.
      image: uint8 [B, H, W, C], or float [B, *space, C].
      condition: conditions [B, ...] in units of the data, or None.
    """
    x = self.model_input(jax.random.key(0), image)  # Nothing is random here.
    return likelihood.encode(
      self._flow_score(params, condition),
      self.sde.continuous,
      x,
      eps=self.flow.eps,
      rtol=self.flow.rtol,
      atol=self.flow.atol,
    )

  def decode(
    self,
    params: PyTree,
    z: Float[ArrayLike, ' B *dims'],
    condition: Conditions | None = None,
  ) -> Samples:
    """Return the samples of latent codes z: inverts `encode`.

    They are in [0, 1], or in units of the data.

    A network that is told classes is told none here, as in `encode`; the
    conditions are those that the codes were made with.
    """
    score_fn = self._flow_score(params, condition)
    found = self.flow(None, score_fn, self.sde.continuous, z)
    return found._replace(x=self.to_units(found.x))


# ------------------------------------------------------------------ building


# Keys of arrays, and of conditions, that are found in the data where they are
# empty.
OF_ARRAYS = ('shape', 'mean', 'std')
OF_CONDITIONS = ('condition_shape', 'condition_mean', 'condition_std')


def _measure_conditions(data):
  """Return `OF_CONDITIONS` of the training data."""
  train = datasets.load(data, 'train')
  return conditioned.measure(train, train.fetch([0]).shape[1:])


def completed(config, folder=None) -> ml_collections.ConfigDict:
  """Return a config that knows shape, mean and deviation of its data.

  Those of arrays and of conditions: where config.data leaves them empty they
  are those of the run, if there is one, or those of the training data.

  Args:
    config: a ConfigDict.
    folder: workdir of the run, which need not exist; None for none.

  Raises:
    ValueError, FileNotFoundError: the config or the data cannot be used.
  """
  schema.check(config)
  data, parts = config.data, []
  if data.dataset == 'arrays':
    parts.append((OF_ARRAYS, arrays.complete))
  if config.model.get('condition'):
    parts.append((OF_CONDITIONS, _measure_conditions))
  if all(data[key] for keys, _ in parts for key in keys):
    return config
  datasets.Data(**data)
  known = {}
  if folder and (pathlib.Path(folder) / 'config.json').is_file():
    known = run_config(folder).data
  config = copy.deepcopy(config)
  for keys, measure in parts:
    found = known if all(known.get(key) for key in keys) else measure(data)
    for key in keys:
      if not config.data[key]:
        schema.override(config, f'data.{key}', found[key])
  return config


def build(config) -> Experiment:
  """Return the Experiment of a config.

  Its `config` is `completed`.

  Options that have no effect with what the config chooses are named in a
  warning.

  Args:
    config: a ConfigDict, such as `load_config` returns.

  Raises:
    ValueError: the config cannot run; one line names the key and the fix.
  """
  config = completed(config)
  for line in schema.unused(config):
    warnings.warn(line, stacklevel=2)
  data, num_scales = config.data, config.training.num_scales
  datasets.Data(**data)
  owned = {'num_scales': num_scales, 'centered': data.centered}
  sde = options.build(sde_lib.SDES, config.sde, 'sde.name', **owned)
  owned['augment_labels'] = LABELS if data.augment else 0
  owned['condition_shape'] = tuple(data.condition_shape)
  owned['data_width'] = 2.0 if data.centered else 1.0
  table = models.MODELS | models.CLASSIFIERS
  network = options.build(table, config.model, 'model.name', **owned)
  conditioning = options.build(
    score.CONDITIONINGS, config.model, 'model.conditioning', **owned
  )
  if hasattr(conditioning, 'sigma_data'):
    owned['sigma_data'] = conditioning.sigma_data
  if data.dataset in toy.DISTRIBUTIONS:
    owned['target'] = toy.DISTRIBUTIONS[data.dataset].score_fn(sde)
  classifier = config.model.name in models.CLASSIFIERS
  training = config.training.to_dict()
  training['loss'] = 'classification' if classifier else 'score_matching'
  loss_fn = options.build(losses.LOSSES, training, 'training.loss', **owned)
  sampler = None
  if not classifier:
    sampler = options.build(
      sampling.SAMPLERS, config.sampling, 'sampling.method', **owned
    )
  model = Experiment(
    config=config,
    sde=sde,
    network=network,
    conditioning=conditioning,
    loss_fn=loss_fn,
    optimizer=optimization.make_optimizer(
      options.build(
        optimization.OPTIMIZERS,
        config.optim,
        'optim.optimizer',
        batch_size=config.training.batch_size,
        n_iters=config.training.n_iters,
      )
    ),
    sampler=sampler,
  )
  _check(model)
  return model


def _check(model):
  """Raise ValueError for what single keys cannot tell."""
  config, training = model.config, model.config.training
  model.loss_fn.check(model.sde)
  _check_network(config)
  _check_attention(model)
  if config.data.augment and not getattr(model.network, 'augment_labels', 0):
    raise ValueError(
      f'config.data.augment={config.data.augment} needs a network that can be '
      f'told of it, not config.model.name={config.model.name!r}: use ncsnpp or '
      'ddpm, or data.augment=0.'
    )
  _check_condition(model)
  if config.eval.ood and (model.is_classifier or model.condition):
    raise ValueError(
      f'config.eval.ood={tuple(config.eval.ood)!r} needs a network of p(x), '
      'not a classifier or one that is told conditions: leave it empty.'
    )
  _trace_network(model)
  _check_times(model)
  if model.is_classifier:
    for section, key in (
      ('training', 'snapshot_sampling'),
      ('eval', 'enable_sampling'),
      ('eval', 'enable_bpd'),
    ):
      if config[section][key]:
        raise ValueError(
          'config.model is a classifier, which has no samples or likelihood: '
          f'set config.{section}.{key}=False.'
        )
  else:
    # The conditioning must suit the process.
    model.score_fn(None, continuous=model.sampler.continuous)
    frames = config.sampling.frames
    _trace_sampler(model.sampler, model.sampled, model.shape(1), frames)
  if training.batch_size % training.grad_accumulation:
    raise ValueError(
      f'config.training.batch_size={training.batch_size} does not divide by '
      f'config.training.grad_accumulation={training.grad_accumulation}.'
    )
  kernels = map(
    optimization.is_kernel, jax.tree.leaves(model.abstract_params())
  )
  if config.optim.optimizer == 'muon' and not any(kernels):
    warnings.warn(
      'config.optim.optimizer=muon has no effect: the network has no kernels '
      'of convolutions, and Adam updates all else.',
      stacklevel=3,
    )
  chosen = config.sampling.method, training.objective
  if chosen[0] == 'consistency' != chosen[1]:
    warnings.warn(
      f'config.sampling.method={chosen[0]!r} needs a network that was trained '
      f"with config.training.objective='consistency', not {chosen[1]!r}: "
      'samples will be blurred means.',
      stacklevel=3,
    )
  for key in ('log_freq', 'eval_freq', 'checkpoint_freq', 'snapshot_freq'):
    steps = training.n_jitted_steps
    if training[key] % steps:
      raise ValueError(
        f'config.training.{key}={training[key]} is not a multiple of '
        f'config.training.n_jitted_steps={steps}: use '
        f'{math.ceil(training[key] / steps) * steps}.'
      )


def _check_condition(model):
  """Raise ValueError for conditions that the network cannot take."""
  data, kind = model.config.data, model.condition
  if not kind:
    for path in ('data.condition_shape', 'control.condition'):
      section, _, name = path.partition('.')
      if value := model.config[section][name]:
        raise ValueError(
          f'config.{path}={value!r} needs a network that is told conditions: '
          "set config.model.condition to 'vector' or 'array'."
        )
    return
  shape, example = tuple(data.condition_shape), model.shape(1)[1:]
  if wrong := conditions.CONDITIONS[kind].problem(shape, example):
    raise ValueError(
      f'config.model.condition={kind!r}: a condition of shape {shape} {wrong}'
    )
  for key in ('condition_mean', 'condition_std'):
    if len(data[key]) not in (1, shape[-1]):
      raise ValueError(
        f'config.data.{key} has {len(data[key])} numbers for {shape[-1]} '
        'channels: give one for each, or one for all.'
      )


def _check_network(config):
  """Check keys of config.model against those of other sections."""
  chosen, num_scales = config.model, config.training.num_scales
  if chosen.get('num_classes', num_scales) != num_scales:
    raise ValueError(
      f'config.model.num_classes={chosen.num_classes} needs to equal '
      f'config.training.num_scales={num_scales}: the network has parameters '
      'for each noise level.'
    )
  if 'attn_resolutions' in chosen and 'ch_mult' in chosen:
    size = datasets.example_shape(config.data)[0]
    sizes = [size >> i for i in range(len(chosen.ch_mult))]
    idle = [size for size in chosen.attn_resolutions if size not in sizes]
    if idle:
      warnings.warn(
        f'config.model.attn_resolutions={tuple(chosen.attn_resolutions)} has '
        f'no effect at {", ".join(map(str, idle))}: the network has the '
        f'resolutions {", ".join(map(str, sizes))}.',
        stacklevel=4,
      )


def _check_attention(model):
  """Check that cuDNN has the attention of the network, where it is chosen."""
  network, size = model.network, model.shape(1)[1]
  if getattr(network, 'attention', 'xla') == 'xla':
    return
  levels = [(size >> i, m * network.nf) for i, m in enumerate(network.ch_mult)]
  heads = {c for n, c in levels if n in network.attn_resolutions}
  heads.add(levels[-1][1])  # In the middle of the network.
  device = jax.local_devices()[0]
  # '9.0' of an H100; devices of other makers have none, or no number.
  capability = getattr(device, 'compute_capability', '')
  is_nvidia = device.platform == 'gpu' and '.' in capability
  largest = 256 if is_nvidia and float(capability) >= 9 else 128
  reason = ''
  if network.dtype != 'bfloat16':
    reason = "needs config.model.dtype='bfloat16'"
  elif not is_nvidia or float(capability) < 8:
    reason = f'needs an NVIDIA GPU from Ampere on, not {device.device_kind!r}'
  elif model.config.training.objective.startswith(('implicit', 'sliced')):
    reason = 'has no derivative as config.training.objective needs it'
  elif wrong := [n for n in sorted(heads) if n > largest or n % 8]:
    reason = (
      f'needs heads of multiples of 8 up to {largest} channels on '
      f'{device.device_kind!r}, and the network has one of {wrong[0]}'
    )
  if reason:
    raise ValueError(
      f"config.model.attention='cudnn' {reason}; 'xla' runs everywhere."
    )


def _trace_network(model):
  """Check that the network takes data of the shape of config.data."""
  try:
    model.abstract_params()
  except Exception as error:  # Layers can raise any type.
    key = 'shape' if model.config.data.shape else 'image_size'
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ValueError(
      f'config.model.name={model.config.model.name!r} cannot take data of '
      f'config.data.{key}={model.config.data[key]}: {reason:.300}'
    ) from error


@functools.cache
def _trace_sampler(sampler, sde, shape, frames):
  """Check that a sampler can make examples; the grid may be too coarse.

  Samplers with the same options are traced once in a process.
  """
  sampler.check_frames(frames)

  def sample(rng):
    free = lambda x, t: x  # A score that costs nothing.
    z = sde.prior_sample(rng, shape)
    return sampler(rng, free, sde, z, frames=frames)

  jax.eval_shape(sample, jax.random.key(0))


def _check_times(model):
  """Check that the process is defined, in float32, at all times in use."""
  config, name = model.config, type(model.sde).__name__
  values = dict(schema.leaves(config))

  def finite(sde, t, weighting=None):
    """Return whether score and loss have finite scales at t."""
    t = jnp.float32(t)
    _, sigma = sde.marginal(t)
    values = [1 / sigma, sigma**2, sde.log_snr(t), *sde.coefficients(t)]
    if weighting is not None:
      values.append(weighting(sde, t) / sigma**2)
    return bool(np.isfinite(values).all())

  if not finite(model.sde, 1.0):
    section = ', '.join(f'config.sde.{k}={v!r}' for k, v in config.sde.items())
    raise ValueError(
      f'The process {name} has no finite signal-to-noise ratio at t = 1 '
      f'({section}): use less noise.'
    )
  weighting = getattr(model.loss_fn, 'weighting', None)
  smallest = [('training.eps', model.sde, model.loss_fn.smallest, weighting)]
  if model.sampler is not None:
    sampler, sde = model.sampler, model.sampled
    levels = getattr(sampler, 'levels', lambda sde: 0)
    last = 0.0 if levels(sde) else sampler.eps
    smallest += [
      ('sampling.eps', sde, last, None),
      ('eval.bpd_eps', model.sde.continuous, config.eval.bpd_eps, None),
    ]
  for path, sde, t, weighting in smallest:
    if not finite(sde, t, weighting):
      raise ValueError(
        f'config.{path}={values[path]!r} does not suit the '
        f'process {name}: at t = {t:g}, the smallest time, its noise is too '
        f'small for float32. The default is '
        f'{schema.KEYS[path].option.default!r}.'
      )


def check_labels(model, dataset):
  """Raise ValueError unless the network has the classes of a data set."""
  key = 'num_outputs' if model.is_classifier else 'num_labels'
  wanted = model.config.model.get(key, 0)
  if wanted and wanted != dataset.num_classes:
    raise ValueError(
      f'config.model.{key}={wanted}, but {dataset.name} has '
      f'{dataset.num_classes} classes.'
    )


def check_conditions(model, dataset):
  """Raise ValueError unless a data set has the conditions of the network."""
  if not model.condition:
    return
  conditioned.check_present(dataset)
  shape = dataset.more(np.arange(1))['condition'].shape[1:]
  wanted = tuple(model.config.data.condition_shape)
  if shape != wanted:
    raise ValueError(
      f'{dataset.name} has conditions of shape {shape}, but '
      f'config.data.condition_shape={wanted}: all need to have one shape.'
    )


# ------------------------------------------------------------------- samples


def why_failed(what: str, not_finite_at, keys) -> str:
  """Return the text of an error about an adaptive solver, with its cause.

  Args:
    what: what did not happen.
    not_finite_at: of the solver's result.
    keys: dotted keys of the tolerances.
  """
  if np.isfinite(not_finite_at):
    return (
      f'{what}: the score is not finite at t = {float(not_finite_at):.4g}. The '
      'weights, or the range of config.sde, are wrong there; another tolerance '
      'does not help.'
    )
  return f'{what}; larger {" and ".join(keys)} may help.'


def check_samples(config, samples: Samples, largest: float):
  """Raise FloatingPointError for samples that cannot be used.

  Args:
    config: a ConfigDict.
    samples: what a sampler returned.
    largest: absolute value that samples must be below, in the model's units.
  """
  if not samples.success:
    chosen = schema.chosen_keys(config)
    keys = [
      f'config.{path}'
      for path in schema.marked(config, 'cost')
      if path.endswith('tol') and path in chosen
    ]
    what = f'The solver {config.sampling.method!r} did not reach t = eps'
    raise FloatingPointError(why_failed(what, samples.not_finite_at, keys))
  scale = arrays.Scale(tuple(config.data.mean), tuple(config.data.std))
  for shard in samples.x.addressable_shards:
    x = scale(np.asarray(shard.data))
    if not np.all(np.abs(x) < largest):  # Nor is NaN.
      raise FloatingPointError(
        f'Samples diverged (values of {largest:g} or more, or not a number): '
        'use more config.sampling.num_steps or, with a control, a lower '
        'config.control.scale or a higher config.control.ramp or noise_std.'
      )


# ------------------------------------------------------------------- loading


def load_config(path) -> ml_collections.ConfigDict:
  """Return the ConfigDict of a file: a .py with get_config(), or a .json.

  Args:
    path: such as configs/quickstart.py, or the config.json of a run.

  Raises:
    FileNotFoundError, ValueError: there is none, or it is no config.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'There is no config file {path}.')
  if path.suffix == '.json':
    try:
      return schema.from_dict(json.loads(path.read_text()))
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{path} is no config: {error}') from None
  if path.suffix != '.py':
    raise ValueError(f'{path} is no config: it ends neither in .py nor .json.')
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except (Exception, SystemExit) as error:  # It is a program of the user.
    frames = traceback.extract_tb(error.__traceback__)
    line = next(
      (f.lineno for f in frames[::-1] if f.filename == spec.origin),
      getattr(error, 'lineno', None),
    )
    text = error.args[0] if isinstance(error, KeyError) else error
    where = f', line {line}' if line else ''
    raise ValueError(
      f'{path}{where}: {type(error).__name__}: {text}'
    ) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      f'{path}: get_config() needs to return a ConfigDict, not a '
      f'{type(config).__name__}.'
    )
  return config


def json_of(config) -> dict[str, Any]:
  """Return a ConfigDict as nested dicts that JSON can hold."""
  return json.loads(config.to_json_best_effort())


def claim(config, folder, *, write=True):
  """Make a workdir that of a config; see `checkpoints.workdir.claim`.

  Args:
    config: a ConfigDict.
    folder: the workdir.
    write: False to check only.

  Raises:
    ValueError: the workdir belongs to a run with other data, another process or
      another network.
  """
  workdir.claim(
    folder,
    json_of(config),
    schema.marked(config, 'run'),
    write=write,
    upgrade=schema.upgrade,
  )


def run_config(folder) -> ml_collections.ConfigDict:
  """Return the config that a run was trained with, from its workdir."""
  values = workdir.read_config(folder)
  try:
    return schema.from_dict(values)
  except ValueError as error:
    path = pathlib.Path(folder) / 'config.json'
    raise ValueError(f'{path} is no config: {error}') from None


def averages_until(saved, step, without=()):
  """Return (step, length) of all averages in checkpoints up to a step.

  Raises:
    ValueError: there is none.
  """
  steps = [s for s in saved.steps if s <= step and s not in without]
  found = [(s, length) for s in steps for length in saved.lengths(s)]
  if not found:
    raise ValueError(
      'config.eval.ema_length needs averages, and the checkpoints up to step '
      f'{step} have none: train with config.training.ema_lengths, such as '
      '0.05,0.1.'
    )
  return found


def restore_average(saved, step, like, length=None, without=()):
  """Return averaged parameters of a checkpoint.

  That of a length is combined from the averages in all checkpoints up to this
  one; see `optimization.combination`.

  Args:
    saved: open `Checkpoints`.
    step: of the checkpoint.
    like: pytree of `jax.ShapeDtypeStruct` with shardings.
    length: relative length; None for the average of config.training.ema_rate.
    without: steps of checkpoints that cannot be read.

  Raises:
    FileNotFoundError, ValueError: the checkpoint cannot be read, or has no
      averages to combine.
  """
  if length is None:
    return saved.restore(step, like, 'ema')
  snapshots = averages_until(saved, step, without)
  weights, error = optimization.combination(snapshots, step, length)
  total = jax.tree.map(lambda v: 0.0, like)
  for (at, kept), weight in zip(snapshots, weights, strict=True):
    item = workdir.average_item(kept)
    read = functools.partial(saved.restore, like=like, item=item)
    part, problem = workdir.attempt(read, at)
    if problem:
      if at == step:
        raise problem
      say(f'warning: {problem} It is left out.')
      return restore_average(saved, step, like, length, (*without, at))
    total = jax.tree.map(lambda a, v, w=weight: a + w * v, total, part)
  say(
    f'Average of length {length:g} at step {step}: combined of '
    f'{len(snapshots)}, with a relative error of its profile of {error:.2g}.'
  )
  if error > INEXACT:
    say(
      f'warning: The average of length {length:g} is inexact: keep more '
      'checkpoints with config.training.snapshot_freq, or choose a length '
      'nearer to those of config.training.ema_lengths.'
    )
  return total


def load(path, which='last', ema_length=None):
  """Return (Experiment, averaged parameters) of a run or of an exported file.

  Args:
    path: workdir of a run, or a .safetensors file of `--mode export`.
    which: checkpoint of the run: 'last', 'best' or a step.
    ema_length: see `restore_average`; of a run only.

  Raises:
    FileNotFoundError, ValueError: there is none, or it is damaged.
  """
  check_local(path)
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    model = build(run_config(path))
    restore = functools.partial(restore_average, length=ema_length)
    shapes = model.abstract_params()
    params = workdir.restore_ema(path, shapes, which, restore)
    return model, model.network_params(params)
  model = build(schema.from_dict(formats.exported_config(path)))
  released = formats.load(path, model.network, model.shape(1))
  return model, jax.tree.map(jnp.asarray, released.ema_params)
