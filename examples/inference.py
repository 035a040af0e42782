r"""Infer the parameters of simulators from what they return, and check it.

  python -m examples.inference --workdir W

A network that is told an observation x learns the score of the posterior
p(theta | x) from simulated pairs alone (Geffner et al. 2023; Sharrock et al.
2024): theta are data [N, D], x vector conditions [N, K]. The ODE draws samples.
The exact posterior of both tasks is known (Lueckmann et al. 2021).
- c2st: accuracy of a classifier of learned and exact samples; 0.5 is perfect;
- ranks of true theta among samples of p(theta | x): uniform, if calibrated.
"""

import argparse
import pathlib

import jax
import numpy as np
from scipy import stats
from sklearn import model_selection, neural_network

import experiment
import run_lib
from configs import base
from reporting import plane
from runtime.files import save_npz, write_json

ROTATION = np.array([[1, -1], [1, 1]]) / np.sqrt(2)
SIZES = {'simulations': 10_000, 'steps': 6000, 'batch_size': 512, 'nf': 128}
SIZES |= {'observations': 3, 'samples': 1000, 'pairs': 300}


# Tasks: `exact` returns samples of the posterior of each x, [n, count, D].
class GaussianLinear:
  """theta ~ N(0, 0.1 I) in ten dimensions, x ~ N(theta, 0.1 I)."""

  def prior(self, rng, n):
    return np.sqrt(0.1) * rng.normal(size=(n, 10))

  def simulate(self, rng, theta):
    return theta + np.sqrt(0.1) * rng.normal(size=theta.shape)

  def exact(self, rng, x, count):
    return x[:, None] / 2 + 0.05**0.5 * rng.normal(size=(len(x), count, 10))


class TwoMoons:
  """theta uniform in [-1, 1]^2; x is a point of a crescent, moved by theta."""

  def prior(self, rng, n):
    return rng.uniform(-1, 1, (n, 2))

  def crescent(self, rng, n):
    angle, radius = np.pi * rng.uniform(-0.5, 0.5, n), rng.normal(0.1, 0.01, n)
    return radius * np.cos(angle) + 0.25, radius * np.sin(angle)

  def simulate(self, rng, theta):
    a, b = self.crescent(rng, len(theta))
    u = theta @ ROTATION
    return np.stack([a - abs(u[:, 0]), b + u[:, 1]], axis=1)

  def exact(self, rng, x, count):
    # The theta of x and points of the crescent, if in the square of the prior.
    samples = np.full((len(x), count, 2), np.inf)
    while len(row := np.nonzero(missing := (abs(samples) > 1).any(2))[0]):
      a, b = self.crescent(rng, len(row))
      size = np.where(a < x[row, 0], np.inf, a - x[row, 0])
      u = np.stack([rng.choice([-1, 1], len(row)) * size, x[row, 1] - b], 1)
      samples[missing] = u @ ROTATION.T
    return samples


TASKS = {'two_moons': TwoMoons(), 'gaussian_linear': GaussianLinear()}


def learn(task, folder, rng, args):
  """Train on simulations; return posterior(rng, x, count), as `exact` is."""
  folder.mkdir(parents=True, exist_ok=True)
  theta, path = task.prior(rng, args.simulations), folder / 'simulations.npz'
  save_npz(path, points=theta, condition=task.simulate(rng, theta))
  config = base.compose(base.vp, base.mlp, base.edm, base.arrays(str(path)), {
    'model.condition': 'vector', 'model.nf': args.nf,
    'training.batch_size': args.batch_size, 'training.n_iters': args.steps,
    'training.n_jitted_steps': 50, 'training.ema_rate': 0.995,
    'training.snapshot_sampling': False, 'training.checkpoint_freq': 500,
    'optim.lr': 2e-3, 'optim.warmup': 100, 'optim.schedule': 'cosine',
  })  # fmt: skip
  run_lib.train(config, folder / 'run')
  model, params = experiment.load(folder / 'run', 'best')  # Of the test loss.

  def posterior(rng, x, count):
    key, n = jax.random.key(rng.integers(2**31)), len(x) * count
    theta = model.sample(params, key, n, condition=np.repeat(x, count, 0))
    return theta.reshape(len(x), count, -1)

  return posterior


def c2st(x, y):
  """Return the accuracy of a classifier of points x and y, [N, D]."""
  both = (np.concatenate([x, y]) - x.mean(0)) / x.std(0)
  label, sizes = np.repeat([0, 1], [len(x), len(y)]), (10 * x.shape[1],) * 2
  net = neural_network.MLPClassifier(sizes, max_iter=10_000, random_state=0)
  return model_selection.cross_val_score(net, both, label, cv=5).mean()


def ranks(task, posterior, rng, pairs, count=63):
  """Return the ranks of `pairs` true theta, in (0, 1), [pairs, D]."""
  theta = task.prior(rng, pairs)
  smaller = posterior(rng, task.simulate(rng, theta), count) < theta[:, None]
  return (smaller.sum(1) + rng.uniform(size=theta.shape)) / (count + 1)


def check(name, axes, args):
  """Learn a task; draw into three axes, and return {name: number}."""
  task, rng = TASKS[name], np.random.default_rng(0)
  posterior = learn(task, args.workdir / name, rng, args)
  x = task.simulate(rng, task.prior(rng, args.observations))
  exact, again = (task.exact(rng, x, args.samples) for _ in range(2))
  found = posterior(rng, x, args.samples)
  for ax, points in zip(axes[:2], (exact, found), strict=True):
    plane.scatter(ax, points[1 % len(x), :, :2])
  axes[0].set(title=f'{name}: exact posterior')
  axes[1].set(title='learned', xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())
  u = np.sort(ranks(task, posterior, rng, args.pairs), axis=0)
  axes[2].axhspan(*np.array([-1.36, 1.36]) / len(u) ** 0.5, color='0.9')  # 95%
  axes[2].plot(u, np.linspace(0, 1, len(u))[:, None] - u, lw=1)
  axes[2].set(title='ranks: distribution - uniform', ylim=(-0.2, 0.2))
  return {
    'c2st': np.mean([*map(c2st, exact, found)]),
    'c2st_of_exact': c2st(exact[0], again[0]),
    'p_of_ranks': min(stats.kstest(v, 'uniform').pvalue for v in u.T),
  }


def main(argv=None):
  """Run both tasks; return {task: {name: number}}, as in inference.json."""
  parser = argparse.ArgumentParser(prog='python -m examples.inference')
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  for name, default in SIZES.items():
    parser.add_argument(f'--{name}', default=default, type=int)
  args = parser.parse_args(argv)
  with plane.canvas(args.workdir / 'inference.png', len(TASKS), 3) as axes:
    found = {n: check(n, a, args) for n, a in zip(TASKS, axes, strict=True)}
  write_json(path := args.workdir / 'inference.json', found)
  print(path.read_text())
  return found


if __name__ == '__main__':
  main()
