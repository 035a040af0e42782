r"""Sampling from p(x | y) with a model of p(x) (Song et al. 2021, App. I).

By Bayes' rule the reverse-time SDE of the conditional distribution (Eq. 14) is
that of the unconditional one with the score

    grad_x log p_t(x | y) = grad_x log p_t(x) + grad_x log p_t(y | x).

So every `Guidance` here takes a score_fn(x, t), with x [B, ...] and t [B], and
returns another score_fn. All samplers accept both. Inverse problems have
measurements y = A(x_0) + noise_std n with n ~ N(0, I), where A is an `Operator`
and all values are in the units of the model.
"""

import abc
import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

import sde_lib
from runtime.options import Options, option
from sde_lib import SDE
from solvers.base import ScoreFn


@typing.runtime_checkable
class Guidance(typing.Protocol):
  """A function from a score to the score of a conditional distribution.

  Each guidance names what it needs besides the score as keyword arguments.
  """

  def __call__(self, score_fn: ScoreFn, sde: SDE, **given: Any) -> ScoreFn: ...


def told(
  score_fn: Callable,
  label: Int[ArrayLike, ' B'] | None = None,
  condition: Float[ArrayLike, ' B *dims'] | None = None,
) -> ScoreFn:
  """Return score_fn(x, t) of a network that is told classes and conditions.

  Args:
    score_fn: score_fn(x, t, label, condition), of which the last ones may be
      missing.
    label: classes; None for no class.
    condition: conditions, as the network takes them; None for none.
  """
  given = (label, condition)[: 2 if condition is not None else 1]
  if label is None and condition is None:
    return score_fn
  return lambda x, t: score_fn(x, t, *given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Options):
  """Base of guidances that have a strength."""

  scale: float = option(
    1.0,
    'Factor of the guidance: 1 for p(x | y), more for p(x) p(y | x)^scale.',
    '(-inf, inf)',
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limited(Scaled):
  """Base of guidances that may be limited to an interval of noise levels.

  Kynkaanniemi et al. (2024, arXiv 2404.07724, Eq. 5): guidance harms samples at
  high noise levels and is not needed at low ones.
  """

  interval_low: float = option(
    0.0, 'Guidance needs a noise level sigma / alpha above this.', '[0, inf)'
  )
  interval_high: float = option(
    math.inf, 'Guidance needs a noise level of at most this.', '[0, inf]'
  )

  def __post_init__(self):
    super().__post_init__()
    if self.interval_low >= self.interval_high:
      raise ValueError(
        f'config.control.interval_low={self.interval_low} needs to be below '
        f'config.control.interval_high={self.interval_high}.'
      )

  @property
  def everywhere(self) -> bool:
    """Whether there is no limit."""
    return self.interval_low == 0 and self.interval_high == math.inf

  def choose(
    self,
    sde: SDE,
    t: Float[Array, ' B'],
    guided: Float[Array, ' B *dims'],
    plain: Float[Array, ' B *dims'],
  ) -> Float[Array, ' B *dims']:
    """Return the guided score in the interval, and the plain one outside."""
    if self.everywhere:
      return guided
    alpha, sigma = sde.marginal(t)
    level = sigma / alpha
    inside = (level > self.interval_low) & (level <= self.interval_high)
    return jnp.where(sde_lib.expand(inside, plain), guided, plain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoguidance(Limited):
  """Guide by a weaker version of the network (Karras et al. 2024b, Eq. 3).

  D = D_weak + scale (D - D_weak) (arXiv 2406.02507), where the weak network is
  smaller, or was trained for a shorter time; scale=1 is no guidance. The
  denoisers belong to the same process, so it is the same for scores.

  Example:
    >>> guided = Autoguidance(scale=2.0)(
    ...   lambda x, t: -x, sde_lib.VPSDE(), weak=lambda x, t: -0.5 * x)
    >>> print(guided(jnp.ones((1, 2)), jnp.ones(1)))
    [[-1.5 -1.5]]
  """

  def __call__(
    self,
    score_fn: ScoreFn,
    sde: SDE,
    *,
    weak: ScoreFn,
    label: Int[ArrayLike, ' B'] | None = None,
    condition: Float[ArrayLike, ' B *dims'] | None = None,
  ) -> ScoreFn:
    """Return the guided score.

    Args:
      score_fn: the score, of a class and a condition if there are.
      sde: the process of both scores.
      weak: weak(x, t) -> the score of the weak network.
      label, condition: see `told`.
    """
    strong = told(score_fn, label, condition)

    def guided(x, t):
      plain = strong(x, t)
      if self.scale == 1:
        return plain
      poor = weak(x, t)
      return self.choose(sde, t, poor + self.scale * (plain - poor), plain)

    return guided


# ------------------------------------------------------------------- classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierGuidance(Limited):
  """Guide by a classifier of noisy data (Eq. 14).

  score(x, t) + scale grad_x log p_t(y | x).

  Example:
    >>> guidance = ClassifierGuidance(scale=2.0)
    >>> log_prob = lambda x, t: -x[:, 0]
    >>> guided = guidance(lambda x, t: -x, sde_lib.VPSDE(), log_prob=log_prob)
    >>> print(guided(jnp.zeros((1, 2)), jnp.ones(1)))
    [[-2.  0.]]
  """

  def __call__(
    self,
    score_fn: ScoreFn,
    sde: SDE,
    *,
    log_prob: Callable[[Array, Array], Array],
  ) -> ScoreFn:
    """Return the score of p_t(x | y).

    Args:
      score_fn: the unconditional score.
      sde: the process.
      log_prob: log_prob(x, t) -> log p_t(y | x) of the wanted class, [B].
    """

    def guided(x, t):
      gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x)
      free = score_fn(x, t)
      return self.choose(sde, t, free + self.scale * gradient, free)

    return guided


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierFree(Limited):
  """Guide by a network that is told the class (Ho & Salimans 2022, Eq. 6).

  score(x, t) + scale (score(x, t, label) - score(x, t)), and the same for
  conditions. In the paper's notation scale = 1 + w: 0 gives the unconditional
  score, 1 the conditional one, and more sharpens the classes. Only scales 0 and
  1 evaluate the network once per step, all others twice. Outside of the
  interval of noise levels it is the conditional score.

  Example:
    >>> score_fn = lambda x, t, *label: jnp.full_like(x, len(label))
    >>> guided = ClassifierFree(scale=3.0)(
    ...   score_fn, sde_lib.VPSDE(), label=jnp.zeros(1, int))
    >>> print(guided(jnp.zeros((1, 2)), jnp.ones(1)))
    [[3. 3.]]
  """

  def __call__(
    self,
    score_fn: ScoreFn,
    sde: SDE,
    *,
    label: Int[ArrayLike, ' B'] | None = None,
    condition: Float[ArrayLike, ' B *dims'] | None = None,
  ) -> ScoreFn:
    """Return the score of the given classes and conditions.

    Args:
      score_fn: score_fn(x, t) is the unconditional score, score_fn(x, t, label)
        the score given the classes.
      sde: the process.
      label, condition: see `told`; not both None.
    """
    of_given = told(score_fn, label, condition)

    def guided(x, t):
      if self.scale == 1:
        return of_given(x, t)
      free = score_fn(x, t)
      if self.scale == 0 and self.everywhere:
        return free
      given = of_given(x, t)
      return self.choose(sde, t, free + self.scale * (given - free), given)

    return guided


# ----------------------------------------------------------------- operators


def transpose(
  operator: Callable[[Array], Array], shape: tuple[int, ...]
) -> Callable[[Array], Array]:
  """Return A^T, as a function, of a linear operator on arrays of a shape.

  Args:
    operator: x -> A x, linear.
    shape: of x, [B, ...].
  """
  transposed = jax.linear_transpose(
    operator, jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  return lambda y: transposed(y)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator(Options, abc.ABC):
  """Base of measurements without their noise: x -> A(x).

  Attributes:
    orthonormal: whether A is linear with A A^T = I, as `Projection` needs it.
      The other methods accept any differentiable function.
  """

  orthonormal: ClassVar[bool] = False

  @abc.abstractmethod
  def __call__(
    self, x: Float[Array, ' B *dims']
  ) -> Float[Array, ' B *measured']:
    """Return A(x), [B, ...], for images x [B, H, W, C]."""

  def check_shape(self, shape: tuple[int, ...]) -> None:
    """Raise ValueError if data of a shape [B, ...] cannot be measured."""
    if len(shape) != 4:
      raise ValueError(
        f'{type(self).__name__} measures images, not points: unset '
        "config.control.name, or use config.control.name='labels'."
      )

  def picture(
    self, y: Float[Array, ' B *measured'], shape: tuple[int, ...]
  ) -> Float[Array, 'B H W C']:
    """Return measurements y as images in the range of the model.

    Args:
      y: measurements, shaped as A(x).
      shape: of the images, [B, H, W, C].
    """
    return transpose(self, shape)(y) if self.orthonormal else y


def _center(shape, known, rng):
  """Return the mask that hides the middle half of the height and width."""
  del known, rng
  mask = np.ones(shape, bool)
  rows, columns = (slice(n // 4, n - n // 4) for n in shape)
  mask[rows, columns] = False
  return mask


def _half(shape, known, rng):
  """Return the mask that hides the right half."""
  del known, rng
  mask = np.ones(shape, bool)
  mask[:, shape[1] // 2 :] = False
  return mask


def _random(shape, known, rng):
  """Return the mask that shows about a share `known` of the pixels."""
  return rng.random(shape) < known


MASKS = {'center': _center, 'half': _half, 'random': _random}


# A mask may be an array, which has no hash: objects are compared by identity.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Inpaint(Operator):
  """Measure the known pixels: x[:, mask].

  Example:
    >>> Inpaint(mask='half')(jnp.zeros((1, 4, 4, 3))).shape
    (1, 8, 3)
  """

  orthonormal: ClassVar[bool] = True

  mask: str | np.ndarray = option(
    'half',
    "Known pixels: 'center' (which is hidden), 'half', 'random', or an image "
    'file whose white pixels are known; in code also a boolean array [H, W].',
    path=True,
  )
  known: float = option(
    0.25, 'Share of pixels that a random mask shows.', '(0, 1)'
  )
  seed: int = option(0, 'Seed of a random mask.', '[0, inf)', given=True)

  def pixels(self, shape: tuple[int, ...]) -> Bool[np.ndarray, '*shape']:
    """Return which pixels are known, as booleans of a shape [H, W].

    Raises:
      ValueError: the mask has no such name or shape, or all pixels, or none,
        are known.
    """
    if isinstance(self.mask, np.ndarray):
      mask = np.asarray(self.mask, bool)
    elif self.mask in MASKS:
      rng = np.random.default_rng(self.seed)
      mask = MASKS[self.mask](shape, self.known, rng)
    else:
      raise ValueError(
        f'config.control.mask={self.mask!r} is neither one of {[*MASKS]} nor '
        'an image file: name a file whose white pixels are known.'
      )
    if mask.shape != shape:
      raise ValueError(
        f'config.control.mask is of shape {mask.shape}, but the data of '
        f'{shape}.'
      )
    if mask.all() or not mask.any():
      raise ValueError(
        f'config.control.mask={self.mask!r} leaves '
        f'{"no pixel unknown" if mask.all() else "no pixel known"}: use '
        'another mask or config.control.known.'
      )
    return mask

  def __call__(
    self, x: Float[Array, ' B *dims']
  ) -> Float[Array, 'B known *channels']:
    return x[:, self.pixels(x.shape[1:3])]

  def check_shape(self, shape):
    super().check_shape(shape)
    self.pixels(shape[1:3])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colorize(Operator):
  """Measure gray values, [B, H, W].

  They are sqrt(3) times the mean of the three colours: the first channel of the
  paper's orthogonal matrix (App. I.3).

  Example:
    >>> Colorize()(jnp.zeros((1, 4, 4, 3))).shape
    (1, 4, 4)
  """

  orthonormal: ClassVar[bool] = True

  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W']:
    return jnp.sum(x, axis=-1) / math.sqrt(x.shape[-1])

  def check_shape(self, shape):
    super().check_shape(shape)
    if shape[-1] != 3:
      raise ValueError(
        "config.control.name='colorize' needs a model of 3 channels, not of "
        f'config.data.num_channels={shape[-1]}.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperResolution(Operator):
  """Measure f times the mean of each block of f x f pixels.

  The result is [B, H / f, W / f, C].

  Example:
    >>> SuperResolution(factor=2)(jnp.zeros((1, 4, 4, 3))).shape
    (1, 2, 2, 3)
  """

  orthonormal: ClassVar[bool] = True

  factor: int = option(
    4, 'Ratio of the known resolution to the wanted one.', '[1, inf)'
  )

  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
    (b, h, w, c), f = x.shape, self.factor
    x = x.reshape(b, h // f, f, w // f, f, c)
    return jnp.sum(x, axis=(2, 4)) / f

  def check_shape(self, shape):
    super().check_shape(shape)
    if any(size % self.factor for size in shape[1:3]):
      size = math.gcd(*shape[1:3])
      divisors = [str(f) for f in range(1, size + 1) if size % f == 0]
      raise ValueError(
        f'config.control.factor={self.factor} does not divide '
        f'config.data.image_size={size}: use one of {", ".join(divisors)}.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deblur(Operator):
  """Measure a Gaussian blur of the image, whose edge pixels are repeated.

  Example:
    >>> Deblur(width=0.5)(jnp.zeros((1, 4, 4, 3))).shape
    (1, 4, 4, 3)
  """

  width: float = option(
    1.0, 'Standard deviation of the blur, in pixels.', '(0, 1000]'
  )

  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    radius = math.ceil(3 * self.width)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / self.width) ** 2)
    taps = taps / taps.sum()
    for axis in (1, 2):
      pad = [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)]
      padded, size = jnp.pad(x, pad, mode='edge'), x.shape[axis]
      x = sum(
        tap * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
        for i, tap in enumerate(taps)
      )
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranged(Operator):
  """Base of operators that depend on the range of the data."""

  centered: bool = option(
    False, 'Whether the data lie in [-1, 1], not in [0, 1].', given=True
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overexposed(Ranged):
  """Measure a photograph with saturated highlights: tanh(gain x).

  Here x is 0 for black and 1 for white.

  Example:
    >>> print(Overexposed(gain=10.0)(jnp.ones((1, 1, 1, 1))).item())
    1.0
  """

  gain: float = option(2.0, 'Factor of the exposure.', '(0, inf)')

  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    x = 0.5 * (x + 1) if self.centered else x
    x = jnp.tanh(self.gain * x)
    return 2 * x - 1 if self.centered else x


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseRetrieval(Ranged):
  """Measure |DFT|, orthonormal, of each channel: the phase is lost.

  The result is [B, H, W // 2 + 1, C], since the rest mirrors it.

  Example:
    >>> PhaseRetrieval()(jnp.zeros((1, 4, 4, 3))).shape
    (1, 4, 3, 3)
  """

  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H w C']:
    spectrum = jnp.fft.rfft2(x, axes=(1, 2), norm='ortho')
    # The gradient of jnp.abs at 0 is not a number, so that it is not used.
    return jnp.sqrt(jnp.real(spectrum * jnp.conj(spectrum)) + 1e-12)

  def picture(self, y, shape):
    # Noise can make measurements negative. The root of the spectrum shows more
    # than its largest value, the mean.
    y = jnp.maximum(y, 1e-12)
    y = jnp.sqrt(y / jnp.max(y, axis=(1, 2), keepdims=True))
    y = jnp.pad(y, [(0, 0), (0, 0), (0, shape[2] - y.shape[2]), (0, 0)])
    return 2 * y - 1 if self.centered else y


OPERATORS = {
  'inpaint': Inpaint,
  'colorize': Colorize,
  'super_resolution': SuperResolution,
  'deblur': Deblur,
  'overexposed': Overexposed,
  'phase_retrieval': PhaseRetrieval,
}


# --------------------------------------------------------- inverse problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Options, abc.ABC):
  """Base of guidances by measurements y = A(x_0) + noise_std n.

  Attributes:
    orthonormal_only: whether A must be linear with A A^T = I.
  """

  orthonormal_only: ClassVar[bool] = False

  noise_std: float = option(
    0.0,
    'Standard deviation of the noise of measurements, in the range of the '
    'model.',
    '[0, inf)',
  )

  @property
  def random(self) -> bool:
    """Return whether the score is random, so that the sampler must be 'pc'."""
    return False

  @abc.abstractmethod
  def __call__(
    self,
    score_fn: ScoreFn,
    sde: SDE,
    *,
    operator: Callable[[Array], Array],
    y: Float[Array, ' B *measured'],
  ) -> ScoreFn:
    """Return the score of p_t(x | y).

    Args:
      score_fn: the score of the model.
      sde: its process.
      operator: x [B, ...] -> A(x); an `Operator` or any other function.
      y: measurements, shaped as A(x).
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection(Method):
  """Impute as the paper does (App. I.2, I.3), for an A with orthonormal rows.

  A x_t is known to be distributed as N(alpha y, sigma^2 I), so the measured
  directions have the score of this Gaussian. The other directions have the
  score of the model, which assumes p_t(unseen | seen_t, y) = p_t(unseen |
  seen_t). The last denoising step returns exactly y in the measured directions.

  With noise_std > 0 the measured part of x_0 is assumed to be distributed as
  N(y, noise_std^2 I), independently of the prior.

  Example:
    >>> x, t = jnp.zeros((1, 3)), jnp.ones(1)
    >>> guided = Projection()(lambda x, t: -x, sde_lib.VPSDE(),
    ...   operator=lambda x: x[:, :1], y=jnp.ones((1, 1)))
    >>> print(guided(x, t)[0, 1:])
    [0. 0.]
  """

  orthonormal_only: ClassVar[bool] = True

  fresh_noise: bool = option(
    False,
    'Whether the model sees the known part with new noise at each time, as in '
    "the paper; needs sampling.method='pc'. Otherwise it sees that of the "
    'sampler, which follows its own exact reverse process.',
  )
  seed: int = option(0, 'Seed of the fresh noise.', '[0, inf)', given=True)

  @property
  def random(self) -> bool:
    return self.fresh_noise

  def __call__(self, score_fn, sde, *, operator, y):
    def guided(x, t):
      project, embed = operator, transpose(operator, x.shape)
      alpha, sigma = sde.marginal(t)
      mean = sde_lib.expand(alpha, y) * y
      variance = sde_lib.expand(sigma**2 + (alpha * self.noise_std) ** 2, y)
      seen_score = (mean - project(x)) / variance
      if self.fresh_noise:
        bits = jax.lax.bitcast_convert_type(t[0], jnp.uint32)
        rng = jax.random.fold_in(jax.random.key(self.seed), bits)
        z = jax.random.normal(rng, y.shape)
        x = x + embed(mean + jnp.sqrt(variance) * z - project(x))
      score = score_fn(x, t)
      return score + embed(seen_score - project(score))

    return guided


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisedGuidance(Method, Scaled):
  """Base of guidances by the gradient of log p(y | x0_hat).

  Here x0_hat = E[x_0 | x] is Tweedie's estimate by the model. It and its
  Jacobian divide the error of the network by alpha, which near t = 1 is far
  larger than the guidance itself. So the guidance is multiplied by
  1 / (1 + (ramp sigma / alpha)^2): 1 where ramp sigma < alpha, falling as
  alpha^2 towards t = 1, and smooth, as ODE solvers need it.
  """

  ramp: float = option(
    1.0,
    'Guidance fades where sigma / alpha is above 1 / ramp, because errors of '
    'the network are amplified there; 0 for the formula of the papers.',
    '[0, inf)',
  )

  def weight(
    self, sde: SDE, x: Float[Array, ' B *dims'], t: Float[Array, ' B']
  ) -> Float[Array, ' B *ones']:
    """Return 1 / (1 + (ramp sigma / alpha)^2), which multiplies x [B, ...]."""
    alpha, sigma = (sde_lib.expand(c, x) for c in sde.marginal(t))
    return 1 / (1 + (self.ramp * sigma / alpha) ** 2)


def _denoiser(score_fn, sde, t):
  """Return x -> (x0_hat, score), as `jax.vjp(..., has_aux=True)` takes it."""

  def denoised(x):
    score = score_fn(x, t)
    return sde.denoise(x, t, score), score

  return denoised


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPS(DenoisedGuidance):
  """Sample the posterior by DPS (Chung et al. 2022, arXiv 2209.14687, Eq. 16).

  p_t(y | x) = N(y; A(x0_hat), noise_std^2 I), which is right where x0_hat is
  more certain than the measurement. A is any differentiable function.

  Example:
    >>> x, t = jnp.zeros((1, 3)), jnp.ones(1)
    >>> guided = DPS(noise_std=0.1)(lambda x, t: -x, sde_lib.VESDE(),
    ...   operator=lambda x: x[:, :1], y=jnp.ones((1, 1)))
    >>> guided(x, t).shape
    (1, 3)
  """

  def __post_init__(self):
    super().__post_init__()
    if self.noise_std <= 0:
      raise ValueError(
        "config.control.method='dps' divides by config.control.noise_std: set "
        'it above 0, for example to 0.05.'
      )

  def __call__(self, score_fn, sde, *, operator, y):
    def guided(x, t):
      denoised = _denoiser(score_fn, sde, t)

      def log_likelihood(x):
        x0_hat, score = denoised(x)
        error = (y - operator(x0_hat)) / self.noise_std
        return -0.5 * jnp.sum(error**2), score

      gradient, score = jax.grad(log_likelihood, has_aux=True)(x)
      return score + self.scale * self.weight(sde, x, t) * gradient

    return guided


def _solve(matrix, b, *, tol=1e-5, max_steps=50):
  """Return matrix^-1 b by conjugate gradients, separately for each example.

  Args:
    matrix: v -> matrix v, symmetric, positive definite, shaped as b.
    b: right-hand sides [B, ...].
    tol: tolerance of the norm of the residual, relative to that of b.
    max_steps: number of steps after which the result is returned as it is.
  """

  def dot(u, v):
    return jnp.sum(u * v, axis=tuple(range(1, b.ndim)))

  def divide(u, v):
    return sde_lib.expand(jnp.where(v > 0, u / jnp.where(v > 0, v, 1), 0), b)

  def unfinished(carry):
    *_, square, step = carry
    return jnp.any(square > tol**2 * dot(b, b)) & (step < max_steps)

  def step(carry):
    x, residual, direction, square, count = carry
    image = matrix(direction)
    length = divide(square, dot(direction, image))
    residual = residual - length * image
    after = dot(residual, residual)
    ahead = residual + divide(after, square) * direction
    return x + length * direction, residual, ahead, after, count + 1

  start = jnp.zeros_like(b), b, b, dot(b, b), 0
  return jax.lax.while_loop(unfinished, step, start)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiGDM(DenoisedGuidance):
  """Guide by the pseudo-inverse of A (Song et al. 2023, "PiGDM", Eq. 7).

  p(x_0 | x) = N(x0_hat, r^2 I), so p_t(y | x) = N(A x0_hat, r^2 A A^T +
  noise_std^2 I), with the r of data N(., data_std^2 I): r^-2 = data_std^-2 +
  (alpha / sigma)^2. All of this is exact for such data. A nonlinear A is
  linearised at x0_hat. The equations are solved by conjugate gradients, which
  take one step where A A^T = I.

  Example:
    >>> x, t = jnp.zeros((1, 3)), jnp.ones(1)
    >>> guided = PiGDM()(lambda x, t: -x, sde_lib.VESDE(),
    ...   operator=lambda x: x[:, :1], y=jnp.ones((1, 1)))
    >>> guided(x, t).shape
    (1, 3)
  """

  data_std: float = option(
    0.5, 'Standard deviation of the data that is assumed.', '(0, inf)'
  )

  def __call__(self, score_fn, sde, *, operator, y):
    def guided(x, t):
      denoised = _denoiser(score_fn, sde, t)
      x0_hat, pull_back, score = jax.vjp(denoised, x, has_aux=True)
      y_hat, linear = jax.linearize(operator, x0_hat)
      adjoint = transpose(linear, x.shape)
      alpha, sigma = sde.marginal(t)
      r2 = sde_lib.expand(1 / (self.data_std**-2 + (alpha / sigma) ** 2), y)
      # Divided by r^2, the covariance has a size that does not depend on t.
      covariance = lambda v: linear(adjoint(v)) + self.noise_std**2 / r2 * v
      u = _solve(covariance, (y - y_hat) / r2)
      gradient = pull_back(adjoint(u))[0]
      return score + self.scale * self.weight(sde, x, t) * gradient

    return guided


METHODS = {'projection': Projection, 'dps': DPS, 'pigdm': PiGDM}

CONTROLS = {
  'classifier': ClassifierGuidance,
  'labels': ClassifierFree,
  'autoguidance': Autoguidance,
  **OPERATORS,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control(Options):
  """The section `control`, besides the options of guidances and operators."""

  name: Any = option(
    '',
    "What guides samples: 'classifier' or 'labels' for classes, "
    "'autoguidance' for a weaker network, the others for measurements; '' for "
    'nothing.',
    table={'': None, **CONTROLS},
  )
  label: int | str = option(
    -1, 'Class, a number or a name; -1 for all classes in turn.', '[-1, inf)'
  )
  condition: str = option(
    '',
    'File of the conditions of samples, .npy or .npz, for a network with '
    "model.condition; '' for those of the test set.",
    path=True,
  )
  classifier_workdir: str = option(
    '',
    "Folder of a trained classifier, for the control 'classifier'.",
    path=True,
  )
  weak_workdir: str = option(
    '',
    "Folder of the weak network of 'autoguidance'; '' for the run itself.",
    path=True,
  )
  weak_checkpoint: str | int = option(
    'last', "Its checkpoint: 'last', 'best' or a step."
  )
  method: Any = option(
    'projection', 'How samples are conditioned on measurements.', table=METHODS
  )
  images: str = option(
    '',
    "Folder or .npz of images to be measured; '' for the test set.",
    path=True,
  )
  num_images: int = option(8, 'Number of images that are measured.', '[1, 1e7]')
  repeats: int = option(4, 'Reconstructions of each image.', '[1, 1e6]')
