r"""Time grids: where between t = 1 and eps a sampler evaluates the score.

A grid is evenly spaced in some function of time. Half the log signal-to-noise
ratio, lambda = log(alpha / sigma), and its inverse tell how noise levels and
times belong together for every process alike.
"""

import jax
import jax.numpy as jnp
import numpy as np


def half_log_snr(sde, t):
  """lambda = log(alpha / sigma) at times t, float64 numpy, shaped as t."""
  with jax.ensure_compile_time_eval(), jax.enable_x64(True):
    return 0.5 * np.asarray(sde.log_snr(jnp.asarray(t, jnp.float64)))


def marginal(sde, t):
  """(alpha, sigma) at times t, float64 numpy, each shaped as t."""
  with jax.ensure_compile_time_eval(), jax.enable_x64(True):
    alpha, sigma = sde.marginal(jnp.asarray(t, jnp.float64))
    return np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)


def _labels(sde, t):
  """Numbers of the nearest levels of a discrete process, integers."""
  return np.rint(np.asarray(t) * (sde.num_scales - 1)).astype(int)


def times(sde, lam):
  """Times in [0, 1] at which lambda is nearest to `lam`, float32 numpy.

  Those of a process with discrete levels are times of its levels.
  """
  lam = np.asarray(lam)
  levels = sde.num_scales
  if not levels:
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
      t = sde.time(2 * jnp.asarray(lam, jnp.float64))
      return np.asarray(t, np.float32)
  all_times = np.linspace(0, 1, levels)
  distance = np.abs(half_log_snr(sde, all_times) - lam[..., None])
  return all_times[distance.argmin(-1)].astype(np.float32)


def between(sde, t, lam):
  """As `times`, but always before t (its array of times): a level lower."""
  found = times(sde, lam)
  if sde.num_scales:
    before = np.maximum(_labels(sde, t) - 1, 0)
    found = np.minimum(found, np.float32(before / (sde.num_scales - 1)))
  return found


def uniform(sde, num_steps, eps, *, rho):
  """Evenly spaced in t, as in the paper."""
  del sde, rho
  return np.linspace(1, eps, num_steps)


def log_snr(sde, num_steps, eps, *, rho):
  """Evenly spaced in lambda, as DPM-Solver has it (Lu et al. 2022)."""
  del rho
  first, last = half_log_snr(sde, np.array([1.0, eps]))
  return times(sde, np.linspace(first, last, num_steps))


def edm(sde, num_steps, eps, *, rho):
  """Evenly spaced in (sigma / alpha)^(1 / rho) (Karras et al. 2022, Eq. 5)."""
  noise = np.exp(-half_log_snr(sde, np.array([1.0, eps])))
  first, last = noise ** (1 / rho)
  return times(sde, -rho * np.log(np.linspace(first, last, num_steps)))


# (sde, num_steps, eps, *, rho) -> times from 1 down to eps.
GRIDS = {'uniform': uniform, 'edm': edm, 'log_snr': log_snr}


def time_grid(sde, num_steps, eps, *, grid='uniform', rho=7.0):
  """Times from 1 down to eps, [num_steps], float32, falling strictly.

  Those of a process with discrete levels are rounded to its levels, no two to
  the same one (and end in level 0, whatever eps is).

  Args:
    sde: the process.
    num_steps: number of times, at least 1.
    eps: the last time.
    grid: a key of `GRIDS`.
    rho: exponent of the grid 'edm'.

  Raises:
    ValueError: no such grid; or a discrete process has fewer levels than the
      grid has steps.
  """
  if num_steps < 1:
    raise ValueError(f'sampling.num_steps={num_steps} must be at least 1.')
  if grid not in GRIDS:
    raise ValueError(f'sampling.grid={grid!r} is none of {list(GRIDS)}.')
  if not rho > 0:
    raise ValueError(f'sampling.rho={rho} must be positive.')
  levels = sde.num_scales
  if levels and num_steps > levels:
    raise ValueError(
      f'sampling.num_steps={num_steps} is more than the {levels} noise levels '
      'that this network was trained on.'
    )
  ends = np.linspace(1, 0 if levels else eps, num_steps)
  t = np.array(GRIDS[grid](sde, num_steps, ends[-1], rho=rho))
  t[0], t[-1] = ends[0], ends[-1]
  if not levels:
    return t.astype(np.float32)
  steps = np.arange(num_steps)
  # At least one level apart, and enough of them left for the rest.
  labels = np.minimum.accumulate(_labels(sde, t) + steps) - steps
  labels = np.maximum(labels, steps[::-1])
  return (labels / (levels - 1)).astype(np.float32)
