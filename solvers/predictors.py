r"""Steps of predictor-corrector sampling (Song et al. 2021, Algorithm 1).

A step is called as step(rng, score_fn, sde, x, t, t_next) -> (x, x_mean): from
x at time t it draws a sample at t_next < t, and returns the mean of that sample
before noise was added as well. A predictor follows the reverse-time SDE; a
corrector stays at time t.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from runtime.options import Options, option
from sde_lib import SDE, expand
from solvers.base import Rng, ScoreFn, State, Times
from solvers.langevin import langevin_step

Step = tuple[Float[Array, ' B *dims'], Float[Array, ' B *dims']]


def _normal_like(rng, x):
  return jax.random.normal(rng, x.shape, x.dtype)


# ------------------------------------------------------------- predictors


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FlowOrSDE(Options):
  """Predictor of the reverse-time SDE, or of the probability-flow ODE."""

  probability_flow: bool = option(
    False, 'Whether the predictor follows the ODE (Eq. 13), without noise.'
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerMaruyama(_FlowOrSDE):
  """Euler-Maruyama on the reverse-time SDE (Eq. 6), or Euler on the ODE.

  Example:
    >>> EulerMaruyama(probability_flow=True)
    EulerMaruyama(probability_flow=True)
  """

  def __call__(
    self,
    rng: Rng,
    score_fn: ScoreFn,
    sde: SDE,
    x: State,
    t: Times,
    t_next: Times,
  ) -> Step:
    dt = expand(t - t_next, x)
    score = score_fn(x, t)
    if self.probability_flow:
      x = x - sde.ode_drift(x, t, score) * dt
      return x, x
    x_mean = x - sde.reverse_drift(x, t, score) * dt
    g = expand(sde.coefficients(t)[1], x)
    return x_mean + g * jnp.sqrt(dt) * _normal_like(rng, x), x_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseDiffusion(_FlowOrSDE):
  """Reverse of the chain x_t = a x_s + sqrt(v) z (Eq. 46; of the ODE: Eq. 47).

  Example:
    >>> ReverseDiffusion()
    ReverseDiffusion(probability_flow=False)
  """

  def __call__(
    self,
    rng: Rng,
    score_fn: ScoreFn,
    sde: SDE,
    x: State,
    t: Times,
    t_next: Times,
  ) -> Step:
    a, v = (expand(c, x) for c in sde.discretize(t_next, t))
    score = score_fn(x, t)
    if self.probability_flow:
      x = (2 - a) * x + 0.5 * v * score
      return x, x
    x_mean = (2 - a) * x + v * score
    return x_mean + jnp.sqrt(v) * _normal_like(rng, x), x_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(Options):
  """Ancestral sampling of the forward chain (Eq. 4 for VP, App. F for VE).

  With x_t = a x_s + sqrt(v) z, the mean of x_s is (x_t + v score) / a. The
  variance of the noise is v ('forward'), or that of p(x_s | x_t, x_0), which is
  v sigma_s^2 / sigma_t^2 ('posterior').

  Example:
    >>> Ancestral()
    Ancestral(ancestral_variance='paper')
  """

  ancestral_variance: str = option(
    'paper',
    "Variance of the noise: 'forward', 'posterior', or 'paper' for the "
    "posterior's with VE and the forward chain's with VP.",
    choices=('paper', 'forward', 'posterior'),
  )

  def __call__(
    self,
    rng: Rng,
    score_fn: ScoreFn,
    sde: SDE,
    x: State,
    t: Times,
    t_next: Times,
  ) -> Step:
    a, v = sde.discretize(t_next, t)
    x_mean = (x + expand(v, x) * score_fn(x, t)) / expand(a, x)
    variance = self.ancestral_variance
    if variance == 'paper':
      variance = 'posterior' if sde.variance_exploding else 'forward'
    if variance == 'posterior':
      v = v * (sde.marginal(t_next)[1] / sde.marginal(t)[1]) ** 2
    noise = expand(jnp.sqrt(v), x) * _normal_like(rng, x)
    return x_mean + noise, x_mean


def ddim(
  rng: Rng,
  sde: SDE,
  x: State,
  t: Times,
  t_next: Times,
  x0_hat: State,
  eta: float,
) -> Step:
  """Return (x, x_mean) at t_next, if E[x_0 | x] at time t is x0_hat.

  x = alpha x0_hat + sigma (sqrt(1 - eta^2) n + eta z) with new noise z and the
  noise n = (x - alpha x0_hat) / sigma of time t.
  """
  alpha, sigma = (expand(c, x) for c in sde.marginal(t))
  alpha_next, sigma_next = (expand(c, x) for c in sde.marginal(t_next))
  noise = (x - alpha * x0_hat) / sigma
  mean = alpha_next * x0_hat + math.sqrt(1 - eta**2) * sigma_next * noise
  return mean + eta * sigma_next * _normal_like(rng, x), mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(Options):
  """Step of DDIM with a share eta of new noise; DDRM's own steps.

  With eta = 0 it is DDIM (Song et al. 2021a, Eq. 12), and for eta > 0 the step
  of DiffPIR (Zhu et al. 2023, Algorithm 1, zeta = eta^2) and of DDRM (Kawar et
  al. 2022). New noise of a constant share suits few steps: the more there are,
  the more the samples shrink to means. Scores that bring a step, such as those
  of `controllable_generation.DDRM`, take that step.

  Example:
    >>> DDIM(eta=0.85)
    DDIM(eta=0.85)
  """

  eta: float = option(
    0.0, 'Share of new noise at each step of the predictor ddim.', '[0, 1]'
  )

  def __call__(
    self,
    rng: Rng,
    score_fn: ScoreFn,
    sde: SDE,
    x: State,
    t: Times,
    t_next: Times,
  ) -> Step:
    if hasattr(score_fn, 'step'):
      return score_fn.step(rng, x, t, t_next, self.eta)
    x0_hat = sde.denoise(x, t, score_fn(x, t))
    return ddim(rng, sde, x, t, t_next, x0_hat, self.eta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoStep(Options):
  """No step: x stays as it is, without a score evaluation.

  Example:
    >>> NoStep()(None, None, None, x=1.0, t=0.5, t_next=0.4)
    (1.0, 1.0)
  """

  def __call__(self, rng, score_fn, sde, x, t, t_next):
    return x, x


# ------------------------------------------------------------- correctors


def _batch_norm(v):
  """Return the mean over the whole (global) batch of each example's norm."""
  return jnp.mean(jnp.linalg.norm(v.reshape(v.shape[0], -1), axis=-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Corrector(Options):
  """Corrector by Langevin dynamics."""

  snr: float = option(
    0.16, 'Signal-to-noise ratio r of a Langevin corrector.', '(0, inf)'
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Langevin(_Corrector):
  """Langevin dynamics at time t (Algorithms 4 and 5).

  The step size is e = 2 a^2 (snr |z| / |score|)^2, where `a` belongs to the
  forward chain (1 for VE). Both norms are means over the whole batch, so the
  path of an example depends on the others; this is the paper's rule.

  Example:
    >>> Langevin(snr=0.1)
    Langevin(snr=0.1)
  """

  def __call__(
    self,
    rng: Rng,
    score_fn: ScoreFn,
    sde: SDE,
    x: State,
    t: Times,
    t_next: Times,
  ) -> Step:
    score = score_fn(x, t)
    z = _normal_like(rng, x)
    a, _ = sde.discretize(t_next, t)
    ratio = self.snr * _batch_norm(z) / _batch_norm(score)
    return langevin_step(x, score, z, 2 * (a * ratio) ** 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnealedLangevin(_Corrector):
  """Annealed Langevin dynamics ("ald"), as in the paper's release.

  The step size is e = 2 a^2 (snr sigma_t)^2. The sampler 'annealed_langevin'
  (Song & Ermon 2019, Algorithm 1) has another rule for the step size.

  Example:
    >>> AnnealedLangevin()
    AnnealedLangevin(snr=0.16)
  """

  def __call__(
    self,
    rng: Rng,
    score_fn: ScoreFn,
    sde: SDE,
    x: State,
    t: Times,
    t_next: Times,
  ) -> Step:
    a, _ = sde.discretize(t_next, t)
    e = 2 * (a * self.snr * sde.marginal(t)[1]) ** 2
    return langevin_step(x, score_fn(x, t), _normal_like(rng, x), e)


PREDICTORS = {
  'euler_maruyama': EulerMaruyama,
  'reverse_diffusion': ReverseDiffusion,
  'ancestral': Ancestral,
  'ddim': DDIM,
  'none': NoStep,
}

CORRECTORS = {
  'langevin': Langevin,
  'ald': AnnealedLangevin,
  'none': NoStep,
}
