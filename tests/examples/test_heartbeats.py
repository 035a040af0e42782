"""Signals, scores of forecasts, and the example at reduced size."""

import pathlib

import numpy as np
from scipy.signal import find_peaks

from examples import heartbeats
from runtime.files import load_npz


def test_signals_beat():
  """The first lead has one R wave in each beat, of 0.6 to 1.2 seconds."""
  x = heartbeats.generate(np.random.default_rng(0), 200)
  assert x.shape == (200, heartbeats.LENGTH, 2) and np.isfinite(x).all()
  lead = x[..., 0]
  beats = np.array(
    [len(find_peaks(v, 0.5 * v.max(), distance=10)[0]) for v in lead]
  )
  # In two seconds 2 / period on average: 2 log(2) / 0.6.
  assert abs(beats.mean() - 2 * np.log(2) / 0.6) < 0.15 and beats.max() <= 4


def test_masks_and_conditions():
  rng = np.random.default_rng(1)
  known = heartbeats.masks(rng, 500)
  unknown = (~known).sum(1)
  assert unknown.min() >= heartbeats.LENGTH // 4 and known.any(1).all()
  assert (np.abs(np.diff(known, axis=1)).sum(1) <= 2).all()  # One gap.
  assert 0.45 < (~known[:, -1]).mean() < 0.6
  x = heartbeats.generate(rng, 500)
  told = heartbeats.condition_of(x, known)
  assert told.shape == (500, heartbeats.LENGTH, 3)
  np.testing.assert_array_equal(told[known][:, :2], x[known])
  assert not told[~known].any() and (told[known][:, 2] == 1).all()


def test_scores():
  """Of N(0, 1): CRPS 1 / sqrt(pi); too narrow intervals hold fewer values."""
  rng = np.random.default_rng(2)
  samples, x = rng.normal(size=(4, 400, 500)), rng.normal(size=(4, 500))
  found = heartbeats.scores(samples, x)
  assert abs(found['crps'] - 1 / np.sqrt(np.pi)) < 0.03
  assert abs(found['in_90'] - 0.9) < 0.02
  narrow = heartbeats.scores(0.3 * samples, x)
  assert narrow['in_90'] < 0.5 and narrow['crps'] > found['crps']


def test_reduced(tmp_path, monkeypatch):
  """Both methods keep what they are told: samples are near their signal.

  The ratio of the errors was 0.42 and 0.07; it is 1 if nothing is told.
  """
  monkeypatch.setattr(heartbeats, 'LENGTH', 32)
  network = {'model.nf': 8, 'model.ch_mult': (1,)}
  optim = {'optim.lr': 5e-3, 'optim.warmup': 10}
  monkeypatch.setattr(heartbeats, 'NETWORK', network | optim)
  samplers, kept = heartbeats.samplers, {}
  monkeypatch.setattr(
    heartbeats, 'samplers', lambda *args: kept.update(samplers(*args)) or kept
  )
  found = heartbeats.main(
    f'--workdir {tmp_path} --signals 512 --steps 150 --tests 4 --samples 4'
    .split()
  )  # fmt: skip
  assert (tmp_path / 'heartbeats.png').read_bytes().startswith(b'\x89PNG')
  assert (tmp_path / 'heartbeats.json').is_file()
  assert load_npz(tmp_path / 'signals.npz')['x_train'].shape == (512, 32, 2)
  assert {*found} == {'forecast', 'gap'}
  known = np.arange(32) < 16
  x = heartbeats.generate(np.random.default_rng(3), 16)
  for name, fill in kept.items():
    assert {*found['gap'][name]} == {'crps', 'in_90'}
    error = np.abs(np.asarray(fill(x, known))[:, None] - x)[:, :, known]
    own = np.eye(16, dtype=bool)
    assert np.median(error[own]) < 0.5 * np.median(error[~own]), name


def test_it_is_short():
  lines = pathlib.Path(heartbeats.__file__).read_text().splitlines()
  assert len(lines) <= 175
