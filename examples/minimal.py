r"""Learn the score of points on two rings, and draw new points with it.

  python examples/minimal.py --output rings.png

A network learns it by denoising score matching (Song et al. 2021, Eq. 7). Then
the reverse-time SDE (Eq. 6) turns noise into points. About 20 s on two cores.
"""

import argparse
import functools
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import losses
import sampling
import sde_lib

RADII, WIDTH = (1.0, 2.0), 0.08
SDE = sde_lib.VPSDE()


def rings(rng, n):
  """Return n points [n, 2] around two circles, at distances ~ N(0, WIDTH^2)."""
  rng_ring, rng_angle, rng_noise = jax.random.split(rng, 3)
  radius = jax.random.choice(rng_ring, jnp.array(RADII), (n, 1))
  radius += WIDTH * jax.random.normal(rng_noise, (n, 1))
  angle = jax.random.uniform(rng_angle, (n, 1), maxval=2 * jnp.pi)
  return radius * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


class Score(nn.Module):
  """Score of x_t, as -1 / sigma(t) times a prediction of the noise z."""

  @nn.compact
  def __call__(self, x, t):
    sigma = SDE.marginal(t)[1][:, None]
    waves = jnp.log(sigma) * jnp.array([[0.25, 0.5, 1.0, 2.0]])
    noise_level, h = jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], 1), x
    for _ in range(3):
      h = nn.swish(nn.Dense(128)(h) + nn.Dense(128)(noise_level))
    return -nn.Dense(2)(h) / sigma


def train(rng, steps, batch=512):
  """Return the learned score_fn(x, t) and the losses of all steps."""
  network, loss_fn = Score(), losses.ScoreMatching()
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

  def step(state, rng):
    params, moments = state
    rng_data, rng_loss = jax.random.split(rng)

    def loss(params):
      score_fn = functools.partial(network.apply, params)
      return loss_fn(rng_loss, score_fn, SDE, rings(rng_data, batch)).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    change, moments = optimizer.update(gradient, moments)
    return (optax.apply_updates(params, change), moments), value

  params = jax.jit(network.init)(rng, jnp.zeros((1, 2)), jnp.ones(1))
  start, keys = (params, optimizer.init(params)), jax.random.split(rng, steps)
  (params, _), values = jax.jit(lambda s: jax.lax.scan(step, s, keys))(start)
  return functools.partial(network.apply, params), values


def draw(path, samples, data):
  """Save a picture of the samples on their way, and of data."""
  x, t = samples.frames, samples.times
  panels = [(f't = {t[i]:.2f}', x[i]) for i in (0, 12, 14, 15, 16)]
  axes = (figure := Figure((12, 2.2), layout='constrained')).subplots(1, 6)
  for ax, (title, x) in zip(axes, [*panels, ('data', data)], strict=True):
    ax.scatter(*x.T, s=3, lw=0, alpha=0.5, c=('C0', 'C1')[title == 'data'])
    ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], title=title)
  figure.savefig(path, dpi=120)


def main(argv=None):
  """Train a network, draw samples and a picture; return the samples."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--output', default='rings.png', help='picture')
  parser.add_argument('--steps', default=5000, type=int, help='training steps')
  args, rngs = parser.parse_args(argv), jax.random.split(jax.random.key(0), 4)
  score_fn, values = train(rngs[0], args.steps)
  print(f'loss of the last 100 steps: {values[-100:].mean():.3f}')
  sampler, z = sampling.PC(num_steps=500), SDE.prior_sample(rngs[1], (2000, 2))
  samples = jax.jit(lambda z: sampler(rngs[2], score_fn, SDE, z, frames=17))(z)
  draw(args.output, samples, rings(rngs[3], 2000))
  return samples


if __name__ == '__main__':
  main()
