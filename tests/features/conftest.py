"""Fixtures of the tests of features."""

import numpy as np
import pytest

from features import extract as extract_lib
from features import inception
from tests.features.shared import Tiny, random_weights, tiny_params


@pytest.fixture
def images():
  """Return 23 random images."""
  return np.random.default_rng(0).integers(0, 256, (23, 12, 10, 3), np.uint8)


@pytest.fixture
def extract(monkeypatch):
  """Return an extractor with a small network in the place of Inception."""
  monkeypatch.setattr(inception, 'InceptionV3', Tiny)
  return extract_lib.FeatureExtractor(tiny_params(), batch_size=8)


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
  """Return the path of a file of random weights of the Inception network."""
  path = tmp_path_factory.mktemp('weights') / 'random.npz'
  np.savez(path, **random_weights())
  return path
