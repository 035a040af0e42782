"""Options that several networks have.

Each function returns a new field, because a dataclass takes its fields over.
"""

from models import conditions, layers
from runtime import options
from runtime.options import option


def nf(default=128):
  """Return the field `nf`."""
  meaning = 'Channels at the highest resolution, or features of each layer.'
  return option(default, meaning, '[1, 1e6]')


def num_res_blocks(default):
  """Return the field `num_res_blocks`."""
  return option(
    default,
    'Residual blocks per resolution on the way down; one more on the way up.',
    '[1, 1000]',
  )


def conditional():
  """Return the field `conditional`."""
  return option(True, 'Whether the network is told the noise level.')


def num_labels():
  """Return the field `num_labels`."""
  return option(
    0,
    'Classes that the network is told; 0 for none. The label num_labels stands '
    'for no class.',
    '[0, 1e7]',
  )


def augment_labels():
  """Return the field `augment_labels`, which the section `data` decides."""
  return option(
    0, 'Numbers that tell the network how an image was augmented.', given=True
  )


def condition():
  """Return the field `condition`."""
  return option(
    '',
    "What the network is told of each example: 'vector' (embedded, and added "
    "to the noise embedding), 'array' (appended to the data as channels), or "
    'nothing.',
    choices=('', *conditions.CONDITIONS),
  )


def condition_shape():
  """Return the field `condition_shape`, which the section `data` owns."""
  return option((), 'Shape of the condition of an example.', given=True)


def embedding_type(default):
  """Return the field `embedding_type`."""
  return option(
    default,
    'Features of the noise level: of its logarithm (fourier), or sinusoids of '
    'a step in 0..999 (positional).',
    choices=('fourier', 'positional'),
  )


def fourier_scale(default):
  """Return the field `fourier_scale`."""
  meaning = 'Standard deviation of the frequencies of Fourier features.'
  return option(default, meaning, '[0, inf)')


def nonlinearity(default):
  """Return the field `nonlinearity`."""
  names = tuple(layers.ACTIVATIONS)
  return option(default, 'Activation function.', choices=names)


def centered(default):
  """Return the field `centered`, which the section `data` owns."""
  return option(
    default,
    'Whether images are in [-1, 1]; else they are in [0, 1] and mapped there.',
    given=True,
  )


def dtype():
  """Return the field `dtype`."""
  return option(
    'float32',
    'Precision of convolutions and matrix products.',
    choices=('float32', 'bfloat16'),
    marks=('samples',),
  )


def remat():
  """Return the field `remat`."""
  return option(
    False,
    'Whether blocks are computed again in the backward pass, which takes less '
    'memory and more time.',
    marks=('samples',),
  )


def check(module):
  """Raise ValueError for options of a network that cannot have their values."""
  options.check(module)
  for name in ('ch_mult', 'fir_kernel'):
    if not getattr(module, name, (1,)):
      raise ValueError(f'{type(module).__name__}: {name}=() is empty.')
  told = {'num_labels': 'classes'}
  if getattr(module, 'condition', '') == 'vector':
    told['condition'] = 'vectors'
  for name, what in told.items():
    if (value := getattr(module, name, 0)) and not module.conditional:
      raise ValueError(
        f'{type(module).__name__}: {name}={value} needs conditional=True, '
        f'because {what} are added to the noise embedding.'
      )
