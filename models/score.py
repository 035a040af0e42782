"""From a network to a score (Song et al. 2021, Section 3.1 and Appendix H).

Every network becomes a score by a change of scale,

    score(x, t) = c_skip x + c_out net(c_in x, cond),

with scalars that depend on the noise level. Most of the paper's networks
estimate, up to its sign, the noise z in x_t = alpha x_0 + sigma z. The score of
p(x_t | x_0) is -z / sigma, so c_out is 1 / sigma, with the sign of the score in
the released VE networks and that of the noise in the VP ones. NCSN of 2019
returns the score itself; division by sigma came one year later (Song & Ermon
2020, Technique 3).
"""

import abc
import dataclasses

import jax.numpy as jnp

import sde_lib
from runtime.options import Options, option


class Conditioning(Options, abc.ABC):
  """What a network is told of the noise level, and what its output means."""

  def check(self, sde):
    """Raise ValueError if the conditioning does not suit the process."""

  @abc.abstractmethod
  def condition(self, sde, t):
    """Return what the network is told at times t [B], [B]."""

  @abc.abstractmethod
  def scales(self, sde, t):
    """Return (c_in, c_skip, c_out) at times t [B], each [B] or a scalar."""


class _Noise(Conditioning):
  """Base of networks that estimate `sign` times -z."""

  sign = 1

  def scales(self, sde, t):
    return 1.0, 0.0, self.sign / sde.marginal(t)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigma(_Noise):
  """Tell sigma to NCSN++ with Fourier features, which take its logarithm.

  Example:
    >>> Sigma().condition(sde_lib.EDM(sigma_max=8.0), jnp.ones(1)).tolist()
    [8.0]
  """

  def condition(self, sde, t):
    return sde.marginal(t)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Time(_Noise):
  """Tell times scaled to DDPM's labels to DDPM++ and DDPM.

  Example:
    >>> Time().condition(sde_lib.VPSDE(), jnp.ones(1)).tolist()
    [999.0]
  """

  sign = -1

  def condition(self, sde, t):
    return 999 * t


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Labels(_Noise):
  """Base of networks that are told the index of a noise level."""

  num_scales: int = option(
    0, 'Noise levels that the network was trained on.', '[0, inf)', given=True
  )

  def __post_init__(self):
    super().__post_init__()
    if not self.num_scales:
      raise ValueError(
        f'config.{_key(self)} needs the number of noise levels that the '
        'network was trained on: set training.num_scales.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPMLabel(_Labels):
  """Tell the integer step to DDPM.

  Example:
    >>> labels = DDPMLabel(num_scales=1000)
    >>> labels.condition(sde_lib.DDPM(), jnp.ones(1)).tolist()
    [999.0]
  """

  sign = -1

  def condition(self, sde, t):
    return jnp.round(t * (self.num_scales - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SMLDLabel(_Labels):
  """Tell the label, 0 for the largest sigma, to NCSNv2 and discrete NCSN++.

  Example:
    >>> labels = SMLDLabel(num_scales=232)
    >>> labels.condition(sde_lib.VESDE(), jnp.zeros(1)).tolist()
    [231.0]
  """

  def condition(self, sde, t):
    return jnp.round((1 - t) * (self.num_scales - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NCSNLabel(SMLDLabel):
  """Tell the label, 0 for the largest sigma, to NCSN, which is the score.

  Example:
    >>> NCSNLabel(num_scales=10).scales(sde_lib.VESDE(), jnp.zeros(1))
    (1.0, 0.0, 1.0)
  """

  def scales(self, sde, t):
    return 1.0, 0.0, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM(Conditioning):
  """Tell c_noise = log(sigma) / 4 to EDM's networks (Karras et al. 2022).

  c_noise is about -1.6 to 1.1. As in their networks it is the angle of the
  fastest sinusoid itself, whose sine and cosine are smooth and distinguish all
  levels, because the network changes slowly with log sigma.

  Example:
    >>> EDM(sigma_data=0.5).condition(sde_lib.EDM(sigma_max=1.0), 1.0).tolist()
    0.0
  """

  sigma_data: float = option(
    0.5,
    'Standard deviation of the data.',
    '(0, inf)',
    formerly='sde.sigma_data',
  )

  def check(self, sde):
    if not isinstance(sde, sde_lib.EDM):
      raise ValueError(
        f"config.{_key(self)} needs sde.name='edm', not {type(sde).__name__}."
      )

  def condition(self, sde, t):
    return jnp.log(sde.marginal(t)[1]) / 4

  def scales(self, sde, t):
    """Return (c_in, c_skip, c_out), each [B] (Karras et al. 2022, Table 1).

    Their denoiser D(x) = k_skip x + k_out net(c_in x), with k_skip = d^2 / s^2,
    k_out = sigma d / s, c_in = 1 / s, d = sigma_data and s^2 = sigma^2 + d^2,
    is E[x_0 | x]. The score is (D - x) / sigma^2, here with the terms in x
    taken together, which does not cancel near sigma = 0. For Gaussian data of
    that deviation the best network is 0; for any data of that deviation its
    input and target have variance 1.
    """
    _, sigma = sde.marginal(t)
    variance = sigma**2 + self.sigma_data**2
    root = jnp.sqrt(variance)
    return 1 / root, -1 / variance, self.sigma_data / (sigma * root)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMFourier(EDM):
  """Tell sigma^(1/4) to EDM's networks with Fourier features.

  These take the logarithm themselves.

  Example:
    >>> EDMFourier().condition(sde_lib.EDM(sigma_max=16.0), 1.0).tolist()
    2.0
  """

  def condition(self, sde, t):
    return sde.marginal(t)[1] ** 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Velocity(Conditioning):
  """Take the output for the velocity dx/dt of the ODE, told DDPM's labels.

  v = f x - g^2 score / 2 (Song et al. 2021, Eq. 13). For the rectified flow it
  estimates z - x_0 (Liu et al. 2023).

  Example:
    >>> net = lambda x, cond: jnp.full_like(x, 3)
    >>> flow, t = sde_lib.RectifiedFlow(), jnp.full(1, 0.5)
    >>> score = make_score_fn(net, flow, Velocity())(jnp.ones((1, 2)), t)
    >>> print(flow.ode_drift(jnp.ones((1, 2)), t, score).round(4))
    [[3. 3.]]
  """

  def check(self, sde):
    if sde.continuous != sde:
      raise ValueError(
        f'config.{_key(self)} needs a process in continuous time, not '
        f'{type(sde).__name__}.'
      )

  def condition(self, sde, t):
    return 999 * t

  def scales(self, sde, t):
    f, g = sde.coefficients(t)
    return 1.0, 2 * f / g**2, -2 / g**2


CONDITIONINGS = {
  'sigma': Sigma,
  'time': Time,
  'ddpm_label': DDPMLabel,
  'smld_label': SMLDLabel,
  'ncsn_label': NCSNLabel,
  'edm': EDM,
  'edm_fourier': EDMFourier,
  'velocity': Velocity,
}


def _key(conditioning):
  """Return how a config chooses a conditioning."""
  name = next(k for k, v in CONDITIONINGS.items() if type(conditioning) is v)
  return f'model.conditioning={name!r}'


def make_score_fn(net, sde, conditioning):
  """Return the score function of a network.

  Args:
    net: `net(x, cond, *label)` -> raw output shaped as x [B, ...]; cond is [B].
    sde: the process whose marginals the network was trained on.
    conditioning: an object of a class of `CONDITIONINGS`.

  Returns:
    score_fn(x, t), with t [B] in [0, 1]: the score of p_t at x, shaped as x;
    score_fn(x, t, label) for a class-conditional network, with classes [B].

  Raises:
    ValueError: the conditioning does not suit the process.
  """
  conditioning.check(sde)

  def score_fn(x, t, *label):
    scales = conditioning.scales(sde, t)
    c_in, c_skip, c_out = (sde_lib.expand(c, x) for c in scales)
    cond = conditioning.condition(sde, t)
    return c_skip * x + c_out * net(c_in * x, cond, *label)

  return score_fn
