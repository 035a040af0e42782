"""A multilayer perceptron: the score network of points in the plane.

It is told the noise level as NCSN++ and DDPM++ are, is told nothing (the plain
score network of Hyvarinen 2005), or returns minus the gradient of an energy,
which is a conservative field (Salimans & Ho 2021, "Should EBMs model the energy
or the score?").
"""

import flax.linen as nn
import jax.numpy as jnp

from models import layers


class _Body(nn.Module):
  """Dense layers of `nf` features, to `out` numbers."""

  out: int
  nf: int
  num_layers: int
  nonlinearity: str
  embedding_type: str
  fourier_scale: float
  input_scale: float
  num_labels: int

  @nn.compact
  def __call__(self, x, cond, label):
    act = layers.ACTIVATIONS[self.nonlinearity]
    temb = None
    if self.embedding_type == 'fourier':
      project = layers.GaussianFourierProjection(self.nf, self.fourier_scale)
      temb = project(jnp.log(cond))
      # Points that carry much noise would dwarf the others.
      x = x / jnp.sqrt(1 + cond**2)[:, None]
    elif self.embedding_type == 'positional':
      temb = layers.positional_embedding(cond, self.nf)
    if temb is not None:
      temb = layers.embed_noise(temb, self.nf, act)
      if self.num_labels:
        temb = layers.add_label(temb, label, self.num_labels)
      temb = act(temb)
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

  Attributes:
    nf: features of every layer.
    num_layers: hidden layers.
    nonlinearity: a key of `layers.ACTIVATIONS`; smooth ones, since score
      matching takes derivatives.
    embedding_type: 'fourier' features of log cond; 'positional', sinusoids of
      cond in 0..999; or 'none', for a network that is not told.
    fourier_scale: standard deviation of the frequencies.
    input_scale: standard deviation of the frequencies, per unit of x, of
      sines and cosines of the points (Tancik et al. 2020), without which a
      small network learns fine structure slowly; 0 for none.
    num_labels: classes of a class-conditional network; 0 for none. Its label
      `num_labels` stands for no class.
    energy: whether the network is a scalar E and the output its gradient.
  """

  nf: int = 128
  num_layers: int = 3
  nonlinearity: str = 'swish'
  embedding_type: str = 'fourier'
  fourier_scale: float = 1.0
  input_scale: float = 0.0
  num_labels: int = 0
  energy: bool = False

  def __post_init__(self):
    layers.check_choices(
      self,
      nonlinearity=layers.ACTIVATIONS,
      embedding_type=('fourier', 'positional', 'none'),
    )
    if self.num_labels:
      layers.check_choices(self, embedding_type=('fourier', 'positional'))
    super().__post_init__()

  @nn.compact
  def __call__(self, x, cond, label=None, *, train):
    """Field over points x [B, D] at noise levels cond [B]: [B, D].

    `label` [B] are classes, None for no class.

    `train` has no effect: there is no dropout.
    """
    del train
    body = _Body(
      out=1 if self.energy else x.shape[-1],
      nf=self.nf,
      num_layers=self.num_layers,
      nonlinearity=self.nonlinearity,
      embedding_type=self.embedding_type,
      fourier_scale=self.fourier_scale,
      input_scale=self.input_scale,
      num_labels=self.num_labels,
      name='body',
    )
    if not self.energy:
      return body(x, cond, label)
    _, vjp = nn.vjp(lambda body, x: body(x, cond, label), body, x)
    _, gradient = vjp(jnp.ones((x.shape[0], 1)))
    return gradient
