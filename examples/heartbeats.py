r"""Forecast heartbeats and fill gaps in them, with intervals.

  python -m examples.heartbeats --workdir W

The signals are generated electrocardiograms with two leads, [N, L, 2]: waves P,
Q, R, S, T over the phase of the heart (McSharry et al. 2003), with rates and
heights of each patient. A share of the examples is told no condition, so that
one network learns p(signal) and p(signal | known part), and samples the unknown
part in two ways:

- condition: the network is told what is known and where, an array [N, L, 3];
- inpaint: the network of p(signal) is guided by what is known (PiGDM).

W/heartbeats.png shows 90% intervals of both. W/heartbeats.json has the share of
true values in them, and the CRPS (mean |x - y| - 1/2 mean |x - x'| of samples x
and true y, in millivolts), also of signals of other patients.
"""

import argparse
import pathlib

import jax
import numpy as np

import experiment
import run_lib
from configs import base
from controllable_generation import PiGDM, told
from reporting import plane
from runtime.files import save_npz, write_json

LENGTH, RATE = 64, 32  # Two seconds, in samples and samples per second.
PHASES = np.array([-1.2, -0.26, 0.0, 0.26, 1.8])  # Of the waves P, Q, R, S, T.
WIDTHS = np.array([0.25, 0.12, 0.16, 0.12, 0.4])
HEIGHTS = np.array([[0.15, -0.1, 1.0, -0.2, 0.3], [0.1, -0.3, 0.5, -0.5, 0.2]])
NETWORK = {'model.nf': 16, 'model.ch_mult': (1, 2, 2)}
SIZES = {'signals': 6000, 'steps': 4000, 'tests': 16, 'samples': 24}


def generate(rng, n):
  """Return n signals, float32 [n, LENGTH, 2], in millivolts."""
  time = np.arange(LENGTH) / RATE
  period = rng.uniform(0.6, 1.2, (n, 1))  # Seconds of a beat of a patient.
  beats = period * (1 + 0.05 * rng.normal(size=(n, 8)))
  starts = np.cumsum(beats, axis=1) - beats[:, :1] * (1 + rng.random((n, 1)))
  phase = np.stack([np.interp(time, s, np.arange(8)) for s in starts])
  wave = 2 * np.pi * (phase - np.rint(phase))[:, :, None] - PHASES
  shape = np.exp(-0.5 * (wave / WIDTHS) ** 2)
  heights = HEIGHTS * (1 + 0.3 * rng.normal(size=(n, 2, 5)))
  angle = 2 * np.pi * (0.25 * time + rng.random((n, 1)))  # Breathing.
  drift = 0.1 * np.sin(angle)[:, :, None]
  noise = 0.02 * rng.normal(size=(n, LENGTH, 2))
  return np.float32(np.einsum('nlw,ncw->nlc', shape, heights) + drift + noise)


def masks(rng, n):
  """Return which places are known, bool [n, LENGTH]; half of them first."""
  place = np.arange(LENGTH)
  size = rng.integers(LENGTH // 4, 3 * LENGTH // 4, (n, 1))
  start = rng.integers(0, LENGTH - size + 1)
  start = np.where(rng.random((n, 1)) < 0.5, LENGTH - size, start)
  return (place < start) | (place >= start + size)


def condition_of(x, known):
  """Return what the network is told: known values, and where they are."""
  known = np.broadcast_to(known[..., None], (*x.shape[:-1], 1))
  return np.concatenate([x * known, known], axis=-1).astype(np.float32)


def learn(workdir, args):
  """Train on generated signals; return (model, params)."""
  rng, arrays = np.random.default_rng(0), {}
  for split, n in (('train', args.signals), ('test', 256)):
    arrays[f'x_{split}'] = x = generate(rng, n)
    arrays[f'condition_{split}'] = condition_of(x, masks(rng, n))
  save_npz(path := workdir / 'signals.npz', **arrays)
  data = base.arrays(str(path))
  config = base.compose(base.vp, base.ddpmpp, base.edm, data, {
    'model.condition': 'array', 'training.condition_dropout': 0.3,
    'model.num_res_blocks': 1, 'model.attn_resolutions': (),
    'model.dropout': 0.0,
    'training.batch_size': 32, 'training.n_iters': args.steps,
    'training.ema_rate': 0.995, 'training.snapshot_sampling': False,
    'optim.lr': 1e-3, 'optim.warmup': 100, 'optim.schedule': 'cosine',
    'sampling.method': 'dpmpp_2m', 'sampling.num_steps': 20, **NETWORK,
  })  # fmt: skip
  run_lib.train(config, workdir / 'run')
  return experiment.load(workdir / 'run')


def samplers(model, params, n):
  """Return {name: fill(x, known) -> [n, L, 2]}: samples, given known parts.

  Both take signals x [n, L, 2], of which they see what is known [L].
  """

  def guide(score_fn, sde, *, x, known):
    operator = lambda x: x * known[None, :, None]
    method = PiGDM(noise_std=0.05, data_std=1.0, ramp=0.0)
    return method(told(score_fn), sde, operator=operator, y=operator(x))

  guided = jax.jit(model.make_sample(n, guide=guide))

  def condition(x, known):
    given = condition_of(x, known)
    return model.sample(params, jax.random.key(1), n, condition=given)

  def inpaint(x, known):
    return guided(params, jax.random.key(1), x=model.scale(x), known=known).x

  return {'condition': condition, 'inpaint': inpaint}


def scores(samples, x):
  """Return {name: number} of samples [N, S, ...] of the unknown values x."""
  low, high = np.quantile(samples, [0.05, 0.95], axis=1)
  half = len(samples[0]) // 2
  near = np.abs(samples - x[:, None]).mean()
  apart = np.abs(samples[:, :half] - samples[:, half : 2 * half]).mean()
  return {
    'crps': float(near - apart / 2),
    'in_90': float(np.mean((low <= x) & (x <= high))),
  }


def draw(ax, title, x, known, samples):
  """Draw the first lead: the truth, where it is known, and the 90% interval."""
  time = np.arange(LENGTH) / RATE
  low, high = np.quantile(samples[..., 0], [0.05, 0.95], axis=0)
  ax.fill_between(time, low, high, where=~known, color='C1', alpha=0.4, lw=0)
  ax.plot(time, samples[:2, :, 0].T * np.where(known, np.nan, 1)[:, None],
          color='C1', lw=0.6)  # fmt: skip
  ax.plot(time, x[:, 0], color='0.6', lw=0.8)
  ax.plot(time, np.where(known, x[:, 0], np.nan), color='k', lw=1)
  ax.set(title=title, xlabel='seconds', ylabel='mV')


def main(argv=None):
  """Train, fill and draw; return {task: {method: {name: number}}}."""
  parser = argparse.ArgumentParser(prog='python -m examples.heartbeats')
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  for name, default in SIZES.items():
    parser.add_argument(f'--{name}', default=default, type=int)
  args = parser.parse_args(argv)
  args.workdir.mkdir(parents=True, exist_ok=True)
  model, params = learn(args.workdir, args)
  x, place = generate(np.random.default_rng(1), args.tests), np.arange(LENGTH)
  others = generate(np.random.default_rng(2), args.samples)[None]
  fills = samplers(model, params, args.tests * args.samples)
  results = {}
  with plane.canvas(args.workdir / 'heartbeats.png', 2, 2) as axes:
    for row, (task, known) in zip(axes, {
      'forecast': place < LENGTH // 2,
      'gap': (place < LENGTH // 3) | (place >= 2 * LENGTH // 3),
    }.items(), strict=True):  # fmt: skip
      given = np.repeat(x, args.samples, axis=0)
      found = {
        name: np.reshape(fill(given, known), (len(x), -1, LENGTH, 2))
        for name, fill in fills.items()
      }
      for ax, (name, samples) in zip(row, found.items(), strict=True):
        draw(ax, f'{task}: {name}', x[0], known, samples[0])
      found['other patients'] = np.repeat(others, len(x), axis=0)
      results[task] = {
        name: scores(samples[:, :, ~known], x[:, ~known])
        for name, samples in found.items()
      }
  write_json(path := args.workdir / 'heartbeats.json', results)
  print(path.read_text())
  return results


if __name__ == '__main__':
  main()
