"""The networks, by the names that configs give them."""

import functools

import jax
import jax.numpy as jnp
from flax import traverse_util

from models.classifier import WideResNet
from models.ddpm import DDPM
from models.mlp import MLP
from models.ncsn import NCSN, NCSNv2, NCSNv2_128, NCSNv2_256
from models.ncsnpp import NCSNpp
from runtime import options

MODELS = {
  'ncsnpp': NCSNpp,  # Also DDPM++: the same network with other options.
  'ddpm': DDPM,
  'ncsn': NCSN,
  'ncsnv2': NCSNv2,
  'ncsnv2_64': NCSNv2,  # The paper's name of the same network.
  'ncsnv2_128': NCSNv2_128,
  'ncsnv2_256': NCSNv2_256,
  'mlp': MLP,  # For points, not for images.
}
CLASSIFIERS = {'wideresnet_noise_conditional': WideResNet}


def create(name, **fields):
  """Return a network.

  Args:
    name: a key of `MODELS` or `CLASSIFIERS`.
    **fields: options of its class; lists become tuples.

  Returns:
    A flax module, called as module.apply({'params': params}, x, cond, train=).

  Raises:
    ValueError: the name, an option or its value is unknown.

  Example:
    >>> create('ddpm', nf=64).ch_mult
    (1, 2, 2, 2)
  """
  networks = MODELS | CLASSIFIERS
  if name not in networks:
    raise ValueError(
      f'Unknown model: {name!r}; {options.suggestion(name, networks)}'
    )
  known = [o.name for o in options.declared(networks[name])]
  for field in fields:
    if field not in known:
      raise ValueError(
        f'Unknown field of model {name!r}: {field!r}; '
        f'{options.suggestion(field, known)}'
      )
  return networks[name](
    **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  )


@functools.cache
def abstract_params(network, shape):
  """Return the shapes and dtypes of parameters, in the order of construction.

  Networks with the same options are traced once in a process.

  Args:
    network: a flax module of `create`.
    shape: of one example, [H, W, C] or [D].

  Returns:
    A nested dict, which is not to be changed.

  Example:
    >>> abstract_params(create('mlp'), (2,))['body']['Dense_0']['bias']
    ShapeDtypeStruct(shape=(128,), dtype=float32)
  """
  paths = []

  def init(rng):
    x, cond = jnp.zeros((1, *shape)), jnp.ones(1)
    params = network.init(rng, x, cond, train=False)['params']
    paths.extend(traverse_util.flatten_dict(params))
    return params

  flat = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)))
  return traverse_util.unflatten_dict({path: flat[path] for path in paths})
