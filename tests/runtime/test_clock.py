"""The time of several pieces, and the end of each."""

import json
import os
import signal
import time

import pytest

from runtime.clock import Clock, PieceOver, stoppable


def test_pieces_add_up_and_a_killed_one_loses_what_is_not_recorded(tmp_path):
  path = tmp_path / 'clock.json'
  with Clock(path, time.monotonic() - 100, 1000) as clock:
    assert 100 < clock.seconds < 101
  assert 100 < json.loads(path.read_text())['seconds'] < 101
  killed = Clock(path, time.monotonic() - 10, 1000, interval=0.01)
  killed.__enter__()
  time.sleep(0.1)  # The records go on without a call.
  recorded = json.loads(path.read_text())['seconds']
  assert 110.05 < recorded < 112
  killed.__exit__()
  with Clock(path, time.monotonic() - 1, 1000) as clock:
    assert 111 < clock.seconds < 113
    assert not clock.over


def test_a_piece_that_is_over_stops_itself_once(tmp_path):
  path, now = tmp_path / 'clock.json', time.monotonic()
  with stoppable(), Clock(path, now, 0.3, interval=0.01) as clock:
    with pytest.raises(PieceOver):
      time.sleep(10)
    assert clock.over
    time.sleep(0.1)  # There is no second signal.


def test_the_handler_of_before_is_restored():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(PieceOver), stoppable():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
  assert signal.getsignal(signal.SIGTERM) is before
