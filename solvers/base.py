r"""What all samplers share: the interface, the result, and frames on the way.

A sampler is a frozen dataclass of options, called with

    sampler(rng, score_fn, sde, z, frames=0) -> Samples

where `score_fn(x, t)` takes x [B, ...] and t [B], and need not come from a
network. z [B, ...] is the state at t = 1: a draw of the prior, or a latent
code. By default a sampler ends with the posterior mean E[x_0 | x] (Tweedie's
formula) at the smallest time.
"""

import abc
import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

import sde_lib
from runtime.options import Options, option
from solvers import grids

Rng = Key[Array, '']
State = Float[ArrayLike, ' B *dims']
Times = Float[ArrayLike, ' B']


@typing.runtime_checkable
class ScoreFn(typing.Protocol):
  """Score of the noisy data: an estimate of grad_x log p_t(x)."""

  def __call__(self, x: State, t: Times) -> Float[Array, ' B *dims']: ...


@typing.runtime_checkable
class Predictor(typing.Protocol):
  """Step from x at time t to a sample at t_next, and its mean.

  Correctors have the same interface, but stay at time t.
  """

  def __call__(
    self,
    rng: Rng,
    score_fn: ScoreFn,
    sde: sde_lib.SDE,
    x: State,
    t: Times,
    t_next: Times,
  ) -> tuple[Float[Array, ' B *dims'], Float[Array, ' B *dims']]: ...


class Samples(typing.NamedTuple):
  """Result of a sampler.

  Attributes:
    x: samples [B, ...] in the model's range.
    nfe: number of score evaluations per sample.
    success: whether an adaptive solver reached the end; else True.
    frames: states on the way, [F, B, ...], from z to x; F = 0 by default.
    times: times of the frames, [F]; the last is 0 if x is a mean of x_0.
    not_finite_at: time at which an adaptive solver found a score that is not
      finite, and stopped; else NaN.
    label: classes that the samples are of, [B]; None without classes.
  """

  x: Float[Array, ' B *dims']
  nfe: Int[Array, '']
  success: Bool[Array, '']
  frames: Float[Array, 'F B *dims']
  times: Float[Array, ' F']
  not_finite_at: Float[ArrayLike, ''] = np.float32(np.nan)
  label: Int[Array, ' B'] | None = None


@typing.runtime_checkable
class Sampler(typing.Protocol):
  """From a state at t = 1 to samples. `BaseSampler` helps to write one.

  Attributes:
    continuous: whether the score is evaluated between the levels of a discrete
      process, so that the sampler needs `sde.continuous`.
  """

  continuous: bool

  def __call__(
    self,
    rng: Rng | None,
    score_fn: ScoreFn,
    sde: sde_lib.SDE,
    z: State,
    *,
    frames: int = 0,
  ) -> Samples: ...

  def check_frames(self, frames: int) -> None:
    """Raise a ValueError if so many frames cannot be recorded."""


# ------------------------------------------------------------- base classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseSampler(Options, abc.ABC):
  """Base class of samplers: options that all have, and checks."""

  # Whether the score is evaluated between the levels of a discrete process, so
  # that the sampler needs `sde.continuous`.
  continuous = False
  # Whether states on the way can be recorded.
  records_frames = True

  eps: float = option(1e-3, 'Smallest time at which samplers stop.', '(0, 1)')
  final_denoise: bool = option(
    True, 'Whether samples end as the mean of x_0 given the state at eps.'
  )

  def __call__(
    self,
    rng: Rng | None,
    score_fn: ScoreFn,
    sde: sde_lib.SDE,
    z: State,
    *,
    frames: int = 0,
  ) -> Samples:
    """Draw samples.

    Args:
      rng: key; may be None for a deterministic sampler.
      score_fn: score_fn(x, t) -> score, shaped as x.
      sde: the process to reverse.
      z: state at t = 1, [B, ...].
      frames: number of states to record; 0 for none, otherwise at least 2.

    Raises:
      ValueError: so many frames cannot be recorded, or the time grid does not
        suit the process.
    """
    self.check_frames(frames)
    return self._sample(rng, score_fn, sde, z, frames)

  @abc.abstractmethod
  def _sample(self, rng, score_fn, sde, z, frames):
    """Draw samples; the arguments are those of `__call__`."""

  def check_frames(self, frames: int) -> None:
    """Raise a ValueError if so many frames cannot be recorded."""
    if frames < 0 or frames == 1:
      raise ValueError(
        f'sampling.frames={frames}: use 0 for none, or at least 2 (the first '
        'and the last state).'
      )
    if frames and not self.records_frames:
      raise ValueError(
        f'sampling.frames={frames}: the sampler {type(self).__name__} records '
        'no frames. Use sampling.frames=0, or another sampling.method.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedSteps(BaseSampler):
  """Base class of samplers with a fixed number of steps."""

  num_steps: int = option(
    1000,
    'Number of steps (times of the grid) of samplers with fixed steps.',
    '[1, 1e7]',
    marks=('samples', 'cost'),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridSampler(FixedSteps):
  """Base class of samplers that step along a time grid."""

  grid: grids.Grid = option(
    'uniform', 'Spacing of the times between 1 and eps.', table=grids.GRIDS
  )
  num_scales: int = option(
    0,
    'Number of noise levels that the network was trained on; times are '
    'rounded to them. 0 for continuous time.',
    '[0, inf)',
    given=True,
  )

  def levels(self, sde: sde_lib.SDE) -> int:
    """Return the number of noise levels; 0 for continuous time."""
    # The chain of DDPM has levels of its own.
    return self.num_scales or getattr(sde, 'num_scales', 0)

  def times(self, sde: sde_lib.SDE) -> Float[np.ndarray, ' N']:
    """Return the times of the grid, [num_steps], from 1 to eps."""
    return self.grid(sde, self.num_steps, self.eps, self.levels(sde))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelSampler(GridSampler):
  """Base class of samplers that run a Markov chain at each time of a grid."""

  corrector_steps: int = option(
    1, 'Langevin steps at each time of the grid.', '[1, 1e7]'
  )


# ------------------------------------------------------------------ loops


def scan_with_frames(step, carry, inputs, t, frames):
  """Scan step(carry, (t, *inputs)) -> carry, and record the state carry[0].

  Args:
    step: function of one step; t is [B] there.
    carry: start of the scan, a tuple.
    inputs: tuple of arrays [n, ...].
    t: [n + 1] times of the states before each step, and of the result.
    frames: number of states to record. `result` fills in the last of them.

  Returns:
    (carry, recorded states [F, B, ...], their times [F]).
  """
  x, t = carry[0], jnp.asarray(t)
  if frames > len(t):
    raise ValueError(
      f'sampling.frames={frames} is more than the {len(t)} states on the way: '
      'use fewer frames, or more sampling.num_steps.'
    )
  chosen = np.rint(np.linspace(0, len(t) - 1, frames)).astype(int)
  chosen = np.unique(chosen)
  slots = np.full(len(t), len(chosen))
  slots[chosen] = np.arange(len(chosen))

  def recorded(state, row):
    (carry, film), (slot, t, *inputs) = state, row
    if frames:  # States that are not recorded have a slot beyond the film.
      film = film.at[slot].set(carry[0], mode='drop')
    t = jnp.full(x.shape[:1], t, x.dtype)
    return (step(carry, (t, *inputs)), film), None

  film = jnp.zeros((len(chosen), *x.shape), x.dtype)
  rows = (slots[:-1], t[:-1], *inputs)
  (carry, film), _ = jax.lax.scan(recorded, (carry, film), rows)
  return carry, film, t[chosen]


def scan_stretches(solve, sampler, score_fn, sde, z, frames):
  """Sample by solve(i, x, t, t_next) -> solution from 1 to eps.

  Frames are evenly spaced in time, and the solver restarts at each frame. A
  solution has y, nfe, success and not_finite_at; after one that failed the
  state stays where it is.

  Args:
    solve: adaptive solver from time t to t_next, both scalars; i is the number
      of the stretch.
    sampler: sampler with eps and final_denoise.
    score_fn, sde, z, frames: arguments of `BaseSampler.__call__`.

  Returns:
    Samples.
  """
  eps, final_denoise = sampler.eps, sampler.final_denoise
  t = np.linspace(1, eps, max(frames, 2), dtype=np.float32)

  def stretch(carry, inputs):
    x, nfe, success, bad = carry
    i, t, t_next = inputs
    solution = solve(i, x, jnp.where(success, t, t_next), t_next)
    x, success = solution.y, success & solution.success
    bad = jnp.where(jnp.isnan(bad), solution.not_finite_at, bad)
    return (x, nfe + solution.nfe, success, bad), x

  start = (z, jnp.asarray(0), jnp.asarray(True), jnp.float32(jnp.nan))
  stretches = (np.arange(len(t) - 1), t[:-1], t[1:])
  (x, nfe, success, bad), film = jax.lax.scan(stretch, start, stretches)
  if final_denoise:
    x = denoise_at(score_fn, sde, x, eps)
  film = jnp.concatenate([z[None], film])[:frames]
  times = np.append(t[:-1], 0 if final_denoise else eps)[:frames]
  times = jnp.asarray(times, jnp.float32)
  found = result(x, nfe + int(final_denoise), film, times, success)
  return found._replace(not_finite_at=bad)


def denoise_at(score_fn, sde, x, t):
  """Return E[x_0 | x_t = x] for a scalar t, by one score evaluation."""
  t = jnp.full(x.shape[:1], t, x.dtype)
  return sde.denoise(x, t, score_fn(x, t))


def result(x, nfe, film, times, success=True) -> Samples:
  """Return Samples whose last frame, if there are frames, is x."""
  if len(film):
    film = film.at[-1].set(x)
  return Samples(x, jnp.asarray(nfe), jnp.asarray(success), film, times)
