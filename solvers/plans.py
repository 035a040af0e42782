r"""Fast solvers of the reverse process, as plans of linear combinations.

In terms of lambda = log(alpha / sigma) the probability-flow ODE is solved from
time s to t < s by (Lu et al. 2022b, Proposition 4.1)

    x_t = sigma_t / sigma_s x_s + alpha_t int_0^h e^(u - h) D(lambda_s + u) du,

where h = lambda_t - lambda_s, and D is the data prediction E[x_0 | x] on the
way. Every solver in this module (DDIM, DPM-Solver++, UniPC and Heun's method)
replaces the integral by a weighted sum of a few predictions. The weights depend
only on the grid, so the method `plan` of a solver writes them down as a `Plan`,
in float64, before anything runs; one loop, `carry_out`, runs all plans. The
loop holds

    x        the state at which the next prediction D_0 = E[x_0 | x] is made
    base     the state at the start of a step; x may be a stage of the step
    D_0, ..  predictions, the latest first

Only (alpha, sigma) are used, so the solvers work for every linear SDE.
"""

import abc
import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

import sde_lib
from runtime.options import option
from solvers import base, grids, ode


class Plan(typing.NamedTuple):
  """What to do after each of n predictions, with the K latest of them.

  First base <- keep . (x, base, D_0, .., D_K-1), then
  x <- move . (base, D_0, .., D_K-1) + noise z.

  Attributes:
    t: times of the predictions, [n].
    keep: weights of the new base, [n, 2 + K].
    move: weights of the new x, [n, 1 + K].
    noise: standard deviations, [n].
  """

  t: np.ndarray
  keep: np.ndarray
  move: np.ndarray
  noise: np.ndarray


def _empty(t, depth):
  """Return a plan with base <- x and x <- 0 at all times."""
  keep = np.zeros((len(t), 2 + depth))
  keep[:, 0] = 1
  move, noise = np.zeros((len(t), 1 + depth)), np.zeros(len(t))
  return Plan(np.array(t), keep, move, noise)


def with_denoising(plan: Plan, t: Real[ArrayLike, '']) -> Plan:
  """Return the plan followed by a last prediction, at t, as the result."""
  last = _empty([t], plan.move.shape[1] - 1)
  last.move[0, 1] = 1
  return Plan(
    *(np.concatenate(parts) for parts in zip(plan, last, strict=True))
  )


def carry_out(
  plan: Plan,
  rng: base.Rng | None,
  score_fn: base.ScoreFn,
  sde: sde_lib.SDE,
  z: base.State,
  *,
  noisy: bool,
  end: Real[ArrayLike, ''],
  frames: int = 0,
) -> tuple[
  Float[Array, ' B *dims'], Float[Array, 'F B *dims'], Float[Array, ' F']
]:
  """Carry out a plan, from z on.

  Args:
    plan: the plan.
    rng, score_fn, sde, z, frames: as in `base.BaseSampler.__call__`.
    noisy: whether the plan has noise.
    end: time of the result.

  Returns:
    (x, frames without the last, their times).
  """

  def mix(weights, *states):
    return ode.combine(weights, jnp.concatenate(states))

  def advance(carry, inputs):
    (x, start, past), (t, i, keep, move, noise) = carry, inputs
    prediction = sde.denoise(x, t, score_fn(x, t))
    past = jnp.concatenate([prediction[None], past[:-1]])
    start = mix(keep, x[None], start[None], past)
    x = mix(move, start[None], past)
    if noisy:
      key = jax.random.fold_in(rng, i)
      x = x + noise * jax.random.normal(key, x.shape, x.dtype)
    return x, start, past

  weights = (jnp.asarray(v, z.dtype) for v in plan[1:])
  past = jnp.zeros((plan.move.shape[1] - 1, *z.shape), z.dtype)
  (x, *_), film, times = base.scan_with_frames(
    advance,
    (z, z, past),
    (np.arange(len(plan.t)), *weights),
    jnp.append(plan.t, end),
    frames,
  )
  return x, film, times


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSampler(base.GridSampler):
  """Base class of the fast solvers.

  num_steps is the number of times of the grid, so there is one step less.
  """

  @abc.abstractmethod
  def plan(self, sde: sde_lib.SDE, t: Float[np.ndarray, ' N']) -> Plan:
    """Return the plan of the steps between the times t [N] of a grid."""

  def _sample(self, rng, score_fn, sde, z, frames):
    t = self.times(sde)
    if not (np.diff(grids.half_log_snr(sde, t)) > 0).all():
      raise ValueError(
        f'sampling.num_steps={self.num_steps} is too many for the '
        f'{type(sde).__name__}: two times have the same noise level. Use '
        'fewer, or sampling.grid=log_snr.'
      )
    plan = self.plan(sde, t)
    if self.final_denoise:
      plan = with_denoising(plan, t[-1])
    x, film, times = carry_out(
      plan,
      rng,
      score_fn,
      sde,
      z,
      noisy=bool(plan.noise.any()),
      end=0 if self.final_denoise else t[-1],
      frames=frames,
    )
    return base.result(x, len(plan.t), film, times)


def _levels(sde, t):
  """Return (alpha, sigma, lambda), each [n], at the times t."""
  return *grids.marginal(sde, t), grids.half_log_snr(sde, t)


def _integral(nodes, h):
  """Return weights w [K] with int_0^h e^(u - h) p(u) du = sum_j w_j p(u_j).

  They are exact for polynomials p of degree below K. nodes [K]: u_j of each
  prediction.
  """
  points, weights = np.polynomial.legendre.leggauss(24)
  u = 0.5 * h * (1 + points)
  basis = np.ones((len(nodes), len(u)))
  for j, node in enumerate(nodes):
    for other in np.delete(nodes, j):
      basis[j] *= (u - other) / (node - other)
  return basis @ (0.5 * h * weights * np.exp(u - h))


# -------------------------------------------------------------- multistep


def _first(h, nodes):
  """Return the weight of DDIM: D is constant during the step."""
  del nodes
  return np.array([-np.expm1(-h)])


def _second(h, nodes):
  """Return the weights of DPM-Solver++(2M): D_0 + (D_0 - D_1) / (2 r).

  r is the ratio of the sizes of the last two steps.
  """
  slope = -0.5 * h / nodes[1]
  return -np.expm1(-h) * np.array([1 + slope, -slope])


def _third(h, nodes):
  """Return weights that are exact for a quadratic D through 3 predictions."""
  return _integral(nodes[:3], h)


_WEIGHTS = (_first, _second, _third)


def _past(lam, i, order):
  """Return u = lambda - lambda_i of the latest predictions at i."""
  return lam[i::-1][:order] - lam[i]


def _multistep(sde, t, order):
  """Return a plan with one prediction a step.

  The early steps use the predictions available so far.
  """
  alpha, sigma, lam = _levels(sde, t)
  plan = _empty(t[:-1], order)
  for i in range(len(t) - 1):
    k = min(i + 1, order)
    weights = _WEIGHTS[k - 1](lam[i + 1] - lam[i], _past(lam, i, order))
    plan.move[i, 0] = sigma[i + 1] / sigma[i]
    plan.move[i, 1 : 1 + k] = alpha[i + 1] * weights
  return plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(PlanSampler):
  """DDIM without noise (Song et al. 2021a, Eq. 12): first order.

  Example:
    >>> t = np.float32([1, 0.5, 0.1])
    >>> len(DDIM().plan(sde_lib.VPSDE(), t).move)
    2
  """

  def plan(self, sde: sde_lib.SDE, t: Float[np.ndarray, ' N']) -> Plan:
    return _multistep(sde, t, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMpp2M(PlanSampler):
  """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2): second order.

  Example:
    >>> t = np.float32([1, 0.5, 0.1])
    >>> len(DPMpp2M().plan(sde_lib.VPSDE(), t).move)
    2
  """

  def plan(self, sde: sde_lib.SDE, t: Float[np.ndarray, ' N']) -> Plan:
    return _multistep(sde, t, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMpp3M(PlanSampler):
  """Multistep DPM-Solver++ with three predictions: third order.

  The paper has at most two predictions. The code of its authors gives the
  curvature half the weight that a quadratic needs; this class integrates the
  quadratic through the three predictions exactly. The first step is DDIM's. Its
  error is of lower order, but small, because D hardly changes near t = 1.

  Example:
    >>> t = np.float32([1, 0.5, 0.1])
    >>> len(DPMpp3M().plan(sde_lib.VPSDE(), t).move)
    2
  """

  def plan(self, sde: sde_lib.SDE, t: Float[np.ndarray, ' N']) -> Plan:
    return _multistep(sde, t, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPC(PlanSampler):
  """UniPC (Zhao et al. 2023, Algorithms 1-2, B(h) = e^h - 1, "bh2").

  UniP-p predicts x. When the prediction D at x has been made, which the next
  step needs anyway, UniC-p repeats the step with it as one more node. The whole
  has order p + 1 and costs no further evaluation.

  Example:
    >>> t = np.float32([1, 0.5, 0.1])
    >>> len(UniPC(order=3).plan(sde_lib.VPSDE(), t).move)
    2
  """

  # The first step is of order 2 at most, which is enough for order=3.
  order: int = option(2, 'Order p of the predictor of unipc.', '[1, 3]')

  def plan(self, sde: sde_lib.SDE, t: Float[np.ndarray, ' N']) -> Plan:
    alpha, sigma, lam = _levels(sde, t)
    plan = _multistep(sde, t, self.order)
    plan = plan._replace(
      keep=np.pad(plan.keep, ((0, 0), (0, 1))),
      move=np.pad(plan.move, ((0, 0), (0, 1))),
    )
    for i in range(1, len(t) - 1):
      # Repeat the step from i - 1 to i, with the prediction at i.
      k, h = min(i, self.order), lam[i] - lam[i - 1]
      nodes = np.concatenate([[h], _past(lam, i - 1, k)])
      equal = np.full(2, -0.5 * np.expm1(-h))  # "bh2" at p = 1
      weights = equal if k == 1 else _integral(nodes, h)
      plan.keep[i] = 0
      plan.keep[i, 1] = sigma[i] / sigma[i - 1]
      plan.keep[i, 2 : 3 + k] = alpha[i] * weights
    return plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDEDPMpp(PlanSampler):
  """SDE-DPM-Solver++(2M) (Lu et al. 2022b, Section 5) of the reverse SDE.

  Given D, x_t is a draw of p(x_t | x_s, x_0 = D), which is Gaussian.

  Example:
    >>> t = np.float32([1, 0.5, 0.1])
    >>> bool((SDEDPMpp().plan(sde_lib.VPSDE(), t).noise > 0).all())
    True
  """

  def plan(self, sde: sde_lib.SDE, t: Float[np.ndarray, ' N']) -> Plan:
    alpha, sigma, lam = _levels(sde, t)
    h = np.diff(lam)
    plan = _empty(t[:-1], 2)
    plan.move[:, 0] = sigma[1:] / sigma[:-1] * np.exp(-h)
    plan.move[:, 1] = -alpha[1:] * np.expm1(-2 * h)
    slope = 0.5 * plan.move[1:, 1] * h[1:] / h[:-1]
    plan.move[1:, 1] += slope
    plan.move[1:, 2] -= slope
    plan.noise[:] = sigma[1:] * np.sqrt(-np.expm1(-2 * h))
    return plan


# ------------------------------------------------------------- singlestep


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Singlestep(PlanSampler):
  """Solver with predictions at s and at `fractions` of the way in lambda."""

  fractions = ()  # of the stages between the ends of a step, increasing

  @abc.abstractmethod
  def _stage(self, j, nodes, h):
    """Return weights of D at the first j + 1 nodes, for stage j.

    Args:
      j: number of the stage.
      nodes: u of the predictions of this step.
      h: length of the stage in lambda, from the start of the step.
    """

  def plan(self, sde: sde_lib.SDE, t: Float[np.ndarray, ' N']) -> Plan:
    alpha, sigma, lam = _levels(sde, t)
    stages = [t[:-1]]
    for fraction in self.fractions:
      wanted = lam[:-1] + fraction * np.diff(lam)
      stages.append(grids.before(sde, t[:-1], wanted, self.levels(sde)))
    k = len(stages)
    plan = _empty(np.stack(stages, 1).reshape(-1), k)
    # Each prediction leads to the next stage, or to the end of the step.
    to = np.stack([*stages[1:], t[1:]], 1)
    alpha_to, sigma_to, lam_to = _levels(sde, to)
    for i in range(len(t) - 1):
      nodes = np.concatenate([[0.0], lam_to[i, :-1] - lam[i]])
      for j in range(k):
        row = i * k + j
        weights = self._stage(j, nodes, lam_to[i, j] - lam[i])
        plan.move[row, 0] = sigma_to[i, j] / sigma[i]
        # Predictions of this step, the latest first.
        plan.move[row, 1 : 2 + j] = alpha_to[i, j] * weights[::-1]
        if j:
          plan.keep[row, :2] = 0, 1
    return plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMpp2S(_Singlestep):
  """DPM-Solver++(2S) (Lu et al. 2022b, Algorithm 1, r = 1/2): second order.

  Example:
    >>> t = np.float32([1, 0.5, 0.1])
    >>> len(DPMpp2S().plan(sde_lib.VPSDE(), t).move)
    4
  """

  fractions = (1 / 2,)

  def _stage(self, j, nodes, h):
    if j == 0:
      return _first(h, nodes)
    slope = 0.5 * h / nodes[1]
    return -np.expm1(-h) * np.array([1 - slope, slope])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMpp3S(_Singlestep):
  """DPM-Solver-3 (Lu et al. 2022a, Algorithm 2) with data predictions.

  It is not in the DPM-Solver++ paper, but in the code of its authors. Third
  order; second order on the levels of a discrete process, where the stages are
  not exactly at 1/3 and 2/3.

  Example:
    >>> t = np.float32([1, 0.5, 0.1])
    >>> len(DPMpp3S().plan(sde_lib.VPSDE(), t).move)
    6
  """

  fractions = (1 / 3, 2 / 3)

  def _stage(self, j, nodes, h):
    if j < 2:
      return _integral(nodes[: j + 1], h)
    first, last = _integral(nodes[[0, 2]], h)
    return np.array([first, 0, last])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(PlanSampler):
  """Heun's method on x / alpha over sigma / alpha (Karras et al. 2022, Alg. 2).

  With s_churn = 0 it is deterministic (Algorithm 1) and of second order. Noise
  never raises the level above that of t = 1, which networks do not know.

  Example:
    >>> t = np.float32([1, 0.5, 0.1])
    >>> len(Heun().plan(sde_lib.VPSDE(), t).move)
    4
  """

  s_churn: float = option(
    0.0, 'Noise that heun adds over all steps; 0 for none.', '[0, inf)'
  )
  s_min: float = option(
    0.05, 'Lowest level sigma / alpha at which heun adds noise.', '[0, inf)'
  )
  s_max: float = option(
    50.0, 'Highest level sigma / alpha at which heun adds noise.', '[0, inf]'
  )
  s_noise: float = option(
    1.003,
    "Standard deviation of heun's noise, relative to the rise of the level.",
    '[0, inf)',
  )

  def __post_init__(self):
    super().__post_init__()
    if self.s_min > self.s_max:
      raise ValueError(
        f'config.sampling.s_min={self.s_min} is above config.sampling.s_max='
        f'{self.s_max}, so that no level has noise: use s_churn=0 for that.'
      )

  def plan(self, sde: sde_lib.SDE, t: Float[np.ndarray, ' N']) -> Plan:
    alpha, sigma, lam = _levels(sde, t)
    ratio = sigma / alpha
    gain = min(self.s_churn / max(len(t) - 1, 1), np.sqrt(2) - 1)
    noisy = (ratio >= self.s_min) & (ratio <= self.s_max)
    gains = np.where(noisy, gain, 0.0)
    gains[[0, -1]] = 0
    higher = grids.times(sde, lam - np.log1p(gains), self.levels(sde))
    raised = np.where(gains > 0, higher, t)
    alpha_hat, sigma_hat, _ = _levels(sde, raised)
    ratio_hat = sigma_hat / alpha_hat
    plan = _empty(np.stack([raised[:-1], t[1:]], 1).reshape(-1), 2)
    a, b = ratio_hat[:-1], ratio[1:]
    # Euler's step: x / alpha = D + b / a (x / alpha - D).
    plan.move[::2, 0] = alpha[1:] * b / a / alpha_hat[:-1]
    plan.move[::2, 1] = alpha[1:] * (1 - b / a)
    # The trapezoid rule, then the noise of the next step, at its raised level.
    plan.keep[1::2, :2] = 0, 1
    scale = alpha_hat[1:]
    plan.move[1::2, 0] = scale * b / a / alpha_hat[:-1]
    plan.move[1::2, 1] = scale * 0.5 * (a - b) / b
    plan.move[1::2, 2] = scale * 0.5 * (b - a) * ((1 - b / a) / b - 1 / a)
    rise = np.maximum(ratio_hat[1:] ** 2 - b**2, 0)
    plan.noise[1::2] = self.s_noise * scale * np.sqrt(rise)
    return plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowHeun(PlanSampler):
  """Heun's method on the probability-flow ODE dx/dt = v(x, t) itself.

  x + h / 2 (v(x, t) + v(x + h v, t + h)): of second order in the step h of t,
  as it is published for rectified flows. `Heun` has other variables.

  Example:
    >>> t = np.float32([1, 0.5, 0.1])
    >>> len(FlowHeun().plan(sde_lib.RectifiedFlow(), t).move)
    4
  """

  continuous = True

  def plan(self, sde: sde_lib.SDE, t: Float[np.ndarray, ' N']) -> Plan:
    alpha, sigma = grids.marginal(sde, t)
    f, g = grids.float64(sde, 'coefficients', t)
    # v = a x + b D, with the score (alpha D - x) / sigma^2 of a prediction D.
    a = f + 0.5 * (g / sigma) ** 2
    b = -0.5 * (g / sigma) ** 2 * alpha
    h, plan = np.diff(t.astype(np.float64)), _empty(np.repeat(t, 2)[1:-1], 2)
    euler = np.stack([1 + h * a[:-1], h * b[:-1]], axis=1)
    plan.move[::2, :2] = euler
    plan.keep[1::2, :2] = 0, 1
    # Half of Euler's step, and half of a step along the slope at its end.
    plan.move[1::2, [0, 2]] = 0.5 * (euler + [1, 0])
    plan.move[1::2, [0, 2]] += 0.5 * (h * a[1:])[:, None] * euler
    plan.move[1::2, 1] = 0.5 * h * b[1:]
    return plan
