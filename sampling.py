r"""Samplers: from a state at t = 1 to data.

Predictor-corrector sampling (Song et al. 2021, Algorithm 1) is in this module;
the other samplers are in `solvers`, each beside its algorithm. `SAMPLERS` is
the table of them all. A sampler is called with

    sampler(rng, score_fn, sde, z, frames=0) -> Samples

(see `solvers.base`). `score_fn(x, t)` takes x [B, ...] and t [B].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from runtime.options import option
from solvers import adaptive_sde, base, consistency, langevin, ode, plans
from solvers.predictors import CORRECTORS, DDIM, PREDICTORS, NoStep


def _check_chain(sde, grid):
  """Raise a ValueError for grids so coarse that the chain leaves no signal."""
  with jax.ensure_compile_time_eval():
    a, v = (np.asarray(c) for c in sde.discretize(grid[1:], grid[:-1]))
  if not (np.isfinite(a).all() and (a > 0).all() and np.isfinite(v).all()):
    raise ValueError(
      f'{len(grid)} steps are too few for the {type(sde).__name__}: beta_max '
      'times the step size reaches 1. Use more sampling.num_steps (more than '
      'beta_max), or the ODE sampler.'
    )


def _evaluations(step, sde, shape):
  """Return how often a predictor or corrector evaluates the score."""
  calls = []

  def counting(x, t):
    del t
    calls.append(1)
    return x

  def once(rng, x, t):
    return step(rng, counting, sde, x, t, t)

  x, t = jnp.zeros(shape), jnp.ones(shape[:1])
  jax.eval_shape(once, jax.random.key(0), x, t)
  return len(calls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PC(base.LevelSampler):
  """Predictor-corrector sampling (Algorithm 1), the corrector first at each t.

  The predictor evaluates the score at all num_steps times. At the last time its
  evaluation is used for the mean of x_0, if final_denoise.

  Example:
    >>> PC(num_steps=100, corrector=CORRECTORS['langevin'](snr=0.1)).corrector
    Langevin(snr=0.1)
  """

  predictor: base.Predictor = option(
    'euler_maruyama', 'Step from one time to the next.', table=PREDICTORS
  )
  corrector: base.Predictor = option(
    'none',
    'Step that corrects the samples at each time.',
    table=CORRECTORS,
    renamed={'annealed_langevin': 'ald'},
  )

  def _correct(self, rng, score_fn, sde, x, t, t_next):
    """Make corrector_steps steps of the corrector at time t."""

    def once(x, key):
      return self.corrector(key, score_fn, sde, x, t, t_next)[0], None

    return jax.lax.scan(once, x, jax.random.split(rng, self.corrector_steps))[0]

  def _nfe(self, sde, shape):
    """Return the number of score evaluations of the whole."""
    predictions = (self.num_steps - 1) * _evaluations(
      self.predictor, sde, shape
    )
    corrections = self.num_steps * self.corrector_steps
    corrections *= _evaluations(self.corrector, sde, shape)
    return predictions + corrections + int(self.final_denoise)

  def _sample(self, rng, score_fn, sde, z, frames):
    t, last = self.times(sde), self.num_steps - 1
    needless = DDIM, NoStep  # They use marginals, not the chain.
    steps = self.predictor, self.corrector
    if last and not all(isinstance(step, needless) for step in steps):
      _check_chain(sde, t)

    def level(carry, inputs):
      (x,), (t, i, t_next) = carry, inputs
      t_next = jnp.full_like(t, t_next)
      rng_c, rng_p = jax.random.split(jax.random.fold_in(rng, i))
      x = self._correct(rng_c, score_fn, sde, x, t, t_next)
      return (self.predictor(rng_p, score_fn, sde, x, t, t_next)[0],)

    times = np.append(t[:-1], 0 if self.final_denoise else t[-1])
    (x,), film, times = base.scan_with_frames(
      level, (z,), (np.arange(last), t[1:]), times, frames
    )
    t_last = jnp.full(z.shape[:1], t[-1], z.dtype)
    rng_last, zero = jax.random.fold_in(rng, last), jnp.zeros_like(t_last)
    x = self._correct(rng_last, score_fn, sde, x, t_last, zero)
    if self.final_denoise:
      x = sde.denoise(x, t_last, score_fn(x, t_last))
    return base.result(x, self._nfe(sde, z.shape), film, times)


SAMPLERS = {
  'pc': PC,
  'ode': ode.ODE,
  'adaptive_sde': adaptive_sde.AdaptiveSDE,
  'ula': langevin.ULA,
  'mala': langevin.MALA,
  'annealed_langevin': langevin.AnnealedLangevin,
  'ddim': plans.DDIM,
  'heun': plans.Heun,
  'flow_heun': plans.FlowHeun,
  'dpmpp_2m': plans.DPMpp2M,
  'dpmpp_3m': plans.DPMpp3M,
  'dpmpp_2s': plans.DPMpp2S,
  'dpmpp_3s': plans.DPMpp3S,
  'unipc': plans.UniPC,
  'sde_dpmpp': plans.SDEDPMpp,
  'consistency': consistency.Consistency,
}
