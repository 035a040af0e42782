r"""Reproduce the main figures of two papers as small experiments.

  python -m examples.paper_figures NAME --workdir W     (or `all`)

draws W/NAME.png and writes the numbers that it shows to W/NAME.json. NAME is

- low_density: true and estimated score (Song & Ermon 2019, Figure 2);
- modes: Langevin dynamics finds the modes but not their weights, annealed
  Langevin dynamics finds both (Song & Ermon 2019, Figure 3);
- manifold: score matching fails for data on a manifold, unless noise is added
  (Song & Ermon 2019, Figure 1);
- sde: paths of the forward and the reverse SDE on the marginal densities
  (Song et al. 2021, Figure 2);
- ode: paths of the probability-flow ODE on the marginal densities (the same).

Each takes seconds on a CPU.
"""

import argparse
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

import losses
import models
import sampling
import sde_lib
from data import toy
from reporting import plane
from runtime.files import write_json
from solvers import langevin, ode

MIXTURE = toy.DISTRIBUTIONS['toy/mixture']


# ------------------------------------------------------------ the first paper


def fit(loss_fn, network, sample, *, num_steps, batch=256, lr=1e-3, seed=0):
  """Train an unconditional score network.

  Args:
    loss_fn: loss_fn(rng, score_fn, x) -> [B], an objective.
    network: a flax module of `models`.
    sample: data [N, D]; each batch is drawn from them at random.
    num_steps: number of steps of Adam.
    batch: number of examples in a batch.
    lr: learning rate.
    seed: seed of the parameters, the batches and the loss.

  Returns:
    (score_fn, losses): the learned score, and the loss of each step.
  """
  x = jnp.asarray(sample, jnp.float32)
  ones = lambda x: jnp.ones(x.shape[:1])
  optimizer = optax.adam(lr)

  def score_fn(params, x):
    return network.apply({'params': params}, x, ones(x), train=False)

  def step(carry, key):
    params, state = carry
    key_x, key_loss = jax.random.split(key)
    rows = x[jax.random.randint(key_x, (batch,), 0, len(x))]

    def mean_loss(params):
      return jnp.mean(loss_fn(key_loss, lambda x: score_fn(params, x), rows))

    loss, grads = jax.value_and_grad(mean_loss)(params)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), loss

  @jax.jit
  def train(rng):
    rng, rng_init = jax.random.split(rng)
    params = network.init(rng_init, x[:1], ones(x[:1]), train=False)['params']
    start = params, optimizer.init(params)
    (params, _), history = jax.lax.scan(
      step, start, jax.random.split(rng, num_steps)
    )
    return params, history

  params, history = train(jax.random.key(seed))
  return jax.jit(functools.partial(score_fn, params)), np.asarray(history)


def plain_network(**fields):
  """Return a multilayer perceptron without a noise level as input."""
  return models.create('mlp', conditional=False, **fields)


def low_density(path):
  """Draw the true and the estimated score of the mixture, and the error."""
  score_fn, _ = fit(
    losses.sliced_vr,
    plain_network(),
    MIXTURE.sample(np.random.default_rng(0), 100_000),
    num_steps=2000,
  )
  half = MIXTURE.extent
  true_score = jax.jit(jax.grad(lambda x: jnp.sum(MIXTURE.logp(x))))
  coarse, fine = plane.grid(half, 19), plane.grid(half, 120)
  p = np.exp(jax.jit(MIXTURE.logp)(fine))
  true, learnt = np.asarray(true_score(fine)), np.asarray(score_fn(fine))
  square = lambda v: np.sum(v**2, axis=1)
  dense = p > 0.01 * p.max()

  with plane.canvas(path, 1, 3) as ((a, b, c),):
    for ax, score, title in (
      (a, true_score(coarse), 'true score'),
      (b, score_fn(coarse), 'estimated score'),
    ):
      plane.density(ax, half, p)
      plane.field(ax, coarse, np.asarray(score), longest=6.0)
      plane.frame(ax, half, title)
    error = np.sqrt(square(true - learnt))
    plane.density(c, half, error)
    side = round(np.sqrt(len(p)))
    c.contour(
      *fine.T.reshape(2, side, side),
      dense.reshape(side, side),
      levels=[0.5],
      colors=plane.POINTS,
    )
    plane.frame(c, half, 'error (red: region of the data)')

  relative = lambda where: float(
    np.sum(square(true - learnt)[where]) / np.sum(square(true)[where])
  )
  return {
    'expected_squared_error': float(np.sum(p * error**2) / np.sum(p)),
    'relative_squared_error_where_dense': relative(dense),
    'relative_squared_error_elsewhere': relative(~dense),
  }


def modes(path):
  """Measure the weights of two modes by plain and annealed dynamics."""
  n, sigmas = 2000, np.geomspace(20.0, 1.0, 10, dtype=np.float32)
  rng = jax.random.split(jax.random.key(0), 3)
  start = jax.random.uniform(rng[0], (n, 2), minval=-8, maxval=8)

  def score(x, sigma):
    return jax.grad(lambda x: jnp.sum(MIXTURE.logp(x, 1.0, sigma)))(x)

  @jax.jit
  def chains(rng):
    plain = langevin.unadjusted(
      rng[1], lambda x: score(x, 0.0), start, step_size=0.05, num_steps=2000
    )
    annealed = langevin.annealed(
      rng[2],
      score,
      sigmas,
      start,
      step_size=0.03,
      num_steps=200,
      final_denoise=False,
    )
    # The last level still has noise of sigma = 1: continue with a plain chain.
    final = langevin.unadjusted(
      rng[1], lambda x: score(x, 0.0), annealed.x, step_size=0.05, num_steps=100
    )
    return plain.x, final.x

  data = MIXTURE.sample(np.random.default_rng(0), n)
  clouds = {
    'data': data,
    'Langevin dynamics': np.asarray(chains(rng)[0]),
    'annealed Langevin dynamics': np.asarray(chains(rng)[1]),
  }
  half = MIXTURE.extent
  p = np.exp(jax.jit(MIXTURE.logp)(plane.grid(half, 120)))
  shares = {}
  with plane.canvas(path, 1, 3) as (axes,):
    for ax, (name, x) in zip(axes, clouds.items(), strict=True):
      shares[name] = float(np.mean(x.sum(axis=1) > 0))
      plane.density(ax, half, p)
      plane.scatter(ax, x)
      plane.frame(ax, half, name)
      ax.text(0, -0.9 * half, f'upper mode: {shares[name]:.2f}')
  error = float(np.sqrt(0.8 * 0.2 / n))
  return {'weight_of_upper_mode': shares, 'true': 0.8, 'std_error': error}


def manifold(path):
  """Draw the loss of score matching on a curve, with and without noise."""
  curve = toy.DISTRIBUTIONS['toy/curve']
  x = curve.sample(np.random.default_rng(0), 50_000)
  noise = np.random.default_rng(1).standard_normal(x.shape)
  results, numbers, num_steps = {}, {}, 2000
  for sigma in (0.0, 0.1):
    _, results[sigma] = fit(
      losses.sliced_vr,
      plain_network(input_scale=0.5),
      x + sigma * noise,
      num_steps=num_steps,
    )
    late = results[sigma][num_steps // 2 :]
    first, second = np.split(late, 2)
    numbers[f'sigma={sigma}'] = {
      'last_loss': float(late[-100:].mean()),
      'std_of_late_losses': float(late.std()),
      'drift_of_late_losses': float(second.mean() - first.mean()),
    }
  with plane.canvas(path, 1, 2, size=3.6) as (axes,):
    for ax, (sigma, history) in zip(axes, results.items(), strict=True):
      ax.plot(history, lw=0.5, color='tab:blue')
      title = f'noise of {sigma:g} added' if sigma else 'data on a curve'
      ax.set(xlabel='step', ylabel='sliced score matching loss', title=title)
      ax.grid(alpha=0.3)
  return numbers


# ----------------------------------------------------------- the second paper

BIMODAL = toy.Mixture(
  weights=(0.4, 0.6), means=((-1.2,), (0.9,)), std=0.2, extent=3.0
)
PROCESS = sde_lib.VPSDE()
EPS = 1e-3


def _marginals(ax, times, half=3.0):
  """Draw p_t(x), scaled to 1 at each time: x upwards, t to the right."""
  x = np.linspace(-half, half, 200, dtype=np.float32)
  t = np.linspace(EPS, 1, 200, dtype=np.float32)
  alpha, sigma = (np.repeat(c, len(x)) for c in PROCESS.marginal(t))
  logp = jax.jit(BIMODAL.logp)(np.tile(x, len(t))[:, None], alpha, sigma)
  p = np.exp(np.reshape(logp, (len(t), len(x))))
  p = p / p.max(axis=1, keepdims=True)
  if times[0] > times[-1]:
    p = p[::-1]
  ax.imshow(
    p.T,
    extent=(times[0], times[-1], -half, half),
    origin='lower',
    aspect='auto',
    cmap=plane.DENSITY,
  )
  ax.set(xlim=(times[0], times[-1]), ylim=(-half, half), xlabel='t', ylabel='x')


def _draw_paths(ax, times, x, title):
  """Draw paths x [F, N, 1] on the marginals."""
  _marginals(ax, times)
  colors = plane.spread(len(x[0]))
  for path, color in zip(x[:, :, 0].T, colors, strict=True):
    ax.plot(times, path, lw=0.9, color=color)
  ax.set(title=title)


def _quantile(x, t):
  """Return the share of p_t below x [N, 1], for a scalar t."""
  alpha, sigma = (np.asarray(c) for c in PROCESS.marginal(jnp.float32(t)))
  std = np.hypot(alpha * BIMODAL.std, sigma)
  return sum(
    w * stats.norm.cdf(np.asarray(x)[:, 0], alpha * m, std)
    for w, (m,) in zip(BIMODAL.weights, BIMODAL.means, strict=True)
  )


def sde(path):
  """Draw paths of the forward and of the reverse SDE on the marginals."""
  n, shown, num_steps = 2000, 8, 500
  x0 = jnp.asarray(BIMODAL.sample(np.random.default_rng(0), n), jnp.float32)
  grid = jnp.linspace(0, 1, num_steps)

  def forward(x, inputs):
    s, t, key = inputs
    a, v = PROCESS.transition(s, t)
    x = a * x + jnp.sqrt(v) * jax.random.normal(key, x.shape)
    return x, x

  keys = jax.random.split(jax.random.key(1), num_steps - 1)
  x1, later = jax.jit(
    lambda x: jax.lax.scan(forward, x, (grid[:-1], grid[1:], keys))
  )(x0)
  onward = np.concatenate([x0[None], later])

  reverse = sampling.PC(num_steps=num_steps, eps=EPS, final_denoise=False)
  score_fn = BIMODAL.score_fn(PROCESS)
  z = PROCESS.prior_sample(jax.random.key(2), (n, 1))
  back = jax.jit(
    lambda rng, z: reverse(rng, score_fn, PROCESS, z, frames=num_steps)
  )(jax.random.key(3), z)
  with plane.canvas(path, 1, 2, size=3.8) as ((left, right),):
    _draw_paths(left, np.asarray(grid), onward[:, :shown], 'forward SDE')
    _draw_paths(
      right,
      np.asarray(back.times),
      np.asarray(back.frames)[:, :shown],
      'reverse SDE',
    )
  distance = lambda x, t: float(stats.kstest(_quantile(x, t), 'uniform')[0])
  return {
    'count': n,
    'kolmogorov_distance_forward': distance(x1, 1.0),
    'kolmogorov_distance_reverse': distance(back.x, EPS),
    'expected_of_exact_samples': float(0.87 / np.sqrt(n)),
  }


def flow(path):
  """Draw paths of the ODE, which keep their quantiles in one dimension."""
  levels = (np.arange(16) + 0.5) / 16
  z = jnp.asarray(stats.norm.ppf(levels)[:, None], jnp.float32)
  sampler = ode.ODE(eps=EPS, rtol=1e-5, atol=1e-5, final_denoise=False)
  score_fn = BIMODAL.score_fn(PROCESS)
  samples = jax.jit(lambda z: sampler(None, score_fn, PROCESS, z, frames=100))(
    z
  )
  with plane.canvas(path, 1, 1, size=4.2) as ((ax,),):
    times, frames = np.asarray(samples.times), np.asarray(samples.frames)
    _draw_paths(ax, times, frames, 'probability-flow ODE')
  start, end = _quantile(z, 1.0), _quantile(samples.x, EPS)
  return {
    'nfe': int(samples.nfe),
    'largest_change_of_quantile': float(np.abs(end - start).max()),
  }


# --------------------------------------------------------------- command line

FIGURES = {
  'low_density': low_density,
  'modes': modes,
  'manifold': manifold,
  'sde': sde,
  'ode': flow,
}


def make(name, workdir):
  """Draw a figure, write its numbers to a file, and return them."""
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  numbers = FIGURES[name](workdir / f'{name}.png')
  write_json(workdir / f'{name}.json', numbers)
  return numbers


def main(argv=None):
  """Draw the figures that the command line names."""
  parser = argparse.ArgumentParser(prog='python -m examples.paper_figures')
  parser.add_argument('name', choices=[*FIGURES, 'all'])
  parser.add_argument('--workdir', required=True)
  args = parser.parse_args(argv)
  try:
    for name in FIGURES if args.name == 'all' else [args.name]:
      numbers = make(name, args.workdir)
      print(f'{args.workdir}/{name}.png:', json.dumps(numbers))
  except OSError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
