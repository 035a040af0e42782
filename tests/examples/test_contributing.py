"""The sampler of CONTRIBUTING.md needs one file and one line."""

import doctest
import pathlib
import re

import pytest

import sampling
from configs import schema
from runtime import options

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def page():
  """Return the names that the page's Python blocks define."""
  names = {'__name__': 'page'}
  text = (ROOT / 'CONTRIBUTING.md').read_text()
  for block in re.findall(r'^```python\n(.*?)^```$', text, re.M | re.S):
    exec(block, names)  # The last block is the sampler's test.
  return names


def test_docstrings_have_true_examples(page):
  runner, finder = doctest.DocTestRunner(), doctest.DocTestFinder()
  for name in ('NoisyDDIM', 'squared_error'):
    for test in finder.find(page[name], name, module=False, globs=page):
      runner.run(test)
  assert runner.tries == 2
  assert not runner.failures


def test_without_noise_it_is_ddim(page):
  z, score_fn, sde = page['z'], page['score_fn'], page['sde']
  ddim = sampling.SAMPLERS['ddim'](num_steps=5)
  noisy = page['NoisyDDIM'](num_steps=5, eta=0.0)
  expected = ddim(None, score_fn, sde, z).x
  assert abs(noisy(None, score_fn, sde, z).x - expected).max() < 1e-6


def test_one_line_makes_it_known(page, monkeypatch):
  table = sampling.SAMPLERS
  monkeypatch.setitem(table, 'noisy_ddim', page['NoisyDDIM'])
  key = schema._keys()['sampling.eta']
  assert key.choices == ('predictor=ddim', 'method=noisy_ddim')
  section = schema.defaults()['sampling'] | {'method': 'noisy_ddim', 'eta': 0.5}
  assert options.build(table, section, 'sampling.method').eta == 0.5
  with pytest.raises(ValueError, match=r'sampling.eta=2.0 is not in \[0, 1\]'):
    options.build(table, section | {'eta': 2.0}, 'sampling.method')
