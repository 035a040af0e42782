r"""Compile a config for TPUs or GPUs that this machine does not have.

  python -m benchmarks.compile --config configs/quickstart.py \
    --topology h100:1x1x8 [--batch_size 1024] [--config.model.dtype=bfloat16] \
    [--programs train,sample,likelihood] [--kernels]
  python -m benchmarks.compile --table benchmarks/compile.json

The programs are those that `main.py` runs: a training step, the sampler, and an
attempted step of the likelihood's ODE solver. Any machine with a CPU will do,
but the compiler for the device must be installed: `pip install "jax[tpu]"` or
`pip install "jax[cuda13]"`. A topology is

- v4:AxBxC, v5e:AxB, v5p:AxBxC or v6e:AxB, a slice of TPUs, or
- h100:SLICESxHOSTSxGPUS, for H100 of 80 GB.

For each program it prints the memory of one device, as the compiler plans it:
arguments, temporaries and their sum, against what JAX can use of the device's
memory. The exit code is 1 if a program does not fit. Floating-point operations
are those of convolutions and matrix products, counted in the program as it is
traced: the bodies of loops count as often as they run, and a loop with an
unknown number of rounds (an adaptive solver) once. Collectives are those that
the compiled program executes, per training step.

Without the device the compiler cannot try out kernels (autotuning), so that
memory and numbers of kernels are meaningful but say little about speed.
Programs are compiled with the least effort. On TPUs this takes a fifth of the
time, and plans somewhat more temporary memory, than with `--full_effort`.

With `--kernels` it also prints what the kernels do and where they come from.
"""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import jax
from absl import app, flags
from jax.experimental import topologies
from ml_collections import config_flags

import experiment
import run_lib
from benchmarks import hlo
from commands import evaluate, trained
from runtime.devices import check_divisible, make_layout
from runtime.files import write_json

FLAGS = flags.FlagValues()
flags.DEFINE_flag(app.HelpFlag(), flag_values=FLAGS)
config_flags.DEFINE_config_file(
  'config', None, 'A file of configs/.', flag_values=FLAGS
)
for define, name, default, meaning in (
  (flags.DEFINE_string, 'topology', '', 'Such as v5e:4x4 or h100:1x1x8.'),
  (flags.DEFINE_integer, 'batch_size', 0, 'Examples at a time, in all.'),
  (
    flags.DEFINE_list,
    'programs',
    'train,sample,likelihood',
    'What to compile.',
  ),
  (flags.DEFINE_bool, 'kernels', False, 'Print what the kernels do.'),
  (flags.DEFINE_bool, 'full_effort', False, 'For TPUs, compile as for a run.'),
  (flags.DEFINE_float, 'memory_gib', 0, "Usable memory, in place of a chip's."),
  (flags.DEFINE_string, 'hlo', '', 'Folder to write the programs in.'),
  (flags.DEFINE_string, 'table', '', 'JSON file to complete and print.'),
):
  define(name, default, meaning, flag_values=FLAGS)

GIB = 2**30
TARGET = pathlib.Path(__file__).parent / 'h100_target.txtpb'
# Memory in GiB that programs can use. A TPU keeps some for itself; of a GPU's,
# JAX takes three quarters (XLA_PYTHON_CLIENT_MEM_FRACTION changes that).
MEMORY_GIB = {
  'v4': 30.75,
  'v5e': 15.75,
  'v5p': 95.0,
  'v6e': 31.25,
  'h100': 0.75 * 84942979072 / GIB,
}
# Machine code that does not run needs no effort; the kernels are the same.
GPU_OPTIONS = {
  'xla_gpu_autotune_level': 0,
  'xla_gpu_disable_gpuasm_optimizations': True,
  'xla_llvm_disable_expensive_passes': True,
  'xla_backend_optimization_level': 0,
}
TPU_OPTIONS = {
  'exec_time_optimization_effort': -1.0,
  'memory_fitting_effort': -1.0,
}
# The rows of docs/scaling.md.
_DDPMPP = 'configs/vp/cifar10_ddpmpp_continuous.py'
_NCSNPP = 'configs/ve/cifar10_ncsnpp_continuous.py'
_256 = 'configs/ve/ffhq_256_ncsnpp_continuous.py'
_1024 = 'configs/ve/ffhq_ncsnpp_continuous.py'
_BF16 = '--config.model.dtype=bfloat16'
TABLE = (
  (_DDPMPP, 'h100:1x1x1', _BF16),
  (_DDPMPP, 'h100:1x8x8', _BF16, '--batch_size=4096'),
  (_DDPMPP, 'v5e:4x4', _BF16, '--batch_size=1024'),
  (_DDPMPP, 'v5p:4x8x8', _BF16, '--batch_size=8192'),
  (_NCSNPP, 'h100:1x1x1'),
  (_NCSNPP, 'v4:2x2x2'),
  (_256, 'h100:1x1x8'),
  (_256, 'h100:1x1x8', _BF16),
  (_256, 'v6e:4x4', _BF16),
  (_1024, 'h100:1x1x8'),
  (_1024, 'v5e:2x4', _BF16),
)


def devices_of(topology: str) -> list[jax.Device]:
  """Return the devices of a topology, to compile for.

  Raises:
    ValueError: there is no such topology, or its compiler is not installed.
  """
  chip, _, shape = topology.partition(':')
  if chip not in MEMORY_GIB:
    raise ValueError(
      f'--topology={topology!r} needs to be CHIP:SHAPE, such as v5e:4x4 or '
      f'h100:1x1x8, with one of the chips {", ".join(MEMORY_GIB)}.'
    )
  extra, modules = 'tpu', ('libtpu',)
  if chip == 'h100':
    extra, modules = 'cuda13', ('jax_cuda13_plugin', 'jax_cuda12_plugin')
  if not any(importlib.util.find_spec(name) for name in modules):
    raise ValueError(
      f'Compiling for {chip} needs its compiler, but no such device: '
      f'pip install "jax[{extra}]=={jax.__version__}"'
    )
  options = {'platform': 'tpu', 'topology_name': topology}
  if chip == 'h100':
    options = {'platform': 'cuda', 'topology_name': '', 'topology': shape}
    options['target_config'] = TARGET.read_text()
  elif chip == 'v4':
    options['chip_config_name'] = 'megacore'  # One device a chip.
  # libtpu neither looks for a TPU nor locks it.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  try:
    return topologies.get_topology_desc(**options).devices
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f'--topology={topology}: {reason}') from None


# ------------------------------------------------------------------- programs


def _rng():
  return jax.eval_shape(lambda: jax.random.key(0))


def train(model, layout):
  """Return (jitted training steps, arguments, number of steps)."""
  state = run_lib.abstract_state(model, layout)
  batches = run_lib.abstract_batches(model)
  n = batches['image'].shape[0]
  return run_lib.make_train_steps(model, layout), (state, batches), n


def sample(model, layout):
  """Return (jitted sampler, arguments, 1)."""
  size = model.config.eval.batch_size
  make = trained.jit_sample(model, layout, size, split=True)
  return make, (model.abstract_params(), _rng(), {}, {}), 1


def likelihood(model, layout):
  """Return (a jitted stretch of the likelihood's solver, arguments, 1)."""
  begin, proceed = evaluate.jit_bits(model, layout)
  dtype = run_lib.abstract_batches(model)['image'].dtype
  size = model.config.eval.batch_size
  image = jax.ShapeDtypeStruct(model.shape(size), dtype)
  condition = None
  if model.condition:
    shape = size, *model.config.data.condition_shape
    condition = jax.ShapeDtypeStruct(shape, 'float32')
  arguments = model.abstract_params(), _rng(), image, condition
  *_, state = jax.eval_shape(begin, *arguments, None)
  return proceed, (*arguments, state), 1


PROGRAMS = {'train': train, 'sample': sample, 'likelihood': likelihood}


def inner_programs(eqn):
  """Return the jaxprs in an equation: of a call, branches or a loop."""
  values = jax.tree.leaves(
    list(eqn.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')
  )
  return [getattr(v, 'jaxpr', v) for v in values if hasattr(v, 'eqns')]


def count_flops(jaxpr) -> int:
  """Return the operations of convolutions and matrix products of a program.

  2 for each multiplication and addition, the taps that fall on the padding or
  between the pixels of a transposed convolution not counted apart.

  Args:
    jaxpr: of `jax.make_jaxpr`, say; the loops of `scan` count as often as they
      run, those of `while` once, and of branches the most costly one.
  """
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      inner = math.prod(shape[axis] for axis in contracted)
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * inner
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel = eqn.invars[1].aval.shape
      out_axis = eqn.params['dimension_numbers'].rhs_spec[0]
      taps = math.prod(kernel) // kernel[out_axis]
      out = math.prod(eqn.outvars[0].aval.shape)
      total += 2 * out * taps // math.prod(eqn.params['lhs_dilation'])
    else:
      inner = [count_flops(program) for program in inner_programs(eqn)]
      if inner:
        choose = max if eqn.primitive.name == 'cond' else sum
        total += choose(inner) * eqn.params.get('length', 1)
  return total


def measure(name: str, model, layout, full_effort: bool):
  """Return (facts of a compiled program, the program as text).

  Args:
    name: of `PROGRAMS`.
    model: an Experiment.
    layout: of the devices to compile for.
    full_effort: whether TPU programs are compiled as for a run.

  Raises:
    MemoryError: the compiler says that the program does not fit.
  """
  function, arguments, steps = PROGRAMS[name](model, layout)
  options = {'gpu': GPU_OPTIONS, 'tpu': TPU_OPTIONS}.get(layout.platform)
  if full_effort and layout.platform == 'tpu':
    options = None
  traced = function.trace(*arguments)
  flops = count_flops(traced.jaxpr) / steps
  begun = time.monotonic()
  try:
    compiled = traced.lower().compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise MemoryError(str(error).splitlines()[0]) from None
  seconds = time.monotonic() - begun
  memory, text = compiled.memory_analysis(), compiled.as_text()
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
  program = hlo.Program(text)
  found, kinds = hlo.collectives(program), hlo.kernels(program)
  return {
    'arguments_mib': memory.argument_size_in_bytes / 2**20,
    'temporaries_mib': memory.temp_size_in_bytes / 2**20,
    'peak_mib': total / 2**20,
    'tflop': flops / 1e12,
    'collectives': {
      kind: {'number': number / steps, 'mib': size / steps / 2**20}
      for kind, (number, size) in found.items()
    },
    'kernels': {group['kind']: group['number'] / steps for group in kinds},
    'compile_seconds': seconds,
  }, text


# -------------------------------------------------------------------- reports


def print_kernels(text, steps):
  """Print what the kernels of a step do."""
  kinds = hlo.kernels(hlo.Program(text))
  total = sum(group['number'] for group in kinds) / steps
  print(f'  {total:.0f} kernels; float32: those that write it')
  print('                       number   float32   MiB written  float32 MiB')
  for group in kinds:
    sizes = (group[k] / steps / 2**20 for k in ('bytes', 'float32_bytes'))
    numbers = (group[k] / steps for k in ('number', 'float32'))
    print(
      f'  {group["kind"]:18}'
      + ''.join(f'{v:10.0f}' for v in numbers)
      + ''.join(f'{v:13.0f}' for v in sizes)
    )
    for source, number in group['sources'].items():
      print(f'  {number / steps:20.0f}      {source}')


def _batches(config, count):
  """Return {program: examples at a time} of the programs to compile."""
  if FLAGS.batch_size:
    with config.unlocked():
      config.training.batch_size = FLAGS.batch_size
      config.eval.batch_size = FLAGS.batch_size
  training, batches = config.training, {}
  for name in FLAGS.programs:
    if name not in PROGRAMS:
      raise ValueError(
        f'--programs has {name!r}, which is none of {", ".join(PROGRAMS)}.'
      )
    if name == 'train':
      batches[name] = training.batch_size
      parts = training.batch_size // training.grad_accumulation
      check_divisible(
        parts, 'The training batch (divided by grad_accumulation)', count
      )
    else:
      batches[name] = config.eval.batch_size
      check_divisible(batches[name], 'config.eval.batch_size', count)
  return batches


def _print_facts(found, count, usable):
  print(
    f'  memory of a device: {found["arguments_mib"]:.0f} MiB arguments + '
    f'{found["temporaries_mib"]:.0f} MiB temporaries, at most '
    f'{found["peak_mib"]:.0f} of {usable * 1024:.0f} MiB: '
    f'{"fits" if found["fits"] else "DOES NOT FIT"}\n'
    f'  operations: {found["tflop"]:.3g} TFLOP, '
    f'{found["tflop"] / count:.3g} on a device\n'
    f'  collectives: {_collectives(found)}\n'
    f'  compiled in {found["compile_seconds"]:.0f} s'
  )


def report(config, topology):
  """Compile the programs, print their facts; return whether all fit."""
  layout = make_layout(devices_of(topology))
  count = layout.split.mesh.size
  batches = _batches(config, count)
  model = experiment.build(config)
  usable = FLAGS.memory_gib or MEMORY_GIB[topology.partition(':')[0]]
  facts = {'devices': count, 'jax': jax.__version__}
  for name, batch in batches.items():
    print(f'{name}, batch {batch} on {topology}', flush=True)
    facts[name] = {'batch': batch, 'fits': False}
    try:
      found, text = measure(name, model, layout, FLAGS.full_effort)
    except MemoryError as error:
      print(f'  DOES NOT FIT: {error}')
      facts[name]['error'] = str(error)
      continue
    facts[name] |= found | {'fits': found['peak_mib'] <= usable * 1024}
    _print_facts(facts[name], count, usable)
    if FLAGS.kernels:
      steps = config.training.n_jitted_steps if name == 'train' else 1
      print_kernels(text, steps)
    if FLAGS.hlo:
      path = pathlib.Path(FLAGS.hlo) / f'{name}.hlo'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
  print(json.dumps(facts))
  return all(facts[name]['fits'] for name in batches)


def _collectives(found):
  """Return the collectives of a program as text."""
  return '; '.join(
    f'{value["number"]:.3g} {kind}, {value["mib"]:.3g} MiB in all'
    for kind, value in found['collectives'].items()
  ) or 'none'  # fmt: skip


def make_table(path):
  """Compile the training steps of `TABLE` that a JSON file lacks; print all."""
  path = pathlib.Path(path)
  rows = json.loads(path.read_text()) if path.exists() else {}
  for config, topology, *rest in TABLE:
    key = ' '.join((config, topology, *rest))
    if key not in rows:
      command = ['-m', 'benchmarks.compile', f'--config={config}', *rest]
      command += [f'--topology={topology}', '--programs=train']
      if FLAGS.hlo:
        command.append(f'--hlo={FLAGS.hlo}/{len(rows)}')
      done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False
      )
      lines = done.stdout.splitlines()
      if not lines or not lines[-1].startswith('{'):
        reason = (done.stderr.splitlines() or ['it says nothing'])[-1]
        raise ValueError(f'{key}: {reason}')
      rows[key] = json.loads(lines[-1])
      write_json(path, rows)
  print(table(rows))


def table(rows):
  """Return the rows of `TABLE` as Markdown, for docs/scaling.md."""
  lines = [
    '| config | devices | batch | arguments + temporaries, MiB | of usable '
    '| TFLOP a device | collectives of a step |',
    '|---|---|---|---|---|---|---|',
  ]
  for config, topology, *rest in TABLE:
    row = rows[' '.join((config, topology, *rest))]
    found, chip = row['train'], topology.partition(':')[0]
    name = config.removeprefix('configs/').removesuffix('.py')
    name = f'`{name}`' + (', bf16' if _BF16 in rest else '')
    cells = [name, topology, found['batch']]
    if 'error' in found:
      cells += ['does not fit', '', '', '']
    else:
      share = found['peak_mib'] / 1024 / MEMORY_GIB[chip]
      cells += [
        f'{found["arguments_mib"]:,.0f} + {found["temporaries_mib"]:,.0f}',
        f'{share:.0%}',
        f'{found["tflop"] / row["devices"]:.3g}',
        _collectives(found),
      ]
    lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
  return '\n'.join(lines)


def parse(argv):
  """Return the arguments that are no flags."""
  flags.FLAGS(argv[:1])  # Flags of this program are apart from those of main.
  return FLAGS(argv)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Unknown argument {argv[1]!r}.')
  jax.config.update('jax_platforms', 'cpu')
  try:
    if FLAGS.table:
      make_table(FLAGS.table)
    elif FLAGS.config is None:
      raise ValueError('--config or --table is missing; see --help.')
    elif not report(FLAGS.config, FLAGS.topology):
      sys.exit(1)
  except ValueError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
