r"""Samplers: predictor-corrector (Song et al. 2021, Algorithm 1) and ODE.

A step is a function (rng, x, t, t_next) -> (x, x_mean): from x at time t it
makes a sample at t_next < t, and that sample's mean before noise was added. A
predictor follows the reverse-time SDE; a corrector stays at t. The loop is one
`lax.scan` over the integers of a time grid, and the last step at the smallest
time replaces x by its posterior mean (Tweedie's formula).

`score_fn(x, t)` takes x [B, ...] and t [B]; it need not come from a network.
Every sampler starts from z [B, ...], the state at t = 1: a draw of the prior,
or a latent code.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np

import ode
import sde_lib


class Samples(typing.NamedTuple):
  """x [B, ...] in the model's range; nfe: score evaluations per sample;
  success: whether an adaptive solver reached the end."""

  x: jax.Array
  nfe: jax.Array
  success: jax.Array


def _normal_like(rng, x):
  return jax.random.normal(rng, x.shape, x.dtype)


# ------------------------------------------------------------- predictors


def euler_maruyama(score_fn, sde, *, probability_flow=False):
  """Euler-Maruyama on the reverse-time SDE (Eq. 6), over the grid's own steps.

  Args:
    score_fn, sde: as everywhere in this module.
    probability_flow: follow the ODE (Eq. 13) instead, without noise.
  """

  def step(rng, x, t, t_next):
    dt = sde_lib.expand(t - t_next, x)
    score = score_fn(x, t)
    if probability_flow:
      x = x - sde.ode_drift(x, t, score) * dt
      return x, x
    x_mean = x - sde.reverse_drift(x, t, score) * dt
    g = sde_lib.expand(sde.coefficients(t)[1], x)
    return x_mean + g * jnp.sqrt(dt) * _normal_like(rng, x), x_mean

  return step


def reverse_diffusion(score_fn, sde, *, probability_flow=False):
  """Reverses the forward chain x_t = a x_s + sqrt(v) z (Eq. 46; ODE: Eq. 47).

  Args: as `euler_maruyama`.
  """

  def step(rng, x, t, t_next):
    a, v = (sde_lib.expand(c, x) for c in sde.discretize(t_next, t))
    score = score_fn(x, t)
    if probability_flow:
      x = (2 - a) * x + 0.5 * v * score
      return x, x
    x_mean = (2 - a) * x + v * score
    return x_mean + jnp.sqrt(v) * _normal_like(rng, x), x_mean

  return step


def ancestral(score_fn, sde, *, variance='forward'):
  """Ancestral sampling of the forward chain (Eq. 4 for VP, App. F for VE).

  With x_t = a x_s + sqrt(v) z, the mean of x_s is (x_t + v score) / a.

  Args:
    score_fn, sde: as everywhere in this module.
    variance: of the noise: 'forward' for v, which the paper takes for VP;
      'posterior' for v sigma_s^2 / sigma_t^2, that of p(x_s | x_t, x_0), which
      it takes for VE.
  """
  if variance not in ('posterior', 'forward'):
    raise ValueError(
      f"sampling.ancestral_variance={variance!r} is neither 'posterior' nor "
      "'forward'."
    )

  def step(rng, x, t, t_next):
    a, v = sde.discretize(t_next, t)
    x_mean = (x + sde_lib.expand(v, x) * score_fn(x, t)) / sde_lib.expand(a, x)
    if variance == 'posterior':
      v = v * (sde.marginal(t_next)[1] / sde.marginal(t)[1]) ** 2
    return x_mean + sde_lib.expand(jnp.sqrt(v), x) * _normal_like(
      rng, x
    ), x_mean

  return step


def no_step(score_fn, sde):
  """Leaves x as it is; it costs no score evaluation."""
  del score_fn, sde
  return lambda rng, x, t, t_next: (x, x)


# ------------------------------------------------------------- correctors


def _langevin_step(x, score, z, e):
  """x + e score + sqrt(2 e) z (Algorithms 4 and 5), e [B], and its mean."""
  e = sde_lib.expand(e, x)
  x_mean = x + e * score
  return x_mean + jnp.sqrt(2 * e) * z, x_mean


def _batch_norm(v):
  """Euclidean norm of each example, averaged over the whole (global) batch."""
  return jnp.mean(jnp.linalg.norm(v.reshape(v.shape[0], -1), axis=-1))


def langevin(score_fn, sde, *, snr):
  """Langevin dynamics at time t (Algorithms 4 and 5).

  The step size e = 2 a^2 (snr |z| / |score|)^2 takes both norms averaged over
  the whole batch, so an example's path depends on its neighbours; that is the
  paper's rule. `a` is the forward chain's (1 for VE).

  Args:
    score_fn, sde: as everywhere in this module.
    snr: the signal-to-noise ratio r.
  """

  def step(rng, x, t, t_next):
    score = score_fn(x, t)
    z = _normal_like(rng, x)
    a, _ = sde.discretize(t_next, t)
    ratio = snr * _batch_norm(z) / _batch_norm(score)
    return _langevin_step(x, score, z, 2 * (a * ratio) ** 2)

  return step


def annealed_langevin(score_fn, sde, *, snr):
  """Annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1).

  The step size is e = 2 a^2 (snr sigma_t)^2.

  Args:
    score_fn, sde, snr: as `langevin`.
  """

  def step(rng, x, t, t_next):
    a, _ = sde.discretize(t_next, t)
    e = 2 * (a * snr * sde.marginal(t)[1]) ** 2
    return _langevin_step(x, score_fn(x, t), _normal_like(rng, x), e)

  return step


PREDICTORS = {
  'euler_maruyama': euler_maruyama,
  'reverse_diffusion': reverse_diffusion,
  'ancestral': ancestral,
  'none': no_step,
}

CORRECTORS = {
  'langevin': langevin,
  'annealed_langevin': annealed_langevin,
  'none': no_step,
}


# ------------------------------------------------------------- the loop


def time_grid(sde, num_steps, eps):
  """Times from 1 down to eps, [num_steps], float32, evenly spaced.

  Those of a process with discrete levels are rounded to its levels (and end in
  level 0, whatever eps is).

  Raises:
    ValueError: a discrete process has fewer levels than the grid has steps.
  """
  if num_steps < 1:
    raise ValueError(f'sampling.num_steps={num_steps} must be at least 1.')
  levels = sde.num_scales
  if not levels:
    return np.linspace(1, eps, num_steps, dtype=np.float32)
  if num_steps > levels:
    raise ValueError(
      f'sampling.num_steps={num_steps} is more than the {levels} noise levels '
      'that this network was trained on.'
    )
  labels = np.rint(np.linspace(levels - 1, 0, num_steps))
  return (labels / (levels - 1)).astype(np.float32)


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
  corrector_steps=1,
  final_denoise=True,
) -> Samples:
  """Predictor-corrector sampling (Algorithm 1), the corrector first at each t.

  Args:
    rng: key.
    score_fn: score_fn(x, t) -> score.
    sde: the process to reverse.
    z: state at t = 1, [B, ...].
    predictor: (score_fn, sde) -> step: an entry of `PREDICTORS`, its options
      bound.
    corrector: likewise of `CORRECTORS`.
    num_steps: times at which the predictor evaluates the score, >= 1.
    eps: smallest time.
    corrector_steps: corrector steps at each time.
    final_denoise: whether the last step, at eps, returns the mean of x_0 (which
      is where the last score evaluation of the predictor goes).

  Returns:
    Samples; nfe is what the loop really evaluates.

  Raises:
    ValueError: the grid is too coarse or too fine for the process.
  """
  grid = time_grid(sde, num_steps, eps)
  if num_steps > 1:
    _check_chain(sde, grid)
  predict, correct = predictor(score_fn, sde), corrector(score_fn, sde)
  batch, shape = z.shape[0], z.shape

  def correct_at(rng, x, t, t_next):
    def once(x, key):
      return correct(key, x, t, t_next)[0], None

    return jax.lax.scan(once, x, jax.random.split(rng, corrector_steps))[0]

  def level(x, inputs):
    i, t, t_next = inputs
    t, t_next = jnp.full((batch,), t), jnp.full((batch,), t_next)
    rng_c, rng_p = jax.random.split(jax.random.fold_in(rng, i))
    x = correct_at(rng_c, x, t, t_next)
    return predict(rng_p, x, t, t_next)[0], None

  rng_last = jax.random.fold_in(rng, num_steps - 1)
  steps = np.arange(num_steps - 1)
  x, _ = jax.lax.scan(level, z, (steps, grid[:-1], grid[1:]))
  last = jnp.full((batch,), grid[-1])
  x = correct_at(rng_last, x, last, jnp.zeros_like(last))
  if final_denoise:
    x = denoise(score_fn, sde, x, last)
  nfe = (
    (num_steps - 1) * _evaluations(predictor, sde, shape)
    + num_steps * corrector_steps * _evaluations(corrector, sde, shape)
    + int(final_denoise)
  )
  return Samples(x, jnp.asarray(nfe), jnp.asarray(True))


# ------------------------------------------------------------- adaptive


def ode_sample(
  rng, score_fn, sde, z, *, eps, rtol, atol, final_denoise=False
) -> Samples:
  """Samples by the probability-flow ODE from t = 1 to eps (Eq. 13).

  Args:
    rng: not used.
    score_fn, sde, z, eps: as `pc_sample`, in continuous time.
    rtol, atol: as `ode.solve_ode`.
    final_denoise: whether to end in the mean of x_0 given x_eps.
  """
  del rng

  def drift(t, x):
    t = jnp.full(x.shape[:1], t)
    return sde.ode_drift(x, t, score_fn(x, t))

  solution = ode.solve_ode(drift, z, 1.0, eps, rtol=rtol, atol=atol)
  x = solution.y
  if final_denoise:
    x = denoise(score_fn, sde, x, jnp.full(x.shape[:1], eps))
  return Samples(x, solution.nfe + int(final_denoise), solution.success)


# (rng, score_fn, sde, z, *, options) -> Samples. The options are keys of
# config.sampling.
SAMPLERS = {'pc': pc_sample, 'ode': ode_sample}

# Those that evaluate the score between the levels of a discrete process.
CONTINUOUS = ('ode',)
