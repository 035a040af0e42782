r"""Sampling from p(x | y) with a model of p(x) (Song et al. 2021, App. I).

By Bayes' rule the reverse-time SDE of the conditional distribution (Eq. 14) is
that of the unconditional one with the score

    grad_x log p_t(x | y) = grad_x log p_t(x) + grad_x log p_t(y | x).

So every `Guidance` here takes a score_fn(x, t), with x [B, ...] and t [B], and
returns another score_fn. All samplers accept both. Inverse problems have
measurements y = A(x_0) + noise_std n with n ~ N(0, I), where A is an `Operator`
or any other differentiable function of x [B, ...], and all values are in the
units of the model. Measurements may be complex: then the real and the imaginary
part have noise of that standard deviation each, and products are the real ones,
Re(conj(u) v).
"""

import abc
import ast
import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Inexact, Int, Key

import sde_lib
from runtime import user_code
from runtime.files import digest
from runtime.options import Options, option
from sde_lib import SDE
from solvers import predictors
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

  Of a complex A it is v -> Re(A^H v), so that Re<A x, v> = <x, A^T v>.

  Args:
    operator: x -> A x, linear.
    shape: of x, [B, ...].
  """
  transposed = jax.linear_transpose(
    operator, jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  return lambda y: transposed(jnp.conj(y))[0]


def noise_like(rng: Key[Array, ''], y: Inexact[Array, '*shape']) -> Array:
  """Return n ~ N(0, I) shaped as y; of complex y, in each of the two parts."""
  z = jax.random.normal(rng, y.shape, y.dtype)
  return math.sqrt(2) * z if jnp.iscomplexobj(y) else z


class SVD(typing.NamedTuple):
  """Singular value decomposition A = U diag(values) V^T of an operator.

  Attributes:
    values: singular values above 0, [...].
    to: x [B, ...] -> V^T x, [B, ...], shaped as the values.
    back: V^T x -> x, the transpose of `to`.
    of: y [B, ...] -> U^T y.
  """

  values: Array
  to: Callable[[Array], Array]
  back: Callable[[Array], Array]
  of: Callable[[Array], Array]


# Values of an example up to which a matrix of the operator is decomposed.
DENSE = 4096


def dense_svd(
  operator: Callable[[Array], Array], shape: tuple[int, ...]
) -> SVD:
  """Return the decomposition of a linear operator by that of its matrix.

  Args:
    operator: x -> A x, linear; a complex result counts as two real ones.
    shape: of x, [B, ...].

  Raises:
    ValueError: an example has more than `DENSE` values.
  """
  size = math.prod(shape[1:])
  if size > DENSE:
    raise ValueError(
      f'The matrix of an operator on {size} values is too large to be '
      f'decomposed (at most {DENSE}): give the operator a method `svd`, or use '
      "config.control.method='mmps', 'pigdm' or 'diffpir'."
    )

  def flat(y):
    y = y.reshape(y.shape[0], -1)
    parts = [y.real, y.imag] if jnp.iscomplexobj(y) else [y]
    return jnp.concatenate(parts, axis=1)

  with jax.ensure_compile_time_eval():
    basis = jnp.eye(size).reshape(size, *shape[1:])
    matrix = np.asarray(
      jax.jit(lambda x: flat(operator(x)))(basis), np.float64
    ).T
  u, values, vt = np.linalg.svd(matrix, full_matrices=False)
  kept = values > 1e-5 * values.max()
  u, vt = (jnp.float32(v) for v in (u[:, kept], vt[kept]))
  return SVD(
    values=jnp.float32(values[kept]),
    to=lambda x: x.reshape(x.shape[0], -1) @ vt.T,
    back=lambda c: (c @ vt).reshape(-1, *shape[1:]),
    of=lambda y: flat(y) @ u,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator(Options, abc.ABC):
  """Base of measurements without their noise: x -> A(x).

  Attributes:
    linear: whether A is linear, as `DDRM` needs it.
    orthonormal: whether A is linear with A A^T = I on its range, as
      `Projection` needs it. The other methods accept any differentiable
      function.
  """

  linear: ClassVar[bool] = False
  orthonormal: ClassVar[bool] = False

  @abc.abstractmethod
  def __call__(
    self, x: Float[Array, ' B *dims']
  ) -> Inexact[Array, ' B *measured']:
    """Return A(x), [B, ...], for images x [B, H, W, C]."""

  def check_shape(self, shape: tuple[int, ...]) -> None:
    """Raise ValueError if data of a shape [B, ...] cannot be measured."""
    if len(shape) != 4:
      raise ValueError(
        f'{type(self).__name__} measures images, not points: unset '
        "config.control.name, or use config.control.name='labels'."
      )

  def svd(self, shape: tuple[int, ...]) -> SVD:
    """Return the decomposition of a linear A, on x of a shape [B, ...]."""
    return find_svd(self, shape)

  def picture(
    self, y: Inexact[Array, ' B *measured'], shape: tuple[int, ...]
  ) -> Float[Array, ' B *dims']:
    """Return measurements y as images in the range of the model.

    Args:
      y: measurements, shaped as A(x).
      shape: of the images, [B, H, W, C].
    """
    return transpose(self, shape)(y) if self.orthonormal else y


def find_svd(operator: Callable[[Array], Array], shape: tuple[int, ...]) -> SVD:
  """Return the decomposition of a linear operator on x of a shape [B, ...].

  It is trivial where A A^T = I, otherwise that of `dense_svd`.
  """
  if not getattr(operator, 'orthonormal', False):
    return dense_svd(operator, shape)
  with jax.ensure_compile_time_eval():
    y = jax.eval_shape(operator, jax.ShapeDtypeStruct(shape, jnp.float32))
  return SVD(
    values=jnp.ones(y.shape[1:]),
    to=operator,
    back=transpose(operator, shape),
    of=lambda y: y,
  )


def _center(shape, known, rng):
  """Return the mask that hides the middle half of each axis."""
  del known, rng
  mask = np.ones(shape, bool)
  mask[tuple(slice(n // 4, n - n // 4) for n in shape)] = False
  return mask


def _half(shape, known, rng):
  """Return the mask that hides the right half, or the end of a signal."""
  del known, rng
  mask = np.ones(shape, bool)
  mask[..., shape[-1] // 2 :] = False
  return mask


def _random(shape, known, rng):
  """Return the mask that shows about a share `known` of the pixels."""
  return rng.random(shape) < known


MASKS = {'center': _center, 'half': _half, 'random': _random}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Subset(Operator):
  """Base of operators that measure a part of the values."""

  linear: ClassVar[bool] = True
  orthonormal: ClassVar[bool] = True

  known: float = option(
    0.25,
    'Share of pixels that a random mask shows, or of rows of frequencies that '
    'are measured.',
    '(0, 1)',
  )
  seed: int = option(0, 'Seed of a random mask.', '[0, inf)', given=True)


def _space(shape):
  """Return the axes of space of [B, *space, C]; those of points are [D]."""
  return shape[1:-1] or shape[1:]


# A mask may be an array, which has no hash: objects are compared by identity.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Inpaint(_Subset):
  """Measure the known pixels: x[:, mask].

  Example:
    >>> Inpaint(mask='half')(jnp.zeros((1, 4, 4, 3))).shape
    (1, 8, 3)
  """

  mask: str | np.ndarray = option(
    'half',
    "Known pixels: 'center' (which is hidden), 'half', 'random', or a file: an "
    'image whose white pixels are known, or an .npy of booleans that has the '
    'axes of space; in code also such an array.',
    path=True,
  )

  def pixels(self, shape: tuple[int, ...]) -> Bool[np.ndarray, '*shape']:
    """Return which pixels are known, as booleans of the shape of space, [H, W].

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
    return x[:, self.pixels(_space(x.shape))]

  def check_shape(self, shape):
    self.pixels(_space(shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colorize(Operator):
  """Measure gray values, [B, H, W].

  They are sqrt(3) times the mean of the three colours: the first channel of the
  paper's orthogonal matrix (App. I.3).

  Example:
    >>> Colorize()(jnp.zeros((1, 4, 4, 3))).shape
    (1, 4, 4)
  """

  linear: ClassVar[bool] = True
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

  linear: ClassVar[bool] = True
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

  linear: ClassVar[bool] = True

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
    >>> print(f'{Overexposed(gain=10.0)(jnp.ones((1, 1, 1, 1))).item():.3f}')
    1.000
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fourier(_Subset):
  """Measure complex Fourier coefficients, as magnetic resonance imaging does.

  The rows of the orthonormal DFT with the lowest frequencies, a third of those
  that are measured, are all there; the others are drawn. The result is [B,
  rows, W // 2 + 1, C], since the rest mirrors it. Coefficients that stand for
  two are multiplied by sqrt(2), so that A A^T = I on the range of A.

  Example:
    >>> y = Fourier(known=0.5)(jnp.zeros((1, 4, 4, 3)))
    >>> y.shape, y.dtype
    ((1, 2, 3, 3), dtype('complex64'))
  """

  def rows(self, height: int) -> np.ndarray:
    """Return the indices of the rows that are measured, sorted."""
    count = max(1, round(self.known * height))
    near = np.argsort(np.abs(np.fft.fftfreq(height)), kind='stable')
    low, rest = np.split(near, [-(-count // 3)])
    rng = np.random.default_rng(self.seed)
    return np.sort([*low, *rng.permutation(rest)[: count - len(low)]])

  def __call__(self, x: Float[Array, 'B H W C']) -> Inexact[Array, 'B r w C']:
    width, rows = x.shape[2], self.rows(x.shape[1])
    # Row k of the half spectrum mirrors row -k where it is its own mirror
    # column: at frequency 0 and, for an even width, at the highest one.
    columns, single = np.arange(width // 2 + 1), np.zeros(width // 2 + 1)
    single[(2 * columns) % width == 0] = 1
    both = np.isin(-rows % x.shape[1], rows)  # The mirrored row is there too.
    own = 2 * rows % x.shape[1] == 0
    weight = np.where(
      single[None, :] * (both | own)[:, None], 1.0, math.sqrt(2)
    )
    spectrum = jnp.fft.rfft2(x, axes=(1, 2), norm='ortho')[:, rows]
    return spectrum * jnp.float32(weight)[None, :, :, None]

  def picture(self, y, shape):
    return transpose(self, shape)(y)


def parse_options(text: str) -> dict[str, Any]:
  """Return the keyword arguments of a text such as "width=2, mode='edge'".

  Raises:
    ValueError: the text has another form.
  """
  try:
    call = ast.parse(f'f({text})', mode='eval').body
    if call.args or not all(keyword.arg for keyword in call.keywords):
      raise ValueError
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords}
  except (ValueError, SyntaxError, AttributeError):
    raise ValueError(
      f'config.control.operator_options={text!r} are no keyword arguments: '
      "write them as width=2, mode='edge'."
    ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Operator):
  """Measure by a function of the user, A(x, **options) for x [B, ...].

  It may be nonlinear or complex, and x of any shape. Whether it is linear, and
  whether A A^T = I, is found by `check_shape` on random numbers.

  Example:
    >>> Own(operator='jax.numpy:cumsum', operator_options='axis=1')(
    ...   jnp.ones((1, 3))).tolist()
    [[1.0, 2.0, 3.0]]
  """

  operator: str = option(
    '', "Function of x [B, ...] that measures, as 'module:function'."
  )
  operator_options: str = option(
    '', "Its keyword arguments, such as width=2, mode='edge'."
  )

  @functools.cached_property
  def _found(self):
    if not self.operator:
      raise ValueError(
        "config.control.name='own' needs config.control.operator: set it to "
        "your function, as 'module:function'."
      )
    function, source = user_code.find('control.operator', self.operator)
    return function, parse_options(self.operator_options), source

  @property
  def version(self) -> str:
    """Return a digest of what the function depends on: its module's source."""
    return digest(self._found[2])[:8]

  def __call__(self, x: Float[Array, ' B *dims']) -> Any:
    function, options, _ = self._found
    return function(x, **options)

  def _wrong(self, what):
    return ValueError(f'config.control.operator={self.operator!r} {what}')

  def check_shape(self, shape):
    """Raise ValueError for a function that cannot measure x of a shape.

    Tested: arrays of JAX go in and come out, one measurement for each example
    that does not depend on the others, with a derivative that is finite and not
    0 everywhere. Then `linear` and `orthonormal` are set.
    """
    shape = (3, *shape[1:])
    rng = np.random.default_rng(0)
    x, v = jnp.float32(rng.standard_normal((2, *shape)))
    found = jax.eval_shape(self, jax.ShapeDtypeStruct(shape, jnp.float32))
    dtype = getattr(found, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
      raise self._wrong(
        f'returns {dtype or type(found).__name__}, which has no derivative: '
        'return one array of real or complex floats.'
      )
    if found.shape[:1] != shape[:1]:
      raise self._wrong(
        f'makes {found.shape} of {shape}: the first axis is the batch, which '
        'must not change.'
      )
    y, change = jax.jvp(self, (x,), (v,))
    if not (jnp.isfinite(y).all() and jnp.isfinite(change).all()):
      raise self._wrong('returns numbers, or derivatives, that are not finite.')
    if not change.any():
      raise self._wrong(
        'has the derivative 0 everywhere, as rounding has: make it smooth.'
      )
    if not jnp.allclose(y[:1], self(x[:1]), rtol=1e-3, atol=1e-4):
      raise self._wrong(
        'mixes examples: a measurement may depend on one example only.'
      )
    close = lambda a, b: bool(jnp.allclose(a, b, rtol=1e-3, atol=1e-4))
    linear = close(self(2 * x - v), 2 * y - self(v)) and close(
      y, jax.jvp(self, (v,), (x,))[1]
    )
    # A A^T A = A: on the range of A.
    flat = linear and close(self(transpose(self, shape)(y)), y)
    object.__setattr__(self, 'linear', linear)
    object.__setattr__(self, 'orthonormal', flat)

  def picture(self, y, shape):
    if y.shape == shape and not jnp.iscomplexobj(y):
      return y
    back = jax.vjp(self, jnp.zeros(shape))[1](jnp.conj(y))[0]
    return jnp.nan_to_num(back)


OPERATORS = {
  'inpaint': Inpaint,
  'colorize': Colorize,
  'super_resolution': SuperResolution,
  'deblur': Deblur,
  'overexposed': Overexposed,
  'phase_retrieval': PhaseRetrieval,
  'fourier': Fourier,
  'own': Own,
}


# --------------------------------------------------------- inverse problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Options, abc.ABC):
  """Base of guidances by measurements y = A(x_0) + noise_std n.

  Attributes:
    orthonormal_only: whether A must be linear with A A^T = I.
    linear_only: whether A must be linear.
    own_steps: whether it is a Markov chain, which only the predictor 'ddim' of
      the sampler 'pc' follows.
  """

  orthonormal_only: ClassVar[bool] = False
  linear_only: ClassVar[bool] = False
  own_steps: ClassVar[bool] = False

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
    y: Inexact[Array, ' B *measured'],
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
        z = noise_like(rng, y)
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


def _square(v):
  """Return |v|^2 of real or complex numbers."""
  return v.real**2 + v.imag**2 if jnp.iscomplexobj(v) else v**2


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
        return -0.5 * jnp.sum(_square(error)), score

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
    product = jnp.real(jnp.conj(u) * v)
    return jnp.sum(product, axis=tuple(range(1, b.ndim)))

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
class GaussianGuidance(DenoisedGuidance):
  """Base of methods with p(x_0 | x) = N(x0_hat, V), V = level^2 S.

      grad log p_t(y | x) = J^T A^T (A V A^T + noise_std^2 I)^-1 (y - A x0_hat)

  J is the Jacobian of x0_hat. A nonlinear A is linearised at x0_hat. The
  equations are solved by at most `max_steps` steps of conjugate gradients.
  """

  max_steps: ClassVar[int] = 50

  @abc.abstractmethod
  def level2(self, alpha, sigma):
    """Return level^2 [B]; divided by it, V has a size free of t."""

  @abc.abstractmethod
  def spread(self, alpha, pull_back, v):
    """Return S v for v [B, ...]; pull_back(v) is (J^T v,)."""

  def __call__(self, score_fn, sde, *, operator, y):
    def guided(x, t):
      denoised = _denoiser(score_fn, sde, t)
      x0_hat, pull_back, score = jax.vjp(denoised, x, has_aux=True)
      y_hat, linear = jax.linearize(operator, x0_hat)
      adjoint = transpose(linear, x.shape)
      alpha, sigma = sde.marginal(t)
      level2 = sde_lib.expand(self.level2(alpha, sigma), y)

      def covariance(v):
        image = linear(self.spread(alpha, pull_back, adjoint(v)))
        return image + self.noise_std**2 / level2 * v

      u = _solve(covariance, (y - y_hat) / level2, max_steps=self.max_steps)
      gradient = pull_back(adjoint(u))[0]
      return score + self.scale * self.weight(sde, x, t) * gradient

    return guided


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiGDM(GaussianGuidance):
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

  def level2(self, alpha, sigma):
    return 1 / (self.data_std**-2 + (alpha / sigma) ** 2)

  def spread(self, alpha, pull_back, v):
    return v


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMPS(GaussianGuidance):
  """Match the moments of p(x_0 | x) (Rozet et al. 2024, arXiv 2405.13712).

  p(x_0 | x) = N(x0_hat, V) with the covariance V = sigma^2 / alpha J, where J
  is the Jacobian of x0_hat (Tweedie's formula of second order; TMPD of Boys et
  al. 2023, arXiv 2310.06721, has the same moments). So

      grad log p_t(y | x) = J^T A^T (A V A^T + noise_std^2 I)^-1 (y - A x0_hat),

  exact for Gaussian data of any covariance and a linear A. A nonlinear A is
  linearised at x0_hat. The equations are solved by conjugate gradients, whose
  steps take a product with J each.

  Example:
    >>> x, t = jnp.zeros((1, 3)), jnp.ones(1)
    >>> guided = MMPS(noise_std=0.1)(lambda x, t: -x, sde_lib.VPSDE(),
    ...   operator=lambda x: x[:, :1], y=jnp.ones((1, 1)))
    >>> guided(x, t).shape
    (1, 3)
  """

  cg_steps: int = option(
    5,
    'Steps of conjugate gradients in mmps, each a product with the Jacobian '
    'of the network; more are more exact, unless the network is not.',
    '[1, 1000]',
  )

  @property
  def max_steps(self):
    return self.cg_steps

  def level2(self, alpha, sigma):
    return (sigma / alpha) ** 2

  def spread(self, alpha, pull_back, v):
    return sde_lib.expand(alpha, v) * pull_back(v)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffPIR(Method):
  """Restore x0_hat by the measurement (Zhu et al. 2023, arXiv 2305.08995).

  The estimate x0_hat of the model is replaced by the solution of

      argmin_x |y - A x|^2 + rho |x - x0_hat|^2,

  with rho = lam noise_std^2 (alpha / sigma)^2 (their Algorithm 1), which takes
  no derivative of the network. A nonlinear A is linearised at x0_hat. Their
  sampler is 'pc' with the predictor 'ddim' and eta = sqrt(zeta).

  Example:
    >>> x, t = jnp.zeros((1, 3)), jnp.ones(1)
    >>> guided = DiffPIR(noise_std=0.1)(lambda x, t: -x, sde_lib.VPSDE(),
    ...   operator=lambda x: x[:, :1], y=jnp.ones((1, 1)))
    >>> guided(x, t).shape
    (1, 3)
  """

  lam: float = option(
    1.0,
    'Weight of the estimate of the model against the measurement in diffpir; '
    '1 where the prior hardly restricts the data.',
    '(0, inf)',
  )

  def __call__(self, score_fn, sde, *, operator, y):
    def guided(x, t):
      x0_hat = sde.denoise(x, t, score_fn(x, t))
      y_hat, linear = jax.linearize(operator, x0_hat)
      adjoint = transpose(linear, x.shape)
      alpha, sigma = sde.marginal(t)
      rho = self.lam * self.noise_std**2 * (alpha / sigma) ** 2
      rho = sde_lib.expand(rho, y)
      u = _solve(lambda v: linear(adjoint(v)) + rho * v, y - y_hat)
      return _score_of(sde, x, t, x0_hat + adjoint(u))

    return guided


def _score_of(sde, x, t, x0_hat):
  """Return the score whose E[x_0 | x] is x0_hat; inverse of `SDE.denoise`."""
  alpha, sigma = (sde_lib.expand(c, x) for c in sde.marginal(t))
  return (alpha * x0_hat - x) / sigma**2


@dataclasses.dataclass(frozen=True)
class Chain:
  """A score that brings its own step, for the predictor 'ddim'.

  Attributes:
    score: (x, t) -> score.
    step: (rng, x, t, t_next, eta) -> (x, x_mean), as of a predictor.
  """

  score: Callable
  step: Callable

  def __call__(self, x, t):
    """Return the score at x [B, ...] and times t [B]."""
    return self.score(x, t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDRM(Method):
  """Restore in spectral space (Kawar et al. 2022, arXiv 2201.11793, Eq. 7-8).

  With A = U S V^T, the coordinate V^T x of singular value s is known to be yb =
  (U^T y) / s, with noise of standard deviation noise_std / s. With the estimate
  xb of the model and the level r = sigma / alpha, its next state is alpha times

      xb + r (sqrt(1 - eta^2) n + eta z)                  if s = 0 (DDIM),
      xb + sqrt(1 - eta^2) r (yb - xb) / (noise_std / s) + eta r z
                                                          if r < noise_std / s,
      (1 - eta_b) xb + eta_b yb + sqrt(r^2 - (eta_b noise_std / s)^2) z   else.

  It is a Markov chain: eta is that of the predictor 'ddim' of the sampler 'pc',
  0.85 in the paper with 20 steps. The score itself, which the last denoising
  step uses, replaces coordinates of the third kind by (1 - eta_b) xb + eta_b
  yb.

  Example:
    >>> x, t = jnp.zeros((1, 3)), jnp.ones(1)
    >>> guided = DDRM()(lambda x, t: -x, sde_lib.VPSDE(),
    ...   operator=lambda x: 2 * x[:, :1], y=jnp.ones((1, 1)))
    >>> x0_hat = sde_lib.VPSDE().denoise(x, t, guided(x, t))
    >>> print(x0_hat.round(3))
    [[0.5 0.  0. ]]
  """

  linear_only: ClassVar[bool] = True
  own_steps: ClassVar[bool] = True

  eta_b: float = option(
    1.0, 'Weight of the measurement in ddrm where noise is stronger.', '[0, 1]'
  )

  def _coordinates(self, sde, x, t, x0_hat, operator, y, eta):
    """Return (mean, standard deviation, SVD) of V^T x_0 at times t."""
    svd = getattr(operator, 'svd', lambda shape: find_svd(operator, shape))(
      x.shape
    )
    s, known, guess = svd.values[None], svd.of(y), svd.to(x0_hat)
    alpha, sigma = (sde_lib.expand(c, guess) for c in sde.marginal(t))
    level, blur = sigma / alpha, self.noise_std / s
    loud = level >= blur
    # s / noise_std is not needed where noise_std is 0.
    pull = (known - s * guess) / max(self.noise_std, 1e-30)
    mean = jnp.where(
      loud,
      guess + self.eta_b * (known / s - guess),
      guess + math.sqrt(1 - eta**2) * level * pull,
    )
    left = jnp.maximum(level**2 - (self.eta_b * blur) ** 2, 0)
    return mean, jnp.where(loud, jnp.sqrt(left), eta * level), svd

  def __call__(self, score_fn, sde, *, operator, y):
    def score(x, t):
      x0_hat = sde.denoise(x, t, score_fn(x, t))
      # With eta = 1 coordinates of the second kind stay as they are.
      mean, _, svd = self._coordinates(sde, x, t, x0_hat, operator, y, 1.0)
      x0_hat = x0_hat + svd.back(mean - svd.to(x0_hat))
      return _score_of(sde, x, t, x0_hat)

    def step(rng, x, t, t_next, eta):
      x0_hat = sde.denoise(x, t, score_fn(x, t))
      rng, rng_seen = jax.random.split(rng)
      mean, std, svd = self._coordinates(
        sde, x, t_next, x0_hat, operator, y, eta
      )
      alpha = sde_lib.expand(sde.marginal(t_next)[0], mean)
      seen_mean = alpha * mean
      seen = seen_mean + alpha * std * noise_like(rng_seen, mean)
      free, free_mean = predictors.ddim(rng, sde, x, t, t_next, x0_hat, eta)
      place = lambda x, c: x + svd.back(c - svd.to(x))
      return place(free, seen), place(free_mean, seen_mean)

    return Chain(score, step)


METHODS = {
  'projection': Projection,
  'dps': DPS,
  'pigdm': PiGDM,
  'mmps': MMPS,
  'diffpir': DiffPIR,
  'ddrm': DDRM,
}

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
  measurements: str = option(
    '',
    'File (.npy, or .npz with measurements) of measurements in the range of '
    "the model, in place of images; '' to measure images.",
    path=True,
  )
  num_images: int = option(8, 'Number of images that are measured.', '[1, 1e7]')
  repeats: int = option(4, 'Reconstructions of each image.', '[1, 1e6]')
