r"""Steps of predictor-corrector sampling (Song et al. 2021, Algorithm 1).

A step is a function (rng, x, t, t_next) -> (x, x_mean): from x at time t it
makes a sample at t_next < t, and that sample's mean before noise was added. A
predictor follows the reverse-time SDE; a corrector stays at t.
"""

import jax
import jax.numpy as jnp

import sde_lib
from solvers.langevin import langevin_step


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
    return langevin_step(x, score, z, 2 * (a * ratio) ** 2)

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
    return langevin_step(x, score_fn(x, t), _normal_like(rng, x), e)

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
