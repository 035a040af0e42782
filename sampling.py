r"""Samplers, all in one table: from a state at t = 1 to data.

Predictor-corrector sampling (Song et al. 2021, Algorithm 1) takes its steps
from `predictors`, the fast solvers their plans from `solvers`; both run over
the integers of a time grid in one `lax.scan`. Adaptive solvers, of the ODE and
of the SDE, choose their own steps.

`score_fn(x, t)` takes x [B, ...] and t [B]; it need not come from a network.
Every sampler starts from z [B, ...], the state at t = 1: a draw of the prior,
or a latent code. Most end by replacing x with its posterior mean E[x_0 | x]
(Tweedie's formula) at the smallest time.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

import sde_lib
from solvers import adaptive_sde, langevin, ode, plans
from solvers.grids import time_grid


class Samples(typing.NamedTuple):
  """What a sampler returns.

  Attributes:
    x: samples [B, ...] in the model's range.
    nfe: score evaluations per sample.
    success: whether an adaptive solver reached the end.
    frames: states on the way, [F, B, ...], from z to x; F = 0 if not asked for.
    times: of the frames, [F]; the last is 0 if x is a mean of x_0.
  """

  x: jax.Array
  nfe: jax.Array
  success: jax.Array
  frames: jax.Array
  times: jax.Array


# ------------------------------------------------------------- loops over grids


def denoise(score_fn, sde, x, t):
  """E[x_0 | x_t] = (x + sigma^2 score) / alpha (Tweedie), shaped as x."""
  alpha, sigma = (sde_lib.expand(c, x) for c in sde.marginal(t))
  return (x + sigma**2 * score_fn(x, t)) / alpha


def _check_chain(sde, grid):
  """Refuses grids so coarse that the forward chain leaves no signal."""
  with jax.ensure_compile_time_eval():
    a, v = (np.asarray(c) for c in sde.discretize(grid[1:], grid[:-1]))
  if not (np.isfinite(a).all() and (a > 0).all() and np.isfinite(v).all()):
    raise ValueError(
      f'{len(grid)} steps are too few for the {type(sde).__name__}: beta_max '
      'times the step size reaches 1. Use more sampling.num_steps (more than '
      'beta_max), or the ODE sampler.'
    )


def _evaluations(make_step, sde, shape):
  """How often one step evaluates the score."""
  calls = []

  def counting(x, t):
    del t
    calls.append(1)
    return x

  step = make_step(counting, sde)
  x, t = jnp.zeros(shape), jnp.ones(shape[:1])
  jax.eval_shape(step, jax.random.key(0), x, t, t)
  return len(calls)


def check_frames(frames):
  """Raises a ValueError if so many frames cannot be recorded."""
  if frames < 0 or frames == 1:
    raise ValueError(
      f'sampling.frames={frames}: use 0 for none, or at least 2, the first '
      'and the last.'
    )


def _scan(step, carry, inputs, t, frames):
  """Scans step(carry, (t, *inputs)) -> carry, and records the state carry[0].

  Args:
    step: t is [B] there.
    carry: the start, a tuple.
    inputs: tuple of arrays [n, ...].
    t: [n + 1] times of the states before each step, and of the result.
    frames: number of states to record, the last of them by `_result`.

  Returns:
    (carry, recorded states [F, B, ...], their times [F]).
  """
  check_frames(frames)
  x, t = carry[0], jnp.asarray(t)
  chosen = np.rint(np.linspace(0, len(t) - 1, frames)).astype(int)
  chosen = np.unique(chosen)
  slots = np.full(len(t), len(chosen))
  slots[chosen] = np.arange(len(chosen))

  def recorded(state, row):
    (carry, film), (slot, t, *inputs) = state, row
    if frames:  # A slot beyond the film is dropped.
      film = film.at[slot].set(carry[0], mode='drop')
    t = jnp.full(x.shape[:1], t, x.dtype)
    return (step(carry, (t, *inputs)), film), None

  film = jnp.zeros((len(chosen), *x.shape), x.dtype)
  rows = (slots[:-1], t[:-1], *inputs)
  (carry, film), _ = jax.lax.scan(recorded, (carry, film), rows)
  return carry, film, t[chosen]


def _result(x, nfe, film, times, success=True):
  """Samples whose last frame, if there are any, is x."""
  if len(film):
    film = film.at[-1].set(x)
  return Samples(x, jnp.asarray(nfe), jnp.asarray(success), film, times)


def pc_sample(
  rng,
  score_fn,
  sde,
  z,
  *,
  predictor,
  corrector,
  num_steps,
  eps,
  grid='uniform',
  rho=7.0,
  corrector_steps=1,
  final_denoise=True,
  frames=0,
) -> Samples:
  """Predictor-corrector sampling (Algorithm 1), the corrector first at each t.

  Args:
    rng: key.
    score_fn: score_fn(x, t) -> score.
    sde: the process to reverse.
    z: state at t = 1, [B, ...].
    predictor: (score_fn, sde) -> step: an entry of `predictors.PREDICTORS`, its
      options bound.
    corrector: likewise of `predictors.CORRECTORS`.
    num_steps: times at which the predictor evaluates the score, >= 1.
    eps: smallest time.
    grid, rho: as `grids.time_grid`.
    corrector_steps: corrector steps at each time.
    final_denoise: whether the last step, at eps, returns the mean of x_0 (which
      is where the last score evaluation of the predictor goes).
    frames: states to record, evenly spaced among the steps; 0 for none.

  Returns:
    Samples; nfe is what the loop really evaluates.

  Raises:
    ValueError: the grid is too coarse or too fine for the process.
  """
  t = time_grid(sde, num_steps, eps, grid=grid, rho=rho)
  if num_steps > 1:
    _check_chain(sde, t)
  predict, correct = predictor(score_fn, sde), corrector(score_fn, sde)

  def correct_at(rng, x, t, t_next):
    def once(x, key):
      return correct(key, x, t, t_next)[0], None

    return jax.lax.scan(once, x, jax.random.split(rng, corrector_steps))[0]

  def level(carry, inputs):
    (x,), (t, i, t_next) = carry, inputs
    t_next = jnp.full_like(t, t_next)
    rng_c, rng_p = jax.random.split(jax.random.fold_in(rng, i))
    x = correct_at(rng_c, x, t, t_next)
    return (predict(rng_p, x, t, t_next)[0],)

  steps, end = np.arange(num_steps - 1), 0 if final_denoise else t[-1]
  times = np.append(t[:-1], end)
  (x,), film, times = _scan(level, (z,), (steps, t[1:]), times, frames)
  last = jnp.full(z.shape[:1], t[-1], z.dtype)
  rng_last = jax.random.fold_in(rng, num_steps - 1)
  x = correct_at(rng_last, x, last, jnp.zeros_like(last))
  if final_denoise:
    x = denoise(score_fn, sde, x, last)
  nfe = (
    (num_steps - 1) * _evaluations(predictor, sde, z.shape)
    + num_steps * corrector_steps * _evaluations(corrector, sde, z.shape)
    + int(final_denoise)
  )
  return _result(x, nfe, film, times)


def plan_sample(
  rng,
  score_fn,
  sde,
  z,
  *,
  solver,
  num_steps,
  eps,
  grid='uniform',
  rho=7.0,
  final_denoise=True,
  frames=0,
) -> Samples:
  """Samples by a fast solver: carries out its plan (see `solvers`).

  Args:
    rng, score_fn, sde, z, eps, grid, rho, frames: as `pc_sample`.
    solver: (sde, t) -> Plan: an entry of `plans.SOLVERS`, its options bound.
    num_steps: times of the grid; one less is the number of steps.
    final_denoise: whether to end in the mean of x_0 given x_eps.
  """
  t = time_grid(sde, num_steps, eps, grid=grid, rho=rho)
  plan = solver(sde, t)
  if final_denoise:
    plan = plans.with_denoising(plan, t[-1])
  x, film, times = carry_out(
    plan,
    rng,
    score_fn,
    sde,
    z,
    noisy=plan.noise.any(),
    end=0 if final_denoise else t[-1],
    frames=frames,
  )
  return _result(x, len(plan.t), film, times)


def carry_out(plan, rng, score_fn, sde, z, *, noisy, end, frames=0):
  """Does what a plan says, from z on.

  Args:
    plan: a `plans.Plan`.
    rng, score_fn, sde, z, frames: as `pc_sample`.
    noisy: whether the plan has noise.
    end: time of the result.

  Returns:
    (x, frames but for the last, their times).
  """

  def mix(weights, *states):
    return ode.combine(weights, jnp.concatenate(states))

  def advance(carry, inputs):
    (x, base, past), (t, i, keep, move, noise) = carry, inputs
    prediction = denoise(score_fn, sde, x, t)
    past = jnp.concatenate([prediction[None], past[:-1]])
    base = mix(keep, x[None], base[None], past)
    x = mix(move, base[None], past)
    if noisy:
      key = jax.random.fold_in(rng, i)
      x = x + noise * jax.random.normal(key, x.shape, x.dtype)
    return x, base, past

  weights = (jnp.asarray(v, z.dtype) for v in plan[1:])
  past = jnp.zeros((plan.move.shape[1] - 1, *z.shape), z.dtype)
  (x, *_), film, times = _scan(
    advance,
    (z, z, past),
    (np.arange(len(plan.t)), *weights),
    jnp.append(plan.t, end),
    frames,
  )
  return x, film, times


# ------------------------------------------------------------- adaptive


def _in_stretches(solve, score_fn, sde, z, *, eps, final_denoise, frames):
  """Samples by solve(i, x, t, t_next) -> (.y, .nfe, .success) from 1 to eps.

  The solver starts anew at each frame; frames are evenly spaced in time.
  """
  check_frames(frames)
  t = np.linspace(1, eps, max(frames, 2), dtype=np.float32)

  def stretch(carry, inputs):
    x, nfe, success = carry
    solution = solve(*inputs[:1], x, *inputs[1:])
    x = solution.y
    return (x, nfe + solution.nfe, success & solution.success), x

  start = (z, jnp.asarray(0), jnp.asarray(True))
  stretches = (np.arange(len(t) - 1), t[:-1], t[1:])
  (x, nfe, success), film = jax.lax.scan(stretch, start, stretches)
  if final_denoise:
    x = denoise(score_fn, sde, x, jnp.full(x.shape[:1], eps, x.dtype))
  film = jnp.concatenate([z[None], film])[:frames]
  times = np.append(t[:-1], 0 if final_denoise else eps)[:frames]
  times = jnp.asarray(times, jnp.float32)
  return _result(x, nfe + int(final_denoise), film, times, success)


def ode_sample(
  rng, score_fn, sde, z, *, eps, rtol, atol, final_denoise=False, frames=0
) -> Samples:
  """Samples by the probability-flow ODE from t = 1 to eps (Eq. 13).

  Args:
    rng: not used.
    score_fn, sde, z, eps: as `pc_sample`, in continuous time.
    rtol, atol: as `ode.solve_ode`.
    final_denoise: whether to end in the mean of x_0 given x_eps.
    frames: states to record, evenly spaced in time; 0 for none.
  """
  del rng

  def drift(t, x):
    t = jnp.full(x.shape[:1], t)
    return sde.ode_drift(x, t, score_fn(x, t))

  def solve(i, x, t, t_next):
    del i
    return ode.solve_ode(drift, x, t, t_next, rtol=rtol, atol=atol)

  return _in_stretches(
    solve, score_fn, sde, z,
    eps=eps, final_denoise=final_denoise, frames=frames,
  )  # fmt: skip


def adaptive_sde_sample(
  rng,
  score_fn,
  sde,
  z,
  *,
  eps,
  sde_rtol,
  sde_atol,
  final_denoise=True,
  frames=0,
) -> Samples:
  """Samples by the reverse SDE in steps of adapted size, each example's own.

  Args:
    rng, score_fn, sde, z, eps, final_denoise, frames: as `ode_sample`.
    sde_rtol, sde_atol: as `adaptive_sde.solve_sde`.
  """

  def drift(x, t):
    return sde.reverse_drift(x, t, score_fn(x, t))

  def solve(i, x, t, t_next):
    return adaptive_sde.solve_sde(
      jax.random.fold_in(rng, i),
      drift,
      lambda t: sde.coefficients(t)[1],
      x,
      t,
      t_next,
      rtol=sde_rtol,
      atol=sde_atol,
    )

  return _in_stretches(
    solve, score_fn, sde, z,
    eps=eps, final_denoise=final_denoise, frames=frames,
  )  # fmt: skip


# ------------------------------------------------------------- Langevin


def _after_chains(chains, score_fn, sde, t, final_denoise):
  """Samples of chains that ended at time t."""
  x = chains.x
  if final_denoise:
    x = denoise(score_fn, sde, x, jnp.full(x.shape[:1], t, x.dtype))
  return _result(
    x, chains.nfe + int(final_denoise), jnp.zeros((0, *x.shape)), jnp.zeros(0)
  )


def langevin_sample(
  rng, score_fn, sde, z, *, dynamics, eps, num_steps, step_size, final_denoise
) -> Samples:
  """Langevin dynamics at the one time eps, from z on.

  Args:
    rng, score_fn, sde, z: as `pc_sample`.
    dynamics: `langevin.unadjusted` or `langevin.metropolis`.
    eps: the time whose marginal is sampled.
    num_steps, step_size: of the chain; see `langevin.unadjusted`.
    final_denoise: whether to end in the mean of x_0 given x_eps.
  """

  def at_eps(x):
    return score_fn(x, jnp.full(x.shape[:1], eps, x.dtype))

  chains = dynamics(rng, at_eps, z, step_size=step_size, num_steps=num_steps)
  return _after_chains(chains, score_fn, sde, eps, final_denoise)


def annealed_sample(
  rng,
  score_fn,
  sde,
  z,
  *,
  num_steps,
  eps,
  step_size,
  corrector_steps=1,
  grid='uniform',
  rho=7.0,
  final_denoise=True,
) -> Samples:
  """Annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1).

  Args:
    rng, score_fn, sde, z, num_steps, eps, grid, rho: as `pc_sample`; num_steps
      is L, the number of noise levels.
    step_size: e at the last level, of noise sigma_L; at others it is larger by
      sigma^2 / sigma_L^2.
    corrector_steps: T, steps at each level.
    final_denoise: whether to end in the mean of x_0.
  """
  t = time_grid(sde, num_steps, eps, grid=grid, rho=rho)
  chains = langevin.annealed(
    rng,
    score_fn,
    sde.marginal(t)[1],
    z,
    step_size=step_size,
    num_steps=corrector_steps,
    final_denoise=False,
    levels=t,
  )
  return _after_chains(chains, score_fn, sde, t[-1], final_denoise)


# (rng, score_fn, sde, z, *, options) -> Samples. The options are keys of
# config.sampling.
SAMPLERS = {
  'pc': pc_sample,
  'ode': ode_sample,
  'adaptive_sde': adaptive_sde_sample,
  'ula': functools.partial(langevin_sample, dynamics=langevin.unadjusted),
  'mala': functools.partial(langevin_sample, dynamics=langevin.metropolis),
  'annealed_langevin': annealed_sample,
  **{
    name: functools.partial(plan_sample, solver=solver)
    for name, solver in plans.SOLVERS.items()
  },
}

# Those that evaluate the score between the levels of a discrete process.
CONTINUOUS = ('ode', 'adaptive_sde')
