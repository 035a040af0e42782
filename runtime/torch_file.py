"""Reads the files that `torch.save` and `torch.jit.save` write, without torch.

Both hold a pickle: a small program that, run by Python's own unpickler, may
call anything. Here that program is never run. `pickletools` splits it into
instructions, and the loop below carries out the few that torch writes:
constants, containers, and the handful of constructors in `_CONSTRUCTORS`,
each of them a function of this file. A name outside that table ends the
reading, so a hostile file has nothing to call.

Three layouts are known: the zip archive that torch >= 1.6 writes, the
single stream written before that, and TorchScript archives, whose objects
become dictionaries of their attributes.
"""

import dataclasses
import io
import os
import pickletools
import struct
import zipfile
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

_DTYPES = {
  'torch.FloatStorage': np.dtype('<f4'),
  'torch.DoubleStorage': np.dtype('<f8'),
  'torch.HalfStorage': np.dtype('<f2'),
  'torch.BFloat16Storage': np.dtype(jnp.bfloat16),
  'torch.LongStorage': np.dtype('<i8'),
  'torch.IntStorage': np.dtype('<i4'),
  'torch.ShortStorage': np.dtype('<i2'),
  'torch.CharStorage': np.dtype('i1'),
  'torch.ByteStorage': np.dtype('u1'),
  'torch.BoolStorage': np.dtype('?'),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclasses.dataclass(frozen=True)
class _Global:
  """A name in the file, 'module.name'. It is never imported."""

  name: str


class _Object(dict):
  """Attributes of a TorchScript object."""


def load(file: str | os.PathLike | BinaryIO) -> Any:
  """Returns the nested dicts, lists and tuples of a torch file.

  Tensors become numpy arrays (bfloat16 ones of ml_dtypes' type).

  Args:
    file: a path, or a seekable binary stream.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, is no torch file, or names something
      beyond tensors, numbers, strings and containers.
  """
  if not hasattr(file, 'read'):
    with open(file, 'rb') as stream:
      return load(stream)
  label = getattr(file, 'name', 'the stream')
  try:
    if zipfile.is_zipfile(file):
      return _load_zip(file)
    file.seek(0)
    return _load_legacy(file)
  except Exception as error:  # What a damaged file trips over is unforeseeable.
    raise ValueError(
      f'{label} cannot be read as a PyTorch file: '
      f'{str(error) or type(error).__name__}.'
    ) from None


def _load_zip(stream: BinaryIO) -> Any:
  """Zip archive: ROOT/data.pkl, and one ROOT/data/KEY for each storage."""
  archive = zipfile.ZipFile(stream)
  names = archive.namelist()
  roots = [n.removesuffix('data.pkl') for n in names if n.endswith('data.pkl')]
  if len(roots) != 1:
    raise ValueError('the zip archive has no data.pkl, or several')
  root = roots[0]
  if f'{root}byteorder' in names and archive.read(f'{root}byteorder') == b'big':
    raise ValueError('it was written on a big-endian machine')
  storages = {}

  def storage(dtype, key, size):
    if key not in storages:
      info = archive.getinfo(f'{root}data/{key}')
      # Declared sizes bound what is read: no bombs.
      if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f'storage {key} is compressed')
      storages[key] = archive.read(info)
    return np.frombuffer(storages[key], dtype, size)

  return _interpret(io.BytesIO(archive.read(f'{root}data.pkl')), storage)


def _load_legacy(stream: BinaryIO) -> Any:
  """One stream: header, object, storage keys, then the storages' bytes."""
  limit = stream.seek(0, os.SEEK_END)
  stream.seek(0)
  if stream.read(1) != b'\x80':
    raise ValueError('it starts like no file of torch.save')
  stream.seek(0)
  storages = {}

  def storage(dtype, key, size):
    # The bytes come later in the stream: tensors are views on these arrays,
    # which are filled at the end.
    if size * dtype.itemsize > limit:
      raise ValueError(f'storage {key} is larger than the file')
    if key not in storages:
      storages[key] = np.zeros(size, dtype)
    if storages[key].dtype != dtype or storages[key].size != size:
      raise ValueError(f'storage {key} has two types')
    return storages[key]

  if _interpret(stream, storage) != _LEGACY_MAGIC:
    raise ValueError('it starts like no file of torch.save')
  if _interpret(stream, storage) != _LEGACY_PROTOCOL:
    raise ValueError('it has an unknown protocol version')
  if not _interpret(stream, storage)['little_endian']:
    raise ValueError('it was written on a big-endian machine')
  result = _interpret(stream, storage)
  for key in _interpret(stream, storage):
    array = storages[key]
    (size,) = struct.unpack('<q', stream.read(8))
    data = stream.read(array.nbytes)
    if size != array.size or len(data) != array.nbytes:
      raise ValueError(f'storage {key} is cut short')
    array[:] = np.frombuffer(data, array.dtype)
    del storages[key]
  if storages:
    raise ValueError(f'storage {min(storages)} is missing')
  return result


def _tensor(storage, offset, size, stride, *unused) -> np.ndarray:
  """A view of `storage` with torch's strides, counted in elements."""
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if min(offset, *size, *stride, 0) < 0:
    raise ValueError('a tensor has a negative size or stride')
  if 0 in size:
    return np.zeros(size, storage.dtype)
  if last >= storage.size:
    raise ValueError('a tensor reaches beyond its storage')
  return np.lib.stride_tricks.as_strided(
    storage[offset:],
    size,
    [s * storage.itemsize for s in stride],
    writeable=False,
  )


def _number_type(name: str, *unused) -> np.dtype:
  """A numpy type of plain little-endian numbers (never of objects)."""
  dtype = np.dtype(name)
  if dtype.kind not in 'fiub':
    raise ValueError(f'it has numbers of type {name}, which is refused')
  return dtype


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
  """A numpy number, such as the learning rate in an optimizer's state."""
  return np.frombuffer(data, dtype, 1)[0]


_first = lambda value, *unused: value
_latin1 = lambda text, *unused: text.encode('latin1')
_CONSTRUCTORS = {
  '_codecs.encode': _latin1,  # How bytes are written.
  'collections.OrderedDict': dict,
  'numpy.dtype': _number_type,
  'numpy._core.multiarray.scalar': _scalar,
  'numpy.core.multiarray.scalar': _scalar,
  'torch.Size': tuple,
  'torch._utils._rebuild_tensor': _tensor,
  'torch._utils._rebuild_tensor_v2': _tensor,
  'torch._utils._rebuild_parameter': _first,
  'torch.jit._pickle.build_boollist': _first,
  'torch.jit._pickle.build_doublelist': _first,
  'torch.jit._pickle.build_intlist': _first,
  'torch.jit._pickle.build_tensorlist': _first,
  'torch.jit._pickle.restore_type_tag': _first,
}
_LITERALS = {
  *('BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'INT', 'LONG'),
  *('BINFLOAT', 'FLOAT', 'BINSTRING', 'SHORT_BINSTRING', 'STRING'),
  *('BINUNICODE', 'SHORT_BINUNICODE', 'UNICODE', 'SHORT_BINBYTES'),
}
_EMPTY = {
  'NONE': lambda: None,
  'NEWTRUE': lambda: True,
  'NEWFALSE': lambda: False,
  'EMPTY_DICT': dict,
  'EMPTY_LIST': list,
  'EMPTY_TUPLE': tuple,
}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


def _construct(function: Any, arguments: tuple) -> Any:
  """What a call in the file stands for, for the calls that we know."""
  if not isinstance(function, _Global):
    raise ValueError('it calls something that is not a name')
  if function.name.startswith('__torch__.'):
    return _Object()
  if function.name not in _CONSTRUCTORS:
    raise ValueError(f'it asks for {function.name}, which is refused')
  return _CONSTRUCTORS[function.name](*arguments)


def _interpret(stream: BinaryIO, storage) -> Any:
  """Carries out one pickle's instructions; leaves `stream` after its end.

  Args:
    stream: where the pickle starts.
    storage: (dtype, key, size) -> flat array of that many elements.
  """
  stack, marks, memo = [], [], {}

  def pop(count):
    # Never beneath the latest mark; a pickle that tries is damaged.
    if count < 0 or len(stack) - count < (marks[-1] if marks else 0):
      raise ValueError('its pickle takes more than it put')
    items = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return items

  def pop_mark():
    return pop(len(stack) - marks.pop())

  for instruction, value, _ in pickletools.genops(stream):
    op = instruction.name
    if op in _LITERALS:
      stack.append(value)
    elif op in _EMPTY:
      stack.append(_EMPTY[op]())
    elif op in ('PROTO', 'FRAME'):
      pass
    elif op == 'MARK':
      marks.append(len(stack))
    elif op in ('BINPUT', 'LONG_BINPUT', 'PUT'):
      memo[value] = stack[-1]
    elif op == 'MEMOIZE':
      memo[len(memo)] = stack[-1]
    elif op in ('BINGET', 'LONG_BINGET', 'GET'):
      stack.append(memo[value])
    elif op in _TUPLES:
      stack.append(tuple(pop(_TUPLES[op])))
    elif op == 'TUPLE':
      stack.append(tuple(pop_mark()))
    elif op == 'LIST':
      stack.append(list(pop_mark()))
    elif op in ('APPEND', 'APPENDS'):
      items = pop(1) if op == 'APPEND' else pop_mark()
      stack[-1].extend(items)
    elif op in ('SETITEM', 'SETITEMS'):
      items = pop(2) if op == 'SETITEM' else pop_mark()
      stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif op == 'GLOBAL':
      stack.append(_Global(value.replace(' ', '.')))
    elif op == 'STACK_GLOBAL':
      stack.append(_Global('.'.join(pop(2))))
    elif op in ('REDUCE', 'NEWOBJ'):
      stack.append(_construct(*pop(2)))
    elif op == 'BUILD':
      (state,) = pop(1)
      if isinstance(stack[-1], _Object):
        stack[-1].update(state)
      # Attributes of a dict (a state_dict's _metadata) and of a number's type
      # are left out.
      elif not isinstance(stack[-1], dict | np.dtype):
        raise ValueError('it sets the state of an unknown object')
    elif op == 'BINPERSID':
      kind, dtype, key, _, size, *view = pop(1)[0]
      if kind != 'storage' or dtype.name not in _DTYPES or any(view):
        raise ValueError(f'it refers to an unknown kind of data: {kind}')
      stack.append(storage(_DTYPES[dtype.name], key, size))
    elif op == 'STOP':
      if len(stack) != 1 or marks:
        raise ValueError('its pickle does not end in one object')
      return stack[0]
    else:
      raise ValueError(f'its pickle has the instruction {op}, which is refused')
  raise ValueError('its pickle has no end')
