"""Read compiled programs as XLA prints them: collectives and kernels.

`executed` walks what a program runs, with the number of times of each
instruction: the bodies of loops count as often as they run, if XLA knows it.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# Instructions that no kernel is started for.
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast',
  'after-all', 'opt-barrier', 'while', 'call', 'conditional', 'async-done',
  'partition-id', 'replica-id', 'copy-done', 'add-dependency',
}  # fmt: skip
_COMPUTATION = re.compile(r'^(ENTRY )?%?([^\s(]+) \(.*\{$')
_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$'
)
_ARRAY = re.compile(r'([a-z]+(\d*)\w*)\[([\d,]*)\]')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|called_computations|branch_computations)='
  r'(\{[^}]*\}|%?[\w.\-]+)'
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """An instruction.

  Attributes:
    name: its name, such as 'loop_add_fusion.3'.
    shape: text of the shape of its result.
    opcode: such as 'fusion'.
    rest: text of its operands and attributes.
  """

  name: str
  shape: str
  opcode: str
  rest: str

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    found = _CALLED.findall(self.rest)
    return [name for text in found for name in re.findall(r'[\w.\-]+', text)]

  @property
  def source(self) -> str:
    """Name of the operation in the model that it comes from, or ''."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ''


def num_bytes(shape: str, dtype: str = '') -> int:
  """Return the bytes of all arrays in the text of a shape.

  Args:
    shape: such as '(f32[2,3]{1,0}, bf16[])'.
    dtype: count the arrays of this type only.

  Example:
    >>> num_bytes('(f32[2,3]{1,0:T(8,128)}, bf16[])')
    26
  """
  total = 0
  for kind, bits, dims in _ARRAY.findall(shape):
    if kind != 'token' and (not dtype or kind == dtype):
      size = math.prod(int(d) for d in dims.split(',') if d)
      total += math.ceil(size * int(bits or 8) / 8)
  return total


class Program:
  """A compiled program.

  Attributes:
    computations: {name: its instructions}.
    entry: name of the computation where the program begins.
  """

  def __init__(self, text: str):
    """Read the text of `jax.stages.Compiled.as_text`."""
    self.computations, self.entry, current = {}, '', None
    for line in text.splitlines():
      if begins := _COMPUTATION.match(line):
        current = self.computations[begins[2]] = []
        self.entry = begins[2] if begins[1] else self.entry
      elif current is not None and (found := _INSTRUCTION.match(line)):
        current.append(Instruction(*found.groups()))

  def executed(
    self, fused: bool = False, computation: str = '', times: int = 1
  ) -> Iterator[tuple[Instruction, int]]:
    """Yield (instruction, number of times that it runs).

    Args:
      fused: whether to go into fusions and asynchronous calls, too.
      computation: where to begin; the entry by default.
      times: how often that runs.
    """
    inner = {'while', 'call', 'conditional', 'async-start'}
    inner |= {'fusion'} if fused else set()
    for instruction in self.computations[computation or self.entry]:
      yield instruction, times
      if instruction.opcode in inner:
        for name in instruction.called:
          again = times * self.trips(instruction)
          yield from self.executed(fused, name, again)

  def trips(self, instruction: Instruction) -> int:
    """Return how often a loop runs; 1 if that is unknown, or for no loop."""
    if found := _TRIPS.search(instruction.rest):
      return int(found[1])
    # Compilers for TPUs do not say it. JAX counts from 0 while i < n.
    name = re.search(r'condition=%?([\w.\-]+)', instruction.rest)
    condition = (
      {i.opcode: i for i in self.computations[name[1]]} if name else {}
    )
    if set(condition) == {
      'parameter',
      'get-tuple-element',
      'constant',
      'compare',
    }:
      found = re.match(r'(\d+)\)', condition['constant'].rest)
      if found and 'direction=LT' in condition['compare'].rest:
        return int(found[1])
    return 1

  def opcodes(self, instruction: Instruction) -> set[str]:
    """Return the opcodes of an instruction, or of all that it fuses."""
    if instruction.opcode != 'fusion':
      return {instruction.opcode}
    body = (i for n in instruction.called for i in self.computations[n])
    return {
      code for inner in body for code in self.opcodes(inner)
    }  # Fusions can be nested.


def collectives(program: Program) -> dict[str, tuple[int, int]]:
  """Return {kind: (number, bytes of the results on a device)}."""
  found = collections.defaultdict(lambda: (0, 0))
  for instruction, times in program.executed(fused=True):
    kind = instruction.opcode.removesuffix('-done')
    if kind in COLLECTIVES:
      number, size = found[kind]
      size += times * num_bytes(instruction.shape)
      found[kind] = number + times, size
  return dict(found)


def kernel_kind(program: Program, instruction: Instruction) -> str:
  """Return what a kernel does, by the most costly thing in it; '' for none."""
  if instruction.opcode in _FREE or instruction.opcode.endswith('-done'):
    return ''
  if instruction.opcode == 'custom-call':
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    target = target[1] if target else ''
    if 'conv' in target:
      return 'convolution'
    if re.search('gemm|matmul|cublas|dot', target):
      return 'matrix product'
    return 'other call'
  codes = program.opcodes(instruction)
  for code, kind in (
    ('convolution', 'convolution'),
    ('dot', 'matrix product'),
    ('custom-call', 'other call'),
    ('reduce', 'reduction'),
    ('reduce-window', 'reduction'),
    ('transpose', 'transpose'),
  ):
    if code in codes:
      return kind
  if any(code.removesuffix('-start') in COLLECTIVES for code in codes):
    return 'collective'
  doing = codes - _FREE - {'broadcast', 'reshape', 'slice'}
  if doing == {'convert'}:
    return 'lone cast'
  return 'copy' if doing <= {'copy', 'copy-start'} else 'elementwise'


def kernels(program: Program) -> list[dict]:
  """Return the kinds of kernels, the most frequent first.

  Returns:
    Dicts with 'kind', 'number', 'float32' (how many write float32),
    'float32_bytes', 'bytes' (written) and 'sources', {operation: number} of the
    most frequent ones.
  """
  groups = collections.defaultdict(list)
  for instruction, times in program.executed():
    kind = kernel_kind(program, instruction)
    if kind:
      groups[kind].append((instruction, times))
  found = []
  for kind, members in groups.items():
    sources = collections.Counter()
    single = [(i, n, num_bytes(i.shape, 'f32')) for i, n in members]
    for instruction, times in members:
      source = re.sub(r'_\d+', '_#', instruction.source)
      source = re.sub(r'^.*closed_call/', '', source)
      sources[source or 'of the compiler'] += times
    found.append(
      {
        'kind': kind,
        'number': sum(times for _, times in members),
        'float32': sum(times for _, times, size in single if size),
        'float32_bytes': sum(times * size for _, times, size in single),
        'bytes': sum(n * num_bytes(i.shape) for i, n in members),
        'sources': dict(sources.most_common(10)),
      }
    )
  return sorted(found, key=lambda group: -group['number'])
