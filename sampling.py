r"""Samplers: predictor-corrector (Song et al. 2021, Algorithm 1) and ODE.

A step is a function (rng, x, t, t_next) -> (x, x_mean): from x at time t it
makes a sample at t_next < t, and that sample's mean before noise was added. A
predictor follows the reverse-time SDE; a corrector stays at t. The loop is one
`lax.scan` over the integers of a time grid, and the last step at the smallest
time replaces x by its posterior mean (Tweedie's formula).

`score_fn(x, t)` takes x [B, ...] and t [B]; it need not come from a network.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

import sde_lib


class Samples(typing.NamedTuple):
  """x [B, ...] in the model's range; nfe: score evaluations per sample."""

  x: jax.Array
  nfe: jax.Array


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
  shape,
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
    shape: [B, ...] of the samples.
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
  batch = shape[0]

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

  rng, rng_prior, rng_last = jax.random.split(rng, 3)
  x = sde.prior_sample(rng_prior, shape)
  steps = np.arange(num_steps - 1)
  x, _ = jax.lax.scan(level, x, (steps, grid[:-1], grid[1:]))
  last = jnp.full((batch,), grid[-1])
  x = correct_at(rng_last, x, last, jnp.zeros_like(last))
  if final_denoise:
    x = denoise(score_fn, sde, x, last)
  nfe = (
    (num_steps - 1) * _evaluations(predictor, sde, shape)
    + num_steps * corrector_steps * _evaluations(corrector, sde, shape)
    + int(final_denoise)
  )
  return Samples(x, jnp.asarray(nfe))


# ------------------------------------------------------------- adaptive ODE


class OdeSolution(typing.NamedTuple):
  """y: the state at t1; nfe: drift evaluations; success: whether t1 was reached
  with a finite state and within the allowed number of steps."""

  y: typing.Any
  nfe: jax.Array
  success: jax.Array


# Dormand & Prince (1980): nodes, stages (the last row is the fifth-order
# solution) and the difference of that to the fourth-order one.
_NODES = np.array([1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1], np.float32)
_STAGES = np.array(
  [
    [1 / 5, 0, 0, 0, 0, 0, 0],
    [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
    [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
  ],
  np.float32,
)
_ERROR = np.array(
  [-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40],
  np.float32,
)
_SAFETY, _MIN_FACTOR, _MAX_FACTOR = 0.9, 0.2, 10.0


def _combine(weights, slopes):
  """sum_i weights_i slopes_i, for a pytree of arrays stacked along axis 0."""
  contract = functools.partial(
    jnp.tensordot, weights, axes=1, precision=jax.lax.Precision.HIGHEST
  )
  return jax.tree.map(contract, slopes)


def _axpy(h, x, y):
  """y + h x, for pytrees."""
  return jax.tree.map(lambda x, y: y + h * x, x, y)


def _rms(tree, scale):
  """Root mean square over all numbers of tree / scale."""
  leaves = jax.tree.leaves(jax.tree.map(lambda v, s: (v / s) ** 2, tree, scale))
  total = sum(jnp.sum(v) for v in leaves)
  return jnp.sqrt(total / sum(v.size for v in leaves))


def solve_ode(
  drift, y0, t0, t1, *, rtol, atol, max_steps=10_000
) -> OdeSolution:
  """Solves dy/dt = drift(t, y) from t0 to t1 by RK45, inside `jax.jit`.

  Dormand and Prince's pair with local extrapolation and the step control of
  Hairer, Norsett & Wanner (Solving ODEs I, II.4), as scipy's RK45 has it: one
  step size for the whole batch, from the root mean square of the error
  relative to atol + rtol |y|.

  Args:
    drift: drift(t, y), t a scalar, y and the result pytrees like y0.
    y0: pytree of float arrays.
    t0, t1: start and end; t1 may be smaller than t0.
    rtol, atol: tolerances of a step's error.
    max_steps: attempted steps after which success is False.
  """
  t0, t1 = jnp.float32(t0), jnp.float32(t1)
  direction = jnp.sign(t1 - t0)

  def scale_of(y, y_new):
    return jax.tree.map(
      lambda a, b: atol + rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)), y, y_new
    )

  scale0 = scale_of(y0, y0)
  stages, nodes = jnp.asarray(_STAGES), jnp.asarray(_NODES)

  def explore(_, carry):
    """Euler's step of size h along the slope k; the slope there."""
    _, k, _, h = carry
    k_next = drift(t0 + direction * h, _axpy(direction * h, k, y0))
    d0, d1 = _rms(y0, scale0), _rms(k_next, scale0)
    tiny = (d0 < 1e-5) | (d1 < 1e-5)
    h_next = jnp.where(tiny, 1e-6, 0.01 * d0 / d1)
    return k, k_next, h, jnp.minimum(h_next, jnp.abs(t1 - t0))

  def attempt(carry):
    t, y, k0, h_abs, rejected, steps, _ = carry
    # A step below the spacing of floats at t would not move t.
    h_min = 10 * jnp.finfo(jnp.float32).eps * jnp.maximum(jnp.abs(t), 1e-7)
    h_abs = jnp.maximum(h_abs, h_min)
    last = h_abs >= jnp.abs(t1 - t)
    t_new = jnp.where(last, t1, t + direction * h_abs)
    h = t_new - t

    def stage(i, carry):
      slopes, _ = carry
      y_i = _axpy(h, _combine(stages[i], slopes), y)
      k = drift(t + nodes[i] * h, y_i)
      return jax.tree.map(lambda s, k: s.at[i + 1].set(k), slopes, k), y_i

    slopes = jax.tree.map(
      lambda k: jnp.zeros((7, *k.shape), k.dtype).at[0].set(k), k0
    )
    slopes, y_new = jax.lax.fori_loop(0, 6, stage, (slopes, y))
    difference = _combine(jnp.asarray(_ERROR), slopes)
    error = jnp.abs(h) * _rms(difference, scale_of(y, y_new))
    factor = _SAFETY * error ** (-1 / 5)
    accept = error < 1
    # Written so that a NaN error rejects and shrinks the step.
    factor = jnp.where(
      accept,
      jnp.minimum(jnp.where(rejected, 1.0, _MAX_FACTOR), factor),
      jnp.where(factor > _MIN_FACTOR, factor, _MIN_FACTOR),
    )
    stuck = ~accept & (h_abs <= h_min)
    choose = functools.partial(jnp.where, accept)
    return (
      choose(t_new, t),
      jax.tree.map(choose, y_new, y),
      jax.tree.map(lambda k, k0: choose(k[-1], k0), slopes, k0),
      jnp.abs(h) * factor,
      ~accept,
      steps + 1,
      stuck,
    )

  def unfinished(carry):
    t, _, _, _, _, steps, stuck = carry
    return (t != t1) & (steps < max_steps) & ~stuck

  # The slope k0 at y0, k1 after a trial step of size h0, and with them the
  # first step's size. Loops, here and over stages, so that the drift is
  # compiled only twice.
  zero = jax.tree.map(jnp.zeros_like, y0)
  k0, k1, h0, _ = jax.lax.fori_loop(
    0, 2, explore, (zero, zero, jnp.zeros(()), jnp.zeros(()))
  )
  d1 = _rms(k0, scale0)
  d2 = _rms(jax.tree.map(jnp.subtract, k1, k0), scale0) / h0
  steepest = jnp.maximum(d1, d2)
  flat = jnp.maximum(1e-6, h0 * 1e-3)
  h1 = jnp.where(steepest <= 1e-15, flat, (0.01 / steepest) ** (1 / 5))
  start = (t0, y0, k0, jnp.minimum(100 * h0, h1), False, 0, False)
  start = jax.tree.map(jnp.asarray, start)
  t, y, _, _, _, steps, _ = jax.lax.while_loop(unfinished, attempt, start)
  finite = jnp.all(
    jnp.stack([jnp.all(jnp.isfinite(v)) for v in jax.tree.leaves(y)])
  )
  # Two evaluations to begin with, six a step: the seventh is the next's first.
  return OdeSolution(y, 2 + 6 * steps, (t == t1) & finite)


def ode_sample(
  rng, score_fn, sde, shape, *, eps, rtol, atol, final_denoise=False
):
  """Samples by the probability-flow ODE from t = 1 to eps (Eq. 13).

  Args:
    rng, score_fn, sde, shape, eps: as `pc_sample`.
    rtol, atol: as `solve_ode`.
    final_denoise: whether to end in the mean of x_0 given x_eps.

  Returns:
    (Samples, success): success is False if the solver did not reach eps.
  """

  def drift(t, x):
    t = jnp.full((shape[0],), t)
    return sde.ode_drift(x, t, score_fn(x, t))

  z = sde.prior_sample(rng, shape)
  solution = solve_ode(drift, z, 1.0, eps, rtol=rtol, atol=atol)
  x = solution.y
  if final_denoise:
    x = denoise(score_fn, sde, x, jnp.full((shape[0],), eps))
  samples = Samples(x, solution.nfe + int(final_denoise))
  return samples, solution.success
