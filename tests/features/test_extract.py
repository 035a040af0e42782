"""Tests of feature extractors, with a small network in Inception's place."""

import importlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from features import extract as extract_lib
from features import inception
from tests.features.shared import Tiny, tiny_params


def test_any_number_of_images(extract, images):
  """Full batches and a part of one give features in order."""
  calls = []
  got = extract(images, progress=lambda *call: calls.append(call))
  assert got['pool_3'].shape == (23, 5) and got['logits'].shape == (23, 3)
  assert calls == [(8, 23), (16, 23), (23, 23)]
  for i in (0, 8, 22):
    one = extract(images[i : i + 1])
    np.testing.assert_allclose(one['pool_3'][0], got['pool_3'][i], atol=1e-6)
  x = inception.preprocess(images, 'tensorflow')
  want = Tiny().apply({'params': tiny_params()}, x)
  np.testing.assert_allclose(got['logits'], want['logits'], atol=1e-5)
  with pytest.raises(ValueError, match='no images'):
    extract(images[:0])
  with pytest.raises(ValueError, match='uint8'):
    extract(np.float32(images))


def test_weights_without_logits(monkeypatch, images):
  monkeypatch.setattr(inception, 'InceptionV3', Tiny)
  extract = extract_lib.FeatureExtractor(
    tiny_params(False), variant='pytorch_fid'
  )
  got = extract(images)
  assert got['pool_3'].shape == (23, 5) and got['logits'] is None


def test_unknown_variant_is_refused_at_once():
  with pytest.raises(ValueError, match='pytorch_fid'):
    extract_lib.FeatureExtractor({}, variant='torch')


EIGHT_DEVICES = """
import numpy as np, jax
from features import inception
from features import extract as extract_lib
from tests.features import shared as t
assert jax.device_count() == 8
inception.InceptionV3 = t.Tiny
images = np.random.default_rng(0).integers(0, 256, (23, 12, 10, 3), np.uint8)
extract = extract_lib.FeatureExtractor(t.tiny_params(), batch_size=10)
placed = []
apply = extract._apply
extract._apply = lambda p, x: placed.append(x.sharding) or apply(p, x)
np.save(SYS_PATH, extract(images)['pool_3'])
assert [len(s.device_set) for s in placed] == [8, 8], placed
"""


def test_eight_devices_share_a_batch(extract, images, tmp_path):
  """Batches of 10 become 16, and the features stay the same."""
  path = str(tmp_path / 'features.npy')
  program = EIGHT_DEVICES.replace('SYS_PATH', repr(path))
  program = (
    'import jax; jax.config.update("jax_num_cpu_devices", 8)\n' + program
  )
  subprocess.run([sys.executable, '-c', program], check=True)
  np.testing.assert_allclose(
    np.load(path), extract(images)['pool_3'], atol=1e-6
  )


def test_an_extractor_by_name(tmp_path, monkeypatch, images):
  """An extractor is found by 'module:function'; editing it changes its name."""
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'mine', raising=False)
  file = tmp_path / 'mine.py'
  file.write_text('def red(images):\n  return images[..., 0].mean((1, 2))\n')
  extract = extract_lib.find_extractor('mine:red')
  with pytest.raises(ValueError, match=r'\[23, D\]'):
    extract_lib.features_of(images, extract)
  file.write_text('def red(x):\n  return x.mean((1, 2))[:, :1]\n')
  del sys.modules['mine']
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)
  importlib.invalidate_caches()
  again = extract_lib.find_extractor('mine:red')
  got = extract_lib.features_of(images, again)
  np.testing.assert_allclose(got[:, 0], images[..., 0].mean((1, 2)))
  name = extract_lib.identity_of(again)
  assert name.startswith('mine.red-') and name != extract_lib.identity_of(
    extract
  )
  for bad in ('mine', 'mine:blue', 'absent:red', ':'):
    with pytest.raises(ValueError, match='no module:function') as error:
      extract_lib.find_extractor(bad)
    assert '\n' not in str(error.value)


def test_identity_of_a_network_is_of_its_weights(monkeypatch):
  """The last layer does not count, because it changes no features."""
  monkeypatch.setattr(inception, 'InceptionV3', Tiny)
  identity = lambda params, **kwargs: extract_lib.identity_of(
    extract_lib.FeatureExtractor(params, **kwargs)
  )
  params = tiny_params()
  assert identity(params) == identity(tiny_params(False))
  assert identity(params) != identity(params, variant='pytorch_fid')
  changed = jax.tree.map(lambda x: x * 1.01, params)
  assert identity(params) != identity(changed)


def test_the_section_chooses_the_extractor(monkeypatch, tmp_path):
  """A name of a function, or else the network with the weights at a path."""
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'users.py').write_text('def red(images):\n  return images\n')
  section = types.SimpleNamespace(
    extractor='users:red', inception_path='file', inception_variant='score_sde'
  )
  found = extract_lib.extractor(section)
  assert extract_lib.variant_of(found).startswith('users.red-')
  monkeypatch.setattr(inception, 'InceptionV3', Tiny)
  paths = []
  monkeypatch.setattr(
    extract_lib.weights,
    'load_weights',
    lambda path: paths.append(path) or tiny_params(),
  )
  section.extractor = ''
  found = extract_lib.extractor(section)
  assert extract_lib.variant_of(found) == 'score_sde'
  section.inception_path = ''
  extract_lib.extractor(section)
  assert paths == ['file', None]


@pytest.mark.parametrize(
  ('outputs', 'message'),
  [
    (lambda n: np.full((n, 2), np.nan), 'returned pool_3 that are not finite'),
    (lambda n: np.full((n, 2), 'a'), 'returned pool_3 that are not finite'),
    (lambda n: {'logits': np.ones((n, 2))}, "a dict with that as 'pool_3'"),
    (lambda n: np.ones(n), 'of shape'),
  ],
)
def test_outputs_that_no_metric_can_use(outputs, message, images):
  with pytest.raises(ValueError, match=message):
    extract_lib.outputs_of(images, lambda images: outputs(len(images)))


def test_how_to_get_logits(tmp_path, monkeypatch, extract):
  """Users of their own extractor are not sent to other weights."""
  (tmp_path / 'their_net.py').write_text('def net(images):\n  return images\n')
  monkeypatch.syspath_prepend(tmp_path)
  hint = extract_lib.find_extractor('their_net:net').logits_hint
  assert 'their_net:net' in hint and 'pytorch' not in hint
  assert 'config.eval.inception_path' in extract.logits_hint


def test_other_weights_of_a_users_extractor_are_another_extractor(
  tmp_path, monkeypatch
):
  """The file of the module is the same, but not what it reads."""
  monkeypatch.syspath_prepend(tmp_path)
  np.save(tmp_path / 'weights.npy', np.ones(3))
  (tmp_path / 'with_weights.py').write_text(
    'import pathlib, numpy as np\n'
    'FILE = pathlib.Path(__file__).with_name("weights.npy")\n'
    'def f(images):\n  return images.mean((1, 2)) @ np.load(FILE)[:, None]\n'
  )
  identity = lambda: extract_lib.identity_of(
    extract_lib.find_extractor('with_weights:f')
  )
  before = identity()
  assert identity() == before
  np.save(tmp_path / 'weights.npy', 2 * np.ones(3))
  assert identity() != before


@pytest.mark.parametrize(
  ('code', 'message'),
  [
    ('raise RuntimeError("no GPU")', 'no module:function.*no GPU'),
    ('f = 3', 'no function'),
    ('def f(x):\n  return {}["a"]', "'failing:f' raised KeyError.*line 2"),
    ('def f(x):\n  return [[1], [2, 3]]', 'returned no array'),
    ('def f(x):\n  return None', 'returned None'),
    ('import numpy as np\ndef f(x):\n  return np.ones((len(x), 0))', 'shape'),
  ],
)
def test_errors_of_a_users_extractor_name_it(
  code, message, tmp_path, monkeypatch, images
):
  (tmp_path / 'failing.py').write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'failing', raising=False)
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)
  importlib.invalidate_caches()
  with pytest.raises(ValueError, match=message):
    found = extract_lib.find_extractor('failing:f')
    extract_lib.outputs_of(images, found)
