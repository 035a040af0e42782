r"""Forward diffusions (Song et al. 2021, arXiv 2011.13456, Sections 3 and B).

Every process here is a linear SDE on t in [0, 1],

    dx = f(t) x dt + g(t) dw,    x_t = alpha(t) x_0 + sigma(t) z,  z ~ N(0, I),

so two scalar functions, alpha and sigma, say all that there is to say:
f = (log alpha)' and g^2 = (sigma^2)' - 2 f sigma^2. Subclasses write the four
functions in closed form, accurate in float32 down to t = 1e-5; everything else
(perturbing, transitions, the prior, the reverse-time SDE of Eq. 6 and the
probability-flow ODE of Eq. 13) is written once, in `SDE`.

Times are arrays of shape [B] (or scalars); states x are [B, ...].
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


def expand(v, x):
  """Reshapes v [B] (or a scalar) so that it multiplies x [B, ...]."""
  v = jnp.asarray(v)
  return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDE(abc.ABC):
  """A linear forward SDE. Instances are hashable: static under `jax.jit`."""

  @abc.abstractmethod
  def marginal(self, t):
    """(alpha, sigma), shaped as t: p(x_t | x_0) = N(alpha x_0, sigma^2 I)."""

  @abc.abstractmethod
  def coefficients(self, t):
    """(f, g), each shaped as t, of dx = f x dt + g dw."""

  @abc.abstractmethod
  def discretize(self, s, t):
    """(a, v), shaped as t: the paper's step x_t = a x_s + sqrt(v) z, s < t.

    It is the Markov chain whose reversal is the reverse-diffusion and the
    ancestral predictor (Appendices D and F of the paper).
    """

  num_scales = 0  # levels of a discretely trained network; 0: continuous time
  sigma_data = 0.0  # what EDM's networks and loss are scaled by; 0: unknown

  @property
  def continuous(self):
    """The process in continuous time that ODEs and likelihoods are about."""
    return self

  @property
  @abc.abstractmethod
  def prior_std(self):
    """Standard deviation of the Gaussian prior that stands in for p(x_1)."""

  def log_snr(self, t):
    """log(alpha^2 / sigma^2), shaped as t; it falls strictly with t."""
    alpha, sigma = self.marginal(t)
    return 2 * (jnp.log(alpha) - jnp.log(sigma))

  def time(self, log_snr):
    """The t in [0, 1] at which `log_snr(t)` is `log_snr`, by bisection."""

    def halve(_, bounds):
      low, high = bounds
      middle = 0.5 * (low + high)
      later = self.log_snr(middle) > log_snr
      return jnp.where(later, middle, low), jnp.where(later, high, middle)

    bounds = jnp.zeros_like(log_snr), jnp.ones_like(log_snr)
    low, high = jax.lax.fori_loop(0, 40, halve, bounds)
    return 0.5 * (low + high)

  def perturb(self, x0, t, z):
    """x_t = alpha x_0 + sigma z, for noise z shaped as x0 (Eq. 29)."""
    alpha, sigma = self.marginal(t)
    return expand(alpha, x0) * x0 + expand(sigma, x0) * z

  def transition(self, s, t):
    """(a, v), exact: p(x_t | x_s) = N(a x_s, v I) for s <= t.

    v = sigma_t^2 - a^2 sigma_s^2 is computed from the difference of the log
    signal-to-noise ratios, which does not cancel.
    """
    alpha_s, sigma_s = self.marginal(s)
    alpha_t, sigma_t = self.marginal(t)
    v = -(sigma_t**2) * jnp.expm1(self.log_snr(t) - self.log_snr(s))
    # At s = 0 sigma_s may be 0 and the log SNR infinite: there v = sigma_t^2.
    return alpha_t / alpha_s, jnp.where(sigma_s > 0, v, sigma_t**2)

  def prior_sample(self, rng, shape):
    """z ~ N(0, prior_std^2 I) of the given shape [B, ...]."""
    return self.prior_std * jax.random.normal(rng, shape)

  def prior_logp(self, z):
    """log N(z; 0, prior_std^2 I) in nats, [B], for z [B, ...]."""
    dims = math.prod(z.shape[1:])
    axes = tuple(range(1, z.ndim))
    log_normalizer = 0.5 * dims * math.log(2 * math.pi * self.prior_std**2)
    return -0.5 * jnp.sum((z / self.prior_std) ** 2, axes) - log_normalizer

  def reverse_drift(self, x, t, score):
    """Drift of the reverse-time SDE, f x - g^2 score (Eq. 6); shaped as x."""
    f, g = self.coefficients(t)
    return expand(f, x) * x - expand(g**2, x) * score

  def ode_drift(self, x, t, score):
    """Drift of the probability-flow ODE, f x - g^2 score / 2 (Eq. 13)."""
    f, g = self.coefficients(t)
    return expand(f, x) * x - expand(0.5 * g**2, x) * score


@dataclasses.dataclass(frozen=True, kw_only=True)
class VESDE(SDE):
  """Variance exploding (Eq. 30): sigma = sigma_min (sigma_max / sigma_min)^t.

  Attributes:
    sigma_min: noise level at t = 0, in units of the data.
    sigma_max: noise level at t = 1; about the largest distance between two data
      points (Song & Ermon 2020, Technique 1).
    num_scales: number of noise levels that the network was trained on, at
      t = i / (num_scales - 1) (NCSN, "SMLD"); 0 if in continuous time. The
      discrete process is the continuous one on its grid.
  """

  sigma_min: float = 0.01
  sigma_max: float = 50.0
  num_scales: int = 0

  def __post_init__(self):
    if not 0 < self.sigma_min < self.sigma_max:
      raise ValueError(
        'The VE SDE needs 0 < sigma_min < sigma_max, not '
        f'sigma_min={self.sigma_min}, sigma_max={self.sigma_max}.'
      )

  @property
  def log_ratio(self):
    return math.log(self.sigma_max / self.sigma_min)

  def marginal(self, t):
    t = jnp.asarray(t)
    return jnp.ones_like(t), self.sigma_min * jnp.exp(self.log_ratio * t)

  def coefficients(self, t):
    _, sigma = self.marginal(t)
    return jnp.zeros_like(sigma), sigma * math.sqrt(2 * self.log_ratio)

  def discretize(self, s, t):
    return self.transition(s, t)

  @property
  def prior_std(self):
    return self.sigma_max


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM(SDE):
  """Karras et al. (2022, arXiv 2206.00364): noise is the time itself.

  sigma = sigma_max t, and alpha = 1. Beside it, all that their training says
  about data and noise levels (Table 1).

  Attributes:
    sigma_max: noise level at t = 1, in units of the data.
    sigma_data: standard deviation of the data; the network's input, output and
      loss are scaled by it.
    p_mean, p_std: log sigma ~ N(p_mean, p_std^2) in training.
  """

  sigma_max: float = 80.0
  sigma_data: float = 0.5
  p_mean: float = -1.2
  p_std: float = 1.2

  def __post_init__(self):
    if not min(self.sigma_max, self.sigma_data, self.p_std) > 0:
      raise ValueError(
        'The EDM process needs sigma_max, sigma_data and p_std above 0, not '
        f'{self.sigma_max}, {self.sigma_data} and {self.p_std}.'
      )

  def marginal(self, t):
    t = jnp.asarray(t)
    return jnp.ones_like(t), self.sigma_max * t

  def coefficients(self, t):
    t = jnp.asarray(t)
    return jnp.zeros_like(t), self.sigma_max * jnp.sqrt(2 * t)

  def discretize(self, s, t):
    return self.transition(s, t)

  @property
  def prior_std(self):
    return self.sigma_max


def _check_betas(beta_min, beta_max):
  if not 0 < beta_min <= beta_max:
    raise ValueError(
      'VP and sub-VP SDEs need 0 < beta_min <= beta_max, not '
      f'beta_min={beta_min}, beta_max={beta_max}.'
    )


def _beta(sde, t):
  """beta(t) = beta_min + t (beta_max - beta_min) (Eq. 32)."""
  return sde.beta_min + t * (sde.beta_max - sde.beta_min)


def _vp_log_alpha(sde, t):
  """log alpha(t) = -1/2 int_0^t beta(u) du, of VP and sub-VP alike (Eq. 33)."""
  return -0.5 * t * (sde.beta_min + 0.5 * t * (sde.beta_max - sde.beta_min))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VPSDE(SDE):
  """Variance preserving (Eq. 32-33): dx = -beta x / 2 dt + sqrt(beta) dw."""

  beta_min: float = 0.1
  beta_max: float = 20.0

  def __post_init__(self):
    _check_betas(self.beta_min, self.beta_max)

  def marginal(self, t):
    log_alpha = _vp_log_alpha(self, jnp.asarray(t))
    # 1 - alpha^2 by expm1: near t = 0 the plain difference cancels.
    return jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))

  def coefficients(self, t):
    beta = _beta(self, jnp.asarray(t))
    return -0.5 * beta, jnp.sqrt(beta)

  def discretize(self, s, t):
    """DDPM's chain: x_t = sqrt(1 - b) x_s + sqrt(b) z, b = beta(t)(t - s)."""
    b = _beta(self, jnp.asarray(t)) * (t - s)
    return jnp.sqrt(1 - b), b

  @property
  def prior_std(self):
    return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubVPSDE(SDE):
  """Sub-VP (Eq. 34-36): VP's drift, with sigma(t) = 1 - alpha(t)^2."""

  beta_min: float = 0.1
  beta_max: float = 20.0

  def __post_init__(self):
    _check_betas(self.beta_min, self.beta_max)

  def marginal(self, t):
    log_alpha = _vp_log_alpha(self, jnp.asarray(t))
    return jnp.exp(log_alpha), -jnp.expm1(2 * log_alpha)

  def coefficients(self, t):
    t = jnp.asarray(t)
    beta = _beta(self, t)
    discount = -jnp.expm1(4 * _vp_log_alpha(self, t))
    return -0.5 * beta, jnp.sqrt(beta * discount)

  def discretize(self, s, t):
    """Euler's step, as in the paper: a = 1 + f dt, v = g^2 dt."""
    f, g = self.coefficients(t)
    return 1 + f * (t - s), g**2 * (t - s)

  @property
  def prior_std(self):
    return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(SDE):
  """The discrete VP chain of Ho et al. (2020), as a process on t = i / (M - 1).

  sigma comes from the cumulative product of 1 - beta_i, where beta_i goes from
  beta_min / M to beta_max / M. It differs from the continuous VP sigma by up to
  4.6%, and a network trained on the chain wants the chain's. Between labels t
  is rounded to the nearest one. The coefficients are those of the SDE that is
  the limit of the chain.

  Attributes:
    beta_min, beta_max: as for `VPSDE`.
    num_scales: M, the number of noise levels that the network was trained on.
  """

  beta_min: float = 0.1
  beta_max: float = 20.0
  num_scales: int = 1000

  def __post_init__(self):
    _check_betas(self.beta_min, self.beta_max)
    if self.beta_max >= self.num_scales:
      raise ValueError(
        f'A chain of num_scales={self.num_scales} levels with '
        f'beta_max={self.beta_max} has beta_max / num_scales >= 1, which '
        'leaves no signal: use more levels.'
      )

  @property
  def continuous(self):
    """The SDE that the chain discretises."""
    return VPSDE(beta_min=self.beta_min, beta_max=self.beta_max)

  def marginal(self, t):
    m = self.num_scales
    betas = np.linspace(self.beta_min / m, self.beta_max / m, m)
    log_alpha = 0.5 * np.cumsum(np.log1p(-betas))
    label = jnp.round(jnp.asarray(t) * (m - 1)).astype(jnp.int32)
    alpha = jnp.asarray(np.exp(log_alpha), jnp.float32)
    sigma = jnp.asarray(np.sqrt(-np.expm1(2 * log_alpha)), jnp.float32)
    return alpha[label], sigma[label]

  def coefficients(self, t):
    return self.continuous.coefficients(t)

  def discretize(self, s, t):
    return self.transition(s, t)

  @property
  def prior_std(self):
    return 1.0


SDES = {
  've': VESDE,
  'vp': VPSDE,
  'subvp': SubVPSDE,
  'ddpm': DDPM,
  'edm': EDM,
}
