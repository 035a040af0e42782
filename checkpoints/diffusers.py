"""Export of models as folders that diffusers' `from_pretrained` reads.

The class `UNet2DModel` of diffusers can represent two of the networks exactly:

- NCSN++ with image pyramids at input and output (the models for 256 and 1024
  pixels), with Skip*Block2D. Diffusers itself divides the output by sigma.
- DDPM, with DownBlock2D, UpBlock2D and their variants with attention. On the
  way up these attend after every block, the paper's DDPM after the last block
  of a resolution only. The additional attentions get parameters of zero; as
  they are residual, they change nothing.

It cannot represent the others: it has no residual input pyramid (NCSN++ for 32
and 64 pixels), and divides by sqrt(2) only with pyramids (DDPM++).

A folder contains unet/. If diffusers has a pipeline for the process that the
network was trained with, the folder also contains scheduler/ and
model_index.json, and `DiffusionPipeline` can sample from it.

Functions take an `experiment.Experiment` as `model`.
"""

import collections
import pathlib

import numpy as np
import safetensors.numpy
from flax import traverse_util

from runtime.files import atomic, to_json

# Values that fields of each network must have.
_REQUIRED = {
  'ncsnpp': {
    'conditioning': ('sigma',),
    'embedding_type': ('fourier',),
    'conditional': (True,),
    'resblock_type': ('biggan',),
    'progressive': ('output_skip',),
    'progressive_input': ('input_skip',),
    'progressive_combine': ('sum',),
    'fir': (True,),
    'fir_kernel': ((1, 3, 3, 1),),
    'skip_rescale': (True,),
    'conv_size': (3,),
    'condition': ('',),
    'nonlinearity': ('swish',),
  },
  'ddpm': {
    'conditioning': ('time', 'ddpm_label', 'smld_label'),
    'conditional': (True,),
    'resamp_with_conv': (True,),
    'condition': ('',),
    'nonlinearity': ('swish',),
  },
}
# Children of a block: names in this project, and in diffusers.
_RESNET = {
  'GroupNorm_0': 'norm1',
  'Conv_0': 'conv1',
  'Dense_0': 'time_emb_proj',
  'GroupNorm_1': 'norm2',
  'Conv_1': 'conv2',
  'Conv_2': 'conv_shortcut',
  'NIN_0': 'conv_shortcut',
}
_ATTENTION = {
  'GroupNorm_0': 'group_norm',
  'NIN_0': 'to_q',
  'NIN_1': 'to_k',
  'NIN_2': 'to_v',
  'NIN_3': 'to_out.0',
}


def export(folder, model, ema_params):
  """Write the folder atomically.

  Args:
    folder: path of the folder; it must not exist.
    model: the Experiment.
    ema_params: averaged parameters, a pytree of arrays.

  Returns:
    The name of the pipeline that samples from the folder, or None if diffusers
    has none.

  Raises:
    ValueError: `UNet2DModel` cannot represent the network, or the folder
      exists.
  """
  folder = pathlib.Path(folder)
  check(model)
  if folder.exists():
    raise ValueError(f'{folder} exists already: choose another --output.')
  files = {'unet/config.json': unet_config(model)}
  pipeline, scheduler = _pipeline(model)
  if pipeline:
    name = scheduler['_class_name']
    files['scheduler/scheduler_config.json'] = scheduler
    files['model_index.json'] = {
      '_class_name': pipeline,
      'unet': ['diffusers', 'UNet2DModel'],
      'scheduler': ['diffusers', name],
    }
  with atomic(folder) as part:
    for name, content in files.items():
      path = part / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(to_json(content, indent=2) + '\n')
    safetensors.numpy.save_file(
      unet_tensors(model, ema_params),
      part / 'unet' / 'diffusion_pytorch_model.safetensors',
      {'format': 'pt'},
    )
  return pipeline


def check(model):
  """Raise ValueError with the reason if `UNet2DModel` cannot represent it."""
  for reason in _obstacles(model):
    raise ValueError(
      f"diffusers' UNet2DModel cannot be this network exactly: {reason}. "
      'Export to a FILE.safetensors instead.'
    )


def _obstacles(model):
  """Yield the reasons why `UNet2DModel` cannot represent the model."""
  network, config = model.network, model.config
  name = config.model.name
  if name not in _REQUIRED:
    yield f'it has no equivalent of model.name={name!r}'
    return
  for field, allowed in _REQUIRED[name].items():
    value = getattr(network, field, config.model.get(field))
    if value not in allowed:
      choices = ' or '.join(map(repr, allowed))
      yield f'model.{field} is {value!r}, where it can only be {choices}'
  if name == 'ncsnpp':
    if config.data.num_channels != 3:
      yield (
        f'data.num_channels is {config.data.num_channels}, where it can only '
        'be 3'
      )
    for level, channels in enumerate(_channels(network)):
      if _attends(model, level) and (channels < 128 or channels % 32):
        yield (
          'its attention normalises 32 groups of at least 4 channels, and '
          f'there are {channels} at one of model.attn_resolutions'
        )
  placed = {ours for ours, _, _ in _modules(model)}
  for left in sorted(model.abstract_params().keys() - placed):
    yield f'it has no place for {left}'


def _channels(network):
  """Return the number of channels at each resolution."""
  return [network.nf * mult for mult in network.ch_mult]


def _attends(model, level):
  """Return whether the network has attention at a resolution."""
  size = model.config.data.image_size >> level
  return size in model.network.attn_resolutions


def unet_config(model):
  """Return the arguments of `UNet2DModel`, a dict."""
  network, data = model.network, model.config.data
  skip = 'Skip' if model.config.model.name == 'ncsnpp' else ''

  def block_types(way):
    return [
      f'{"Attn" if _attends(model, level) else ""}{skip}{way}Block2D'
      for level in range(len(network.ch_mult))
    ]

  return {
    '_class_name': 'UNet2DModel',
    'sample_size': data.image_size,
    'in_channels': data.num_channels,
    'out_channels': data.num_channels,
    'center_input_sample': not data.centered,
    'time_embedding_type': 'fourier' if skip else 'positional',
    'freq_shift': 1,
    'flip_sin_to_cos': False,
    'block_out_channels': _channels(network),
    'layers_per_block': network.num_res_blocks,
    'down_block_types': block_types('Down'),
    'up_block_types': block_types('Up')[::-1],
    'mid_block_scale_factor': 2**0.5 if skip else 1,
    'downsample_padding': 0,  # It pads at the far borders only.
    'attention_head_dim': None,  # A single head.
    'norm_num_groups': None if skip else 32,
    'norm_eps': 1e-6,
    'act_fn': 'silu',
    'dropout': network.dropout,
  }


def _pipeline(model):
  """Return (class of the pipeline, config of its scheduler), or two Nones."""
  sde, config = model.sde, model.config
  options, trained = (
    config.sampling,
    (config.sde.name, config.model.conditioning),
  )
  if trained == ('ve', 'sigma'):
    return 'ScoreSdeVePipeline', {
      '_class_name': 'ScoreSdeVeScheduler',
      'num_train_timesteps': options.num_steps,
      'snr': options.snr,
      'sigma_min': sde.sigma_min,
      'sigma_max': sde.sigma_max,
      'sampling_eps': options.eps,
      'correct_steps': (options.corrector != 'none') * options.corrector_steps,
    }
  if trained == ('ddpm', 'ddpm_label'):
    posterior = options.ancestral_variance == 'posterior'
    return 'DDPMPipeline', {
      '_class_name': 'DDPMScheduler',
      'num_train_timesteps': sde.num_scales,
      'beta_schedule': 'linear',
      'beta_start': sde.beta_min / sde.num_scales,
      'beta_end': sde.beta_max / sde.num_scales,
      'variance_type': 'fixed_small' if posterior else 'fixed_large',
      'clip_sample': False,
      'prediction_type': 'epsilon',
    }
  return None, None


# ----------------------------------------------------------------- tensors


def unet_tensors(model, ema_params):
  """Return the parameters with diffusers' names and PyTorch's layout."""
  tensors = {}
  for ours, kind, module in _modules(model):
    params = traverse_util.flatten_dict(ema_params[ours])
    for (*child, leaf), value in params.items():
      parts = module, *(_child(kind, name) for name in child)
      leaf = 'bias' if leaf in ('bias', 'b') else 'weight'
      name = '.'.join(filter(None, (*parts, leaf)))
      # Convolutions are [H, W, I, O] here and [O, I, H, W] there. Products are
      # [I, O] here and [O, I] there, where some are 1x1 convolutions.
      value = np.transpose(value, (3, 2, 0, 1) if value.ndim == 4 else None)
      if name.endswith('conv_shortcut.weight') and value.ndim == 2:
        value = value[:, :, None, None]
      tensors[name] = np.ascontiguousarray(value)
  # The attentions that only diffusers has add zero to their input.
  last = model.network.num_res_blocks
  for name in list(tensors):
    block, attends, leaf = name.partition(f'.attentions.{last}.')
    for k in range(last if attends else 0):
      zeros = np.zeros_like(tensors[name])
      tensors[f'{block}.attentions.{k}.{leaf}'] = zeros
  return tensors


def _child(kind, name):
  """Return the name that diffusers gives to the child of a module."""
  if kind.startswith('Resnet'):
    return _RESNET[name]
  return _ATTENTION[name] if kind.startswith('Attn') else ''


def _modules(model):
  """Yield (name here, class here, name there) for each module."""
  counts = collections.Counter()
  for kind, theirs in _walk(model):
    yield f'{kind}_{counts[kind]}', kind, theirs
    counts[kind] += 1


def _walk(model):
  """Yield (class here, name there) in the network's order of construction.

  Flax numbers the modules of a class in this order, so the order tells which
  module here is which module there.
  """
  depth, blocks = len(model.network.ch_mult), model.network.num_res_blocks
  skip = model.config.model.name == 'ncsnpp'
  resnet = 'ResnetBlockBigGANpp' if skip else 'ResnetBlockDDPM'
  attention = 'AttnBlockpp' if skip else 'AttnBlock'

  if skip:
    yield 'GaussianFourierProjection', 'time_proj'
  yield 'Dense', 'time_embedding.linear_1'
  yield 'Dense', 'time_embedding.linear_2'
  yield 'Conv', 'conv_in'
  for level in range(depth):
    at = f'down_blocks.{level}'
    for k in range(blocks):
      yield resnet, f'{at}.resnets.{k}'
      if _attends(model, level):
        yield attention, f'{at}.attentions.{k}'
    if level < depth - 1 and skip:
      yield resnet, f'{at}.resnet_down'
      yield 'Combine', f'{at}.skip_conv'
    elif level < depth - 1:
      yield 'Downsample', f'{at}.downsamplers.0.conv'

  yield resnet, 'mid_block.resnets.0'
  yield attention, 'mid_block.attentions.0'
  yield resnet, 'mid_block.resnets.1'

  for level in reversed(range(depth)):
    at = f'up_blocks.{depth - 1 - level}'
    for k in range(blocks + 1):
      yield resnet, f'{at}.resnets.{k}'
    if _attends(model, level):
      yield attention, f'{at}.attentions.{0 if skip else blocks}'
    if level and skip:
      yield 'GroupNorm', f'{at}.skip_norm'
      yield 'Conv', f'{at}.skip_conv'
      yield resnet, f'{at}.resnet_up'
    elif level:
      yield 'Upsample', f'{at}.upsamplers.0.conv'
  yield 'GroupNorm', 'conv_norm_out'
  yield 'Conv', 'conv_out'
