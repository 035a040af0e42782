r"""Measure the speed of our networks against the same networks in torch.

  python -m benchmarks.peers [--batch_size 16] [--nf 64] [--cpu_devices 2]

Two networks that diffusers has are built with random weights and exported
(`checkpoints.diffusers`): DDPM, and the architecture of NCSN++ for 256 pixels.
First the outputs are compared. Then these are timed in turn: ours, torch, and
torch with channels as the last axis in memory.

- An evaluation is sigma times the score of a batch.
- A training step is flips, loss, gradient, clipping, Adam and moving average.

With `--convolutions` also their convolutions one by one, without the rest of
the network: forward, and the gradients of image and kernel. The table has the
sum over the network, of the faster layout of torch for each.

The defaults are networks that a CPU trains in less than a second a step; CUDA
is used where jax and torch both have it. The last column is our median divided
by the smaller median of torch. `benchmarks.evaluation` does the same for the
Inception network and pytorch-fid.
"""

import argparse
import collections
import copy
import os
import pathlib
import sys
import tempfile

import jax
import numpy as np

import experiment
import run_lib
from benchmarks import comparison
from benchmarks import evaluation as timing
from benchmarks.compile import inner_programs
from checkpoints import diffusers as exported
from runtime.devices import check_divisible, divide_cpu, make_layout, to_global

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
NETWORKS = {
  'DDPM': 'vp/ddpm/cifar10.py',
  'NCSN++ 256': 've/ffhq_256_ncsnpp_continuous.py',
}
# Largest difference of outputs, in units of the largest output. GPUs multiply
# with 10 bits by default.
TOLERANCE = {'cpu': 1e-4, 'gpu': 2e-2}
LEVELS = 1000


def build(path, args):
  """Return the experiment of a config with the network's size of `args`."""
  config = experiment.load_config(CONFIGS / path)
  config.data.image_size = args.image_size
  config.training.batch_size = args.batch_size
  for key in ('nf', 'ch_mult', 'num_res_blocks', 'attn_resolutions'):
    config.model[key] = getattr(args, key)
  return experiment.build(config)


def random_params(model, seed=0):
  """Return parameters in numpy, none of which are close to zero."""
  rng = np.random.default_rng(seed)

  def draw(path, like):
    scale = np.prod(like.shape[:-1]) ** -0.5
    value = rng.normal(scale=scale if like.ndim > 1 else 0.1, size=like.shape)
    return np.float32(value + (path[-1].key == 'scale'))

  return jax.tree_util.tree_map_with_path(draw, model.abstract_params())


# --- Ours ---


def our_functions(model, params, image, x, level):
  """Return {'evaluation', 'training step'}, functions without arguments."""
  layout = make_layout()
  t = np.float32(level) / (LEVELS - 1)

  def scaled_score(params, x, t):
    _, sigma = model.sde.marginal(t)
    return sigma[:, None, None, None] * model.score_fn(params)(x, t)

  apply = jax.jit(
    scaled_score, in_shardings=(layout.replicated, layout.split, layout.split)
  )
  placed = jax.device_put(params, layout.replicated)
  x, t = to_global(layout.split, (x, t))

  init, _ = run_lib.make_init(model, layout)
  state = jax.jit(init, out_shardings=layout.replicated)(params)
  train_steps = run_lib.make_train_steps(model, layout)
  batch = {'image': image, 'label': np.zeros(len(image), np.int32)}
  batches = to_global(
    layout.microbatches, {k: v[None, None] for k, v in batch.items()}
  )

  def train():
    nonlocal state
    state, losses = train_steps(state, batches)
    return float(losses[0])

  evaluate = lambda: np.asarray(apply(placed, x, t))
  return {'evaluation': evaluate, 'training step': train}


# --- Theirs ---


def load_torch(model, params):
  """Return the network that diffusers reads from our export."""
  import diffusers
  import torch

  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder, 'network')
    exported.export(folder, model, params)
    # Without this option, a warning recommends a package.
    network = diffusers.UNet2DModel.from_pretrained(
      folder / 'unet', low_cpu_mem_usage=False
    )
  # Attentions that only diffusers has would cost it time.
  for block in network.up_blocks:
    layers = getattr(block, 'attentions', None) or []
    for i, layer in enumerate(layers):
      if not any(p.any() for p in layer.parameters()):
        layers[i] = torch.nn.Identity()
  return network


def torch_functions(model, network, device, image, x, level):
  """Return the functions of `our_functions` for a network of torch."""
  import torch

  training, optim = model.config.training, model.config.optim
  put = lambda v: torch.tensor(np.asarray(v), device=device)
  first = lambda v: put(np.moveaxis(v, -1, 1))  # NHWC to NCHW
  alphas, sigmas = map(
    put, model.sde.marginal(np.float32(np.arange(LEVELS)) / (LEVELS - 1))
  )
  expand = lambda v: v[:, None, None, None]
  noise_only = model.config.sde.name == 've'  # Told sigma; gives the score.
  image, x, level = first(image), first(x), put(level)
  offset = 1.0 if model.config.data.centered else 0.0

  def scaled_score(x, level):
    sigma = sigmas[level]
    if noise_only:
      return expand(sigma) * network(x, sigma).sample
    return -network(x, level.float()).sample

  def evaluate():
    network.eval()
    with torch.inference_mode():
      return scaled_score(x, level).permute(0, 2, 3, 1).cpu().numpy()

  params = [p for p in network.parameters() if p.requires_grad]
  average = copy.deepcopy(params)
  adam = torch.optim.Adam(params, optim.lr, fused=True)

  def train():
    network.train()
    flip = expand(torch.rand(len(image), device=device) < 0.5)
    x0 = torch.where(flip, image.flip(3), image).float() / 255
    x0 = (1 + offset) * x0 - offset
    level = torch.randint(LEVELS, (len(image),), device=device)
    z = torch.randn_like(x0)
    x = expand(alphas[level]) * x0 + expand(sigmas[level]) * z
    loss = (scaled_score(x, level) + z).square().mean()
    adam.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, optim.grad_clip)
    adam.step()
    with torch.no_grad():
      torch._foreach_lerp_(average, params, 1 - training.ema_rate)
    return loss.item()

  return {'evaluation': evaluate, 'training step': train}


# --- Convolutions ---


def convolutions(jaxpr):
  """Yield (shapes of x, kernel and result, strides, padding) of a program's.

  Those of resampling, which are dilated or act on each channel, are left out.
  """
  for eqn in jaxpr.eqns:
    given = eqn.params
    plain = given.get('lhs_dilation') == (1, 1)
    if plain and given['feature_group_count'] == 1:
      shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
      yield *shapes, given['window_strides'], given['padding']
    for program in inner_programs(eqn):
      yield from convolutions(program)


def our_convolution(x, kernel, dy, strides, padding):
  """Return three functions: forward, gradients of x and of the kernel."""

  def forward(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  def gradient(argument):
    pull = lambda x, kernel, dy: jax.vjp(forward, x, kernel)[1](dy)[argument]
    return jax.jit(pull)

  wait, arrays = jax.block_until_ready, jax.device_put((x, kernel, dy))
  functions = jax.jit(forward), gradient(0), gradient(1)
  calls = arrays[:2], arrays, arrays
  return [
    lambda f=f, given=given: wait(f(*given))
    for f, given in zip(functions, calls, strict=True)
  ]


def torch_convolution(x, kernel, dy, strides, padding, last):
  """Return the same functions; `last`: channels last in memory."""
  import torch

  layout = torch.channels_last if last else torch.contiguous_format
  put = lambda v, *axes: torch.tensor(v.transpose(axes).copy()).contiguous(
    memory_format=layout
  )
  x, dy = (put(v, 0, 3, 1, 2) for v in (x, dy))
  kernel, (rows, columns) = put(kernel, 3, 2, 0, 1), padding
  x = torch.nn.functional.pad(x, (*columns, *rows)).contiguous(
    memory_format=layout
  )

  def gradient(*wanted):
    return torch.ops.aten.convolution_backward(
      dy, x, kernel, None, strides, [0, 0], [1, 1], False, [0, 0], 1, wanted
    )

  return [
    lambda: torch.nn.functional.conv2d(x, kernel, stride=strides),
    lambda: gradient(True, False, False),
    lambda: gradient(False, True, False),
  ]


def compare_convolutions(name, args):
  """Print the sums of the medians over the convolutions of a network."""
  model = build(NETWORKS[name], args)
  size = args.batch_size
  x, t = np.zeros(model.shape(size), np.float32), np.ones(size, np.float32)
  score = lambda params: model.score_fn(params)(x, t)
  program = jax.make_jaxpr(score)(model.abstract_params())
  found = collections.Counter(convolutions(program.jaxpr))
  rng, total = np.random.default_rng(0), np.zeros((2, 3))
  for (*shapes, strides, padding), number in found.items():
    arrays = (np.float32(rng.normal(size=shape)) for shape in shapes)
    given = *arrays, strides, padding
    sides = [our_convolution(*given)]
    sides += [torch_convolution(*given, last) for last in (False, True)]
    times, _ = timing.in_turn(sum(sides, []), args.rounds)
    ours, *theirs = np.median(times[..., 0], axis=1).reshape(3, 3)
    total += number * np.array([ours, np.min(theirs, axis=0)])
  print(f'{found.total()} convolutions alone       ours          torch  ratio')
  names = 'forward', 'gradient of images', 'gradient of kernels'
  for what, (ours, theirs) in zip(names, total.T, strict=True):
    print(
      f'{what:20}{ours:15.4f}{theirs:15.4f}{ours / theirs:7.2f}', flush=True
    )


# --- In turn ---


def compare(name, args):
  """Print the difference of outputs and the times of a network.

  Raises:
    ValueError: the outputs differ.
  """
  import torch

  model = build(NETWORKS[name], args)
  params = random_params(model)
  rng = np.random.default_rng(1)
  image = rng.integers(0, 256, model.shape(args.batch_size), np.uint8)
  x = np.float32(rng.uniform(size=image.shape))
  level = rng.integers(0, LEVELS, args.batch_size)
  on_gpu = jax.default_backend() == 'gpu'
  device = 'cuda' if on_gpu else 'cpu'

  network = load_torch(model, params).to(device)
  last = copy.deepcopy(network).to(memory_format=torch.channels_last)
  sides = {
    'ours': our_functions(model, params, image, x, level),
    'torch': torch_functions(model, network, device, image, x, level),
    'channels last': torch_functions(model, last, device, image, x, level),
  }
  count = sum(v.size for v in jax.tree.leaves(params)) / 1e6
  print(f'\n{name}, {count:.2f}M parameters, batch {args.batch_size}')
  rows = {}
  for what in sides['ours']:
    functions = [side[what] for side in sides.values()]
    times, results = timing.in_turn(functions, args.rounds)
    rows[what] = np.median(times[..., 0], axis=1)
    if what == 'evaluation':
      check(results, TOLERANCE['gpu' if on_gpu else 'cpu'])
  print('median seconds      ' + ''.join(f'{s:>15}' for s in sides) + '  ratio')
  for what, row in rows.items():
    times = ''.join(f'{v:15.4f}' for v in row)
    print(f'{what:20}{times}{row[0] / row[1:].min():7.2f}', flush=True)


def check(outputs, tolerance):
  """Print the difference of outputs; raise ValueError if it is large."""
  ours, *theirs = outputs
  gap = max(np.abs(v - ours).max() for v in theirs) / np.abs(ours).max()
  print(f'largest difference of outputs, relative to the largest: {gap:.1e}')
  if not gap < tolerance:
    raise ValueError(f'The outputs differ by more than {tolerance}.')


def parse_args(argv):
  """Return the options."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--image_size', type=int, default=32)
  parser.add_argument('--nf', type=int, default=64)
  parser.add_argument('--ch_mult', type=int, nargs='+', default=[1, 2, 2])
  parser.add_argument('--num_res_blocks', type=int, default=2)
  parser.add_argument('--attn_resolutions', type=int, nargs='*', default=[16])
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument(
    '--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS)
  )
  parser.add_argument('--convolutions', action='store_true')
  timing.add_cpu_devices(parser)
  return parser.parse_args(argv)


def main(argv=None):
  """Compare the networks."""
  args = parse_args(argv)
  if not comparison.installed('torch', 'diffusers'):
    sys.exit(
      'error: torch or diffusers is not installed: pip install torch diffusers'
    )
  # Leave memory of a GPU to torch.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  divide_cpu(wanted=args.cpu_devices)
  try:
    check_divisible(args.batch_size, '--batch_size')
    for name in args.networks:
      compare(name, args)
      if args.convolutions:
        compare_convolutions(name, args)
  except ValueError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
