"""How parameters change: learning rates, the optimizer, averages (App. H).

The learning rate at a step is

    lr * min(step / warmup, 1) * schedule(step),

a pure function of the config and the number of steps taken, so that a resumed
run has the rates of one that was not stopped.

Besides the constant average of the paper, averages whose length grows with the
training can be kept (Karras et al. 2024, Analyzing and improving the training
dynamics of diffusion models, Section 3.1). That of length s at step T weights
the parameters of step t by the profile

    p(t) = (g + 1) t^g / T^(g + 1),    s^2 = (g + 1) / ((g + 2)^2 (g + 3)),

so that s is the standard deviation of the profile in units of T. The average of
any length is nearly a linear combination of a few that were kept.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import ArrayLike, Float, Int, PyTree

from runtime.options import Options, option

Scalar = Float[ArrayLike, '']
Vector = Float[ArrayLike, '...']
Averages = dict[float, PyTree]
COUNT = '[0, 2147483647]'

# ------------------------------------------------------------------ schedules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(Options, abc.ABC):
  """Base of the schedules, which say how the rate goes on after the warm-up."""

  def check(self, warmup: float) -> None:
    """Raise ValueError if an option does not suit the warm-up."""
    del warmup

  @abc.abstractmethod
  def __call__(self, at: Scalar, warmup: float, end: float) -> Scalar:
    """Return the factor of the rate, in [0, 1].

    Args:
      at: steps or images so far.
      warmup: length of the warm-up in the same unit.
      end: length of the training in the same unit.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
  """Keep the rate (Song et al. 2021).

  Example:
    >>> Constant()(7.0, 0, 10)
    1.0
  """

  def __call__(self, at: Scalar, warmup: float, end: float) -> Scalar:
    return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
  """Decay as sqrt(start / at) from the start on (Karras et al. 2024).

  The start is the end of the warm-up, or `decay_from` if that is later.

  Example:
    >>> float(InverseSqrt(decay_from=4)(16.0, 2, 100))
    0.5
  """

  decay_from: int = option(
    0, 'Where the decay begins, if that is after the warm-up.', COUNT
  )

  def start(self, warmup: float) -> float:
    """Return where the decay begins."""
    return max(self.decay_from, warmup)

  def __call__(self, at: Scalar, warmup: float, end: float) -> Scalar:
    start = max(self.start(warmup), 1)
    return jnp.sqrt(start / jnp.maximum(at, start))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ToZero(InverseSqrt):
  """Decay from 1 at the start to 0 at the horizon; see `InverseSqrt`."""

  horizon: int = option(
    0, 'Where the rate reaches 0; 0 for the end of training.n_iters.', COUNT
  )

  def check(self, warmup: float) -> None:
    start = self.start(warmup)
    if self.horizon and self.horizon <= start:
      raise ValueError(
        f'config.optim.horizon={self.horizon} is not after the beginning of '
        f'the decay, {start} (the larger of config.optim.decay_from and '
        'warmup): use a larger horizon, or 0 for the end of training.'
      )

  def __call__(self, at: Scalar, warmup: float, end: float) -> Scalar:
    start = self.start(warmup)
    length = max((self.horizon or end) - start, 1)
    return self.shape(jnp.clip((at - start) / length, 0.0, 1.0))

  @abc.abstractmethod
  def shape(self, progress: Scalar) -> Scalar:
    """Return the factor at a part of the way from 0 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(_ToZero):
  """Decay linearly to 0.

  Example:
    >>> float(Linear(horizon=10)(6.0, 2, 100))
    0.5
  """

  def shape(self, progress: Scalar) -> Scalar:
    return 1 - progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(_ToZero):
  """Decay to 0 as half a period of a cosine (Loshchilov & Hutter 2017).

  Example:
    >>> round(float(Cosine(horizon=10)(6.0, 2, 100)), 6)
    0.5
  """

  def shape(self, progress: Scalar) -> Scalar:
    return (1 + jnp.cos(jnp.pi * progress)) / 2


SCHEDULES = {
  'constant': Constant,
  'linear': Linear,
  'cosine': Cosine,
  'inverse_sqrt': InverseSqrt,
}


# ----------------------------------------------------------------- optimizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Options):
  """Options of the optimizer (Song et al. 2021, App. H).

  Example:
    >>> optimizer = make_optimizer(Adam(lr=1e-3, warmup=0))
    >>> state = optimizer.init({'w': jnp.zeros(2)})
  """

  lr: float = option(2e-4, 'Learning rate after the warm-up.', '[0, inf)')
  beta1: float = option(
    0.9, "Decay of Adam's average of the gradients.", '[0, 1)'
  )
  beta2: float = option(
    0.999, "Decay of Adam's average of their squares.", '[0, 1)'
  )
  eps: float = option(
    1e-8, 'Number that Adam adds to the root of that average.', '(0, inf)'
  )
  weight_decay: float = option(
    0.0, 'Decoupled weight decay; 0 for none.', '[0, inf)'
  )
  warmup: int = option(
    5000,
    'Length of the rise of the rate from 0; 0 for none.',
    COUNT,
  )
  grad_clip: float = option(
    1.0, 'Largest global norm of a gradient; 0 for no clipping.', '[0, inf)'
  )
  schedule: Schedule = option(
    'constant',
    'How the learning rate goes on after the warm-up.',
    table=SCHEDULES,
  )
  unit: str = option(
    'steps',
    'What warmup, decay_from and horizon are counted in.',
    choices=('steps', 'images'),
  )
  batch_size: int = option(128, 'Images of a step.', '[1, inf)', given=True)
  n_iters: int = option(1_300_000, 'Training steps.', COUNT, given=True)

  def __post_init__(self):
    super().__post_init__()
    self.schedule.check(self.warmup)

  def rate(self, count: Int[ArrayLike, '']) -> Scalar:
    """Return the learning rate after a number of steps."""
    size = float(self.batch_size) if self.unit == 'images' else 1.0
    at, warmup = count * size, self.warmup
    lr = self.lr * jnp.minimum(at / warmup, 1.0) if warmup > 0 else self.lr
    return lr * self.schedule(at, warmup, self.n_iters * size)

  def rule(self) -> optax.GradientTransformation:
    """Return what turns clipped gradients into updates."""
    return optax.adamw(
      self.rate,
      b1=self.beta1,
      b2=self.beta2,
      eps=self.eps,
      weight_decay=self.weight_decay,
    )


def is_kernel(p):
  """Return whether a parameter is a kernel of several rows and columns."""
  return p.ndim > 2 and min(math.prod(p.shape[:-1]), p.shape[-1]) > 1


def _matrix(kernel):
  """Return which axes of a convolution's kernel make a matrix: input, output.

  Kernels are [height, width, input, output], with any number of dimensions.
  """
  inputs = tuple(range(kernel.ndim - 1))
  return optax.contrib.MuonDimensionNumbers(inputs, kernel.ndim - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Adam):
  """Muon for convolution kernels, Adam for the rest (Jordan et al. 2024).

  The update of a kernel, as a matrix [height width input, output], is

      -rate * muon_rms * sqrt(max(input, output)) * NS(m),

  where NS is five Newton-Schulz steps to the nearest orthogonal matrix, and m
  is Nesterov's momentum of the gradients. The factor gives updates of every
  shape the same root mean square, so that one rate suits Adam and Muon (Liu et
  al. 2025).

  Example:
    >>> optimizer = make_optimizer(Muon(lr=1e-3, warmup=0))
    >>> state = optimizer.init({'w': jnp.zeros((3, 3, 8, 8))})
  """

  muon_beta: float = option(
    0.95, "Decay of Muon's average of the gradients.", '[0, 1)'
  )
  muon_rms: float = option(
    0.2,
    "Root mean square of Muon's updates, in units of the rate; 0.2 is Adam's.",
    '(0, inf)',
  )

  def rule(self) -> optax.GradientTransformation:
    def scaled(update):
      largest = max(math.prod(update.shape[:-1]), update.shape[-1])
      return update * (self.muon_rms * largest**0.5)

    muon = optax.chain(
      optax.contrib.scale_by_muon(
        beta=self.muon_beta,
        weight_dimension_numbers=lambda p: jax.tree.map(_matrix, p),
      ),
      optax.stateless(lambda updates, _: jax.tree.map(scaled, updates)),
      optax.add_decayed_weights(self.weight_decay),
      optax.scale_by_learning_rate(self.rate),
    )
    return optax.partition(
      {'muon': muon, 'adam': super().rule()},
      lambda params: jax.tree.map(
        lambda p: 'muon' if is_kernel(p) else 'adam', params
      ),
    )


OPTIMIZERS = {'adam': Adam, 'muon': Muon}


def _few_sums(tree):
  """Return the norm over all numbers of a pytree, like `optax.tree.norm`.

  A sum over a whole array is two kernels on a GPU. Here the last axis is kept,
  which makes it one, and small arrays have none of their own.
  """
  leaves = jax.tree.leaves(tree)
  columns = [jnp.sum(v**2, tuple(range(v.ndim - 1))).ravel() for v in leaves]
  # The barrier keeps XLA from summing each array by itself after all.
  columns = jax.lax.optimization_barrier(jnp.concatenate(columns))
  return jnp.sqrt(jnp.sum(columns))


def clip_by_norm(largest: float) -> optax.GradientTransformation:
  """Scale gradients whose global norm is above `largest` down to it."""

  def update(grads, state, params=None):
    del params
    norm = jax.lax.platform_dependent(
      grads, cuda=_few_sums, default=optax.tree.norm
    )
    scaled = lambda v: jnp.where(norm < largest, v, v / norm * largest)
    return jax.tree.map(scaled, grads), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def make_optimizer(chosen: Adam) -> optax.GradientTransformation:
  """Return an optimizer with clipping and its learning rates.

  The state holds moments and the step count only, so that a resumed run uses
  the learning rate of its config.

  Args:
    chosen: an object of `OPTIMIZERS`.
  """
  clip = (
    clip_by_norm(chosen.grad_clip) if chosen.grad_clip else optax.identity()
  )
  return optax.chain(clip, chosen.rule())


# ------------------------------------------------------------------- averages


def ema_decay(
  step: Int[ArrayLike, ''], *, rate: float, warmup: bool
) -> Float[ArrayLike, '']:
  """Return the decay of the parameters' moving average at a step.

  Args:
    step: number of optimizer steps taken, this one included.
    rate: the constant decay, as in the paper, in [0, 1).
    warmup: whether to use min(rate, (1 + step) / (10 + step)) instead.
  """
  return jnp.minimum(rate, (1 + step) / (10 + step)) if warmup else rate


# Lengths of averages: the first profile is steep, the last one is flat.
LENGTHS = '(0, 0.288]'


def exponent(length: float) -> float:
  """Return the exponent g of the profile of an average of a length.

  It is the root of (g + 2)^2 (g + 3) = (g + 1) / length^2.

  Example:
    >>> round(exponent(0.1), 2), round(exponent(0.05), 2)
    (6.94, 16.97)
  """
  c = length**-2.0
  return float(np.roots([1, 7, 16 - c, 12 - c]).real.max())


def start_averages(params: PyTree, lengths: Sequence[float]) -> Averages:
  """Return {length: parameters} before the first step."""
  return {length: jax.tree.map(jnp.copy, params) for length in lengths}


def update_averages(
  averages: Averages, params: PyTree, step: Int[ArrayLike, '']
) -> Averages:
  """Return the averages after a step (Karras et al. 2024, Eq. 127).

      average <- beta average + (1 - beta) params,
      beta = (1 - 1 / step)^(g + 1)

  Args:
    averages: {length: parameters}.
    params: parameters after the step.
    step: number of steps taken, this one included.
  """

  def update(length, average):
    # 1 - beta, without the rounding of a number near 1.
    new = -jnp.expm1((exponent(length) + 1) * jnp.log1p(-1 / step))
    return jax.tree.map(lambda a, p: a + new * (p - a), average, params)

  return {length: update(length, a) for length, a in averages.items()}


def profile_products(
  step: Vector, g: Vector, other_step: Vector, other_g: Vector
) -> Vector:
  """Return the inner products of two profiles (Karras et al. 2024, App. C.2).

  The integral of both over time is

      (g + 1) (h + 1) min(T, U)^(g + h + 1) / ((g + h + 1) T^(g + 1) U^(h + 1)).

  Args:
    step: T, where the first average was taken.
    g: exponent of the first.
    other_step: U, where the second average was taken.
    other_g: h, exponent of the second.
  """
  first, both = np.minimum(step, other_step), g + other_g + 1
  ratio = (first / step) ** g * (first / other_step) ** other_g
  scale = first / (step * other_step)
  return (g + 1) * (other_g + 1) / both * ratio * scale


def combination(
  snapshots: Sequence[tuple[int, float]], step: int, length: float
) -> tuple[Float[np.ndarray, ' n'], float]:
  """Return weights of snapshots whose sum is the average of another length.

  They are the least-squares solution for the profiles over time (Karras et al.
  2024, App. C.2). Here they sum to one besides, so that parameters that do not
  change are reproduced exactly however few snapshots there are.

  Args:
    snapshots: (step, length) of the averages that were kept.
    step: where the wanted average ends.
    length: of the wanted average.

  Returns:
    (weights [n], the distance of the profiles relative to that which is
    wanted).

  Example:
    >>> weights, error = combination([(90, 0.1), (100, 0.1)], 100, 0.1)
    >>> bool(np.allclose(weights, [0, 1], atol=1e-9)), error < 1e-6
    (True, True)
  """
  steps, lengths = np.asarray(snapshots, np.float64).T
  g = np.array([exponent(length) for length in lengths])
  wanted, norm = exponent(length), np.sqrt(profile_products(steps, g, steps, g))
  products = profile_products(steps[:, None], g[:, None], steps, g)
  products /= norm[:, None] * norm
  target = profile_products(steps, g, float(step), wanted) / norm
  # The last row says that the weights sum to one; its multiplier is dropped.
  system = np.block([[products, 1 / norm[:, None]], [1 / norm, np.zeros(1)]])
  x = np.linalg.lstsq(system, np.append(target, 1.0), rcond=None)[0][:-1]
  whole = profile_products(float(step), wanted, float(step), wanted)
  rest = 1 - (2 * x @ target - x @ products @ x) / whole
  return x / norm, float(np.sqrt(max(rest, 0.0)))
