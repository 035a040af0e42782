"""What a network is told of each example besides its class: a condition.

The network estimates the score of p_t(x | c). It sees a condition c with a last
channel of ones (see `marked`); zeros everywhere, the last channel included, are
no condition. So conditions are dropped in training, and left out by
classifier-free guidance (Ho & Salimans 2022), by one value for all kinds, as
the label num_labels stands for no class.

`CONDITIONS` says how the condition enters a network.
"""

import abc

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

import sde_lib
from models import layers


def marked(
  condition: Float[ArrayLike, 'B *space C'],
) -> Float[Array, 'B *space C_and_1']:
  """Return conditions as networks take them: with a last channel of ones."""
  condition = jnp.asarray(condition)
  return jnp.concatenate([condition, jnp.ones_like(condition[..., :1])], -1)


def dropped(
  drop: Bool[Array, ' B'],
  label: Int[ArrayLike, ' B'] | None,
  condition: Float[Array, ' B *dims'] | None,
  num_labels: int,
) -> tuple[Int[Array, ' B'] | None, Float[Array, ' B *dims'] | None]:
  """Return classes and conditions with those of some examples taken away.

  Args:
    drop: whether an example is trained without both.
    label: classes, or None.
    condition: `marked` conditions, or None.
    num_labels: number of classes, which stands for no class.
  """
  if label is not None:
    label = jnp.where(drop, num_labels, label)
  if condition is not None:
    condition = jnp.where(sde_lib.expand(drop, condition), 0, condition)
  return label, condition


class Condition(nn.Module, abc.ABC):
  """Base: how a condition enters a network.

  Attributes:
    nonlinearity: name of the network's activation.
  """

  nonlinearity: str

  @staticmethod
  @abc.abstractmethod
  def problem(shape: tuple[int, ...], data_shape: tuple[int, ...]) -> str:
    """Return what is wrong with the shape of a condition, or ''.

    Args:
      shape: of a condition.
      data_shape: of an example.
    """

  @abc.abstractmethod
  def __call__(self, x, temb, condition):
    """Return x [B, ...] and the noise embedding [B, E] with a condition."""


class Vector(Condition):
  """Embed a vector by two dense layers, and add it to the noise embedding.

  Example:
    >>> Vector.problem((5,), (8, 8, 1)), Vector.problem((8, 8, 1), (8, 8, 1))
    ('', "is no vector: use 'array'.")
  """

  @staticmethod
  def problem(shape, data_shape):
    del data_shape
    return '' if len(shape) == 1 else "is no vector: use 'array'."

  @nn.compact
  def __call__(self, x, temb, condition):
    act = layers.ACTIVATIONS[self.nonlinearity]
    return x, temb + layers.embed_noise(condition, temb.shape[-1], act)


class Channels(Condition):
  """Append an array of the data's height and width to x, as channels.

  Example:
    >>> Channels.problem((8, 8, 3), (8, 8, 1)), Channels.problem((3,), (2,))
    ('', '')
    >>> Channels.problem((3,), (8, 8, 1))
    'does not lie over data of (8, 8, 1), with equal axes but the last.'
  """

  @staticmethod
  def problem(shape, data_shape):
    if shape[:-1] == data_shape[:-1] and len(shape) == len(data_shape):
      return ''
    return (
      f'does not lie over data of {data_shape}, with equal axes but the last.'
    )

  def __call__(self, x, temb, condition):
    return jnp.concatenate([x, condition.astype(x.dtype)], axis=-1), temb


CONDITIONS = {'vector': Vector, 'array': Channels}


def join(network, x, temb, condition):
  """Return x and the noise embedding with the condition of a network.

  Call it in a compact method, whose module then owns Condition.

  Args:
    network: flax module with `condition`, `condition_shape`, `nonlinearity`.
    x: what the network sees of noisy data, [B, ...].
    temb: noise embedding [B, E], or None.
    condition: `marked` conditions [B, ...]; None for no condition.
  """
  if not network.condition:
    return x, temb
  if condition is None:
    *space, channels = network.condition_shape
    condition = jnp.zeros((x.shape[0], *space, channels + 1))
  entry = CONDITIONS[network.condition](network.nonlinearity, name='Condition')
  return entry(x, temb, condition)
