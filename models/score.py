"""From a network to a score (Song et al. 2021, Section 3.1 and Appendix H).

Every network is one under a change of scale,

    score(x, t) = c_skip x + c_out net(c_in x, cond),

with scalars that depend on the noise level. Most of the paper's networks
estimate, up to its sign, the noise z in x_t = alpha x_0 + sigma z; the score of
p(x_t | x_0) is -z / sigma, so c_out is 1 / sigma: with the sign of the score in
the released VE networks, with that of the noise in the VP ones. NCSN of 2019 is
the score itself: that dividing by sigma suits it better was found a year later
(Song & Ermon 2020, Technique 3).
"""

import jax.numpy as jnp

import sde_lib


def _smld_label(sde, t):
  return jnp.round((1 - t) * (sde.num_scales - 1))


def _noise(sign):
  """(c_in, c_skip, c_out) of a network that estimates sign times -z."""
  return lambda sde, t: (1.0, 0.0, sign / sde.marginal(t)[1])


def edm_scales(sde, t):
  """(c_in, c_skip, c_out), each [B], of Karras et al. (2022, Table 1).

  Their denoiser D(x) = k_skip x + k_out net(c_in x), with k_skip = d^2 / s^2,
  k_out = sigma d / s, c_in = 1 / s, d = sigma_data and s^2 = sigma^2 + d^2, is
  E[x_0 | x]; the score is (D - x) / sigma^2, here with x taken together, which
  does not cancel near sigma = 0. For Gaussian data of that deviation the best
  network is 0; for any data input and target have variance 1.
  """
  _, sigma = sde.marginal(t)
  variance = sigma**2 + sde.sigma_data**2
  root = jnp.sqrt(variance)
  return 1 / root, -1 / variance, sde.sigma_data / (sigma * root)


# What the network is told of the noise level, and (c_in, c_skip, c_out).
CONDITIONINGS = {
  # NCSN++ with Fourier features, which takes the logarithm itself.
  'sigma': (lambda sde, t: sde.marginal(t)[1], _noise(1)),
  # DDPM++ and DDPM in continuous time: times scaled to DDPM's labels.
  'time': (lambda sde, t: 999 * t, _noise(-1)),
  # DDPM: the integer step.
  'ddpm_label': (
    lambda sde, t: jnp.round(t * (sde.num_scales - 1)),
    _noise(-1),
  ),
  # NCSNv2 and NCSN++ of discrete levels: label 0 is the largest sigma.
  'smld_label': (_smld_label, _noise(1)),
  # NCSN, told by the same labels, is the score.
  'ncsn_label': (_smld_label, lambda sde, t: (1.0, 0.0, 1.0)),
  # EDM: c_noise = log(sigma) / 4, about -1.6 to 1.1. As in their networks it is
  # the angle of the fastest sinusoid itself, whose sine and cosine are smooth
  # and tell all levels apart, as F need change only slowly with log sigma.
  'edm': (lambda sde, t: jnp.log(sde.marginal(t)[1]) / 4, edm_scales),
  # The same for Fourier features, which take the logarithm themselves.
  'edm_fourier': (lambda sde, t: sde.marginal(t)[1] ** 0.25, edm_scales),
}


def make_score_fn(net, sde, conditioning):
  """Turns a network into a score function.

  Args:
    net: `net(x, cond, *label)` -> raw output shaped as x [B, ...]; cond is [B].
    sde: the process whose marginals it was trained on.
    conditioning: a key of `CONDITIONINGS`.

  Returns:
    score_fn(x, t), with t [B] in [0, 1]: the score of p_t at x, shaped as x;
    score_fn(x, t, label) of a class-conditional network, with classes [B].
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
  condition, scales = CONDITIONINGS[conditioning]
  if scales is edm_scales and not sde.sigma_data:
    raise ValueError(
      f"model.conditioning={conditioning!r} needs sde.name='edm', whose "
      'sigma_data scales the network.'
    )

  def score_fn(x, t, *label):
    c_in, c_skip, c_out = (sde_lib.expand(c, x) for c in scales(sde, t))
    return c_skip * x + c_out * net(c_in * x, condition(sde, t), *label)

  return score_fn
