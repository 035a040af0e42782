"""Tests of the Inception network: pytorch-fid 0.3.0, torch-fidelity 0.4.0.

The files in tests/arrays contain what those networks compute from CIFAR-10
images, each in its own input convention: with the real weights, whose download
makes that test slow, and with random weights, which are drawn in the same way.
"""

import pathlib

import jax
import numpy as np
import pytest

from features import extract, inception
from features import weights as weights_lib

DATA = pathlib.Path(__file__).parents[1] / 'arrays'
VARIANTS = ('tensorflow', 'pytorch_fid')


def test_network_equals_torch_with_random_weights(weights):
  """Outputs of order 1 agree to the accuracy of float32."""
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
  """The downloaded weights give the features of the other projects."""
  want = np.load(DATA / 'inception_cifar10.npz')
  extractor = extract.FeatureExtractor(
    weights_lib.load_weights(), variant=variant, batch_size=8
  )
  got = extractor(want['images'])['pool_3']
  assert np.abs(got - want[variant]).max() < 1e-4
  other = want[VARIANTS[variant == 'tensorflow']]
  assert np.abs(got - other).max() > 0.1  # The conventions differ.


# --- Images to network input --------------------------------------------------


@pytest.mark.parametrize('variant', VARIANTS)
def test_preprocessing_equals_torch(variant):
  """Images are enlarged from 40 rows, and reduced from 401 columns."""
  want = np.load(DATA / 'inception_preprocess.npz')
  got = inception.preprocess(want['images'], variant)
  assert got.shape == (1, 299, 299, 3)
  np.testing.assert_allclose(got[:, ::13, ::13], want[variant], atol=2e-5)


def test_score_sde_convention():
  """It differs from 'tensorflow' in the values only: (x - 127.5) / 127.5."""
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
