r"""Distribution error against NFE for every sampler: docs/samplers.md and .png.

  python -m benchmarks.samplers

Data are a mixture of two Gaussians of the plane, whose score is known exactly,
so what is seen is the samplers' error alone: the sliced Wasserstein distance
of samples to data. About that of two draws of the data is as low as it goes.
"""

import functools
import pathlib

import jax
import matplotlib
import numpy as np

import sampling
import sde_lib
from runtime.progress import say
from solvers import plans, predictors
from tests.exact import MIXTURE

matplotlib.use('Agg')
from matplotlib import pyplot as plt

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
COUNT, SEED = 20_000, 0
NFES = (5, 10, 20, 40, 80, 160)
# (process, smallest time).
SDES = {
  'VE': (sde_lib.VESDE(), 1e-5),
  'VP': (sde_lib.VPSDE(), 1e-3),
  'sub-VP': (sde_lib.SubVPSDE(), 1e-3),
}
# Score evaluations of one step of a grid.
EVALUATIONS = {'heun': 2, 'dpmpp_2s': 2, 'dpmpp_3s': 3}


def sliced_wasserstein(x, y, directions=64):
  """Root mean square over directions of the 2-Wasserstein distance of
  projections of x and y, [N, 2] both, on evenly spaced directions."""
  angle = np.pi * np.arange(directions) / directions
  axes = np.stack([np.cos(angle), np.sin(angle)])
  gap = np.sort(x @ axes, axis=0) - np.sort(y @ axes, axis=0)
  return float(np.sqrt(np.mean(gap**2)))


def variants():
  """{name: [sampler, options bound but for score_fn and sde, ..]}."""
  langevin = functools.partial(predictors.langevin, snr=0.16)
  half = [nfe // 2 for nfe in NFES]
  found = {
    'pc: Euler-Maruyama': [
      {'predictor': predictors.euler_maruyama, 'num_steps': n} for n in NFES
    ],
    'pc: reverse diffusion': [
      {'predictor': predictors.reverse_diffusion, 'num_steps': n} for n in NFES
    ],
    'pc: reverse diffusion, Langevin': [
      {
        'predictor': predictors.reverse_diffusion,
        'corrector': langevin,
        'num_steps': n,
      }
      for n in half
    ],
  }
  for name, runs in found.items():
    found[name] = [
      functools.partial(
        sampling.pc_sample, **({'corrector': predictors.no_step} | run)
      )
      for run in runs
    ]
  found['ode'] = [
    functools.partial(sampling.ode_sample, rtol=tolerance, atol=tolerance)
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
  ]
  found['adaptive_sde'] = [
    functools.partial(
      sampling.adaptive_sde_sample, sde_rtol=tolerance, sde_atol=2 / 256
    )
    for tolerance in (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
  ]
  fast = {name: {} for name in plans.SOLVERS}
  fast['heun, s_churn=20'] = {'s_churn': 20.0}
  fast['unipc, order=3'] = {'order': 3}
  for label, options in fast.items():
    name = label.partition(',')[0]
    solver = functools.partial(plans.SOLVERS[name], **options)
    found[label] = [
      functools.partial(
        sampling.SAMPLERS[name],
        solver=solver,
        grid='edm' if name == 'heun' else 'log_snr',
        num_steps=1 + (nfe - 1) // EVALUATIONS.get(name, 1),
      )
      for nfe in NFES
    ]
  return found


def measure(sde, eps):
  """{name: [(NFE, distance), ..]} of all samplers."""
  data = MIXTURE.sample(SEED, COUNT)
  z = sde.prior_sample(jax.random.key(SEED), (COUNT, 2))
  rng = jax.random.key(SEED + 1)
  results = {}
  for name, samplers in variants().items():
    points = []
    for sampler in samplers:
      try:
        program = jax.jit(
          functools.partial(
            sampler, score_fn=MIXTURE.score_fn(sde), sde=sde, eps=eps
          ),
          compiler_options={'xla_backend_optimization_level': 1},
        )
        samples = program(rng, z=z)
      except ValueError:  # Too few steps for the paper's chain.
        continue
      x = np.asarray(samples.x)
      if samples.success and np.isfinite(x).all():
        points.append((int(samples.nfe), sliced_wasserstein(x, data)))
    results[name] = points
    shown = ', '.join(f'{nfe}: {error:.4f}' for nfe, error in points)
    print(f'{type(sde).__name__} {name}: {shown}', flush=True)
  return results


def draw(path, results, floor):
  """One panel for each process."""
  figure, axes = plt.subplots(
    1, len(results), figsize=(5 * len(results), 5), sharey=True
  )
  names = list(next(iter(results.values())))
  colors = plt.get_cmap('tab20')(np.arange(len(names)))
  for ax, (title, lines) in zip(axes, results.items(), strict=True):
    for i, (name, points) in enumerate(lines.items()):
      style = '--' if name.startswith(('pc', 'ode', 'adaptive')) else '-'
      marker = 'osv^D'[i % 5]
      ax.loglog(
        *zip(*points, strict=True), style,
        color=colors[i], marker=marker, markersize=4, label=name,
      )  # fmt: skip
    ax.axhline(floor, color='black', linewidth=0.8, linestyle=':')
    # Errors beyond the size of the data are all alike.
    ax.set(title=title, xlabel='NFE', ylim=(0.004, 3))
    ax.grid(alpha=0.3)
  axes[0].set_ylabel('sliced Wasserstein distance to data')
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='lower center', ncols=5, fontsize=8)
  figure.tight_layout(rect=(0, 0.13, 1, 1))
  figure.savefig(path, dpi=100)
  plt.close(figure)


def table(results, floor):
  """The same as Markdown."""
  lines = [
    '# Samplers: error against NFE',
    '',
    'By `python -m benchmarks.samplers`: sliced Wasserstein distance of '
    f'{COUNT:,} samples to as many data of a mixture of two Gaussians of the '
    'plane, whose score is exact (`tests/exact.py`, `MIXTURE`), '
    f'seed {SEED}. Each entry is NFE: distance. Two draws of the data are '
    f'{floor:.4f} apart: differences below about that mean nothing. Heun is on '
    'the grid `edm`, the other fast solvers on `log_snr`, predictor-corrector '
    'on `uniform`; all end in the mean of x_0 but `ode`, whose tolerance goes '
    'from 1e-1 to 1e-5. `adaptive_sde` has sde_rtol from 1 to 0.02.',
    '',
    '![Error against NFE](samplers.png)',
  ]
  for title, rows in results.items():
    lines += ['', f'## {title}', '', '| sampler | NFE: distance |', '|---|---|']
    for name, points in rows.items():
      entries = ' · '.join(f'{nfe}: {error:.4f}' for nfe, error in points)
      lines.append(f'| {name} | {entries} |')
  return '\n'.join(lines) + '\n'


def main():
  floor = sliced_wasserstein(
    MIXTURE.sample(SEED, COUNT), MIXTURE.sample(SEED + 1, COUNT)
  )
  results = {name: measure(*case) for name, case in SDES.items()}
  draw(DOCS / 'samplers.png', results, floor)
  (DOCS / 'samplers.md').write_text(table(results, floor))
  say(f'Written: {DOCS}/samplers.md and .png.')


if __name__ == '__main__':
  main()
