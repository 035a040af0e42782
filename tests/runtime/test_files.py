"""Files are complete or absent, and digests identify content."""

import doctest
import io
import json
import os
import pathlib
import zipfile

import numpy as np
import pytest

from runtime import files

DIGEST = 'b2f780871a98e045'


def test_atomic_writes_and_replaces(tmp_path):
  path = tmp_path / 'new' / 'a.txt'
  for text in ('first', 'second'):
    with files.atomic(path) as part:
      assert part.parent == path.parent and not part.exists()
      part.write_text(text)
    assert path.read_text() == text
  assert list(path.parent.iterdir()) == [path]


def test_atomic_keeps_the_old_file_on_failure(tmp_path):
  path = tmp_path / 'a.txt'
  files.write_text(path, 'old')
  with pytest.raises(KeyboardInterrupt), files.atomic(path) as part:
    part.write_text('half')
    raise KeyboardInterrupt
  assert path.read_text() == 'old'
  with pytest.raises(FileNotFoundError), files.atomic(path):
    pass  # Nothing was written.
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]


def test_atomic_folders(tmp_path):
  path = tmp_path / 'model'
  with pytest.raises(ValueError), files.atomic(path) as part:
    part.mkdir()
    (part / 'a').write_text('half')
    raise ValueError
  assert not any(tmp_path.iterdir())
  path.mkdir()  # An empty folder is replaced.
  with files.atomic(path) as part:
    (part / 'inner').mkdir(parents=True)
    (part / 'inner' / 'a').write_text('whole')
  assert (path / 'inner' / 'a').read_text() == 'whole'
  with pytest.raises(OSError), files.atomic(path) as part:
    part.mkdir()
  assert (path / 'inner' / 'a').read_text() == 'whole'
  assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_usual_permissions(tmp_path):
  files.save_npz(tmp_path / 'a.npz', x=np.ones(1))
  (tmp_path / 'b').write_text('')
  modes = {os.stat(path).st_mode for path in tmp_path.iterdir()}
  assert len(modes) == 1


def test_json_and_npz(tmp_path):
  files.write_json(tmp_path / 'a.json', {'b': [1, None]})
  text = (tmp_path / 'a.json').read_text()
  assert json.loads(text) == {'b': [1, None]}
  assert text.endswith('}\n')
  files.save_npz(
    tmp_path / 'a', x=np.arange(3), y='text'
  )  # No suffix is added.
  found = files.load_npz(tmp_path / 'a')
  np.testing.assert_array_equal(found['x'], [0, 1, 2])
  assert str(found['y']) == 'text'


@pytest.mark.parametrize('kept', [0, 10, 200])
def test_damaged_npz(tmp_path, kept):
  path = tmp_path / 'a.npz'
  files.save_npz(path, x=np.arange(100))
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(ValueError, match=r'a\.npz is not a readable .npz file'):
    files.load_npz(path)


def test_npz_that_is_absent_or_holds_objects(tmp_path):
  with pytest.raises(FileNotFoundError, match='There is no file'):
    files.load_npz(tmp_path / 'a.npz')
  np.savez(tmp_path / 'b.npz', x=np.array([{}], object))
  with pytest.raises(ValueError, match='is not a readable .npz file'):
    files.load_npz(tmp_path / 'b.npz')


def test_cache_dir(tmp_path, monkeypatch):
  monkeypatch.setenv('SCORE_SDE_CACHE', str(tmp_path))
  assert files.cache_dir() == tmp_path
  monkeypatch.setenv('SCORE_SDE_CACHE', '')
  assert files.cache_dir().parts[-2:] == ('.cache', 'score_sde')


def test_digest():
  """Values that earlier versions stored in files."""
  x = np.arange(6, dtype=np.uint8).reshape(2, 3)
  assert files.digest(x, 'digits', (1, 2.5)) == DIGEST
  assert files.digest(x.T.copy().T, 'digits', (1, 2.5)) == DIGEST
  others = [x.T, x.astype(int), x.reshape(3, 2), x + 1]
  assert DIGEST not in {files.digest(v, 'digits', (1, 2.5)) for v in others}


def test_examples():
  assert doctest.testmod(files).failed == 0


def test_json_is_strict(tmp_path):
  """NaN becomes null, and the infinities are texts that float reads."""
  value = {'a': [1.0, float('nan')], 'b': (float('inf'), -float('inf'), None)}
  files.write_json(tmp_path / 'a.json', value)

  def refuse(constant):
    raise ValueError(constant)

  text = (tmp_path / 'a.json').read_text()
  found = json.loads(text, parse_constant=refuse)
  assert found == {'a': [1.0, None], 'b': ['inf', '-inf', None]}
  assert float(found['b'][0]) == float('inf')


def test_arrays_reserve_what_is_in_the_file(tmp_path):
  """The header says 8 TB."""
  path = tmp_path / 'a.npy'
  with open(path, 'wb') as file:
    np.lib.format.write_array_header_1_0(
      file, {'descr': '<f8', 'fortran_order': False, 'shape': (10**12,)}
    )
    file.write(bytes(64))
  with pytest.raises(ValueError, match=r'a\.npy is not .*is cut short'):
    files.load_arrays(path)
  with pytest.raises(ValueError, match=r'a\.npy is not'):
    files.load_npz(path)
  with zipfile.ZipFile(tmp_path / 'b.npz', 'w') as archive:
    archive.write(path, 'x.npy')
  with pytest.raises(ValueError, match=r'b\.npz is not .*is cut short'):
    files.load_npz(tmp_path / 'b.npz')
  np.save(path, np.arange(6).reshape(2, 3))
  np.testing.assert_array_equal(files.load_arrays(path), [[0, 1, 2], [3, 4, 5]])


def test_a_bounded_stream_asks_for_what_there_is(tmp_path):
  asked = []

  class Stream(io.BytesIO):
    def read(self, size=-1):
      asked.append(size)
      return super().read(size)

  stream = files.Bounded(Stream(b'abcdef'))
  assert stream.read(4) == b'abcd' and stream.read(2**40) == b'ef'
  stream.seek(1)
  assert stream.read() == b'bcdef' and stream.read(3) == b''
  assert max(asked) <= 6


def test_addresses_are_no_paths():
  for path in ('/a', 'a/b', '', '~/a', 'C:/a', 'a:b', './gs:/b', 'module:f'):
    files.check_local(path)
  for path in ('gs://b/a', 's3://b', 'file:///a', pathlib.Path('gs://b/a')):
    with pytest.raises(ValueError, match='is an address, not a path: mount'):
      files.check_local(path)
