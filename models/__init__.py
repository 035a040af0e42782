"""The networks, by the names that configurations give them."""

import dataclasses
import difflib

from models.classifier import WideResNet
from models.ddpm import DDPM
from models.mlp import MLP
from models.ncsn import NCSN, NCSNv2, NCSNv2_128, NCSNv2_256
from models.ncsnpp import NCSNpp

MODELS = {
  'ncsnpp': NCSNpp,  # DDPM++ too: the same network with other fields
  'ddpm': DDPM,
  'ncsn': NCSN,
  'ncsnv2': NCSNv2,
  'ncsnv2_64': NCSNv2,  # the paper's name for it
  'ncsnv2_128': NCSNv2_128,
  'ncsnv2_256': NCSNv2_256,
  'mlp': MLP,  # of points, not of images
}
CLASSIFIERS = {'wideresnet_noise_conditional': WideResNet}


def create(name, **fields):
  """Builds a network.

  Args:
    name: a key of `MODELS` or `CLASSIFIERS`.
    **fields: the network's own, see its class; lists become tuples.

  Returns:
    A flax module, called as module.apply({'params': params}, x, cond, train=).

  Raises:
    ValueError: if the name, a field or a field's value is unknown.
  """
  networks = MODELS | CLASSIFIERS
  if name not in networks:
    raise ValueError(_unknown('model', name, networks))
  cls = networks[name]
  known = {field.name for field in dataclasses.fields(cls)} - {'parent', 'name'}
  for field in fields:
    if field not in known:
      raise ValueError(_unknown(f'field of model {name!r}', field, known))
  return cls(
    **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  )


def _unknown(what, name, known):
  close = difflib.get_close_matches(str(name), known, n=1)
  hint = f'did you mean {close[0]!r}?' if close else f'known: {sorted(known)}.'
  return f'Unknown {what}: {name!r}; {hint}'
