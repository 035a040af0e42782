r"""Infer the parameters of simulators from what they return, and check it.

  python -m examples.inference --workdir W

A network that is told an observation x learns the score of the posterior
p(theta | x) from simulated pairs (theta, x) alone (Geffner et al. 2023, Sharrock
et al. 2024): theta are data [N, D], x vector conditions [N, K]. The ODE draws
samples of it. Both tasks (Lueckmann et al. 2021) have an exact posterior.

- C2ST: accuracy of a classifier that tells samples from exact ones; 0.5 is best.
- Calibration (Talts et al. 2018): the rank of the true theta among samples of
  p(theta | x) is uniform, if the posterior is right.

W/inference.png shows both, W/inference.json has the numbers.
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


# Each task has prior(rng, n) -> theta [n, D], simulate(rng, theta) -> x [n, K],
# and exact(rng, x, count) -> samples of the posterior [n, count, D].
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
    angle, radius = rng.uniform(-np.pi / 2, np.pi / 2, n), rng.normal(size=n)
    radius = 0.1 + 0.01 * radius
    return radius * np.stack([np.cos(angle), np.sin(angle)]) + [[0.25], [0]]

  def simulate(self, rng, theta):
    total, difference = theta.sum(1) / ROOT2, np.diff(theta)[:, 0] / ROOT2
    return (self.crescent(rng, len(theta)) + [-abs(total), difference]).T

  def exact(self, rng, x, count):
    """Solve x = point - |total| for theta, for points until enough are valid.

    Two theta belong to each point, with equal volumes, and the prior is flat:
    so all solutions within its square are samples of the posterior.
    """

    def of_one(x):
      found = np.zeros((0, 2))
      while len(found) < count:
        a, difference = x[:, None] - self.crescent(rng, 20 * count)
        total = rng.choice([-1, 1], a.shape) * a
        theta = np.stack([total - difference, total + difference], 1) / ROOT2
        valid = (a <= 0) & (abs(theta) < 1).all(1)
        found = np.concatenate([found, theta[valid]])
      return found[:count]

    return np.stack([of_one(x) for x in x])


TASKS = {'two_moons': TwoMoons(), 'gaussian_linear': GaussianLinear()}


def learn(task, workdir, rng, simulations, steps):
  """Train on simulations; return posterior(rng, x, count), as `exact` is."""
  theta = task.prior(rng, simulations + 1000)
  arrays = {'x': theta, 'condition': task.simulate(rng, theta)}
  parts = {'train': slice(1000, None), 'test': slice(1000)}
  split = {
    f'{k}_{p}': v[s] for p, s in parts.items() for k, v in arrays.items()
  }
  save_npz(workdir / 'simulations.npz', **split)
  config = base.compose(
    base.vp, base.mlp, base.arrays(str(workdir / 'simulations.npz')),
    {
      'model.condition': 'vector', 'model.nf': 128,
      'training.batch_size': 512, 'training.n_iters': steps,
      'training.n_jitted_steps': 100, 'training.ema_rate': 0.995,
      'training.log_freq': 500, 'training.eval_freq': 500,
      'training.checkpoint_freq': 10_000, 'training.snapshot_sampling': False,
      'optim.lr': 2e-3, 'optim.warmup': 100, 'optim.schedule': 'cosine',
      'sampling.method': 'ode', 'sampling.eps': 1e-5, 'sampling.rtol': 1e-3,
      'sampling.atol': 1e-3, 'sampling.final_denoise': False,
    },
  )  # fmt: skip
  run_lib.train(config, workdir / 'run')
  model, params = experiment.load(workdir / 'run')

  def posterior(rng, x, count):
    key, n = jax.random.key(rng.integers(2**31)), len(x) * count
    theta = model.sample(params, key, n, condition=np.repeat(x, count, 0))
    return theta.reshape(len(x), count, -1)

  return posterior


def c2st(x, y):
  """Return the accuracy of a classifier of x and y, [N, D], in 5 parts."""
  both = (np.concatenate([x, y]) - x.mean(0)) / x.std(0)
  size = 10 * x.shape[1]
  net = MLPClassifier((size, size), max_iter=1000, random_state=0)
  folds = KFold(5, shuffle=True, random_state=0)
  label = np.repeat([0, 1], [len(x), len(y)])
  return cross_val_score(net, both, label, cv=folds).mean()


def ranks(task, posterior, rng, pairs, count):
  """Return ranks of true theta [pairs, D] in (0, 1), uniform if calibrated."""
  theta = task.prior(rng, pairs)
  samples = posterior(rng, task.simulate(rng, theta), count)
  below = (samples < theta[:, None]).sum(1)
  return (below + rng.uniform(size=below.shape)) / (count + 1)


def check(name, workdir, axes, args):
  """Return {name: number} of a task, and draw it into three axes."""
  task, rng = TASKS[name], np.random.default_rng(args.seed)
  posterior = learn(task, workdir, rng, args.simulations, args.steps)
  x = task.simulate(rng, task.prior(rng, args.observations))
  exact, again = (task.exact(rng, x, 1000) for _ in range(2))
  samples = posterior(rng, x, 1000)
  for ax, title, v in (
    (axes[0], 'exact', exact),
    (axes[1], 'learned', samples),
  ):
    plane.scatter(ax, v[0, :, :2])
    ax.set(title=f'{name}: {title}', xlim=axes[0].get_xlim())
    ax.set(ylim=axes[0].get_ylim())
  u = ranks(task, posterior, rng, args.pairs, 63)
  level, band = np.arange(1, len(u) + 1) / len(u), 1.36 / np.sqrt(len(u))
  axes[2].axhspan(-band, band, color='0.9')
  axes[2].plot(np.sort(u, 0), level[:, None] - np.sort(u, 0), lw=1)
  axes[2].set(title='ranks: distribution - uniform', ylim=(-0.2, 0.2))
  return {
    'c2st': np.mean([c2st(*v) for v in zip(exact, samples, strict=True)]),
    'c2st_exact': np.mean([c2st(*v) for v in zip(exact, again, strict=True)]),
    'smallest_p_of_ranks': min(stats.kstest(v, 'uniform').pvalue for v in u.T),
  }


def main(argv=None):
  """Run the tasks; return {task: {name: number}}."""
  parser = argparse.ArgumentParser(prog='python -m examples.inference')
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--tasks', nargs='+', choices=TASKS, default=[*TASKS])
  for option, default in {'simulations': 10_000, 'steps': 4000,
                          'observations': 4, 'pairs': 300, 'seed': 0}.items():  # fmt: skip
    parser.add_argument(f'--{option}', default=default, type=int)
  args, results = parser.parse_args(argv), {}
  picture = args.workdir / 'inference.png'
  with plane.canvas(picture, len(args.tasks), 3) as axes:
    for name, row in zip(args.tasks, axes, strict=True):
      (args.workdir / name).mkdir(parents=True, exist_ok=True)
      results[name] = check(name, args.workdir / name, row, args)
      print(name, {k: round(float(v), 3) for k, v in results[name].items()})
  write_json(args.workdir / 'inference.json', {**vars(args), **results})
  return results


if __name__ == '__main__':
  main()
