"""Helpers of the tests of features: a small network, and random weights."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from features import inception


class Tiny(nn.Module):
  """A replacement of `InceptionV3`: 5 features of a coarse grid."""

  with_logits: bool = True

  @nn.compact
  def __call__(self, x):
    x = x[:, ::50, ::50].reshape(len(x), -1)
    pool_3 = jnp.tanh(nn.Dense(5, name='Dense_0')(x))
    logits = nn.Dense(3, name='fc')(pool_3) if self.with_logits else None
    return {'pool_3': pool_3, 'logits': logits}


def tiny_params(with_logits=True):
  """Return parameters of `Tiny`."""
  image = jnp.zeros((1, 299, 299, 3))
  variables = Tiny(with_logits).init(jax.random.key(0), image)
  return variables['params']


def random_weights():
  """Return random arrays with the names and shapes of pytorch-fid's file.

  They are drawn in the order of the names, as for the recorded features.
  """
  image = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
  params = jax.eval_shape(
    inception.InceptionV3().init, jax.random.key(0), image
  )['params']
  shapes = {}
  for path, leaf in flax.traverse_util.flatten_dict(params, sep='.').items():
    name, kind = path.rsplit('.', 1)
    if name == 'fc':
      shapes['fc.weight'], shapes['fc.bias'] = leaf.shape[::-1], (1008,)
    elif kind == 'kernel':
      height, width, channels_in, channels_out = leaf.shape
      shapes[f'{name}.conv.weight'] = (channels_out, channels_in, height, width)
      for norm in ('bias', 'running_mean', 'running_var'):
        shapes[f'{name}.bn.{norm}'] = (channels_out,)
  rng = np.random.default_rng(0)
  arrays = {}
  for name in sorted(shapes):
    noise = rng.standard_normal(shapes[name], dtype=np.float32)
    if name.endswith('running_var'):
      arrays[name] = 0.5 + noise**2
    elif name.endswith(('.bias', 'running_mean')):
      arrays[name] = np.float32(0.1 * noise)
    else:
      he = np.sqrt(2 / np.prod(shapes[name][1:]))
      arrays[name] = noise * np.float32(he)
  return arrays
