"""Evaluation of models of points in the plane, in numbers and pictures.

Distances between samples and data need no features there, the true density is
known, and everything can be seen.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist

import evaluation
import experiment
import likelihood
import run_lib
from data import toy
from reporting import plane
from runtime.files import save_npz
from runtime.progress import say


def sliced_wasserstein(x, y, *, directions=128):
  """Sliced 2-Wasserstein distance of samples [N, 2] (Bonneel et al. 2015).

  The square root of the mean, over evenly spread directions, of the squared
  distance between the projections' quantiles; in units of x.
  """
  angle = np.pi * (np.arange(directions) + 0.5) / directions
  axes = np.stack([np.cos(angle), np.sin(angle)])
  levels = (np.arange(min(len(x), len(y))) + 0.5) / min(len(x), len(y))
  a, b = (np.quantile(np.asarray(v) @ axes, levels, axis=0) for v in (x, y))
  return float(np.sqrt(np.mean((a - b) ** 2)))


def energy_distance(x, y):
  """2 E|x - y| - E|x - x'| - E|y - y'|, of pairs (Szekely & Rizzo 2013).

  It is 0 for equal distributions only; the estimate is unbiased, so it may be
  negative. In units of x.
  """

  def within(v):
    return cdist(v, v).sum() / (len(v) * (len(v) - 1))

  return float(2 * cdist(x, y).mean() - within(x) - within(y))


def _draw(config, params, count):
  """(points [count, 2], NFE), in batches of config.eval.batch_size."""
  batch = config.eval.batch_size
  sample = jax.jit(experiment.make_sampler(config, batch))
  points = []
  for number in range(-(-count // batch)):
    rng = jax.random.fold_in(jax.random.key(config.seed), number)
    x, nfe, success = sample(params, rng)
    run_lib.check_success(config, success)
    points.append(experiment.to_data(config, x))
  return np.concatenate(points)[:count], float(nfe)


def _distances(x, test):
  """Metrics of points x against test points."""
  some = slice(4000)  # All pairs of more would take long.
  return {
    'sliced_wasserstein': evaluation.Metric(
      value=sliced_wasserstein(x, test), count=len(x)
    ),
    'energy_distance': evaluation.Metric(
      value=energy_distance(x[some], test[some]), count=len(x[some])
    ),
  }


def evaluate(config, params, dataset, folder):
  """Samples, scores and draws; returns metrics as dicts, by name.

  Beside the distances of the samples to the test points there are those of as
  many true points, which are the best that can be had of so many, and the true
  negative log-likelihood of the test points, where data have a density.

  Writes samples.npz and pictures (score fields, samples over the true density,
  the model's density, paths of the ODE) to folder.

  Args:
    config, params: the model.
    dataset: test points.
    folder: for pictures; it exists.
  """
  law = toy.DISTRIBUTIONS[config.data.dataset]
  test = dataset.fetch(np.arange(len(dataset)))
  count = config.eval.num_samples
  x, nfe = _draw(config, params, count)
  metrics = _distances(x, test)
  fresh = law.sample(np.random.default_rng(2), count)
  metrics |= {f'true_{k}': v for k, v in _distances(fresh, test).items()}
  if law.has_density:
    logp = np.asarray(jax.jit(law.logp)(test), np.float64)
    metrics['true_nats'] = evaluation.Metric(
      value=float(-logp.mean()),
      count=len(test),
      std_error=float(logp.std(ddof=1) / np.sqrt(len(test))),
    )
  if jax.process_index() == 0:
    save_npz(folder / 'samples.npz', points=x, nfe=np.asarray(nfe))
    draw(config, params, x, folder)
    say(f'Pictures are in {folder}.')
  named = {name: dataclasses.asdict(m) for name, m in metrics.items()}
  return {'nfe': nfe} | named


def model_logp(config, params, x):
  """The model's log-density [N] at x [N, 2], by the likelihood ODE."""
  compute = jax.jit(
    lambda x: (
      likelihood.log_likelihood(
        experiment.make_score_fn(config, params, continuous=True),
        experiment.make_sde(config).continuous,
        x,
        eps=config.sampling.eps,
        rtol=1e-3,
        atol=1e-3,
      ).logp
    )
  )
  return np.asarray(compute(jnp.asarray(x)))


def _ode_paths(config, params, n):
  """States [F, n, 2] of the probability-flow ODE, from noise to data."""
  config = config.copy_and_resolve_references()
  config.sampling.update(method='ode', final_denoise=False)
  sample = experiment.make_sampler(config, n, frames=32)
  return np.asarray(jax.jit(sample)(params, jax.random.key(config.seed))[3])


def draw(config, params, x, folder):
  """Draws a model of points and its samples x [N, 2]; see `evaluate`."""
  law = toy.DISTRIBUTIONS[config.data.dataset]
  sde, half = experiment.make_sde(config), law.extent
  fine = plane.grid(half, 100)
  # The curve's density is shown with the least noise that a pixel can.
  blur = 0.0 if law.has_density else 0.02 * half
  true = np.exp(jax.jit(law.logp)(fine, 1.0, blur))
  # At hardly any noise, and at a little and a lot for the size of the picture.
  snr = jnp.log(half * jnp.array([0.05, 0.3])) * -2
  times = [config.sampling.eps, *sde.continuous.time(snr)]
  coarse = plane.grid(half, 21)

  with plane.canvas(folder / 'score_field.png', 2, 3) as axes:
    model = jax.jit(experiment.make_score_fn(config, params))
    exact = jax.jit(law.score_fn(sde))
    for (upper, lower), time in zip(axes.T, times, strict=True):
      t = jnp.full(len(coarse), time)
      fields = [np.asarray(score_fn(coarse, t)) for score_fn in (model, exact)]
      alpha, sigma = (float(c) for c in sde.marginal(jnp.float32(time)))
      values = np.exp(jax.jit(law.logp)(fine, alpha, max(sigma, blur)))
      for ax, score, name in zip(
        (upper, lower), fields, ('learnt', 'true'), strict=True
      ):
        plane.density(ax, half, values)
        plane.field(ax, coarse, score)  # each to a scale of its own
        plane.frame(ax, half, f'{name} score, $\\sigma$ = {sigma:.2g}')

  with plane.canvas(folder / 'density.png', 1, 3) as ((data, model, cloud),):
    plane.density(data, half, true)
    plane.frame(data, half, 'true density')
    plane.density(model, half, np.exp(model_logp(config, params, fine)))
    plane.frame(model, half, "the model's density")
    plane.density(cloud, half, true)
    plane.scatter(cloud, x[:2000])
    plane.frame(cloud, half, 'samples')

  with plane.canvas(folder / 'trajectories.png', 1, 1, size=5) as ((ax,),):
    plane.density(ax, half, true)
    states = _ode_paths(config, params, 60)
    plane.paths(ax, states)
    plane.frame(ax, half, 'from noise to data')
    reach = np.clip(1.02 * np.abs(states).max(), half, 2 * half)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
