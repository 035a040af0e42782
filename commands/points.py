"""Evaluation of models of arrays, in numbers and pictures.

Samples are compared with test data as they are, in the model's units, in which
all channels have deviation 1; features of the user's own extractor are compared
too. Of points in the plane the true density is known, and everything can be
drawn.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import evaluation
import likelihood
from commands import trained
from data import batches, datasets, toy
from features import extract as extracting
from reporting import pictures, plane
from runtime.files import save_npz
from runtime.progress import say

# At least so many test examples are compared with.
COMPARED = 4000
NO_FID = (
  'No FID, KID or Inception Score: they compare photographs by what a network '
  "for photographs sees. config.eval.extractor='module:function' compares "
  'features of your own.'
)


def distances(model, x, test):
  """Return the metrics of examples x against test examples, in model's units.

  Args:
    model: an Experiment.
    x, test: [N, *space, C] and [M, *space, C], in units of the data.
  """
  x, test = (model.scale(v).reshape(len(v), -1) for v in (x, test))
  metrics = {}
  for function, count in (
    (evaluation.sliced_wasserstein, len(x)),
    (evaluation.energy_distance, 4000),  # All pairs of more would take long.
  ):
    some, names = x[:count], (function.__name__,)
    metrics |= evaluation.attempted(
      names, len(some), function, some, test[: max(count, COMPARED)]
    )
  return metrics


def _draw(run, count, dataset):
  """Return (points [count, 2], NFE)."""
  size = run.model.config.eval.batch_size
  rows = run.model.given(dataset, min(count, len(dataset)))
  drawn = trained.draw(run, -(-count // size) * size, size, rows=rows)
  samples = [found for _, found in drawn]
  x = np.concatenate([run.model.to_data(found.x) for found in samples])
  return x[:count], float(samples[-1].nfe)


def features(config, x, judge):
  """Return the metrics of the features of examples x by a `Judge`."""
  size = config.eval.batch_size
  parts = (x[i : i + size] for i in range(0, len(x), size))
  return evaluation.score_samples(
    (extracting.outputs_of(part, judge.extract) for part in parts),
    judge.reference,
    seed=config.seed,
    allow_few=config.eval.allow_few_samples,
    logits_hint=getattr(judge.extract, 'logits_hint', ''),
  )


def _truth(law, test, count):
  """Return (true points, metrics of the true density) of points of a law."""
  metrics = {}
  if law.has_density:
    logp = np.asarray(law.logp(test), np.float64)
    metrics['true_nats'] = evaluation.Metric(
      value=float(-logp.mean()),
      count=len(test),
      std_error=evaluation.standard_error(logp),
    )
  return law.sample(np.random.default_rng(2), count), metrics


def evaluator(dataset, judge=None):
  """Return an evaluator that samples, scores and draws arrays.

  Beside the distances of the samples to the test examples there are those of as
  many true examples, which are the best that can be had of so many: new points
  of a known density, else training examples. Where the density is known there
  is the true negative log-likelihood of the test points, if there is one. It
  writes samples_COUNT.npz and pictures to its folder: of a known density score
  fields, samples, the density of the model and paths of the ODE; of others
  samples, and histograms and spectra beside those of the data.

  Args:
    dataset: test examples.
    judge: extractor and reference of the user's own; None for none.
  """

  def evaluate_points(run, folder):
    model, config = run.model, run.model.config
    count = config.eval.num_samples
    test = batches.some_of(dataset, max(count, COMPARED))
    law = toy.DISTRIBUTIONS.get(config.data.dataset)
    x, nfe = _draw(run, count, dataset)
    metrics = distances(model, x, test)
    if judge:
      metrics |= features(config, x, judge)
    if law:
      fresh, more = _truth(law, test, count)
    else:
      train = datasets.load(config.data, 'train')
      fresh, more = batches.some_of(train, count), {}
    true = distances(model, fresh, test)
    metrics |= {f'true_{k}': v for k, v in true.items()} | more
    if jax.process_index() == 0:
      path, numbers = folder / f'samples_{count}.npz', np.asarray(nfe)
      save_npz(path, **{model.kind: x, 'nfe': numbers})
      if law:
        draw_pictures(run, x, folder)
      else:
        _compare_pictures(x, test, folder)
      say(f'Pictures are in {folder}.')
    named = {name: dataclasses.asdict(m) for name, m in metrics.items()}
    sampler = trained.sampler_of(config)
    return {'sampler': sampler, 'count': count, 'nfe': nfe} | named

  return evaluate_points


def _compare_pictures(x, test, folder):
  """Draw samples, and histograms and spectra beside those of test data."""
  pictures.save_samples(folder / 'samples.png', x[:64])
  pictures.save_samples(folder / 'test_data.png', test[:64])
  pictures.save_histograms(folder / 'histograms.png', x, test)
  if x.ndim > 2:
    both = (evaluation.power_spectrum(v) for v in (x, test))
    pictures.save_spectra(folder / 'spectra.png', *both)


def model_logp(run, x):
  """Return the log-density of the model [N] at x [N, 2], in nats."""
  model = run.model
  compute = jax.jit(
    lambda x: (
      likelihood.log_likelihood(
        model.score_fn(run.params, continuous=True),
        model.sde.continuous,
        x,
        eps=model.config.sampling.eps,
        rtol=1e-3,
        atol=1e-3,
      ).logp
    )
  )
  return np.asarray(compute(jnp.asarray(x)))


def _ode_paths(run, n):
  """Return states [F, n, 2] of the probability-flow ODE, from noise to data."""
  flow = dataclasses.replace(run.model, sampler=run.model.flow)
  sample = jax.jit(flow.make_sample(n, frames=32))
  key = jax.random.key(run.model.config.seed)
  return np.asarray(sample(run.params, key).frames)


def draw_pictures(run, x, folder):
  """Draw a model of points and its samples x [N, 2]; see `evaluator`."""
  model, params, config = run.model, run.params, run.model.config
  law = toy.DISTRIBUTIONS[config.data.dataset]
  sde, half = model.sde, law.extent
  fine = plane.grid(half, 100)
  # The curve's density is shown with the least noise that a pixel can.
  blur = 0.0 if law.has_density else 0.02 * half
  true = np.exp(law.logp(fine, 1.0, blur))
  # At hardly any noise, and at a little and a lot for the size of the picture.
  snr = jnp.log(half * jnp.array([0.05, 0.3])) * -2
  times = [config.sampling.eps, *sde.continuous.time(snr)]
  coarse = plane.grid(half, 21)

  with plane.canvas(folder / 'score_field.png', 2, 3) as axes:
    learnt = jax.jit(model.score_fn(params))
    exact = jax.jit(law.score_fn(sde))
    for (upper, lower), time in zip(axes.T, times, strict=True):
      t = jnp.full(len(coarse), time)
      fields = [np.asarray(score_fn(coarse, t)) for score_fn in (learnt, exact)]
      alpha, sigma = (float(c) for c in sde.marginal(jnp.float32(time)))
      values = np.exp(law.logp(fine, alpha, max(sigma, blur)))
      for ax, score, name in zip(
        (upper, lower), fields, ('learnt', 'true'), strict=True
      ):
        plane.density(ax, half, values)
        plane.field(ax, coarse, score)  # each to a scale of its own
        plane.frame(ax, half, f'{name} score, $\\sigma$ = {sigma:.2g}')

  with plane.canvas(folder / 'density.png', 1, 3) as ((data, learnt, cloud),):
    plane.density(data, half, true)
    plane.frame(data, half, 'true density')
    plane.density(learnt, half, np.exp(model_logp(run, fine)))
    plane.frame(learnt, half, "the model's density")
    plane.density(cloud, half, true)
    plane.scatter(cloud, x[:2000])
    plane.frame(cloud, half, 'samples')

  with plane.canvas(folder / 'trajectories.png', 1, 1, size=5) as ((ax,),):
    plane.density(ax, half, true)
    states = _ode_paths(run, 60)
    plane.paths(ax, states)
    plane.frame(ax, half, 'from noise to data')
    reach = np.clip(1.02 * np.abs(states).max(), half, 2 * half)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
