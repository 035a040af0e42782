"""Files that torch 2.13 wrote are read, and nothing in a file is run.

The three fixtures hold the same kinds of objects in torch's three layouts.
"""

import io
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from runtime import torch_file

DATA = pathlib.Path(__file__).parents[1] / 'arrays'


@pytest.mark.parametrize('name', ['torch_zip.pth', 'torch_legacy.pth'])
def test_reads_what_torch_saved(name):
  """Nested containers, every dtype, views, and a numpy learning rate."""
  got = torch_file.load(DATA / name)
  assert got['step'] == 7 and got['lr'] == 2e-4
  base = np.arange(24, dtype=np.float32).reshape(4, 6)
  for want, tensor in zip(
    [base, base.T, base[1:, ::2]], got['shadow'], strict=True
  ):
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, want)
  for dtype, tensor in got['types'].items():
    assert tensor.dtype.name == dtype
    want = [0, 1, 1] if dtype == 'bool' else [0, 1, 2]
    np.testing.assert_array_equal(tensor.astype(int), want)
  assert list(got['state'])[0] == '0.weight'
  np.testing.assert_allclose(got['state']['0.bias'], [-0.0114, 0.4578], 0.01)
  np.testing.assert_array_equal(got['param'], [1, 1])
  assert got['empty'].shape == (0, 3) and got['size'] == (2, 3)
  assert got['misc'] == [None, True, (1.5, 'x', -3, 2**40), {}]


def test_reads_torchscript():
  got = torch_file.load(DATA / 'torch_script.pt')
  layer = got['layers']['0']
  np.testing.assert_array_equal(layer['weight'], [[0, 1, 2], [3, 4, 5]])
  np.testing.assert_array_equal(layer['bias'], [0.5, -0.5])
  assert got['sizes'] == [1, 2]


class Call:
  """Pickles as a call of `function`."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


def as_zip(payload):
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w') as archive:
    archive.writestr('archive/data.pkl', payload)
  return stream.getvalue()


HEADER = b''.join(
  pickle.dumps(part, 2)
  for part in (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True})
)


@pytest.mark.parametrize('wrap', [as_zip, lambda p: HEADER + p, lambda p: p])
@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
@pytest.mark.parametrize(
  'attack',
  [
    lambda trace: Call(os.system, f'touch {trace}'),
    lambda trace: Call(eval, f"open('{trace}', 'w')"),
    lambda trace: Call(open, str(trace), 'w'),
    lambda trace: Call(getattr, Call(__import__, 'os'), 'getcwd'),
  ],
)
def test_hostile_pickles_run_nothing(tmp_path, attack, protocol, wrap):
  trace = tmp_path / 'trace'
  path = tmp_path / 'hostile.pth'
  path.write_bytes(wrap(pickle.dumps([attack(trace)], protocol)))
  with pytest.raises(ValueError, match=r'hostile\.pth cannot be read') as error:
    torch_file.load(path)
  assert '\n' not in str(error.value)
  assert not trace.exists()


@pytest.mark.parametrize(
  'program',
  [
    b'\x80\x02.',  # Takes from an empty stack.
    b'\x80\x02](K\x01.',  # A mark that is never closed.
    b'\x80\x02]K\x01',  # No end.
    b'\x80\x02h\x05.',  # Remembers what was never stored.
    b'\x80\x02cos\nsystem\n(X\x01\x00\x00\x00atR.',  # Calls os.system.
    b'\x80\x02cos\nsystem\nX\x01\x00\x00\x00ab.',  # Sets os.system's state.
    b'\x80\x02(ios\nsystem\n.',  # Calls it by the instruction INST.
    b'\x80\x02\x82\x01.',  # A registered extension.
  ],
)
def test_malformed_programs_are_refused(tmp_path, program):
  path = tmp_path / 'bad.pth'
  path.write_bytes(as_zip(program))
  with pytest.raises(ValueError, match=r'bad\.pth cannot be read'):
    torch_file.load(path)


def test_tensors_stay_within_their_storage():
  """Every view that would read beyond the storage's memory is refused."""
  storage = np.arange(6.0)
  assert torch_file._tensor(storage, 1, (2, 2), (2, 1)).tolist() == [
    [1, 2],
    [3, 4],
  ]
  for offset, size, stride in [
    (0, (7,), (1,)),
    (3, (2, 2), (2, 1)),
    (-1, (2,), (1,)),
    (5, (2,), (-1,)),
    (0, (-1,), (1,)),
  ]:
    with pytest.raises(ValueError):
      torch_file._tensor(storage, offset, size, stride)


@pytest.mark.parametrize('name', ['torch_zip.pth', 'torch_legacy.pth'])
def test_truncated_files_are_one_clear_error(tmp_path, name):
  data = (DATA / name).read_bytes()
  path = tmp_path / 'cut.pth'
  for share in (0.0, 0.01, 0.3, 0.6, 0.9, 0.999):
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r'cut\.pth cannot be read') as error:
      torch_file.load(path)
    assert '\n' not in str(error.value)


def test_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError):
    torch_file.load(tmp_path / 'absent.pth')
