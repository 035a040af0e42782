"""A multilayer perceptron: the score network of points in the plane.

It is told the noise level as NCSN++ and DDPM++ are, or not at all (the plain
score network of Hyvarinen 2005). It returns a vector field, or minus the
gradient of an energy, which is a conservative field (Salimans & Ho 2021,
"Should EBMs model the energy or the score?").
"""

import flax.linen as nn
import jax.numpy as jnp

from models import conditions, fields, layers
from runtime.options import option


class _Body(nn.Module):
  """Dense layers of `nf` features, to `out` numbers."""

  out: int
  nf: int
  num_layers: int
  nonlinearity: str
  conditional: bool
  embedding_type: str
  fourier_scale: float
  input_scale: float
  num_labels: int
  condition: str
  condition_shape: tuple[int, ...]

  @nn.compact
  def __call__(self, x, cond, label, condition):
    act = layers.ACTIVATIONS[self.nonlinearity]
    temb = None
    if self.conditional:
      if self.embedding_type == 'fourier':
        project = layers.GaussianFourierProjection(self.nf, self.fourier_scale)
        temb = project(jnp.log(cond))
        # Points with much noise would be much larger than the others.
        x = x / jnp.sqrt(1 + cond**2)[:, None]
      else:
        temb = layers.positional_embedding(cond, self.nf)
      temb = layers.embed_noise(temb, self.nf, act)
      if self.num_labels:
        temb = layers.add_label(temb, label, self.num_labels)
    x, temb = conditions.join(self, x, temb, condition)
    temb = None if temb is None else act(temb)
    h = x
    if self.input_scale:
      init = nn.initializers.normal(2 * jnp.pi * self.input_scale)
      waves = nn.Dense(self.nf, kernel_init=init, name='waves')(x)
      h = jnp.concatenate([x, jnp.sin(waves), jnp.cos(waves)], axis=-1)
    for _ in range(self.num_layers):
      h = nn.Dense(self.nf)(h)
      if temb is not None:
        h = h + nn.Dense(self.nf)(temb)
      h = act(h)
    return nn.Dense(self.out)(h)


class MLP(nn.Module):
  """Dense layers, each with a shift by the embedded noise level.

  The nonlinearity should be smooth, because score matching differentiates it.

  Example:
    >>> import jax
    >>> points, sigma = jnp.zeros((5, 2)), jnp.ones(5)
    >>> init = lambda rng: MLP().init(rng, points, sigma, train=False)
    >>> [*jax.eval_shape(init, jax.random.key(0))['params']]
    ['body']
  """

  nf: int = fields.nf()
  num_layers: int = option(3, 'Hidden layers.', '[0, 1000]')
  nonlinearity: str = fields.nonlinearity('swish')
  conditional: bool = fields.conditional()
  embedding_type: str = fields.embedding_type('fourier')
  fourier_scale: float = fields.fourier_scale(1.0)
  input_scale: float = option(
    0.0,
    'Standard deviation of the frequencies, per unit of x, of sines and '
    'cosines of the points (Tancik et al. 2020), with which a small network '
    'learns fine structure faster; 0 for none.',
    '[0, inf)',
  )
  num_labels: int = fields.num_labels()
  condition: str = fields.condition()
  condition_shape: tuple[int, ...] = fields.condition_shape()
  energy: bool = option(
    False, 'Whether the score is the gradient of a scalar network.'
  )

  def __post_init__(self):
    fields.check(self)
    super().__post_init__()

  @nn.compact
  def __call__(self, x, cond, label=None, condition=None, *, train):
    """Return the field at points x, [B, D].

    Args:
      x: noisy points [B, D].
      cond: noise levels [B]: positive with Fourier features, else steps in
        0..999.
      label: classes [B], for a class-conditional network; None for no class.
      condition: `conditions.marked` conditions [B, ...]; None for none.
      train: has no effect, because there is no dropout.

    Raises:
      ValueError: x has more axes.
    """
    del train
    if x.ndim > 2:
      raise ValueError(f'It is for vectors [B, D], not for {x.shape}.')
    body = _Body(
      out=1 if self.energy else x.shape[-1],
      nf=self.nf,
      num_layers=self.num_layers,
      nonlinearity=self.nonlinearity,
      conditional=self.conditional,
      embedding_type=self.embedding_type,
      fourier_scale=self.fourier_scale,
      input_scale=self.input_scale,
      num_labels=self.num_labels,
      condition=self.condition,
      condition_shape=self.condition_shape,
      name='body',
    )
    if not self.energy:
      return body(x, cond, label, condition)
    _, vjp = nn.vjp(lambda body, x: body(x, cond, label, condition), body, x)
    _, gradient = vjp(jnp.ones((x.shape[0], 1)))
    return gradient
