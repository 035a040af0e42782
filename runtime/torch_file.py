"""Read the files of `torch.save` and `torch.jit.save` without torch.

Both contain a pickle, which is a small program. Python's own unpickler runs it,
and then it can call any function. This module never runs it. `pickletools`
splits it into instructions, and `_interpret` carries out the few that torch
writes: constants, containers, and the constructors of the table
`_CONSTRUCTORS`, all of which are functions of this file. A name that is not in
the table is refused, so a hostile file cannot call anything.

Three layouts can be read: the zip archive that torch >= 1.6 writes, the single
stream that earlier versions wrote, and TorchScript archives, whose objects
become dicts of their attributes.
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

from runtime.files import Bounded

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
  """A name in the file, 'module.name', which is never imported."""

  name: str


class _Object(dict):
  """The attributes of a TorchScript object."""


def load(file: str | os.PathLike | BinaryIO) -> Any:
  """Return the nested dicts, lists and tuples of a torch file.

  Tensors become numpy arrays; bfloat16 has the dtype of ml_dtypes.

  Args:
    file: a path, or a seekable binary stream.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, is no torch file, or contains anything but
      tensors, numbers, strings and containers.
  """
  if not hasattr(file, 'read'):
    with open(file, 'rb') as stream:
      return load(stream)
  label, file = getattr(file, 'name', 'the stream'), Bounded(file)
  try:
    if zipfile.is_zipfile(file):
      return _load_zip(file)
    file.seek(0)
    return _load_legacy(file)
  except Exception as error:  # A damaged file can raise nearly any type.
    raise ValueError(
      f'{label} cannot be read as a PyTorch file: '
      f'{str(error) or type(error).__name__}.'
    ) from None


def _load_zip(stream: BinaryIO) -> Any:
  """Read a zip archive: ROOT/data.pkl, and ROOT/data/KEY for each storage."""
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
      # Without compression, a storage is not larger than the file.
      if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f'storage {key} is compressed')
      storages[key] = archive.read(info)
    return np.frombuffer(storages[key], dtype, size)

  return _interpret(io.BytesIO(archive.read(f'{root}data.pkl')), storage)


def _load_legacy(stream: BinaryIO) -> Any:
  """Read one stream: header, object, storage keys, bytes of the storages."""
  limit = stream.seek(0, os.SEEK_END)
  stream.seek(0)
  if stream.read(1) != b'\x80':
    raise ValueError('it does not start like a file of torch.save')
  stream.seek(0)
  storages = {}

  def storage(dtype, key, size):
    # The bytes come later in the stream. Tensors are views of these arrays,
    # which are filled at the end.
    if size * dtype.itemsize > limit:
      raise ValueError(f'storage {key} is larger than the file')
    if key not in storages:
      storages[key] = np.zeros(size, dtype)
    if storages[key].dtype != dtype or storages[key].size != size:
      raise ValueError(f'storage {key} has two types')
    return storages[key]

  if _interpret(stream, storage) != _LEGACY_MAGIC:
    raise ValueError('it does not start like a file of torch.save')
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
  """Return a view of a storage; strides are counted in elements."""
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
  """Return a numpy type of plain little-endian numbers, never of objects."""
  dtype = np.dtype(name)
  if dtype.kind not in 'fiub':
    raise ValueError(f'it has numbers of type {name}, which is refused')
  return dtype


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
  """Return a numpy number, such as the learning rate of an optimizer."""
  return np.frombuffer(data, dtype, 1)[0]


_first = lambda value, *unused: value
_latin1 = lambda text, *unused: text.encode('latin1')
_CONSTRUCTORS = {
  '_codecs.encode': _latin1,  # Old protocols write bytes as this call.
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


class _Machine:
  """The stack, marks and memo of a pickle, and its instructions.

  Attributes:
    storage: (dtype, key, size) -> flat array of that many elements.
  """

  def __init__(self, storage):
    self.stack, self.marks, self.memo = [], [], {}
    self.storage = storage

  def push(self, value):
    self.stack.append(value)

  def pop(self, count):
    """Remove and return the last objects of the stack, a list."""
    start = len(self.stack) - count
    # Only a damaged pickle takes objects from below the latest mark.
    if count < 0 or start < (self.marks[-1] if self.marks else 0):
      raise ValueError('its pickle takes objects that are not there')
    items = self.stack[start:]
    del self.stack[start:]
    return items

  def pop_mark(self):
    """Remove and return the objects after the latest mark, a list."""
    return self.pop(len(self.stack) - self.marks.pop())

  def remember(self, key):
    self.memo[key] = self.stack[-1]

  def extend(self, items):
    self.stack[-1].extend(items)

  def update(self, items):
    self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

  def construct(self):
    """Replace a function and its arguments by the object of an allowed call."""
    function, arguments = self.pop(2)
    if not isinstance(function, _Global):
      raise ValueError('it calls something that is not a name')
    if function.name.startswith('__torch__.'):
      return self.push(_Object())
    if function.name not in _CONSTRUCTORS:
      raise ValueError(f'it asks for {function.name}, which is refused')
    return self.push(_CONSTRUCTORS[function.name](*arguments))

  def build(self):
    """Set the attributes of an object."""
    (state,) = self.pop(1)
    if isinstance(self.stack[-1], _Object):
      self.stack[-1].update(state)
    # Attributes of a dict (_metadata of a state_dict) and of the type of a
    # number are ignored.
    elif not isinstance(self.stack[-1], dict | np.dtype):
      raise ValueError('it sets the state of an unknown object')

  def load_storage(self):
    """Replace the description of a storage by its array."""
    kind, dtype, key, _, size, *view = self.pop(1)[0]
    if kind != 'storage' or dtype.name not in _DTYPES or any(view):
      raise ValueError(f'it refers to an unknown kind of data: {kind}')
    self.push(self.storage(_DTYPES[dtype.name], key, size))


def _instructions():
  """Return {name: function of (machine, value)} of the known instructions."""
  table = {
    'PROTO FRAME': lambda m, v: None,
    'MARK': lambda m, v: m.marks.append(len(m.stack)),
    'BINPUT LONG_BINPUT PUT': lambda m, v: m.remember(v),
    'MEMOIZE': lambda m, v: m.remember(len(m.memo)),
    'BINGET LONG_BINGET GET': lambda m, v: m.push(m.memo[v]),
    # Constants.
    'BININT BININT1 BININT2 LONG1 LONG4 INT LONG': _Machine.push,
    'BINFLOAT FLOAT BINSTRING SHORT_BINSTRING STRING': _Machine.push,
    'BINUNICODE SHORT_BINUNICODE UNICODE SHORT_BINBYTES': _Machine.push,
    'NONE': lambda m, v: m.push(None),
    'NEWTRUE': lambda m, v: m.push(True),
    'NEWFALSE': lambda m, v: m.push(False),
    # Containers.
    'EMPTY_DICT': lambda m, v: m.push({}),
    'EMPTY_LIST': lambda m, v: m.push([]),
    'EMPTY_TUPLE': lambda m, v: m.push(()),
    'TUPLE1': lambda m, v: m.push(tuple(m.pop(1))),
    'TUPLE2': lambda m, v: m.push(tuple(m.pop(2))),
    'TUPLE3': lambda m, v: m.push(tuple(m.pop(3))),
    'TUPLE': lambda m, v: m.push(tuple(m.pop_mark())),
    'LIST': lambda m, v: m.push(list(m.pop_mark())),
    'APPEND': lambda m, v: m.extend(m.pop(1)),
    'APPENDS': lambda m, v: m.extend(m.pop_mark()),
    'SETITEM': lambda m, v: m.update(m.pop(2)),
    'SETITEMS': lambda m, v: m.update(m.pop_mark()),
    # Names, calls, and data outside of the pickle.
    'GLOBAL': lambda m, v: m.push(_Global(v.replace(' ', '.'))),
    'STACK_GLOBAL': lambda m, v: m.push(_Global('.'.join(m.pop(2)))),
    'REDUCE NEWOBJ': lambda m, v: m.construct(),
    'BUILD': lambda m, v: m.build(),
    'BINPERSID': lambda m, v: m.load_storage(),
  }
  return {name: call for names, call in table.items() for name in names.split()}


_INSTRUCTIONS = _instructions()


def _interpret(stream: BinaryIO, storage) -> Any:
  """Carry out the instructions of one pickle, and return its object.

  Args:
    stream: binary stream at the start of the pickle; it is left at the end.
    storage: (dtype, key, size) -> flat array of that many elements.
  """
  machine = _Machine(storage)
  for instruction, value, _ in pickletools.genops(stream):
    name = instruction.name
    if name == 'STOP':
      if len(machine.stack) != 1 or machine.marks:
        raise ValueError('its pickle does not end in one object')
      return machine.stack[0]
    if name not in _INSTRUCTIONS:
      raise ValueError(
        f'its pickle has the instruction {name}, which is refused'
      )
    _INSTRUCTIONS[name](machine, value)
  raise ValueError('its pickle has no end')
