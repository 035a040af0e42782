"""Load golden numbers of the paper's release, and make their reduced models.

Each file holds the parameters (averaged over training), inputs and outputs
that the paper's own JAX release computed in float32 on a CPU, for one of its
configurations at a reduced size. What the arrays are:

  data01, data          images in [0, 1]; scaled as the configuration says
  t, z, mean, std, x    times, noise, and x_t = mean + std z given the data
  drift, diffusion      of the forward process at (x, t)
  disc_f, disc_G        the same, discretised
  prior_logp            log p_T(x), nats
  cond, model_out       the network's conditioning and output
  score                 at (x, t)
  loss_*                per-example losses for these t and z
  hutchinson_eps, pf_drift, pf_div   probe, probability-flow drift, and the
                        estimated divergence of that drift
  *_x_mean, *_G         one noiseless predictor step
  ode_*, lik_*          probability-flow ODE: samples, and likelihood
"""

import pathlib

import numpy as np
from flax import traverse_util

import models

DATA = pathlib.Path(__file__).parents[0] / 'arrays'

_TINY = {
  'nf': 16,
  'ch_mult': (1, 2),
  'num_res_blocks': 1,
  'attn_resolutions': (8,),
  'dropout': 0.0,
}
_FIELDS = {
  've_ncsnpp_continuous': {'name': 'ncsnpp', **_TINY},
  'vp_ddpmpp_continuous': {
    'name': 'ncsnpp',
    **_TINY,
    'fir': False,
    'progressive_input': 'none',
    'embedding_type': 'positional',
    'centered': True,
  },
  'subvp_ncsnpp_continuous': {
    'name': 'ncsnpp',
    **_TINY,
    'embedding_type': 'positional',
    'centered': True,
  },
  've_ffhq_256_ncsnpp': {
    'name': 'ncsnpp',
    **_TINY,
    'nf': 8,
    'ch_mult': (1, 2, 2),
    'progressive': 'output_skip',
    'progressive_input': 'input_skip',
  },
  'vp_ddpm': {'name': 'ddpm', **_TINY, 'nf': 32},
  've_ncsnv2': {'name': 'ncsnv2', 'nf': 16},
}
CASES = tuple(_FIELDS)


def model(case, **fields):
  """Return the network of a case, with `fields` in place of its own."""
  return models.create(**{**_FIELDS[case], **fields})


def load(case):
  """Return (arrays by name, parameters as a pytree)."""
  with np.load(DATA / f'golden_{case}.npz') as file:
    arrays = dict(file)
  names = [name for name in arrays if name.startswith('params/')]
  flat = {name.removeprefix('params/'): arrays.pop(name) for name in names}
  return arrays, traverse_util.unflatten_dict(flat, sep='/')
