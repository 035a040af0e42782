r"""Sampling from p(x | y) with a model of p(x) (Song et al. 2021, App. I).

By Bayes' rule the reverse-time SDE of the conditional distribution (Eq. 14) is
that of the unconditional one with the score

    grad_x log p_t(x | y) = grad_x log p_t(x) + grad_x log p_t(y | x).

So every control here takes a score_fn(x, t), x [B, ...] and t [B], and returns
another, and all samplers take either. `Operator`s are what measurements come
from, y = A(x_0) + noise_std n with n ~ N(0, I), in the units of the model.
"""

import math
import typing

import jax
import jax.numpy as jnp
import numpy as np

import sampling
import sde_lib

# ------------------------------------------------------------------- classes


def classifier_guidance(score_fn, sde, *, log_prob, scale=1.0):
  """score + scale grad_x log p_t(y | x) (Eq. 14), with a noisy-data classifier.

  Args:
    score_fn: the unconditional score.
    sde: the process; unused.
    log_prob: log_prob(x, t) -> log p_t(y | x) of the wanted class, [B].
    scale: 1 for Bayes' rule; more for the sharpened p(y | x)^scale.
  """
  del sde

  def guided(x, t):
    gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x)
    return score_fn(x, t) + scale * gradient

  return guided


def classifier_free_guidance(score_fn, sde, *, label, scale=1.0):
  """Class-conditional score, sharpened (Ho & Salimans 2022, Eq. 6).

  Args:
    score_fn: score_fn(x, t) is the unconditional score, score_fn(x, t, label)
      that given the class.
    sde: the process; unused.
    label: classes [B].
    scale: 1 + w in the paper's notation: 0 for the unconditional score, 1 for
      the conditional one, more for p(x) p(label | x)^scale. Only these two
      extremes cost a single evaluation of the network.
  """
  del sde

  def guided(x, t):
    if scale == 1:
      return score_fn(x, t, label)
    free = score_fn(x, t)
    if scale == 0:
      return free
    return free + scale * (score_fn(x, t, label) - free)

  return guided


# ----------------------------------------------------------------- operators


def _select(x, *, mask):
  """The known pixels: x[:, mask], for a boolean array [H, W] ([D])."""
  return x[:, mask]


def _gray(x):
  """[B, H, W]: the first channel of the paper's orthogonal matrix (App. I.3).

  That is sqrt(3) times the mean of the three colours.
  """
  return jnp.sum(x, axis=-1) / math.sqrt(x.shape[-1])


def _block_mean(x, *, factor):
  """[B, H / f, W / f, C]: f times the mean of each block of f x f pixels."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // factor, factor, w // factor, factor, c)
  return jnp.sum(x, axis=(2, 4)) / factor


def _blur(x, *, width):
  """Gaussian blur of standard deviation `width` pixels; edges repeat."""
  radius = math.ceil(3 * width)
  taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)
  taps = taps / taps.sum()
  for axis in (1, 2):
    pad = [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)]
    padded, size = jnp.pad(x, pad, mode='edge'), x.shape[axis]
    x = sum(
      tap * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
      for i, tap in enumerate(taps)
    )
  return x


def _overexpose(x, *, gain, centered):
  """A photograph with saturated highlights: tanh(gain x), x from 0 to white."""
  x = 0.5 * (x + 1) if centered else x
  x = jnp.tanh(gain * x)
  return 2 * x - 1 if centered else x


def _magnitude(x):
  """|DFT|, orthonormal, of each channel: phase retrieval asks for the rest."""
  spectrum = jnp.fft.rfft2(x, axes=(1, 2), norm='ortho')
  # Not jnp.abs, whose gradient at 0 is not a number.
  return jnp.sqrt(jnp.real(spectrum * jnp.conj(spectrum)) + 1e-12)


class Operator(typing.NamedTuple):
  """A measurement without its noise.

  Attributes:
    function: function(x, **options) -> A(x), [B, ...].
    options: names of its options.
    orthonormal: A is linear and A A^T = I, as `projection` needs it; the other
      methods take any differentiable function.
  """

  function: typing.Callable
  options: tuple = ()
  orthonormal: bool = False


OPERATORS = {
  'inpaint': Operator(_select, ('mask',), True),
  'colorize': Operator(_gray, (), True),
  'super_resolution': Operator(_block_mean, ('factor',), True),
  'deblur': Operator(_blur, ('width',)),
  'overexposed': Operator(_overexpose, ('gain', 'centered')),
  'phase_retrieval': Operator(_magnitude),
}


def transpose(operator, shape):
  """A^T of a linear operator on arrays of a shape [B, ...]; as a function."""
  transposed = jax.linear_transpose(
    operator, jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  return lambda y: transposed(y)[0]


# --------------------------------------------------------- inverse problems


def projection(score_fn, sde, *, operator, y, noise_std=0.0, rng=None):
  """The paper's imputation (App. I.2, I.3), for an A with orthonormal rows.

  What A sees of x_t is known to be N(alpha y, sigma^2), so there that is the
  score; in the directions that A does not see it is the model's, which takes
  p_t(unseen | seen_t, y) to be p_t(unseen | seen_t). Known values never start
  out clean and are never replaced by noisy ones after denoising: the last
  denoising step returns just y.

  Args:
    score_fn, sde: the model's score and its process.
    operator: x [B, ...] -> A x, linear, A A^T = I.
    y: measurements, shaped as A x.
    noise_std: of the measurements. With noise, what is seen of x_0 is taken to
      be N(y, noise_std^2), whatever the prior says of it.
    rng: None to show the model the seen part of x as the sampler has it, which
      follows its own exact reverse process; a key to draw that part afresh at
      each time, as the paper's algorithm does. Fresh noise is no function that
      an ODE or multistep solver could integrate.
  """

  def guided(x, t):
    project, embed = operator, transpose(operator, x.shape)
    alpha, sigma = sde.marginal(t)
    mean = sde_lib.expand(alpha, y) * y
    variance = sde_lib.expand(sigma**2 + (alpha * noise_std) ** 2, y)
    seen_score = (mean - project(x)) / variance
    if rng is not None:
      bits = jax.lax.bitcast_convert_type(t[0], jnp.uint32)
      z = jax.random.normal(jax.random.fold_in(rng, bits), y.shape)
      x = x + embed(mean + jnp.sqrt(variance) * z - project(x))
    score = score_fn(x, t)
    return score + embed(seen_score - project(score))

  return guided


def _denoiser(score_fn, sde, t):
  """x -> (E[x_0 | x_t = x], score), as `jax.vjp(.., has_aux=True)` wants it."""

  def denoised(x):
    score = score_fn(x, t)
    return sampling.denoise(lambda *_: score, sde, x, t), score

  return denoised


def _trust(sde, x, t, ramp):
  """1 / (1 + (ramp sigma / alpha)^2), [B, 1, ..]: how far guidance is trusted.

  x0_hat and its Jacobian divide the network's error by alpha, which near t = 1
  is far above the guidance itself. The weight is 1 where ramp sigma < alpha,
  falls as alpha^2 before that, and is smooth, so that ODE solvers take it.
  """
  alpha, sigma = (sde_lib.expand(c, x) for c in sde.marginal(t))
  return 1 / (1 + (ramp * sigma / alpha) ** 2)


def dps(score_fn, sde, *, operator, y, noise_std, scale=1.0, ramp=0.0):
  """Diffusion posterior sampling (Chung et al. 2022, arXiv 2209.14687, Eq. 16).

  p_t(y | x) is taken to be N(y; A(x0_hat), noise_std^2) with x0_hat =
  E[x_0 | x]; right where x0_hat is surer than the measurement.

  Args:
    score_fn, sde, y: as in `projection`.
    operator: any differentiable A(x), linear or not.
    noise_std: of the measurements, above 0.
    scale: multiplies the guidance.
    ramp: weighs guidance by 1 / (1 + (ramp sigma / alpha)^2), against errors of
      the network (see `_trust`); 0 leaves the formula as it is.
  """

  def guided(x, t):
    denoised = _denoiser(score_fn, sde, t)

    def log_likelihood(x):
      x0_hat, score = denoised(x)
      error = (y - operator(x0_hat)) / noise_std
      return -0.5 * jnp.sum(error**2), score

    gradient, score = jax.grad(log_likelihood, has_aux=True)(x)
    return score + scale * _trust(sde, x, t, ramp) * gradient

  return guided


def _solve(matrix, b, *, tol=1e-5, max_steps=50):
  """matrix^-1 b by conjugate gradients, each example [B, ...] for itself.

  Args:
    matrix: v -> matrix v, symmetric, positive definite, shaped as b.
    b: right-hand sides.
    tol: of the residual's norm, relative to that of b.
    max_steps: after which to be content.
  """

  def dot(u, v):
    return jnp.sum(u * v, axis=tuple(range(1, b.ndim)))

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


def pigdm(
  score_fn,
  sde,
  *,
  operator,
  y,
  noise_std=0.0,
  data_std=1.0,
  scale=1.0,
  ramp=0.0,
):
  """Pseudo-inverse-guided diffusion (Song et al. 2023, "PiGDM", Eq. 7).

  p(x_0 | x) is taken to be N(x0_hat, r^2 I), so p_t(y | x) = N(A x0_hat,
  r^2 A A^T + noise_std^2 I), with the r of data N(., data_std^2 I): r^-2 =
  data_std^-2 + (alpha / sigma)^2. For such data all this is exact. A nonlinear
  A is linearised at x0_hat. The equations are solved by conjugate gradients,
  in one step where A A^T = I.

  Args:
    score_fn, sde, operator, y, scale, ramp: as in `dps`.
    noise_std: of the measurements; 0 is allowed.
    data_std: the prior's standard deviation, 1 in the paper.
  """

  def guided(x, t):
    denoised = _denoiser(score_fn, sde, t)
    x0_hat, pull_back, score = jax.vjp(denoised, x, has_aux=True)
    y_hat, linear = jax.linearize(operator, x0_hat)
    adjoint = transpose(linear, x.shape)
    alpha, sigma = sde.marginal(t)
    r2 = sde_lib.expand(1 / (data_std**-2 + (alpha / sigma) ** 2), y)
    # The covariance over r^2, whose size does not depend on t.
    covariance = lambda v: linear(adjoint(v)) + noise_std**2 / r2 * v
    u = _solve(covariance, (y - y_hat) / r2)
    gradient = pull_back(adjoint(u))[0]
    return score + scale * _trust(sde, x, t, ramp) * gradient

  return guided


METHODS = {'projection': projection, 'dps': dps, 'pigdm': pigdm}
