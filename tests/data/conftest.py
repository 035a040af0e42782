"""Give every test of data an empty cache folder."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('SCORE_SDE_CACHE', str(tmp_path / 'cache'))
