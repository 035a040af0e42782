r"""Training objectives and the optimizer (Song et al. 2021, Eq. 7 and Table 1).

Denoising score matching asks of a score function s that, at x_t = alpha x_0 +
sigma z, it equal the score of p(x_t | x_0), which is -z / sigma:

    lambda(t) || s(x_t, t) + z / sigma ||^2.

With t uniform it is the continuous objective (Eq. 7); with t on the grid of a
chain it is SMLD's (Eq. 1) for a VE process, DDPM's (Eq. 3) for `sde_lib.DDPM`.
Losses are per example, [B]; their caller takes the mean.
"""

import jax
import jax.numpy as jnp
import optax

import sde_lib


def uniform_times(rng, sde, batch, eps):
  """(t, weight), [B]: t uniform in [eps, 1]; weight 1."""
  del sde
  t = jax.random.uniform(rng, (batch,), minval=eps, maxval=1.0)
  return t, jnp.ones_like(t)


def grid_times(rng, sde, batch, eps):
  """(t, weight), [B]: t uniform on the `num_scales` levels of sde; weight 1."""
  del eps
  if not sde.num_scales:
    raise ValueError("times='grid' needs a process with sde.num_scales levels.")
  label = jax.random.randint(rng, (batch,), 0, sde.num_scales)
  t = label / (sde.num_scales - 1)
  return t, jnp.ones_like(t)


def importance_times(rng, sde, batch, eps):
  """(t, weight), [B]: t with density p ~ g^2 / sigma^2 on [eps, 1].

  g^2 / sigma^2 = -d/dt log SNR, so that is log SNR drawn uniformly (Song et al.
  2021b, arXiv 2101.09258, Section 4.3). weight = 1 / ((1 - eps) p(t)) makes the
  weighted loss an unbiased estimate of the mean over uniform t; with likelihood
  weighting it cancels all of the weighting's variance.
  """
  first, last = sde.log_snr(jnp.asarray(eps)), sde.log_snr(jnp.asarray(1.0))
  u = jax.random.uniform(rng, (batch,))
  t = jnp.clip(sde.time(first + u * (last - first)), eps, 1.0)
  _, sigma = sde.marginal(t)
  _, g = sde.coefficients(t)
  return t, (first - last) / (1 - eps) * sigma**2 / g**2


def lognormal_times(rng, sde, batch, eps):
  """(t, weight), [B]: log sigma ~ N(p_mean, p_std^2); weight 1.

  The noise levels of Karras et al. (2022, Table 1); those outside [eps, 1] are
  moved to its ends.
  """
  if not sde.sigma_data:
    raise ValueError(
      "training.times='lognormal' needs sde.name='edm', with p_mean and p_std."
    )
  log_sigma = sde.p_mean + sde.p_std * jax.random.normal(rng, (batch,))
  t = jnp.clip(sde.time(-2 * log_sigma), eps, 1.0)
  return t, jnp.ones_like(t)


def edm_weighting(sde, t):
  """lambda of Karras et al. (2022, Table 1), for the error of the score.

  Theirs, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, is of the denoiser
  D = x + sigma^2 score, whose error is sigma^2 times that of the score. The
  network's own target then weighs 1 at every noise level.
  """
  if not sde.sigma_data:
    raise ValueError("training.weighting='edm' needs sde.name='edm'.")
  _, sigma = sde.marginal(t)
  return (sigma**2 + sde.sigma_data**2) * (sigma / sde.sigma_data) ** 2


def single_time(rng, sde, batch, eps):
  """(t, weight), [B]: t = eps, one noise level (Vincent 2011); weight 1."""
  del rng, sde
  return jnp.full((batch,), eps), jnp.ones((batch,))


TIMES = {
  'uniform': uniform_times,
  'grid': grid_times,
  'importance': importance_times,
  'lognormal': lognormal_times,
  'single': single_time,
}

# lambda(t): 'variance' is the paper's choice, sigma^2, which makes every level
# weigh the same; 'likelihood' makes the loss a bound on the log-likelihood.
WEIGHTINGS = {
  'variance': lambda sde, t: sde.marginal(t)[1] ** 2,
  'likelihood': lambda sde, t: sde.coefficients(t)[1] ** 2,
  'edm': edm_weighting,
}

# Over the dimensions of one example: the mean (VP), or half the sum (VE).
REDUCTIONS = {
  'mean': lambda v: jnp.mean(v, axis=tuple(range(1, v.ndim))),
  'half_sum': lambda v: 0.5 * jnp.sum(v, axis=tuple(range(1, v.ndim))),
}


def denoising_loss(score_fn, sde, x0, t, z, *, weighting, reduction):
  """lambda(t) || s(x_t, t) + z / sigma ||^2 (Eq. 7), [B], at given t and z.

  Args:
    score_fn: score_fn(x, t) -> score shaped as x.
    sde: the forward process.
    x0: clean data [B, ...] in the model's range.
    t: times [B].
    z: standard normal noise, shaped as x0.
    weighting: a key of `WEIGHTINGS`.
    reduction: a key of `REDUCTIONS`.
  """
  _, sigma = sde.marginal(t)
  score = score_fn(sde.perturb(x0, t, z), t)
  error = REDUCTIONS[reduction]((sde_lib.expand(sigma, z) * score + z) ** 2)
  return WEIGHTINGS[weighting](sde, t) / sigma**2 * error


def score_matching(
  rng,
  score_fn,
  sde,
  x0,
  *,
  times='uniform',
  weighting='variance',
  reduction='mean',
  eps=1e-5,
):
  """Denoising score matching at random times and noise, [B].

  Args:
    rng: key for the times and the noise.
    score_fn, sde, x0, weighting, reduction: as in `denoising_loss`.
    times: a key of `TIMES`.
    eps: smallest time, in [0, 1].
  """
  rng_t, rng_z = jax.random.split(rng)
  t, weight = TIMES[times](rng_t, sde, x0.shape[0], eps)
  z = jax.random.normal(rng_z, x0.shape)
  return weight * denoising_loss(
    score_fn, sde, x0, t, z, weighting=weighting, reduction=reduction
  )


def classification(
  rng, logits_fn, sde, x0, label, *, times='uniform', eps=1e-5
):
  """Cross-entropy of a classifier of noisy data, [B] (App. I.1).

  Args:
    rng, sde, x0, times, eps: as in `score_matching`.
    logits_fn: logits_fn(x, t) -> unnormalised log p_t(label | x), [B, classes].
    label: classes [B].
  """
  rng_t, rng_z = jax.random.split(rng)
  t, weight = TIMES[times](rng_t, sde, x0.shape[0], eps)
  x = sde.perturb(x0, t, jax.random.normal(rng_z, x0.shape))
  return weight * optax.softmax_cross_entropy_with_integer_labels(
    logits_fn(x, t), label
  )


def make_optimizer(
  *, lr, beta1, beta2, eps, weight_decay, warmup, grad_clip
) -> optax.GradientTransformation:
  """Adam with clipping and a linear warm-up from 0 (Song et al. 2021, App. H).

  Nothing but Adam's moments and the count is state: the learning rate of a
  resumed run is that of its config.

  Args:
    lr: learning rate after the warm-up.
    beta1, beta2, eps: Adam's.
    weight_decay: decoupled weight decay; 0 for none.
    warmup: steps over which the rate rises from 0; 0 for none.
    grad_clip: largest global norm of a gradient; 0 for no clipping.
  """

  def schedule(count):
    return lr * jnp.minimum(count / warmup, 1.0) if warmup > 0 else lr

  clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
  adam = optax.adamw(
    schedule, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay
  )
  return optax.chain(clip, adam)


def ema_decay(step, *, rate, warmup):
  """Decay of the parameters' moving average at a step (counted from 1).

  Args:
    step: number of optimizer steps taken, this one included.
    rate: the constant decay, as in the paper.
    warmup: whether to use min(rate, (1 + step) / (10 + step)) instead.
  """
  return jnp.minimum(rate, (1 + step) / (10 + step)) if warmup else rate
