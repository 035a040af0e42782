"""From a network to a score (Song et al. 2021, Section 3.1 and Appendix H).

Every network here estimates, up to its sign, the noise z in x_t = alpha x_0 +
sigma z; since the score of p(x_t | x_0) is -z / sigma, dividing by sigma makes
the score. The released VE networks have the sign of the score, the VP ones
that of the noise.
"""

import jax.numpy as jnp

import sde_lib

# What the network is told of the noise level, and the sign of its output.
CONDITIONINGS = {
  # NCSN++ with Fourier features, which takes the logarithm itself.
  'sigma': (lambda sde, t: sde.marginal(t)[1], 1),
  # DDPM++ and DDPM in continuous time: times scaled to DDPM's labels.
  'time': (lambda sde, t: 999 * t, -1),
  # DDPM: the integer step.
  'ddpm_label': (lambda sde, t: jnp.round(t * (sde.num_scales - 1)), -1),
  # NCSN and NCSNv2: label 0 is the largest sigma.
  'smld_label': (lambda sde, t: jnp.round((1 - t) * (sde.num_scales - 1)), 1),
}


def make_score_fn(net, sde, conditioning):
  """Turns a network into a score function.

  Args:
    net: `net(x, cond)` -> raw output shaped as x [B, ...], for cond [B].
    sde: the process whose marginals it was trained on.
    conditioning: a key of `CONDITIONINGS`.

  Returns:
    score_fn(x, t), with t [B] in [0, 1]: the score of p_t at x, shaped as x.
  """
  if conditioning not in CONDITIONINGS:
    raise ValueError(
      f'model.conditioning={conditioning!r} is none of {list(CONDITIONINGS)}.'
    )
  if conditioning.endswith('_label') and not sde.num_scales:
    raise ValueError(
      f'model.conditioning={conditioning!r} needs the number of noise levels '
      'that the network was trained on: set sde.num_scales.'
    )
  condition, sign = CONDITIONINGS[conditioning]

  def score_fn(x, t):
    _, sigma = sde.marginal(t)
    return sign * net(x, condition(sde, t)) / sde_lib.expand(sigma, x)

  return score_fn
