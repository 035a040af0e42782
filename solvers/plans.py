r"""Fast solvers of the reverse process, as plans of linear combinations.

In terms of lambda = log(alpha / sigma) the probability-flow ODE is solved from
time s to t < s by (Lu et al. 2022b, Proposition 4.1)

    x_t = sigma_t / sigma_s x_s + alpha_t int_0^h e^(u - h) D(lambda_s + u) du,

where h = lambda_t - lambda_s, and D is the data prediction E[x_0 | x] on the
way. Every solver here, DDIM, DPM-Solver++, UniPC and Heun's, replaces the
integral by a weighted sum of a few predictions. Weights depend on the grid
alone, so a solver is a function (sde, t) -> `Plan` that writes them down in
float64 before anything runs, and one loop (`sampling.plan_sample`) carries out
all plans. It holds

    x        at which the next prediction D_0 = E[x_0 | x] is made
    base     the state at the start of a step; x may be on a stage of it
    D_0, ..  predictions, the latest first

for any linear SDE, since (alpha, sigma) are all that is asked of it.
"""

import typing

import numpy as np

from solvers import grids


class Plan(typing.NamedTuple):
  """What to do after each of n predictions, with the K last of them.

  First base <- keep . (x, base, D_0, .., D_K-1), then
  x <- move . (base, D_0, .., D_K-1) + noise z.

  Attributes:
    t: [n] times of the predictions.
    keep: [n, 2 + K].
    move: [n, 1 + K].
    noise: [n] standard deviations.
  """

  t: np.ndarray
  keep: np.ndarray
  move: np.ndarray
  noise: np.ndarray


def _empty(t, depth):
  """A plan with base <- x and x <- 0 at all times."""
  keep = np.zeros((len(t), 2 + depth))
  keep[:, 0] = 1
  move, noise = np.zeros((len(t), 1 + depth)), np.zeros(len(t))
  return Plan(np.array(t), keep, move, noise)


def _levels(sde, t):
  """(alpha, sigma, lambda), each [n], at the times t."""
  return *grids.marginal(sde, t), grids.half_log_snr(sde, t)


def _integral(nodes, h):
  """Weights w [K] of int_0^h e^(u - h) p(u) du = sum_j w_j p(nodes_j), exact
  for polynomials p of degree below K. nodes [K]: u of each prediction."""
  points, weights = np.polynomial.legendre.leggauss(24)
  u = 0.5 * h * (1 + points)
  basis = np.ones((len(nodes), len(u)))
  for j, node in enumerate(nodes):
    for other in np.delete(nodes, j):
      basis[j] *= (u - other) / (node - other)
  return basis @ (0.5 * h * weights * np.exp(u - h))


# -------------------------------------------------------------- multistep


def _first(h, nodes):
  """DDIM's weight: D stays constant over the step."""
  del nodes
  return np.array([-np.expm1(-h)])


def _second(h, nodes):
  """DPM-Solver++(2M)'s: D_0 + (D_0 - D_1) / (2 r), r the ratio of steps."""
  slope = -0.5 * h / nodes[1]
  return -np.expm1(-h) * np.array([1 + slope, -slope])


def _third(h, nodes):
  """Exact for a quadratic D through the last three predictions."""
  return _integral(nodes[:3], h)


_WEIGHTS = (_first, _second, _third)


def _past(lam, i, order):
  """u = lambda - lambda_i of the latest predictions at i, latest first."""
  return lam[i::-1][:order] - lam[i]


def _multistep(sde, t, order):
  """One prediction a step; the first steps make do with those there are."""
  alpha, sigma, lam = _levels(sde, t)
  plan = _empty(t[:-1], order)
  for i in range(len(t) - 1):
    k = min(i + 1, order)
    weights = _WEIGHTS[k - 1](lam[i + 1] - lam[i], _past(lam, i, order))
    plan.move[i, 0] = sigma[i + 1] / sigma[i]
    plan.move[i, 1 : 1 + k] = alpha[i + 1] * weights
  return plan


def ddim(sde, t):
  """DDIM without noise (Song et al. 2021a, Eq. 12): first order."""
  return _multistep(sde, t, 1)


def dpmpp_2m(sde, t):
  """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2): second order."""
  return _multistep(sde, t, 2)


def dpmpp_3m(sde, t):
  """DPM-Solver++'s multistep scheme with three predictions: third order.

  The paper stops at two. Its authors' code gives the curvature half the weight
  that a quadratic needs; this integrates the quadratic through the three
  predictions exactly. The first step can only be DDIM's; its error is of lower
  order, and small since D hardly changes where all is noise.
  """
  return _multistep(sde, t, 3)


def unipc(sde, t, *, order=2):
  """UniPC (Zhao et al. 2023, Algorithms 1-2, B(h) = e^h - 1, "bh2").

  UniP-p predicts x; when the prediction there is made for the next step
  anyway, UniC-p repeats the step with it as one more node, so that p + 1 is
  the order of the whole and no evaluation is added.

  Args:
    sde, t: as everywhere in this module.
    order: p, 1 to 3. The first step is of order 2 at the most, which keeps
      order=3 at third order too.
  """
  if order not in (1, 2, 3):
    raise ValueError(f'sampling.order={order} is none of 1, 2, 3.')
  alpha, sigma, lam = _levels(sde, t)
  plan = _multistep(sde, t, order)
  plan = plan._replace(
    keep=np.pad(plan.keep, ((0, 0), (0, 1))),
    move=np.pad(plan.move, ((0, 0), (0, 1))),
  )
  for i in range(1, len(t) - 1):
    # The step from i - 1 to i once more, with the prediction at i.
    k, h = min(i, order), lam[i] - lam[i - 1]
    nodes = np.concatenate([[h], _past(lam, i - 1, k)])
    equal = np.full(2, -0.5 * np.expm1(-h))  # "bh2" at p = 1
    weights = equal if k == 1 else _integral(nodes, h)
    plan.keep[i] = 0
    plan.keep[i, 1] = sigma[i] / sigma[i - 1]
    plan.keep[i, 2 : 3 + k] = alpha[i] * weights
  return plan


def sde_dpmpp(sde, t):
  """SDE-DPM-Solver++(2M) (Lu et al. 2022b, Section 5): the reverse SDE.

  Given D, x_t is a draw of p(x_t | x_s, x_0 = D), which is Gaussian.
  """
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


def with_denoising(plan, t):
  """The plan, and then a last prediction, at t, which is the result."""
  last = _empty([t], plan.move.shape[1] - 1)
  last.move[0, 1] = 1
  return Plan(
    *(np.concatenate(parts) for parts in zip(plan, last, strict=True))
  )


# ------------------------------------------------------------- singlestep


def _singlestep(sde, t, fractions, stage):
  """Steps with predictions at s and at `fractions` of the way in lambda.

  Args:
    sde, t: the process and the ends of the steps.
    fractions: of the stages between, rising.
    stage: (j, nodes, h) -> weights of D at the first j + 1 of the nodes, for
      going a way of h in lambda from the start of the step.
  """
  alpha, sigma, lam = _levels(sde, t)
  stages = [t[:-1]]
  for fraction in fractions:
    wanted = lam[:-1] + fraction * np.diff(lam)
    stages.append(grids.between(sde, t[:-1], wanted))
  k = len(stages)
  plan = _empty(np.stack(stages, 1).reshape(-1), k)
  # Where each prediction leads: to the next stage, or to the end of the step.
  to = np.stack([*stages[1:], t[1:]], 1)
  alpha_to, sigma_to, lam_to = _levels(sde, to)
  for i in range(len(t) - 1):
    nodes = np.concatenate([[0.0], lam_to[i, :-1] - lam[i]])
    for j in range(k):
      row = i * k + j
      weights = stage(j, nodes, lam_to[i, j] - lam[i])
      plan.move[row, 0] = sigma_to[i, j] / sigma[i]
      # Predictions of this step, the latest first.
      plan.move[row, 1 : 2 + j] = alpha_to[i, j] * weights[::-1]
      if j:
        plan.keep[row, :2] = 0, 1
  return plan


def dpmpp_2s(sde, t):
  """DPM-Solver++(2S) (Lu et al. 2022b, Algorithm 1, r = 1/2): second order."""

  def stage(j, nodes, h):
    if j == 0:
      return _first(h, nodes)
    slope = 0.5 * h / nodes[1]
    return -np.expm1(-h) * np.array([1 - slope, slope])

  return _singlestep(sde, t, (1 / 2,), stage)


def dpmpp_3s(sde, t):
  """DPM-Solver-3 (Lu et al. 2022a, Algorithm 2) on data predictions.

  The DPM-Solver++ paper leaves it out, its authors' code has it. Third order;
  second on the levels of a discrete process, where the stages are not exactly
  at 1/3 and 2/3.
  """

  def stage(j, nodes, h):
    if j < 2:
      return _integral(nodes[: j + 1], h)
    first, last = _integral(nodes[[0, 2]], h)
    return np.array([first, 0, last])

  return _singlestep(sde, t, (1 / 3, 2 / 3), stage)


def heun(sde, t, *, s_churn=0.0, s_min=0.0, s_max=np.inf, s_noise=1.0):
  """Heun's method on x / alpha over sigma / alpha (Karras et al. 2022, Alg. 2).

  With s_churn = 0 it is deterministic (Algorithm 1) and of second order. Noise
  is not added beyond the level of t = 1, where networks know nothing.

  Args:
    sde, t: as everywhere in this module.
    s_churn: noise added before each step, over all steps; 0 for none.
    s_min, s_max: the levels sigma / alpha between which it is.
    s_noise: its standard deviation, in terms of what the level rises by.
  """
  if min(s_churn, s_noise) < 0:
    raise ValueError(
      f'sampling.s_churn={s_churn} and s_noise={s_noise} must not be negative.'
    )
  alpha, sigma, lam = _levels(sde, t)
  ratio = sigma / alpha
  gain = min(s_churn / max(len(t) - 1, 1), np.sqrt(2) - 1)
  gains = np.where((ratio >= s_min) & (ratio <= s_max), gain, 0.0)
  gains[[0, -1]] = 0
  raised = np.where(gains > 0, grids.times(sde, lam - np.log1p(gains)), t)
  alpha_hat, sigma_hat, _ = _levels(sde, raised)
  ratio_hat = sigma_hat / alpha_hat
  plan = _empty(np.stack([raised[:-1], t[1:]], 1).reshape(-1), 2)
  a, b = ratio_hat[:-1], ratio[1:]
  # Euler: x / alpha = D + b / a (x / alpha - D).
  plan.move[::2, 0] = alpha[1:] * b / a / alpha_hat[:-1]
  plan.move[::2, 1] = alpha[1:] * (1 - b / a)
  # The trapezoid rule, then the next step's noise, at the level it leads to.
  plan.keep[1::2, :2] = 0, 1
  scale = alpha_hat[1:]
  plan.move[1::2, 0] = scale * b / a / alpha_hat[:-1]
  plan.move[1::2, 1] = scale * 0.5 * (a - b) / b
  plan.move[1::2, 2] = scale * 0.5 * (b - a) * ((1 - b / a) / b - 1 / a)
  rise = np.maximum(ratio_hat[1:] ** 2 - b**2, 0)
  plan.noise[1::2] = s_noise * scale * np.sqrt(rise)
  return plan


# (sde, t, *, options) -> Plan, t [N] as of `grids.time_grid`. The options are
# keys of config.sampling.
SOLVERS = {
  'ddim': ddim,
  'heun': heun,
  'dpmpp_2m': dpmpp_2m,
  'dpmpp_3m': dpmpp_3m,
  'dpmpp_2s': dpmpp_2s,
  'dpmpp_3s': dpmpp_3s,
  'unipc': unipc,
  'sde_dpmpp': sde_dpmpp,
}
