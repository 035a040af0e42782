r"""Training losses (Song et al. 2021, Eq. 7 and Table 1).

A score network s is trained with the mean over examples of

    lambda(t) J(s(., t)),    x_t = alpha x_0 + sigma z.

The four choices in it are tables:

- `OBJECTIVES`: J, which is smallest where s is the score of x_t. Denoising
  score matching is J = 1/2 || s(x_t, t) + z / sigma ||^2 (Vincent 2011).
- `TIMES`: the distribution of t. With uniform t the loss is the continuous one
  (Eq. 7). With t on the levels of a chain it is that of SMLD (Eq. 1) for a
  variance-exploding process, and that of DDPM (Eq. 3) for `sde_lib.DDPM`.
- `WEIGHTINGS`: lambda(t).
- `REDUCTIONS`: the mean or half the sum over the dimensions of an example.

`ScoreMatching` combines them. Losses are per example, [B]; their caller takes
the mean.

The functions `explicit` to `denoising` are the objectives themselves, for data
without a diffusion. Up to a constant each equals, in expectation, the explicit
objective 1/2 || s(x) - grad log p(x) ||^2 (Hyvarinen 2005), but only `explicit`
asks for p. They take score_fn(x) -> [B, ...] at x [B, ...], which must treat
the examples of a batch independently, and
draw random directions or noise with the key rng.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

import sde_lib
from runtime.options import Options, option

Data = Float[ArrayLike, ' B *dims']
PerExample = Float[ArrayLike, ' B']

OF_LOSS = ('samples',)  # Test losses depend on these options.

# --------------------------------------------- objectives, as plain functions


def _dot(a, b):
  """Return the inner product of each example, [B]."""
  return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def energy_score(energy: Callable) -> Callable:
  """Return the score x -> -dE/dx of p ~ exp(-E), for energy(x) -> [B]."""
  return lambda x: -jax.grad(lambda x: jnp.sum(energy(x)))(x)


def explicit(
  rng: PRNGKeyArray | None, score_fn: Callable, x: Data, *, target: Callable
) -> PerExample:
  """Return 1/2 || s(x) - grad log p(x) ||^2 (Hyvarinen 2005).

  Args:
    rng, score_fn, x: see the module; rng is not used.
    target: the true score, target(x) -> [B, ...].
  """
  del rng
  error = score_fn(x) - target(x)
  return 0.5 * _dot(error, error)


def _slice(score_fn, x, v):
  """Return s(x) and v^T (ds/dx) v, by one Jacobian-vector product."""
  score, jacobian_v = jax.jvp(score_fn, (x,), (v,))
  return score, _dot(v, jacobian_v)


def implicit(
  rng: PRNGKeyArray | None, score_fn: Callable, x: Data
) -> PerExample:
  """Return tr(ds/dx) + 1/2 || s ||^2 (Hyvarinen 2005, Theorem 1).

  The trace is exact and costs one Jacobian-vector product per dimension; rng is
  not used.
  """
  del rng
  basis = jnp.eye(x[0].size).reshape(-1, *x.shape[1:])
  along = lambda e: _slice(score_fn, x, jnp.broadcast_to(e[None], x.shape))
  score, diagonal = jax.vmap(along, out_axes=(None, 0))(basis)
  return jnp.sum(diagonal, axis=0) + 0.5 * _dot(score, score)


def sliced(rng: PRNGKeyArray, score_fn: Callable, x: Data) -> PerExample:
  """Return v^T (ds/dx) v + 1/2 (v^T s)^2 (Song et al. 2019, Eq. 7).

  An unbiased estimate of `implicit`, with random directions v ~ N(0, I).
  """
  v = jax.random.normal(rng, x.shape)
  score, curvature = _slice(score_fn, x, v)
  return curvature + 0.5 * _dot(v, score) ** 2


def sliced_vr(rng: PRNGKeyArray, score_fn: Callable, x: Data) -> PerExample:
  """Return v^T (ds/dx) v + 1/2 || s ||^2 (Song et al. 2019, Eq. 8).

  `sliced` with the expectation of its second term, and so with less variance.
  """
  score, curvature = _slice(score_fn, x, jax.random.normal(rng, x.shape))
  return curvature + 0.5 * _dot(score, score)


def finite_difference(
  rng: PRNGKeyArray,
  score_fn: Callable,
  x: Data,
  *,
  step: PerExample | Float[ArrayLike, ''] = 0.1,
) -> PerExample:
  """Return `sliced` by central differences (FD-SSM; Pang et al. 2020).

      v^T (s_+ - s_-) / (2 h) + 1/8 (v^T (s_+ + s_-))^2,    s_+- = s(x +- h v)

  It takes two evaluations and no derivative; its error is O(h^2).

  Args:
    rng, score_fn, x: see the module.
    step: h > 0, in units of x.
  """
  v = jax.random.normal(rng, x.shape)
  h = sde_lib.expand(step, x)
  after, before = score_fn(x + h * v), score_fn(x - h * v)
  curvature = _dot(v, after - before) / (2 * step)
  return curvature + 0.125 * _dot(v, after + before) ** 2


def denoising(
  rng: PRNGKeyArray,
  score_fn: Callable,
  x: Data,
  *,
  sigma: Float[ArrayLike, ''],
) -> PerExample:
  """Return 1/2 || s(x + sigma z) + z / sigma ||^2 (Vincent 2011).

  It is smallest at the score of the data with Gaussian noise added.

  Args:
    rng, score_fn, x: see the module.
    sigma: standard deviation of the noise, in units of x.
  """
  z = jax.random.normal(rng, x.shape)
  error = score_fn(x + sigma * z) + z / sigma
  return 0.5 * _dot(error, error)


# ---------------------------------------------------------------------- times


def _require_edm(sde, choice):
  """Raise ValueError unless the process is EDM's."""
  if not isinstance(sde, sde_lib.EDM):
    raise ValueError(
      f"config.{choice} needs sde.name='edm', not {type(sde).__name__}."
    )


class Times(Options, abc.ABC):
  """Distribution of the times t of a batch, in [eps, 1]."""

  def check(self, sde: sde_lib.SDE) -> None:
    """Raise ValueError if the times do not suit the process."""

  def smallest(self, eps: float) -> float:
    """Return the smallest time that is drawn."""
    return eps

  @abc.abstractmethod
  def __call__(
    self, rng: PRNGKeyArray, sde: sde_lib.SDE, batch: int, eps: float
  ) -> tuple[PerExample, PerExample]:
    """Return random times and the weights of their losses.

    Args:
      rng: key.
      sde: forward process.
      batch: number of times B.
      eps: smallest time, in [0, 1).
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Times):
  """Draw t uniformly in [eps, 1]; the weight is 1.

  Example:
    >>> t, weight = Uniform()(jax.random.key(0), sde_lib.VPSDE(), 4, 1e-5)
    >>> t.shape, weight.tolist()
    ((4,), [1.0, 1.0, 1.0, 1.0])
  """

  def __call__(self, rng, sde, batch, eps):
    del sde
    t = jax.random.uniform(rng, (batch,), minval=eps, maxval=1.0)
    return t, jnp.ones_like(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(Times):
  """Draw t uniformly from the noise levels i / (num_scales - 1); weight 1.

  Example:
    >>> t, _ = Grid(num_scales=3)(jax.random.key(0), sde_lib.VPSDE(), 9, 0.0)
    >>> {0.0, 0.5, 1.0}.issuperset(t.tolist())
    True
  """

  num_scales: int = option(
    0, 'Noise levels that the network is trained on.', '[0, inf)', given=True
  )

  def __post_init__(self):
    super().__post_init__()
    if self.num_scales < 2:
      raise ValueError(
        "config.training.times='grid' needs 2 noise levels or more, not "
        f'{self.num_scales}: set training.num_scales.'
      )

  def smallest(self, eps):
    return 0.0  # The time of level 0.

  def __call__(self, rng, sde, batch, eps):
    del sde, eps
    label = jax.random.randint(rng, (batch,), 0, self.num_scales)
    t = label / (self.num_scales - 1)
    return t, jnp.ones_like(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance(Times):
  """Draw t with a density p(t) ~ g^2 / sigma^2 on [eps, 1].

  g^2 / sigma^2 = -d/dt log SNR, so this draws log SNR uniformly (Song et al.
  2021b, arXiv 2101.09258, Section 4.3). The weight 1 / ((1 - eps) p(t)) makes
  the weighted loss an unbiased estimate of the mean over uniform t. With
  likelihood weighting it cancels all of the weighting's variance.

  Example:
    >>> t, _ = Importance()(jax.random.key(0), sde_lib.VPSDE(), 1000, 1e-5)
    >>> bool(jnp.mean(t < 0.1) > 0.4)
    True
  """

  def __call__(self, rng, sde, batch, eps):
    first, last = sde.log_snr(jnp.asarray(eps)), sde.log_snr(jnp.asarray(1.0))
    u = jax.random.uniform(rng, (batch,))
    t = jnp.clip(sde.time(first + u * (last - first)), eps, 1.0)
    _, sigma = sde.marginal(t)
    _, g = sde.coefficients(t)
    return t, (first - last) / (1 - eps) * sigma**2 / g**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lognormal(Times):
  """Draw noise levels log sigma ~ N(p_mean, p_std^2); the weight is 1.

  The noise levels of Karras et al. (2022, Table 1), for their process. Times
  outside [eps, 1] are moved to its ends.

  Example:
    >>> sde = sde_lib.EDM(sigma_max=80.0)
    >>> t, _ = Lognormal()(jax.random.key(0), sde, 100, 1e-5)
    >>> bool(abs(jnp.log(sde.sigma_max * t).mean() + 1.2) < 0.5)
    True
  """

  p_mean: float = option(
    -1.2,
    'Mean of the logarithm of sigma in training.',
    '(-inf, inf)',
    formerly='sde.p_mean',
    marks=('run', 'samples'),
  )
  p_std: float = option(
    1.2,
    'Standard deviation of the logarithm of sigma in training.',
    '(0, inf)',
    formerly='sde.p_std',
    marks=('run', 'samples'),
  )

  def check(self, sde):
    _require_edm(sde, "training.times='lognormal'")

  def __call__(self, rng, sde, batch, eps):
    log_sigma = self.p_mean + self.p_std * jax.random.normal(rng, (batch,))
    t = jnp.clip(sde.time(-2 * log_sigma), eps, 1.0)
    return t, jnp.ones_like(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal(Times):
  """Draw log(t / (1 - t)) ~ N(logit_mean, logit_std^2); the weight is 1.

  The times of rectified flows of Esser et al. (2024, arXiv 2403.03206, Eq. 19).
  Times outside [eps, 1] are moved to its ends.

  Example:
    >>> sde = sde_lib.RectifiedFlow()
    >>> t, _ = LogitNormal()(jax.random.key(0), sde, 1000, 1e-5)
    >>> bool(abs(jnp.mean(t < 0.5) - 0.5) < 0.05)
    True
  """

  logit_mean: float = option(
    0.0, 'Mean of the logit of t in training.', '(-inf, inf)', marks=OF_LOSS
  )
  logit_std: float = option(
    1.0,
    'Standard deviation of the logit of t in training.',
    '(0, inf)',
    marks=OF_LOSS,
  )

  def __call__(self, rng, sde, batch, eps):
    del sde
    logit = self.logit_mean + self.logit_std * jax.random.normal(rng, (batch,))
    t = jnp.clip(jax.nn.sigmoid(logit), eps, 1.0)
    return t, jnp.ones_like(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Single(Times):
  """Use t = eps, one noise level (Vincent 2011); the weight is 1.

  Example:
    >>> t, weight = Single()(jax.random.key(0), sde_lib.VPSDE(), 2, 0.5)
    >>> t.tolist(), weight.tolist()
    ([0.5, 0.5], [1.0, 1.0])
  """

  def __call__(self, rng, sde, batch, eps):
    del rng, sde
    return jnp.full((batch,), eps), jnp.ones((batch,))


TIMES = {
  'uniform': Uniform,
  'grid': Grid,
  'importance': Importance,
  'lognormal': Lognormal,
  'logit_normal': LogitNormal,
  'single': Single,
}


# ----------------------------------------------------------------- weightings


class Weighting(Options, abc.ABC):
  """Weight lambda(t) of the squared error of the score."""

  def check(self, sde: sde_lib.SDE) -> None:
    """Raise ValueError if the weighting does not suit the process."""

  @abc.abstractmethod
  def __call__(
    self, sde: sde_lib.SDE, t: Float[ArrayLike, '*T']
  ) -> Float[Array, '*T']:
    """Return lambda at times t in [0, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variance(Weighting):
  """Weigh by sigma^2, so that every noise level counts the same (the paper's).

  Example:
    >>> float(Variance()(sde_lib.EDM(sigma_max=80.0), jnp.asarray(0.5)))
    1600.0
  """

  def __call__(self, sde, t):
    return sde.marginal(t)[1] ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood(Weighting):
  """Weigh by g^2, which makes the loss a bound on the log-likelihood.

  Example:
    >>> sde = sde_lib.VPSDE(beta_min=0.25, beta_max=0.25)
    >>> float(Likelihood()(sde, jnp.asarray(0.5)))
    0.25
  """

  def __call__(self, sde, t):
    return sde.coefficients(t)[1] ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM(Weighting):
  """Weigh as Karras et al. (2022, Table 1), for the error of the score.

  Their weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 is that of the
  denoiser D = x + sigma^2 score, whose error is sigma^2 times that of the
  score. The network's own target then has weight 1 at every noise level.

  Example:
    >>> float(EDM(sigma_data=0.5)(sde_lib.EDM(sigma_max=1.0), jnp.asarray(0.5)))
    0.5
  """

  sigma_data: float = option(
    0.5, 'Standard deviation of the data.', '(0, inf)', given=True
  )

  def check(self, sde):
    _require_edm(sde, "training.weighting='edm'")

  def __call__(self, sde, t):
    _, sigma = sde.marginal(t)
    return (sigma**2 + self.sigma_data**2) * (sigma / self.sigma_data) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Velocity(Weighting):
  """Weigh by g^4 / 4: the squared error of the velocity f x - g^2 score / 2.

  For the rectified flow, the loss is that of Liu et al. (2023, Eq. 1).

  Example:
    >>> flow, t = sde_lib.RectifiedFlow(), jnp.asarray(0.25)
    >>> print(f'{Velocity()(flow, t):.4f}')  # (t / (1 - t))^2
    0.1111
  """

  def __call__(self, sde, t):
    return sde.coefficients(t)[1] ** 4 / 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinSNR(Weighting):
  """Weigh by min(SNR, gamma) (Hang et al. 2023), for the error of the score.

  Their weight is that of the error of the denoiser, which is sigma^2 / alpha
  times that of the score; SNR = alpha^2 / sigma^2.

  Example:
    >>> edm, t = sde_lib.EDM(sigma_max=1.0), jnp.asarray([0.25, 1.0])
    >>> MinSNR(snr_gamma=4.0)(edm, t).tolist()
    [0.015625, 1.0]
  """

  snr_gamma: float = option(
    5.0,
    'Largest weight of the error of the denoiser.',
    '(0, inf)',
    marks=OF_LOSS,
  )

  def __call__(self, sde, t):
    alpha, sigma = sde.marginal(t)
    return sigma**2 * jnp.minimum(1, self.snr_gamma * (sigma / alpha) ** 2)


WEIGHTINGS = {
  'variance': Variance,
  'likelihood': Likelihood,
  'edm': EDM,
  'velocity': Velocity,
  'min_snr': MinSNR,
}


# ----------------------------------------------------------------- reductions


def mean(v: Data) -> PerExample:
  """Return the mean over the dimensions of each example, as for VP."""
  return v.mean(axis=tuple(range(1, v.ndim)))


def half_sum(v: Data) -> PerExample:
  """Return half the sum over the dimensions of each example, as for VE."""
  return 0.5 * v.sum(axis=tuple(range(1, v.ndim)))


REDUCTIONS = {'mean': mean, 'half_sum': half_sum}


# ---------------------------------------------- objectives, at noise levels t


def denoising_loss(
  score_fn: Callable,
  sde: sde_lib.SDE,
  x0: Data,
  t: PerExample,
  z: Data,
  *,
  weighting: Callable,
  reduction: Callable,
) -> PerExample:
  """Return lambda(t) || s(x_t, t) + z / sigma ||^2 (Eq. 7) at given t and z.

  Args:
    score_fn: score_fn(x, t) -> score, shaped as x.
    sde: forward process.
    x0: clean data in the model's range.
    t: times in (0, 1].
    z: standard normal noise.
    weighting: lambda(sde, t) -> [B], such as `Variance()`.
    reduction: `mean` or `half_sum`.
  """
  _, sigma = sde.marginal(t)
  score = score_fn(sde.perturb(x0, t, z), t)
  error = reduction((sde_lib.expand(sigma, z) * score + z) ** 2)
  return weighting(sde, t) / sigma**2 * error


class Objective(Options):
  """Objective J whose minimiser is the score of the noisy data x_t.

  A loss splits its key into `num_keys`: for the times, the noise and the
  objective itself.
  """

  num_keys = 3
  function: ClassVar[Callable]  # One of the functions above.

  def check(self, sde: sde_lib.SDE) -> None:
    """Raise ValueError if the objective does not suit the process."""

  def at(self, fraction: Float[ArrayLike, '']) -> Callable:
    """Return the objective at a fraction of the training, in [0, 1]."""
    del fraction
    return self

  def arguments(self, sde, t) -> dict[str, Any]:
    """Return the keyword arguments of the function at times t."""
    return {}

  def __call__(
    self,
    rngs: Sequence[PRNGKeyArray],
    score_fn: Callable,
    sde: sde_lib.SDE,
    x0: Data,
    t: PerExample,
    z: Data,
    weight: PerExample,
    *,
    weighting: Callable,
    reduction: Callable,
  ) -> PerExample:
    """Return weight lambda(t) J, with J reduced as the squared error is.

    Args:
      rngs: the keys but for those of the times and of the noise.
      score_fn, sde, x0, t, z, weighting, reduction: as for `denoising_loss`.
      weight: weights of the times.
    """
    x = sde.perturb(x0, t, z)
    value = self.function(
      *rngs, lambda x: score_fn(x, t), x, **self.arguments(sde, t)
    )
    # J contains half the sum over the dimensions.
    ones = np.ones((1, x0[0].size))
    scale = (reduction(ones) / half_sum(ones)).item()
    return scale * weight * weighting(sde, t) * value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
  """Use denoising score matching, `denoising_loss` (Eq. 7).

  Example:
    >>> loss = ScoreMatching(objective=Denoising())
  """

  num_keys = 2

  def __call__(
    self, rngs, score_fn, sde, x0, t, z, weight, *, weighting, reduction
  ):
    del rngs
    return weight * denoising_loss(
      score_fn, sde, x0, t, z, weighting=weighting, reduction=reduction
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explicit(Objective):
  """Use `explicit`, for data whose score is known.

  Example:
    >>> loss = ScoreMatching(objective=Explicit(target=lambda x, t: -x))
  """

  function = staticmethod(explicit)
  target: Callable | None = option(
    None, 'The true score, target(x, t), shaped as x.', given=True
  )

  def __post_init__(self):
    super().__post_init__()
    if self.target is None:
      raise ValueError(
        "config.training.objective='explicit' needs the true score of the "
        "data, which is known for points only: set data.dataset='toy/...'."
      )

  def arguments(self, sde, t):
    return {'target': lambda x: self.target(x, t)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implicit(Objective):
  """Use `implicit`, for data of few dimensions.

  Example:
    >>> loss = ScoreMatching(objective=Implicit())
  """

  function = staticmethod(implicit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sliced(Objective):
  """Use `sliced`.

  Example:
    >>> loss = ScoreMatching(objective=Sliced())
  """

  function = staticmethod(sliced)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlicedVR(Objective):
  """Use `sliced_vr`.

  Example:
    >>> loss = ScoreMatching(objective=SlicedVR())
  """

  function = staticmethod(sliced_vr)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiniteDifference(Objective):
  """Use `finite_difference`, with steps of a tenth of the noise.

  Example:
    >>> loss = ScoreMatching(objective=FiniteDifference())
  """

  function = staticmethod(finite_difference)

  def arguments(self, sde, t):
    # The finest structure of x_t is of the size of its noise.
    return {'step': 0.1 * sde.marginal(t)[1]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency(Objective):
  """Train a consistency function by ECT (Geng et al. 2024, arXiv 2406.14548).

  The denoiser f(x, t) of EDM's conditioning is the identity at sigma = 0. With
  the same noise at sigma and at a smaller level r, the loss is

      (sqrt(|| f(x_sigma) - stopgrad f(x_r) ||^2 + c^2) - c) / (sigma - r),

  r = sigma max(0, 1 - n(sigma) / q^a), n = 1 + k sigmoid(-b sigma), where a
  goes from 1 to `ect_stages` in equal parts of the training. At first r is 0
  at low noise, as in denoising, so it begins with a trained EDM model. The
  weighting and the reduction have no effect.

  Example:
    >>> stage = Consistency().at(0.0)
    >>> loss = ScoreMatching(objective=Consistency())
  """

  num_keys = 2

  ect_q: float = option(
    2.0,
    'Factor q by which the gap of consistency shrinks.',
    '(1, inf)',
    marks=OF_LOSS,
  )
  ect_stages: int = option(
    8, 'Stages in which it shrinks.', '[1, 1000]', marks=OF_LOSS
  )
  ect_k: float = option(
    8.0,
    'Further width k of the gap at low noise.',
    '[0, inf)',
    marks=OF_LOSS,
  )
  ect_b: float = option(
    1.0,
    'Decay b of this width with the noise.',
    '[0, inf)',
    marks=OF_LOSS,
  )
  ect_c: float = option(
    0.0,
    'Distance c below which the loss is quadratic.',
    '[0, inf)',
    marks=OF_LOSS,
  )

  def check(self, sde):
    _require_edm(sde, "training.objective='consistency'")

  def at(self, fraction):
    stage = jnp.floor(jnp.asarray(fraction) * self.ect_stages)
    stage = 1 + jnp.minimum(stage, self.ect_stages - 1)
    return functools.partial(self, gap=self.ect_q**-stage)

  def earlier(self, sigma, gap):
    """Return the levels r < sigma, for the gap q^-a."""
    width = 1 + self.ect_k * jax.nn.sigmoid(-self.ect_b * sigma)
    return sigma * jnp.maximum(0, 1 - gap * width)

  def __call__(
    self, rngs, score_fn, sde, x0, t, z, weight, *, weighting, reduction, gap
  ):
    del rngs, weighting, reduction
    _, sigma = sde.marginal(t)
    r = self.earlier(sigma, gap)

    def f(sigma):
      t = sigma / sde.sigma_max
      x = sde.perturb(x0, t, z)
      return sde.denoise(x, t, score_fn(x, t))

    known = sde_lib.expand(r == 0, x0)  # There f is the data.
    goal = f(jnp.where(r > 0, r, sigma))
    goal = jax.lax.stop_gradient(jnp.where(known, x0, goal))
    error = f(sigma) - goal
    # The root has no gradient at 0.
    distance = jnp.sqrt(_dot(error, error) + self.ect_c**2 + 1e-12)
    return weight * (distance - self.ect_c) / (sigma - r)


OBJECTIVES = {
  'denoising': Denoising,
  'explicit': Explicit,
  'implicit': Implicit,
  'sliced': Sliced,
  'sliced_vr': SlicedVR,
  'finite_difference': FiniteDifference,
  'consistency': Consistency,
}


# --------------------------------------------------------------------- losses


def independent(x0: Data, z: Data) -> Int[ArrayLike, ' B']:
  """Return which noise each image gets: its own, independent of the image."""
  return jnp.arange(x0.shape[0])


def _products(x0, z):
  """Return the inner product of each image and each noise, [B, B]."""
  x0, z = (v.reshape(v.shape[0], -1) for v in (x0, z))
  return jnp.matmul(x0, z.T, precision=jax.lax.Precision.HIGHEST)


def greedy(x0: Data, z: Data) -> Int[ArrayLike, ' B']:
  """Return which noise each image gets: in turn the closest that is left.

  Args:
    x0: clean data.
    z: noise, shaped as x0.

  Example:
    >>> x0, z = jnp.array([[1.0], [0.0]]), jnp.array([[2.0], [1.1]])
    >>> greedy(x0, z).tolist()
    [1, 0]
  """

  def take(taken, row):
    noise = jnp.argmin(row + taken)
    return taken.at[noise].set(jnp.inf), noise

  # Squared distances without the square of the image, which changes nothing.
  distances = _dot(z, z)[None] - 2 * _products(x0, z)
  return jax.lax.scan(take, jnp.zeros(len(distances)), distances)[1]


def optimal(x0: Data, z: Data) -> Int[ArrayLike, ' B']:
  """Return which noise each image gets, with the smallest sum of distances.

  The distances are squared. It is the Hungarian algorithm, whose time grows as
  B^3; for large batches `greedy` is faster.

  Args:
    x0: clean data.
    z: noise, shaped as x0.

  Example:
    >>> x0, z = jnp.array([[1.0], [0.0]]), jnp.array([[2.0], [1.1]])
    >>> optimal(x0, z).tolist()
    [0, 1]
  """
  # All assignments have the same sums of squares.
  rows, columns = optax.assignment.hungarian_algorithm(-_products(x0, z))
  return jnp.zeros(len(rows), jnp.int32).at[rows].set(columns)


# Immiscible diffusion (Li et al. 2024).
ASSIGNMENTS = {
  'independent': independent,
  'greedy': greedy,
  'optimal': optimal,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreMatching(Options):
  """Score matching of noisy data at random times.

  Example:
    >>> loss = ScoreMatching(weighting=Likelihood())
    >>> score_fn, x0 = lambda x, t: -x, jnp.zeros((3, 2))
    >>> loss(jax.random.key(0), score_fn, sde_lib.VPSDE(), x0).shape
    (3,)
  """

  objective: Objective = option(
    'denoising',
    'Objective whose minimiser is the score.',
    table=OBJECTIVES,
    marks=OF_LOSS,
  )
  times: Times = option(
    'uniform',
    'Distribution of the times in training.',
    table=TIMES,
    marks=OF_LOSS,
  )
  weighting: Weighting = option(
    'variance',
    'Weight of each time in the loss.',
    table=WEIGHTINGS,
    marks=OF_LOSS,
  )
  reduction: Callable = option(
    'mean',
    'Reduction over the dimensions of an example.',
    table=REDUCTIONS,
    marks=OF_LOSS,
  )
  eps: float = option(
    1e-5, 'Smallest time in training.', '[0, 1)', marks=OF_LOSS
  )
  noise: Callable = option(
    'independent',
    'How the noise of a batch is given to its images in training.',
    table=ASSIGNMENTS,
  )
  uncertainty: bool = option(
    False,
    'Whether training learns the log-variance of the loss at each noise level, '
    'and divides by it (Karras et al. 2024, Eq. 14-15).',
    marks=('run',),
  )

  @property
  def smallest(self) -> float:
    """Return the smallest time that is drawn."""
    return self.times.smallest(self.eps)

  def check(self, sde: sde_lib.SDE) -> None:
    """Raise ValueError if a choice does not suit the process."""
    self.times.check(sde)
    self.weighting.check(sde)
    self.objective.check(sde)

  def __call__(
    self,
    rng: PRNGKeyArray,
    score_fn: Callable,
    sde: sde_lib.SDE,
    x0: Data,
    log_variance: Callable | None = None,
    fraction: Float[ArrayLike, ''] = 1.0,
    *,
    train: bool = True,
  ) -> PerExample:
    """Return L = lambda(t) J(s(., t)) at random times and noise.

    With a log-variance u(t) it is e^-u L + u, where u is reduced as J is; it is
    least where e^u is the mean of L at t.

    Args:
      rng: key for the times, the noise and the directions.
      score_fn: score_fn(x, t) -> score, shaped as x.
      sde: forward process.
      x0: clean data in the model's range.
      log_variance: u(t) [B] of the learned uncertainty; None for L itself.
      fraction: share of the training that is done, for 'consistency'.
      train: whether `noise` applies; test losses are of independent noise.

    Raises:
      ValueError: a choice does not suit the process.
    """
    self.check(sde)
    rng_t, rng_z, *rngs = jax.random.split(rng, self.objective.num_keys)
    t, weight = self.times(rng_t, sde, x0.shape[0], self.eps)
    z = jax.random.normal(rng_z, x0.shape)
    if train and self.noise is not independent:
      z = z[self.noise(x0, z)]
    value = self.objective.at(fraction)(
      rngs,
      score_fn,
      sde,
      x0,
      t,
      z,
      weight,
      weighting=self.weighting,
      reduction=self.reduction,
    )
    if log_variance is None:
      return value
    u = log_variance(t)
    scale = self.reduction(np.ones((1, x0[0].size))).item()
    return jnp.exp(-u) * value + scale * weight * u


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Options):
  """Cross-entropy of a classifier of noisy data (App. I.1).

  Example:
    >>> logits_fn, x0 = lambda x, t: jnp.zeros((2, 4)), jnp.zeros((2, 3))
    >>> rng, sde, label = jax.random.key(0), sde_lib.VPSDE(), jnp.array([0, 3])
    >>> Classification()(rng, logits_fn, sde, x0, label).round(3).tolist()
    [1.3860000371932983, 1.3860000371932983]
  """

  times: Times = option(
    'uniform', 'Distribution of the times in training.', table=TIMES
  )
  eps: float = option(1e-5, 'Smallest time in training.', '[0, 1)')

  @property
  def smallest(self) -> float:
    """Return the smallest time that is drawn."""
    return self.times.smallest(self.eps)

  def check(self, sde: sde_lib.SDE) -> None:
    """Raise ValueError if the times do not suit the process."""
    self.times.check(sde)

  def __call__(
    self,
    rng: PRNGKeyArray,
    logits_fn: Callable,
    sde: sde_lib.SDE,
    x0: Data,
    label: Int[ArrayLike, ' B'],
  ) -> PerExample:
    """Return -log p_t(label | x_t) at random times and noise.

    Args:
      rng: key for the times and the noise.
      logits_fn: logits_fn(x, t) -> log p_t(label | x) up to a constant of each
        example, [B, classes].
      sde: forward process.
      x0: clean data in the model's range.
      label: classes.

    Raises:
      ValueError: the times do not suit the process.
    """
    self.check(sde)
    rng_t, rng_z = jax.random.split(rng)
    t, weight = self.times(rng_t, sde, x0.shape[0], self.eps)
    x = sde.perturb(x0, t, jax.random.normal(rng_z, x0.shape))
    return weight * optax.softmax_cross_entropy_with_integer_labels(
      logits_fn(x, t), label
    )


LOSSES = {'score_matching': ScoreMatching, 'classification': Classification}
