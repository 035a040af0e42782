r"""Forward diffusions (Song et al. 2021, arXiv 2011.13456, Sections 3 and B).

Every process in this module is a linear SDE on t in [0, 1],

    dx = f(t) x dt + g(t) dw,    x_t = alpha(t) x_0 + sigma(t) z,  z ~ N(0, I),

so the two scalar functions alpha and sigma determine everything else:
f = (log alpha)' and g^2 = (sigma^2)' - 2 f sigma^2. Subclasses write the four
functions in closed form, accurate in float32 down to t = 1e-5. The class `SDE`
contains the rest: noise, transitions, the prior, Tweedie's formula, the
reverse-time SDE (Eq. 6) and the probability-flow ODE (Eq. 13).

Times are arrays of shape [B] (or scalars); states x are [B, ...].
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, Real, Shaped

from runtime.options import Options, option

# Types of arguments and results, as the functions of this module use them.
State = Float[ArrayLike, ' B *dims']
Times = Real[ArrayLike, '*T']
Pair = tuple[Float[Array, '*T'], Float[Array, '*T']]


def expand(v: Shaped[ArrayLike, '...'], x: Shaped[ArrayLike, '...']) -> Array:
  """Reshape v [B] (or a scalar) so that it multiplies x [B, ...]."""
  v = jnp.asarray(v)
  return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDE(Options, abc.ABC):
  """Linear forward SDE. Instances are hashable: static under `jax.jit`."""

  # Whether the process only adds noise: alpha(t) = 1 at all times.
  variance_exploding = False

  @abc.abstractmethod
  def marginal(self, t: Times) -> Pair:
    """Return (alpha, sigma) of p(x_t | x_0) = N(alpha x_0, sigma^2 I)."""

  @abc.abstractmethod
  def coefficients(self, t: Times) -> Pair:
    """Return (f, g) of dx = f x dt + g dw, each shaped as t."""

  @abc.abstractmethod
  def discretize(self, s: Real[ArrayLike, '...'], t: Times) -> Pair:
    """Return (a, v) of the paper's chain x_t = a x_s + sqrt(v) z, s < t.

    The reverse-diffusion and the ancestral predictor reverse this Markov chain
    (Appendices D and F of the paper).
    """

  @property
  def continuous(self):
    """Return the process in continuous time, for ODEs and likelihoods."""
    return self

  @property
  @abc.abstractmethod
  def prior_std(self) -> float:
    """Return the standard deviation of the Gaussian prior, used for p(x_1)."""

  def log_snr(self, t: Times) -> Float[Array, '*T']:
    """Return log(alpha^2 / sigma^2), which decreases strictly with t."""
    alpha, sigma = self.marginal(t)
    return 2 * (jnp.log(alpha) - jnp.log(sigma))

  def time(self, log_snr: Times) -> Float[Array, '*T']:
    """Return the t in [0, 1] with this `log_snr(t)`, found by bisection."""

    def halve(_, bounds):
      low, high = bounds
      middle = 0.5 * (low + high)
      later = self.log_snr(middle) > log_snr
      return jnp.where(later, middle, low), jnp.where(later, high, middle)

    bounds = jnp.zeros_like(log_snr), jnp.ones_like(log_snr)
    low, high = jax.lax.fori_loop(0, 40, halve, bounds)
    return 0.5 * (low + high)

  def perturb(
    self, x0: State, t: Real[ArrayLike, '...'], z: State
  ) -> Float[Array, ' B *dims']:
    """Return x_t = alpha x_0 + sigma z for noise z shaped as x0 (Eq. 29)."""
    alpha, sigma = self.marginal(t)
    return expand(alpha, x0) * x0 + expand(sigma, x0) * z

  def denoise(
    self, x: State, t: Real[ArrayLike, '...'], score: State
  ) -> Float[Array, ' B *dims']:
    """Return the posterior mean of the data given x_t = x (Tweedie's formula).

        E[x_0 | x_t] = (x_t + sigma^2 score) / alpha

    Args:
      x: state [B, ...] at time t.
      t: times [B], or a scalar.
      score: score at (x, t), shaped as x.
    """
    alpha, sigma = (expand(c, x) for c in self.marginal(t))
    return (x + sigma**2 * score) / alpha

  def transition(self, s: Real[ArrayLike, '...'], t: Times) -> Pair:
    """Return (a, v) of the exact p(x_t | x_s) = N(a x_s, v I) for s <= t.

    v = sigma_t^2 - a^2 sigma_s^2 is computed from the difference of the log
    signal-to-noise ratios, which does not cancel.
    """
    alpha_s, sigma_s = self.marginal(s)
    alpha_t, sigma_t = self.marginal(t)
    v = -(sigma_t**2) * jnp.expm1(self.log_snr(t) - self.log_snr(s))
    # At s = 0 sigma_s may be 0 and the log SNR infinite: then v = sigma_t^2.
    return alpha_t / alpha_s, jnp.where(sigma_s > 0, v, sigma_t**2)

  def prior_sample(self, rng: Key[Array, ''], shape: Sequence[int]) -> Array:
    """Return z ~ N(0, prior_std^2 I) of the given shape [B, ...]."""
    return self.prior_std * jax.random.normal(rng, shape)

  def prior_logp(self, z: State) -> Float[Array, ' B']:
    """Return log N(z; 0, prior_std^2 I) in nats, [B], for z [B, ...]."""
    dims = math.prod(z.shape[1:])
    axes = tuple(range(1, z.ndim))
    log_normalizer = 0.5 * dims * math.log(2 * math.pi * self.prior_std**2)
    return -0.5 * jnp.sum((z / self.prior_std) ** 2, axes) - log_normalizer

  def reverse_drift(
    self, x: State, t: Real[ArrayLike, '...'], score: State
  ) -> Float[Array, ' B *dims']:
    """Return the drift f x - g^2 score of the reverse-time SDE (Eq. 6)."""
    f, g = self.coefficients(t)
    return expand(f, x) * x - expand(g**2, x) * score

  def ode_drift(
    self, x: State, t: Real[ArrayLike, '...'], score: State
  ) -> Float[Array, ' B *dims']:
    """Return the drift f x - g^2 score / 2 of the ODE (Eq. 13)."""
    f, g = self.coefficients(t)
    return expand(f, x) * x - expand(0.5 * g**2, x) * score


@dataclasses.dataclass(frozen=True, kw_only=True)
class _NoiseOnly(SDE):
  """Process with alpha = 1, whose discrete chain is the process on a grid."""

  variance_exploding = True

  def discretize(self, s: Real[ArrayLike, '...'], t: Times) -> Pair:
    return self.transition(s, t)

  @property
  def prior_std(self) -> float:
    return self.sigma_max


@dataclasses.dataclass(frozen=True, kw_only=True)
class VESDE(_NoiseOnly):
  """Variance exploding (Eq. 30): sigma = sigma_min (sigma_max / sigma_min)^t.

  sigma_max should be about the largest distance between two data points (Song &
  Ermon 2020, Technique 1). SMLD's discrete process is this one on its grid.

  Example:
    >>> VESDE(sigma_max=10.0).prior_std
    10.0
  """

  sigma_min: float = option(
    0.01, 'Noise level at t = 0, in units of the data.', '(0, inf)'
  )
  sigma_max: float = option(
    50.0, 'Noise level at t = 1, in units of the data.', '(0, inf)'
  )

  def __post_init__(self):
    super().__post_init__()
    if self.sigma_min >= self.sigma_max:
      raise ValueError(
        'VESDE: sigma_min needs to be less than sigma_max, but '
        f'sigma_min={self.sigma_min} and sigma_max={self.sigma_max}.'
      )

  @property
  def log_ratio(self) -> float:
    """Return log(sigma_max / sigma_min)."""
    return math.log(self.sigma_max / self.sigma_min)

  def marginal(self, t: Times) -> Pair:
    t = jnp.asarray(t)
    return jnp.ones_like(t), self.sigma_min * jnp.exp(self.log_ratio * t)

  def coefficients(self, t: Times) -> Pair:
    _, sigma = self.marginal(t)
    return jnp.zeros_like(sigma), sigma * math.sqrt(2 * self.log_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM(_NoiseOnly):
  """Process of Karras et al. (2022, arXiv 2206.00364): sigma = sigma_max t.

  Example:
    >>> EDM(sigma_max=80.0).prior_std
    80.0
  """

  sigma_max: float = option(
    80.0, 'Noise level at t = 1, in units of the data.', '(0, inf)'
  )

  def marginal(self, t: Times) -> Pair:
    t = jnp.asarray(t)
    return jnp.ones_like(t), self.sigma_max * t

  def coefficients(self, t: Times) -> Pair:
    t = jnp.asarray(t)
    return jnp.zeros_like(t), self.sigma_max * jnp.sqrt(2 * t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LinearBeta(SDE):
  """Process with the drift -beta(t) x / 2, where beta is linear in t."""

  beta_min: float = option(0.1, 'beta(t) at t = 0.', '(0, inf)')
  beta_max: float = option(20.0, 'beta(t) at t = 1.', '(0, inf)')

  def __post_init__(self):
    super().__post_init__()
    if self.beta_min > self.beta_max:
      raise ValueError(
        f'{type(self).__name__}: beta_min needs to be at most beta_max, but '
        f'beta_min={self.beta_min} and beta_max={self.beta_max}.'
      )

  def _beta(self, t):
    """Return beta(t) = beta_min + t (beta_max - beta_min) (Eq. 32)."""
    return self.beta_min + t * (self.beta_max - self.beta_min)

  def _log_alpha(self, t):
    """Return log alpha(t) = -1/2 int_0^t beta(u) du (Eq. 33)."""
    slope = self.beta_max - self.beta_min
    return -0.5 * t * (self.beta_min + 0.5 * t * slope)

  @property
  def prior_std(self) -> float:
    return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class VPSDE(_LinearBeta):
  """Variance preserving (Eq. 32-33): dx = -beta x / 2 dt + sqrt(beta) dw.

  Example:
    >>> VPSDE(beta_max=10.0).prior_std
    1.0
  """

  def marginal(self, t: Times) -> Pair:
    log_alpha = self._log_alpha(jnp.asarray(t))
    # 1 - alpha^2 by expm1, because the plain difference cancels near t = 0.
    return jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))

  def coefficients(self, t: Times) -> Pair:
    beta = self._beta(jnp.asarray(t))
    return -0.5 * beta, jnp.sqrt(beta)

  def discretize(self, s: Real[ArrayLike, '...'], t: Times) -> Pair:
    """Return DDPM's (sqrt(1 - b), b) with b = beta(t) (t - s)."""
    b = self._beta(jnp.asarray(t)) * (t - s)
    return jnp.sqrt(1 - b), b


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubVPSDE(_LinearBeta):
  """Sub-VP (Eq. 34-36): the drift of VP, with sigma(t) = 1 - alpha(t)^2.

  Example:
    >>> SubVPSDE().beta_max
    20.0
  """

  def marginal(self, t: Times) -> Pair:
    log_alpha = self._log_alpha(jnp.asarray(t))
    return jnp.exp(log_alpha), -jnp.expm1(2 * log_alpha)

  def coefficients(self, t: Times) -> Pair:
    t = jnp.asarray(t)
    beta = self._beta(t)
    discount = -jnp.expm1(4 * self._log_alpha(t))
    return -0.5 * beta, jnp.sqrt(beta * discount)

  def discretize(self, s: Real[ArrayLike, '...'], t: Times) -> Pair:
    """Return Euler's step, as in the paper: a = 1 + f dt, v = g^2 dt."""
    f, g = self.coefficients(t)
    return 1 + f * (t - s), g**2 * (t - s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(_LinearBeta):
  """The discrete VP chain of Ho et al. (2020), as a process on t = i / (M - 1).

  sigma comes from the cumulative product of 1 - beta_i, where beta_i goes from
  beta_min / M to beta_max / M. It differs from the sigma of the continuous VP
  SDE by up to 4.6%, and a network that was trained on the chain needs the
  chain's. Each t is rounded to the nearest level. The coefficients are those of
  the SDE that is the limit of the chain.

  Example:
    >>> DDPM(num_scales=100).continuous
    VPSDE(beta_min=0.1, beta_max=20.0)
  """

  num_scales: int = option(
    1000, 'Number M of noise levels of the chain.', '[2, inf)', given=True
  )

  def __post_init__(self):
    super().__post_init__()
    if self.beta_max >= self.num_scales:
      raise ValueError(
        f'DDPM: beta_max={self.beta_max} needs to be less than '
        f'num_scales={self.num_scales}, or the chain leaves no signal. Use '
        'more noise levels.'
      )

  @property
  def continuous(self):
    """Return the SDE that the chain discretizes."""
    return VPSDE(beta_min=self.beta_min, beta_max=self.beta_max)

  def marginal(self, t: Times) -> Pair:
    m = self.num_scales
    betas = np.linspace(self.beta_min / m, self.beta_max / m, m)
    log_alpha = 0.5 * np.cumsum(np.log1p(-betas))
    label = jnp.round(jnp.asarray(t) * (m - 1)).astype(jnp.int32)
    alpha = jnp.asarray(np.exp(log_alpha), jnp.float32)
    sigma = jnp.asarray(np.sqrt(-np.expm1(2 * log_alpha)), jnp.float32)
    return alpha[label], sigma[label]

  def coefficients(self, t: Times) -> Pair:
    return self.continuous.coefficients(t)

  def discretize(self, s: Real[ArrayLike, '...'], t: Times) -> Pair:
    return self.transition(s, t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RectifiedFlow(SDE):
  """Straight lines from data to noise (Liu et al. 2023).

  x_t = (1 - t) x_0 + t z, so f = -1 / (1 - t) and g^2 = 2 t / (1 - t), and the
  drift of the ODE is the velocity E[z - x_0 | x_t]. A score does not determine
  the velocity at t = 1, where alpha is 0. Therefore times above 1 - `ALPHA_MIN`
  have the coefficients and the noise of that time, and samples start at t = 1.

  Example:
    >>> print(*RectifiedFlow().marginal(0.25))
    0.75 0.25
  """

  ALPHA_MIN: ClassVar[float] = 1e-3
  prior_std: ClassVar[float] = 1.0

  def marginal(self, t: Times) -> Pair:
    sigma = jnp.minimum(jnp.asarray(t), 1 - self.ALPHA_MIN)
    return 1 - sigma, sigma

  def coefficients(self, t: Times) -> Pair:
    alpha, sigma = self.marginal(t)
    return -1 / alpha, jnp.sqrt(2 * sigma / alpha)

  def discretize(self, s: Real[ArrayLike, '...'], t: Times) -> Pair:
    return self.transition(s, t)


SDES = {
  've': VESDE,
  'vp': VPSDE,
  'subvp': SubVPSDE,
  'ddpm': DDPM,
  'edm': EDM,
  'rectified_flow': RectifiedFlow,
}
