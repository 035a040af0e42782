"""What the tutorial shows is what its code returns."""

import doctest
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def test_tutorial(monkeypatch):
  monkeypatch.chdir(ROOT)
  result = doctest.testfile(
    str(ROOT / 'docs/tutorial.md'), module_relative=False
  )
  assert result.attempted > 40
  assert not result.failed
