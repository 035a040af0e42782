r"""Measure the error of every sampler against its number of score evaluations.

  python -m benchmarks.samplers

The data are a mixture of two Gaussians in the plane, whose score is known
exactly, so the results show the error of the samplers alone: the sliced
Wasserstein distance between samples and data. Perfect samples would have about
the distance of two independent sets of data. The results are written to the end
of docs/samplers.md, and to docs/samplers.png.
"""

import functools
import pathlib
import textwrap

import jax
import matplotlib
import numpy as np

import sampling
import sde_lib
from runtime.files import write_text
from runtime.progress import say
from solvers import adaptive_sde, grids, ode, plans, predictors
from tests.exact import MIXTURE

matplotlib.use('Agg')
from matplotlib import pyplot as plt

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
# The table replaces what follows this line of docs/samplers.md.
MARK = '<!-- measured -->\n'
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
  """Return the sliced 2-Wasserstein distance of points x and y, [N, 2] both.

  This is the root mean square of the distances of their projections on evenly
  spaced directions.
  """
  angle = np.pi * np.arange(directions) / directions
  axes = np.stack([np.cos(angle), np.sin(angle)])
  gap = np.sort(x @ axes, axis=0) - np.sort(y @ axes, axis=0)
  return float(np.sqrt(np.mean(gap**2)))


def variants(eps):
  """Return {name: [sampler, ...]}, with samplers of increasing cost."""
  langevin = predictors.Langevin(snr=0.16)
  found = {
    'pc: Euler-Maruyama': [sampling.PC(eps=eps, num_steps=n) for n in NFES]
  }
  reverse = functools.partial(
    sampling.PC, eps=eps, predictor=predictors.ReverseDiffusion()
  )
  found['pc: reverse diffusion'] = [reverse(num_steps=n) for n in NFES]
  found['pc: reverse diffusion, Langevin'] = [
    reverse(corrector=langevin, num_steps=n // 2) for n in NFES
  ]
  found['ode'] = [
    ode.ODE(eps=eps, rtol=tolerance, atol=tolerance, final_denoise=False)
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
  ]
  found['adaptive_sde'] = [
    adaptive_sde.AdaptiveSDE(eps=eps, sde_rtol=tolerance, data_width=2.0)
    for tolerance in (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
  ]
  fast = {
    name: {}
    for name, cls in sampling.SAMPLERS.items()
    if issubclass(cls, plans.PlanSampler)
  }
  wide = {'s_min': 0.0, 's_max': np.inf, 's_noise': 1.0}
  fast['heun, s_churn=20'] = {'s_churn': 20.0} | wide
  fast['unipc, order=3'] = {'order': 3}
  for label, options in fast.items():
    name = label.partition(',')[0]
    found[label] = [
      sampling.SAMPLERS[name](
        eps=eps,
        grid=grids.EDM() if name == 'heun' else grids.LogSNR(),
        num_steps=1 + (nfe - 1) // EVALUATIONS.get(name, 1),
        **options,
      )
      for nfe in NFES
    ]
  return found


def measure(sde, eps):
  """Return {name: [(NFE, distance), ...]} of all samplers."""
  data = MIXTURE.sample(SEED, COUNT)
  z = sde.prior_sample(jax.random.key(SEED), (COUNT, 2))
  rng, score_fn = jax.random.key(SEED + 1), MIXTURE.score_fn(sde)
  results = {}
  for name, samplers in variants(eps).items():
    points = []
    for sampler in samplers:
      program = jax.jit(
        lambda rng, z, sampler=sampler: sampler(rng, score_fn, sde, z),
        compiler_options={'xla_backend_optimization_level': 1},
      )
      try:
        samples = program(rng, z)
      except ValueError:  # There are too few steps for the paper's chain.
        continue
      x = np.asarray(samples.x)
      if samples.success and np.isfinite(x).all():
        points.append((int(samples.nfe), sliced_wasserstein(x, data)))
    results[name] = points
    shown = ', '.join(f'{nfe}: {error:.4f}' for nfe, error in points)
    say(f'{type(sde).__name__} {name}: {shown}')
  return results


def draw(path, results, floor):
  """Draw one panel for each process."""
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
    # Errors larger than the size of the data are not distinguished.
    ax.set(title=title, xlabel='NFE', ylim=(0.004, 3))
    ax.grid(alpha=0.3)
  axes[0].set_ylabel('sliced Wasserstein distance to data')
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='lower center', ncols=5, fontsize=8)
  figure.tight_layout(rect=(0, 0.13, 1, 1))
  figure.savefig(path, dpi=100)
  plt.close(figure)


def table(results, floor):
  """Return the results as Markdown."""
  text = textwrap.fill(
    '`python -m benchmarks.samplers` measures the sliced Wasserstein distance '
    f'between {COUNT:,} samples and {COUNT:,} data points of a mixture of two '
    'Gaussians in the plane, whose score is exact (`tests/exact.py`, '
    f'`MIXTURE`), with seed {SEED}. Each entry is NFE: distance. Two '
    f'independent sets of data are {floor:.4f} apart, so smaller differences '
    'mean nothing. `heun` uses the grid `edm`, the other fast solvers use '
    '`log_snr`, predictor-corrector uses `uniform`. All end in the mean of x_0 '
    'except `ode`, whose tolerance goes from 1e-1 to 1e-5. The `sde_rtol` of '
    '`adaptive_sde` goes from 1 to 0.02. Entries that are missing have too few '
    'steps.',
    width=80,
  )
  lines = ['## Error against NFE', '', text, '']
  lines += ['![Error against NFE](samplers.png)']
  for title, rows in results.items():
    lines += [
      '',
      f'### {title}',
      '',
      '| sampler | NFE: distance |',
      '|---|---|',
    ]
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
  page = DOCS / 'samplers.md'
  written = page.read_text().partition(MARK)[0]
  write_text(page, written + MARK + table(results, floor))
  say(f'{page} and .png have been written.')


if __name__ == '__main__':
  main()
