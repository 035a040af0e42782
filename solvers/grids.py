r"""Time grids: the times between t = 1 and eps at which a sampler steps.

A grid is evenly spaced in some function of time. Half the log signal-to-noise
ratio, lambda = log(alpha / sigma), and its inverse convert between noise levels
and times for every process.
"""

import abc
import dataclasses
import functools

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, PyTree, Real

import sde_lib
from runtime.options import Options, option

Count = int | np.integer


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(sde, method, v):
  return getattr(sde, method)(v)


def float64(
  sde: sde_lib.SDE, method: str, v: Real[ArrayLike, '*T']
) -> PyTree[Float[np.ndarray, '*T']]:
  """Return sde.method(v) in float64 numpy, while a program is traced as well.

  The values are filled up to a power of two, so that grids of about the same
  length share one compiled program.

  Args:
    sde: the process.
    method: name of a function of single times, such as 'marginal'.
    v: its argument.
  """
  v = np.asarray(v, np.float64)
  filled = np.resize(v, 1 << max(v.size - 1, 63).bit_length())
  with jax.ensure_compile_time_eval(), jax.enable_x64(True):
    found = _compiled(sde, method, filled)
    return jax.tree.map(
      lambda f: np.asarray(f, np.float64)[: v.size].reshape(v.shape), found
    )


def half_log_snr(
  sde: sde_lib.SDE, t: Real[ArrayLike, '*T']
) -> Float[ArrayLike, '*T']:
  """Return lambda = log(alpha / sigma) at times t, in float64 numpy."""
  return 0.5 * float64(sde, 'log_snr', t)


def marginal(
  sde: sde_lib.SDE, t: Real[ArrayLike, '*T']
) -> tuple[Float[np.ndarray, '*T'], Float[np.ndarray, '*T']]:
  """Return (alpha, sigma) at times t, in float64 numpy."""
  return float64(sde, 'marginal', t)


def _labels(t, num_scales):
  """Return the indices of the noise levels nearest to times t."""
  return np.rint(np.asarray(t) * (num_scales - 1)).astype(int)


def times(
  sde: sde_lib.SDE, lam: Real[ArrayLike, '*T'], num_scales: int = 0
) -> Float[np.ndarray, '*T']:
  """Return the times in [0, 1] at which lambda is nearest to `lam`, float32.

  Args:
    sde: the process.
    lam: wanted values of lambda.
    num_scales: number of noise levels; the result consists of times of levels.
      0 for continuous time.
  """
  lam = np.asarray(lam)
  if not num_scales:
    return float64(sde, 'time', 2 * lam).astype(np.float32)
  all_times = np.linspace(0, 1, num_scales)
  distance = np.abs(half_log_snr(sde, all_times) - lam[..., None])
  return all_times[distance.argmin(-1)].astype(np.float32)


def before(
  sde: sde_lib.SDE,
  t: Real[ArrayLike, '*T'],
  lam: Real[ArrayLike, '*T'],
  num_scales: int = 0,
) -> Float[np.ndarray, '*T']:
  """Return `times`, but with discrete levels at least one level below t."""
  found = times(sde, lam, num_scales)
  if num_scales:
    lower = np.maximum(_labels(t, num_scales) - 1, 0)
    found = np.minimum(found, np.float32(lower / (num_scales - 1)))
  return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(Options, abc.ABC):
  """Rule for the times of a sampler."""

  @abc.abstractmethod
  def spaced(
    self, sde: sde_lib.SDE, num_steps: Count, eps: float, num_scales: int
  ) -> Float[np.ndarray, ' N']:
    """Return decreasing times [num_steps] from about 1 to about eps."""

  def __call__(
    self,
    sde: sde_lib.SDE,
    num_steps: Count,
    eps: float | int,
    num_scales: int = 0,
  ) -> Float[np.ndarray, ' N']:
    """Return strictly decreasing times [num_steps] from 1 to eps, float32.

    Args:
      sde: the process.
      num_steps: number of times, at least 1.
      eps: last time, in [0, 1).
      num_scales: number of noise levels that the network was trained on, or 0
        for continuous time. With levels all times are times of levels, each
        used once, and the last is that of level 0 whatever eps is.

    Raises:
      ValueError: there are fewer than 1 steps, or fewer levels than steps.
    """
    if num_steps < 1:
      raise ValueError(f'sampling.num_steps={num_steps} must be at least 1.')
    if num_scales and num_steps > num_scales:
      raise ValueError(
        f'sampling.num_steps={num_steps} is more than the {num_scales} noise '
        'levels that this network was trained on.'
      )
    ends = np.linspace(1, 0 if num_scales else eps, num_steps)
    t = np.array(self.spaced(sde, num_steps, ends[-1], num_scales))
    t[0], t[-1] = ends[0], ends[-1]
    if not num_scales:
      t = t.astype(np.float32)
      if not (np.diff(t) < 0).all():
        raise ValueError(
          f'sampling.num_steps={num_steps} is too many for sampling.eps={eps} '
          'and sampling.grid: times would repeat in float32. Use fewer.'
        )
      return t
    steps = np.arange(num_steps)
    # At least one level apart, with enough levels left for the later steps.
    labels = np.minimum.accumulate(_labels(t, num_scales) + steps) - steps
    labels = np.maximum(labels, steps[::-1])
    return (labels / (num_scales - 1)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Grid):
  """Evenly spaced in t, as in the paper.

  Example:
    >>> Uniform()(sde_lib.VPSDE(), 3, 0.5)
    array([1.  , 0.75, 0.5 ], dtype=float32)
  """

  def spaced(
    self, sde: sde_lib.SDE, num_steps: Count, eps: float, num_scales: int
  ) -> Float[np.ndarray, ' N']:
    del sde, num_scales
    return np.linspace(1, eps, num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSNR(Grid):
  """Evenly spaced in lambda, as in DPM-Solver (Lu et al. 2022).

  Example:
    >>> LogSNR()(sde_lib.VESDE(sigma_min=0.1, sigma_max=10.0), 3, 0.5)
    array([1.  , 0.75, 0.5 ], dtype=float32)
  """

  def spaced(
    self, sde: sde_lib.SDE, num_steps: Count, eps: float, num_scales: int
  ) -> Float[np.ndarray, ' N']:
    first, last = half_log_snr(sde, np.array([1.0, eps]))
    return times(sde, np.linspace(first, last, num_steps), num_scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM(Grid):
  """Evenly spaced in (sigma / alpha)^(1 / rho) (Karras et al. 2022, Eq. 5).

  Example:
    >>> EDM(rho=1.0)(sde_lib.EDM(), 3, 0.5)
    array([1.  , 0.75, 0.5 ], dtype=float32)
  """

  rho: float = option(
    7.0, 'Exponent of the grid edm; larger: more small steps.', '(0, inf)'
  )

  def spaced(
    self, sde: sde_lib.SDE, num_steps: Count, eps: float, num_scales: int
  ) -> Float[np.ndarray, ' N']:
    noise = np.exp(-half_log_snr(sde, np.array([1.0, eps])))
    first, last = noise ** (1 / self.rho)
    lam = -self.rho * np.log(np.linspace(first, last, num_steps))
    return times(sde, lam, num_scales)


GRIDS = {'uniform': Uniform, 'edm': EDM, 'log_snr': LogSNR}
