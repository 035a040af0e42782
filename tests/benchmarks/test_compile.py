"""Ahead-of-time compilation: what is read from programs, without plugins."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiment
from benchmarks import compile as compiling
from benchmarks import hlo
from configs.toy import rings_vp
from runtime.devices import make_layout

# As XLA prints them: a loop of 3 rounds with kernels and a collective in it, an
# asynchronous collective, and layouts of a TPU with parentheses.
TEXT = """HloModule jit_f

%fused_convert (p: f32[8]) -> bf16[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %convert.1 = bf16[8]{0} convert(%p)
}

%body (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg = (s32[], f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %conv.1 = (f32[8,4]{1,0:T(8,128)}, u8[0]{0}) custom-call(%x), \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(f)/Conv_3/dot"}
  %all-reduce.1 = (f32[8,4]{1,0}, /*index=1*/bf16[2]{0}) all-reduce(%x, %y), \
to_apply=%add
  ROOT %tuple = (s32[], f32[8,4]{1,0}) tuple(%i, %x)
}

%condition (arg: (s32[], f32[8,4])) -> pred[] {
  ROOT %lt = pred[] constant(true)
}

ENTRY %main (a: f32[8]) -> f32[8,4] {
  %a = f32[8]{0} parameter(0)
  %wrapped_convert = bf16[8]{0} fusion(%a), kind=kLoop, calls=%fused_convert
  %while.1 = (s32[], f32[8,4]{1,0}) while(%tuple.2), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %start = (f32[4]{0}, f32[8]{0}) all-gather-start(%a), dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  ROOT %copy.7 = f32[8,4]{1,0} copy(%gte)
}
"""


def test_kernels_and_collectives_of_a_text():
  program = hlo.Program(TEXT)
  assert program.entry == 'main'
  assert hlo.collectives(program) == {
    'all-reduce': (3, 3 * (8 * 4 * 4 + 2 * 2)),
    'all-gather': (1, 8 * 4),
  }
  kinds = {group['kind']: group for group in hlo.kernels(program)}
  numbers = {kind: group['number'] for kind, group in kinds.items()}
  assert numbers == {
    'convolution': 3, 'collective': 4, 'lone cast': 1, 'copy': 1
  }  # fmt: skip
  assert (
    kinds['lone cast']['float32'] == 0 and kinds['lone cast']['bytes'] == 16
  )
  assert kinds['copy']['float32_bytes'] == 128
  assert kinds['convolution']['sources'] == {'jit(f)/Conv_#/dot': 3}


EIGHT_DEVICES = """
import jax
jax.config.update('jax_num_cpu_devices', 8)
import jax.numpy as jnp
from runtime.devices import make_layout

def f(x):
  step = lambda carry, _: (carry / 2 + jnp.sum(x * carry), None)
  total, _ = jax.lax.scan(step, 1.0, length=5)
  return total, x

layout = make_layout()
f = jax.jit(f, in_shardings=layout.split, out_shardings=layout.replicated)
print(f.lower(jax.ShapeDtypeStruct((16, 3), jnp.float32)).compile().as_text())
"""


def test_rounds_of_a_loop_of_a_tpu():
  """They are in the condition only."""
  lines = """
  %c = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT"""
  text = TEXT.replace('"known_trip_count":{"n":"3"}', '')
  assert hlo.collectives(hlo.Program(text))['all-reduce'][0] == 1
  text = text.replace('\n  ROOT %lt = pred[] constant(true)', lines)
  text = text.replace(
    '%condition (arg: (s32[], f32[8,4])) -> pred[] {',
    '%condition (arg: (s32[], f32[8,4])) -> pred[] {\n'
    '  %arg = (s32[], f32[8,4]) parameter(0)',
  )
  assert hlo.collectives(hlo.Program(text))['all-reduce'][0] == 3


def test_collectives_of_eight_devices():
  """A sum over all devices in a loop, and an array sent to all of them."""
  done = subprocess.run(
    [sys.executable, '-c', EIGHT_DEVICES],
    check=True,
    capture_output=True,
    text=True,
  )
  found = hlo.collectives(hlo.Program(done.stdout))
  assert found['all-reduce'] == (5, 5 * 4)
  assert found['all-gather'] == (1, 16 * 3 * 4)


def test_operations():
  def f(x, kernel, w):
    convolve = lambda x: jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    x, _ = jax.lax.scan(lambda x, _: (convolve(x), None), x, length=7)
    return jax.lax.cond(x[0, 0, 0, 0] > 0, lambda x: x @ w, lambda x: x, x)

  shapes = (2, 8, 8, 5), (3, 3, 5, 5), (5, 5)
  jaxpr = jax.make_jaxpr(jax.jit(f))(*map(jnp.zeros, shapes))
  pixels = 2 * 8 * 8
  assert compiling.count_flops(jaxpr) == 2 * pixels * 5 * 5 * (7 * 9 + 1)


@pytest.mark.parametrize('name', compiling.PROGRAMS)
def test_programs(name):
  """Programs of a small model compile for the mesh that they are given."""
  config = rings_vp.get_config()
  with config.unlocked():
    config.training.update(n_jitted_steps=100, batch_size=64)
    config.eval.batch_size = 64
    config.sampling.num_steps = 30
  model, layout = experiment.build(config), make_layout()
  found, text = compiling.measure(name, model, layout, True)
  assert 0 < found['arguments_mib'] < found['peak_mib'] < 100
  forward = jax.make_jaxpr(model.score_fn(model.init_params(jax.random.key(0))))
  once = compiling.count_flops(forward(np.zeros((64, 2)), np.ones(64)))
  evaluations = found['tflop'] * 1e12 / once
  if name == 'train':
    assert 2 < evaluations < 3
    program = hlo.Program(text)
    assert 100 in {times for _, times in program.executed()}
  elif name == 'sample':
    assert evaluations == 30
  else:
    assert evaluations >= 6


@pytest.mark.parametrize(
  ('topology', 'needed'), [('v5e:4x4', 'tpu'), ('h100:1x1x8', 'cuda13')]
)
def test_without_the_compiler(monkeypatch, topology, needed):
  monkeypatch.setattr(compiling.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=rf'pip install "jax\[{needed}\]==\d'):
    compiling.devices_of(topology)


@pytest.mark.parametrize(('memory_gib', 'fits'), [(1, True), (1e-6, False)])
def test_what_does_not_fit(monkeypatch, capsys, tmp_path, memory_gib, fits):
  config = rings_vp.get_config()
  monkeypatch.setattr(compiling, 'devices_of', lambda name: jax.devices())
  arguments = f'--memory_gib={memory_gib} --programs=train --kernels'
  compiling.FLAGS(['', *arguments.split(), f'--hlo={tmp_path}'])
  assert compiling.report(config, 'h100:1x1x1') == fits
  *printed, facts = capsys.readouterr().out.splitlines()
  assert json.loads(facts)['train']['fits'] == fits
  printed = '\n'.join(printed)
  assert ('DOES NOT FIT' in printed) != fits
  assert ' kernels; ' in printed and 'matrix product' in printed
  assert (tmp_path / 'train.hlo').read_text().startswith('HloModule')


def test_unknown_topology():
  with pytest.raises(ValueError, match='a100.*CHIP:SHAPE.*v5e'):
    compiling.devices_of('a100:1x1x8')


def test_the_table_is_that_of_the_measurements():
  root = pathlib.Path(compiling.__file__).parents[1]
  rows = json.loads((root / 'benchmarks' / 'compile.json').read_text())
  page = (root / 'docs' / 'scaling.md').read_text()
  assert compiling.table(rows) in page
  for config, *_ in compiling.TABLE:
    assert (root / config).is_file()
