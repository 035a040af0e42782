"""From a config to what it describes: process, network, loss and sampler.

This is also the API for a notebook:

    config = experiment.load_config('configs/quickstart.py')
    like = experiment.abstract_params(config)
    params = checkpoints.restore_ema(workdir, like)
    sample = jax.jit(experiment.make_sampler(config, batch_size=16))
    images, nfe, success = sample(params, jax.random.key(0))
"""

import dataclasses
import functools
import importlib.util
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import controllable_generation
import likelihood
import losses
import models
import sampling
import score_matching
import sde_lib
from data import datasets, toy
from models import score
from solvers import grids, plans, predictors


def load_config(path):
  """The ConfigDict of a config file, e.g. configs/quickstart.py."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'No config file {path}.')
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def _choose(table, name, key):
  if name not in table:
    raise ValueError(f'config.{key}={name!r} is none of {list(table)}.')
  return table[name]


def make_sde(config) -> sde_lib.SDE:
  """The forward process of config.sde."""
  fields = config.sde.to_dict()
  return _choose(sde_lib.SDES, fields.pop('name'), 'sde.name')(**fields)


def make_network(config):
  """The flax module of config.model."""
  fields = config.model.to_dict()
  name = fields.pop('name')
  fields.pop('conditioning')
  _choose(score.CONDITIONINGS, config.model.conditioning, 'model.conditioning')
  known = {f.name for f in dataclasses.fields(models.create(name))}
  if 'centered' in known:
    fields['centered'] = config.data.centered
  return models.create(name, **fields)


def image_shape(config, batch_size):
  """[B, H, W, C] of the config's images; [B, D] if its data are points."""
  size, dims = config.data.image_size, config.data.dims
  if dims:
    return batch_size, dims
  return batch_size, size, size, config.data.num_channels


def to_data(config, x):
  """Samples as datasets hold them, in numpy: uint8 images, or float points.

  Args:
    config: a ConfigDict.
    x: samples of `make_sampler`, [B, H, W, C] or [B, D].
  """
  if config.data.dims:
    return np.asarray(x, np.float32)
  return datasets.to_uint8(np.asarray(x), config.sampling.rounding)


def _init(config):
  network = make_network(config)
  x, cond = jnp.zeros(image_shape(config, 1)), jnp.ones(1)
  return lambda rng: network.init(rng, x, cond, train=False)['params']


def abstract_params(config):
  """Shapes and dtypes of the parameters, as a pytree."""
  return jax.eval_shape(_init(config), jax.random.key(0))


def init_params(config, rng):
  """Freshly drawn parameters; compiled quickly, since it runs once."""
  quick = {'xla_backend_optimization_level': 0}
  return jax.jit(_init(config), compiler_options=quick)(rng)


def make_score_fn(config, params, *, continuous=False, dropout_rng=None):
  """score_fn(x, t) of a network with the given parameters.

  Args:
    config: a ConfigDict.
    params: the network's parameters.
    continuous: view a discretely trained network as one of the continuous
      process, as ODEs and likelihoods need it: sigma is then the process's.
    dropout_rng: key, in training; None in evaluation.
  """
  network, sde = make_network(config), make_sde(config)
  conditioning = config.model.conditioning
  if continuous and conditioning == 'ddpm_label':
    sde, conditioning = sde.continuous, 'time'

  def net(x, cond, *label):
    rngs = None if dropout_rng is None else {'dropout': dropout_rng}
    return network.apply(
      {'params': params}, x, cond, *label, train=rngs is not None, rngs=rngs
    )

  return score.make_score_fn(net, sde, conditioning)


def is_classifier(config):
  """Whether config.model is a classifier, which has no score."""
  return config.model.name in models.CLASSIFIERS


def num_labels(config):
  """Classes that config.model is told of; 0 unless it is class-conditional."""
  return config.model.get('num_labels', 0)


def make_logits_fn(config, params):
  """logits_fn(x, t) -> [B, classes] of a classifier with given parameters."""
  network, sde = make_network(config), make_sde(config)

  def logits_fn(x, t):
    _, sigma = sde.marginal(t)
    return network.apply({'params': params}, x, sigma, train=False)

  return logits_fn


def make_loss_fn(config, *, train):
  """loss_fn(params, rng, batch) -> [B].

  A batch has 'image', uint8 [B, H, W, C] (or float points [B, D]), and 'label',
  int [B]. Flips, dequantisation, times, noise and dropout all come from rng.
  """
  sde, data, training = make_sde(config), config.data, config.training
  _choose(score_matching.OBJECTIVES, training.objective, 'training.objective')
  times = _choose(losses.TIMES, training.times, 'training.times')
  weight = _choose(losses.WEIGHTINGS, training.weighting, 'training.weighting')
  _choose(losses.REDUCTIONS, training.reduction, 'training.reduction')
  # What does not suit the process is refused here, not in the first step.
  draw = lambda rng: weight(sde, times(rng, sde, 1, training.eps)[0])
  jax.eval_shape(draw, jax.random.key(0))
  objective = losses.score_matching
  if training.objective != 'denoising':
    objective = functools.partial(
      score_matching.score_matching_loss, objective=training.objective
    )
  if training.objective == 'explicit':
    known = toy.DISTRIBUTIONS
    data_law = _choose(known, data.dataset, 'data.dataset')
    objective = functools.partial(objective, target=data_law.score_fn(sde))

  def loss_fn(params, rng, batch):
    rng_data, rng_loss, rng_dropout, rng_label = jax.random.split(rng, 4)
    label = batch['label']
    x0 = datasets.preprocess(
      rng_data,
      batch['image'],
      random_flip=train and data.random_flip,
      uniform_dequantization=data.uniform_dequantization,
      centered=data.centered,
    )
    if is_classifier(config):
      logits_fn = make_logits_fn(config, params)
      options = {'times': training.times, 'eps': training.eps}
      return losses.classification(
        rng_loss, logits_fn, sde, x0, label, **options
      )
    score_fn = make_score_fn(
      config, params, dropout_rng=rng_dropout if train else None
    )
    if num_labels(config):
      if train:
        drop = jax.random.bernoulli(
          rng_label, training.label_dropout, label.shape
        )
        label = jnp.where(drop, num_labels(config), label)
      of_class = score_fn
      score_fn = lambda x, t: of_class(x, t, label)
    return objective(
      rng_loss,
      score_fn,
      sde,
      x0,
      times=training.times,
      weighting=training.weighting,
      reduction=training.reduction,
      eps=training.eps,
    )

  return loss_fn


# Times at which a classifier's accuracy is measured, by name.
ACCURACIES = {f'accuracy_t{t}': t for t in (0.0, 0.25, 0.5, 0.75, 1.0)}


def make_test_fn(config):
  """test_fn(params, rng, batch) -> {name: [B]}, to be averaged over a dataset.

  'test_loss' and, of a classifier, the accuracy at some noise levels.
  """
  loss_fn, sde = make_loss_fn(config, train=False), make_sde(config)

  def test_fn(params, rng, batch):
    values = {'test_loss': loss_fn(params, rng, batch)}
    if not is_classifier(config):
      return values
    logits_fn = make_logits_fn(config, params)
    image = batch['image'] / 255
    x0 = datasets.scaler(image, centered=config.data.centered)
    z = jax.random.normal(rng, x0.shape)

    def correct(t):
      t = jnp.full(x0.shape[:1], jnp.maximum(t, config.training.eps))
      found = jnp.argmax(logits_fn(sde.perturb(x0, t, z), t), -1)
      return jnp.float32(found == batch['label'])

    hits = jax.lax.map(correct, jnp.asarray([*ACCURACIES.values()]))
    return values | dict(zip(ACCURACIES, hits, strict=True))

  return test_fn


def make_optimizer(config):
  return losses.make_optimizer(**config.optim)


def _predictor_corrector(options):
  """The predictor and the corrector of config.sampling, options bound."""
  predictor = _choose(
    predictors.PREDICTORS, options.predictor, 'sampling.predictor'
  )
  corrector = _choose(
    predictors.CORRECTORS, options.corrector, 'sampling.corrector'
  )
  if options.predictor in ('euler_maruyama', 'reverse_diffusion'):
    predictor = functools.partial(
      predictor, probability_flow=options.probability_flow
    )
  elif options.probability_flow:
    raise ValueError(
      f'config.sampling.predictor={options.predictor!r} has no '
      "probability_flow: use 'euler_maruyama' or 'reverse_diffusion'."
    )
  if options.predictor == 'ancestral':
    predictor = functools.partial(
      predictor, variance=options.ancestral_variance
    )
  if options.corrector != 'none':
    corrector = functools.partial(corrector, snr=options.snr)
  return {'predictor': predictor, 'corrector': corrector}


def _options_of(function, options):
  """The entries of a dict that are keyword-only parameters of a function."""
  parameters = inspect.signature(function).parameters.values()
  names = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
  return {name: options[name] for name in names if name in options}


def make_sampler(config, batch_size, *, wrap=None, frames=0):
  """sample(params, rng, z=None, **given) -> (images, nfe, success).

  images are [B, H, W, C] in [0, 1] but for samples that fall outside it. z
  [B, H, W, C] is the state at t = 1; None draws it from the prior. Without
  `wrap` a class-conditional network is guided to the classes `label` [B] by
  config.control.scale; without `label`, to classes drawn uniformly.

  Args:
    config: a ConfigDict.
    batch_size: B.
    wrap: `wrap(score_fn, sde, **given)` -> score_fn, what guides the samples;
      `given` are the further arguments of `sample`.
    frames: if not 0, `sample` returns two more: that many states on the way,
      [F, B, H, W, C], scaled as the images are, and their times [F].
  """
  if is_classifier(config):
    raise ValueError(
      'A classifier draws no samples: use the config and workdir of a score '
      'model, with config.control.name=classifier and classifier_workdir.'
    )
  method = config.sampling.method
  sampler = _choose(sampling.SAMPLERS, method, 'sampling.method')
  _choose(grids.GRIDS, config.sampling.grid, 'sampling.grid')
  sampling.check_frames(frames)
  options = config.sampling.to_dict() | {'frames': frames}
  options |= _predictor_corrector(config.sampling)
  if method in plans.SOLVERS:
    solver = plans.SOLVERS[method]
    bound = _options_of(solver, options)
    options['solver'] = functools.partial(solver, **bound)
  sampler = functools.partial(sampler, **_options_of(sampler, options))
  continuous = method in sampling.CONTINUOUS
  sde = make_sde(config)
  sde = sde.continuous if continuous else sde
  scaled = functools.partial(
    datasets.inverse_scaler, centered=config.data.centered
  )
  classes = 0 if wrap else num_labels(config)
  if classes:
    wrap = functools.partial(
      controllable_generation.classifier_free_guidance,
      scale=config.control.scale,
    )

  def sample(params, rng, z=None, **given):
    rng, rng_prior = jax.random.split(rng)
    if classes and 'label' not in given:
      rng_label = jax.random.fold_in(rng_prior, 1)
      given['label'] = jax.random.randint(rng_label, (batch_size,), 0, classes)
    if z is None:
      z = sde.prior_sample(rng_prior, image_shape(config, batch_size))
    score_fn = make_score_fn(config, params, continuous=continuous)
    if wrap:
      score_fn = wrap(score_fn, sde, **given)
    samples = sampler(rng, score_fn, sde, z)
    result = scaled(samples.x), samples.nfe, samples.success
    if frames:
      result += scaled(samples.frames), samples.times
    return result

  return sample


def make_bits_per_dim(config):
  """bits_per_dim(params, rng, image) -> ([B], [B], nfe, success).

  The bits/dim and their standard errors over probes, see `Likelihood`. uint8
  images are dequantised uniformly: the bits/dim of the 8-bit data are bounded
  from above by those of the density over [0, 256) (Theis et al. 2016). Those of
  points are of their density as it is.
  """
  sde, data, options = make_sde(config).continuous, config.data, config.eval
  draw = _choose(
    likelihood.PROBES | {'exact': None}, options.bpd_trace, 'eval.bpd_trace'
  )
  if options.bpd_probes < 1:
    raise ValueError('config.eval.bpd_probes must be at least 1.')
  width = 256 if data.dims else 2 if data.centered else 1

  def bits_per_dim(params, rng, image):
    rng_data, rng_probe = jax.random.split(rng)
    x = datasets.preprocess(
      rng_data,
      image,
      random_flip=False,
      uniform_dequantization=True,
      centered=data.centered,
    )
    result = likelihood.log_likelihood(
      make_score_fn(config, params, continuous=True),
      sde,
      x,
      draw and draw(rng_probe, (options.bpd_probes, *x.shape)),
      eps=options.bpd_eps,
      rtol=config.sampling.rtol,
      atol=config.sampling.atol,
    )
    bits = likelihood.bits_per_dim(result.logp, x[0].size, data_width=width)
    error = result.std_error / likelihood.nats_per_bit(x[0].size)
    return bits, error, result.nfe, result.success

  return bits_per_dim


def make_encoder(config):
  """encode(params, image) -> (z, nfe, success).

  z [B, H, W, C] are the latent codes of uint8 images (or points), at t = 1; the
  images are put at t = sampling.eps, where `make_decoder` ends.
  """
  sde, options = make_sde(config).continuous, config.sampling

  def encode(params, image):
    x = datasets.preprocess(
      jax.random.key(0),  # Not used: nothing here is random.
      image,
      random_flip=False,
      uniform_dequantization=False,
      centered=config.data.centered,
    )
    return likelihood.encode(
      make_score_fn(config, params, continuous=True),
      sde,
      x,
      eps=options.eps,
      rtol=options.rtol,
      atol=options.atol,
    )

  return encode


def make_decoder(config, batch_size):
  """decode(params, z) -> (images, nfe, success), the inverse of the encoder.

  The probability-flow ODE, whatever samples are made by, with no denoising at
  its end.
  """
  config = config.copy_and_resolve_references()
  config.sampling.update(method='ode', final_denoise=False)
  config.control.scale = 0.0  # As the encoder, which is told no class.
  sample = make_sampler(config, batch_size)
  return lambda params, z: sample(params, jax.random.key(0), z)


def check_labels(config, dataset):
  """Raises a ValueError unless config.model has the classes of a dataset."""
  key = 'num_outputs' if is_classifier(config) else 'num_labels'
  wanted = config.model.get(key, 0)
  if wanted and wanted != dataset.num_classes:
    raise ValueError(
      f'config.model.{key}={wanted}, but {dataset.name} has '
      f'{dataset.num_classes} classes.'
    )


def check(config):
  """Raises a ValueError, with the mend, for a config that cannot run."""
  make_loss_fn(config, train=True)
  if is_classifier(config):
    for section, key in (
      ('training', 'snapshot_sampling'),
      ('eval', 'enable_sampling'),
      ('eval', 'enable_bpd'),
    ):
      if config[section][key]:
        raise ValueError(
          f'config.model is a classifier, which has no samples or likelihood: '
          f'config.{section}.{key} must be False.'
        )
  else:
    make_score_fn(config, None)
    # Traced with a score that costs nothing: grids may be too coarse.
    sample = make_sampler(
      config,
      1,
      wrap=lambda score_fn, sde: lambda x, t: x,
      frames=config.sampling.frames,
    )
    jax.eval_shape(sample, None, jax.random.key(0))
    make_bits_per_dim(config)
  training = config.training
  if training.grad_accumulation < 1 or training.n_jitted_steps < 1:
    raise ValueError(
      'config.training.grad_accumulation and n_jitted_steps must be at least 1.'
    )
  if training.batch_size % training.grad_accumulation:
    raise ValueError(
      f'config.training.batch_size={training.batch_size} does not divide by '
      f'grad_accumulation={training.grad_accumulation}.'
    )
  for key in ('log_freq', 'eval_freq', 'checkpoint_freq', 'snapshot_freq'):
    if training[key] % training.n_jitted_steps:
      raise ValueError(
        f'config.training.{key}={training[key]} is not a multiple of '
        f'n_jitted_steps={training.n_jitted_steps}.'
      )
