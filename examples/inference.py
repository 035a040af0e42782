r"""Infer the parameters of simulators from what they return, and check it.

  python -m examples.inference --workdir W

A network that is told an observation x learns the score of the posterior
p(theta | x) from simulated pairs alone (Geffner et al. 2023; Sharrock et al.
2024): theta are data [N, D], x vector conditions [N, K]. The ODE draws samples.
The exact posterior of both tasks is known (Lueckmann et al. 2021):

- c2st: accuracy of a classifier of learned and exact samples; 0.5 is perfect;
- ranks of the true theta among samples of p(theta | x): uniform if all
  posteriors are right (simulation-based calibration, Talts et al. 2018).

W/inference.png shows samples and ranks, W/inference.json has the numbers.
"""

import argparse
import pathlib

import jax
import numpy as np
from scipy import stats
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier

import experiment
import run_lib
from configs import base
from reporting import plane
from runtime.files import save_npz, write_json

ROOT2 = np.sqrt(2)


# Tasks: `exact` returns samples of the posterior of each x, [n, count, D].
class GaussianLinear:
  """theta ~ N(0, 0.1 I) in ten dimensions, x ~ N(theta, 0.1 I)."""

  def prior(self, rng, n):
    return np.sqrt(0.1) * rng.normal(size=(n, 10))

  def simulate(self, rng, theta):
    return theta + np.sqrt(0.1) * rng.normal(size=theta.shape)

  def exact(self, rng, x, count):
    z = rng.normal(size=(len(x), count, 10))
    return x[:, None] / 2 + np.sqrt(0.05) * z


class TwoMoons:
  """theta uniform in [-1, 1]^2; x is a point of a crescent, moved by theta."""

  def prior(self, rng, n):
    return rng.uniform(-1, 1, (n, 2))

  def crescent(self, rng, n):
    angle = rng.uniform(-np.pi / 2, np.pi / 2, n)
    radius = rng.normal(0.1, 0.01, n)
    return radius * np.cos(angle) + 0.25, radius * np.sin(angle)

  def simulate(self, rng, theta):
    a, b = self.crescent(rng, len(theta))
    total, difference = theta.sum(1) / ROOT2, np.diff(theta)[:, 0] / ROOT2
    return np.stack([a - abs(total), b + difference], axis=1)

  def exact(self, rng, x, count):
    # Two theta belong to x and a point of the crescent, with equal volumes, and
    # the prior is flat: solutions in its square are samples of the posterior.
    samples = np.full((len(x), count, 2), np.inf)
    while (missing := np.any(abs(samples) > 1, axis=2)).any():
      row = np.nonzero(missing)[0]
      a, b = self.crescent(rng, len(row))
      size, difference = a - x[row, 0], x[row, 1] - b
      total = rng.choice([-1, 1], len(row)) * np.where(size < 0, np.inf, size)
      theta = np.stack([total - difference, total + difference], 1) / ROOT2
      samples[missing] = theta
    return samples


TASKS = {'two_moons': TwoMoons(), 'gaussian_linear': GaussianLinear()}


def learn(task, folder, rng, simulations, steps):
  """Train on simulations; return posterior(rng, x, count), as `exact` is."""
  theta, path = task.prior(rng, simulations), folder / 'simulations.npz'
  save_npz(path, points=theta, condition=task.simulate(rng, theta))
  config = base.compose(base.vp, base.mlp, base.arrays(str(path)), {
    'model.condition': 'vector', 'model.nf': 128, 'training.batch_size': 512,
    'training.n_iters': steps, 'training.n_jitted_steps': 100,
    'training.ema_rate': 0.995, 'training.snapshot_sampling': False,
    'optim.lr': 2e-3, 'optim.warmup': 100, 'optim.schedule': 'cosine',
    'sampling.method': 'ode', 'sampling.eps': 1e-5, 'sampling.rtol': 1e-3,
    'sampling.atol': 1e-3, 'sampling.final_denoise': False,
  })  # fmt: skip
  run_lib.train(config, folder / 'run')
  model, params = experiment.load(folder / 'run')

  def posterior(rng, x, count):
    key, n = jax.random.key(rng.integers(2**31)), len(x) * count
    theta = model.sample(params, key, n, condition=np.repeat(x, count, 0))
    return theta.reshape(len(x), count, -1)

  return posterior


def c2st(x, y):
  """Return the accuracy of a classifier of x and y, [N, D], of unseen points."""
  both = (np.concatenate([x, y]) - x.mean(0)) / x.std(0)
  sizes = (10 * x.shape[1],) * 2
  network = MLPClassifier(sizes, early_stopping=True, random_state=0)
  parts = KFold(5, shuffle=True, random_state=0)
  label = np.repeat([0, 1], [len(x), len(y)])
  return cross_val_score(network, both, label, cv=parts).mean()


def ranks(task, posterior, rng, pairs, count=63):
  """Return the ranks of `pairs` true theta, in (0, 1), [pairs, D]."""
  theta = task.prior(rng, pairs)
  samples = posterior(rng, task.simulate(rng, theta), count)
  below = (samples < theta[:, None]).sum(1)
  return (below + rng.uniform(size=below.shape)) / (count + 1)


def check(name, axes, args):
  """Learn a task; draw into three axes, and return {name: number}."""
  task, rng = TASKS[name], np.random.default_rng(args.seed)
  (folder := args.workdir / name).mkdir(parents=True, exist_ok=True)
  posterior = learn(task, folder, rng, args.simulations, args.steps)
  x = task.simulate(rng, task.prior(rng, args.observations))
  exact, again = (task.exact(rng, x, args.samples) for _ in range(2))
  found = posterior(rng, x, args.samples)
  for i, (title, theta) in enumerate((('exact', exact), ('learned', found))):
    plane.scatter(axes[i], theta[0, :, :2])
    axes[i].set(title=f'{name}: {title}', xlim=axes[0].get_xlim())
    axes[i].set(ylim=axes[0].get_ylim())
  u = np.sort(ranks(task, posterior, rng, args.pairs), axis=0)
  band = 1.36 / np.sqrt(len(u))  # 95% of the distances of Kolmogorov.
  axes[2].axhspan(-band, band, color='0.9')
  axes[2].plot(u, np.linspace(0, 1, len(u))[:, None] - u, lw=1)
  axes[2].set(title='ranks: distribution - uniform', ylim=(-0.2, 0.2))
  return {
    'c2st': np.mean([*map(c2st, exact, found)]),
    'c2st_of_exact': np.mean([*map(c2st, exact, again)]),
    'p_of_ranks': min(stats.kstest(v, 'uniform').pvalue for v in u.T),
  }


def main(argv=None):
  """Run both tasks; return {task: {name: number}}."""
  parser = argparse.ArgumentParser(prog='python -m examples.inference')
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  sizes = {'simulations': 10_000, 'steps': 4000, 'seed': 0}
  sizes |= {'observations': 4, 'samples': 1000, 'pairs': 300}
  for name, default in sizes.items():
    parser.add_argument(f'--{name}', default=default, type=int)
  args = parser.parse_args(argv)
  with plane.canvas(args.workdir / 'inference.png', len(TASKS), 3) as axes:
    found = {n: check(n, a, args) for n, a in zip(TASKS, axes, strict=True)}
  found = {t: {k: float(v) for k, v in d.items()} for t, d in found.items()}
  write_json(args.workdir / 'inference.json', found)
  print(found)
  return found


if __name__ == '__main__':
  main()
