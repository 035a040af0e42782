"""From a network to a score (Song et al. 2021, Section 3.1 and Appendix H).

Most networks here estimate, up to its sign, the noise z in x_t = alpha x_0 +
sigma z; since the score of p(x_t | x_0) is -z / sigma, dividing by sigma makes
the score. The released VE networks have the sign of the score, the VP ones
that of the noise. NCSN of 2019 is the score itself: that dividing by sigma
suits it better was found a year later (Song & Ermon 2020, Technique 3).
"""

import functools

import jax.numpy as jnp

import sde_lib


def _smld_label(sde, t):
  return jnp.round((1 - t) * (sde.num_scales - 1))


def _noise(condition, sign):
  """The network estimates the noise, up to its sign."""

  def score(net, sde, x, t):
    _, sigma = sde.marginal(t)
    return sign * net(x, condition(sde, t)) / sde_lib.expand(sigma, x)

  return score


# score(net, sde, x, t), by what the network is told of the noise level.
CONDITIONINGS = {
  # NCSN++ with Fourier features, which takes the logarithm itself.
  'sigma': _noise(lambda sde, t: sde.marginal(t)[1], 1),
  # DDPM++ and DDPM in continuous time: times scaled to DDPM's labels.
  'time': _noise(lambda sde, t: 999 * t, -1),
  # DDPM: the integer step.
  'ddpm_label': _noise(lambda sde, t: jnp.round(t * (sde.num_scales - 1)), -1),
  # NCSNv2 and NCSN++ of discrete levels: label 0 is the largest sigma.
  'smld_label': _noise(_smld_label, 1),
  # NCSN, told by the same labels, is the score.
  'ncsn_label': lambda net, sde, x, t: net(x, _smld_label(sde, t)),
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
  return functools.partial(CONDITIONINGS[conditioning], net, sde)
