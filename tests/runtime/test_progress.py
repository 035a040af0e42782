"""Progress lines and bars, and the log of a run that is resumed."""

import json
import sys

import numpy as np
import pytest

from runtime import progress
from runtime.progress import Log, Progress, duration, say


@pytest.mark.parametrize(
  ('seconds', 'text'), [(0.9, '0:00:00'), (61, '0:01:01'), (36e4, '100:00:00')]
)
def test_duration(seconds, text):
  assert duration(seconds) == text


def test_progress(monkeypatch, capsys):
  now = [100.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  report = Progress('step', 50, 'steps', start=10, interval=5)
  now[0] = 104.0
  report(11)  # Too early for a line.
  now[0] = 110.0
  report(30, 'loss 0.5')
  now[0] = 111.0
  report(50)  # The last one always comes.
  assert capsys.readouterr().out.splitlines() == [
    'step 30/50 loss 0.5 2 steps/s 0:00:10 left',
    'step 50/50 3.64 steps/s 0:00:00 left',
  ]


def test_progress_without_progress(monkeypatch, capsys):
  monkeypatch.setattr(progress.time, 'monotonic', lambda: 0.0)
  Progress('step', 50, 'steps', interval=0)(0)
  assert capsys.readouterr().out == 'step 0/50 0 steps/s ? left\n'


def read(workdir):
  lines = (workdir / 'train.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_log_goes_on_where_the_checkpoint_was(tmp_path):
  with Log(tmp_path, resumed_at=0) as log:
    for step in (1, 2, 3):
      log.write(step, loss=np.float32(step / 4))
  with (tmp_path / 'train.jsonl').open('a') as file:
    file.write('{"step": 4, "lo')  # Killed while writing.
  with Log(tmp_path, resumed_at=2) as log:
    log.write(3, loss=7, test_loss=8)
  assert read(tmp_path) == [
    {'step': 1, 'loss': 0.25},
    {'step': 2, 'loss': 0.5},
    {'step': 3, 'loss': 7.0, 'test_loss': 8.0},
  ]
  events = list((tmp_path / 'tensorboard').iterdir())
  assert events and all('tfevents' in event.name for event in events)


def test_progress_on_a_terminal(monkeypatch, capsys):
  """A bar has the same information, and lines of `say` stand above it."""
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  monkeypatch.setenv('COLUMNS', '100')
  report = Progress('step', 50, 'steps', start=10)
  report(30, 'loss 0.5')
  say('A line', 'between.')
  report(50, 'loss 0.25')
  text = capsys.readouterr().out.replace('\r', '\n')
  lines = [line for line in text.splitlines() if line.strip()]
  assert lines.count('A line between.') == 1
  assert lines[-1].startswith('step 50/50 ')
  assert lines[-1].endswith(' steps/s 00:00 left, loss 0.25')
  assert text.endswith('\n')


def test_a_damaged_line_of_the_log_is_named_and_left_out(tmp_path, capsys):
  path = tmp_path / 'train.jsonl'
  bad = ['{"step": 2, "lo\n', '7\n', '{"loss": 3}\n', '{"step": null}\n']
  good = '{"step": 1, "loss": 0.5}\n'
  path.write_text(''.join([good, *bad]))
  with Log(tmp_path, resumed_at=2) as log:
    log.write(3, loss=7)
  assert [entry['step'] for entry in read(tmp_path)] == [1, 3]
  said = capsys.readouterr().out
  assert said.startswith(f'warning: {path} is damaged in line 2 and 3 more')
  assert (tmp_path / 'train.jsonl.damaged').read_text() == good + ''.join(bad)


def test_nothing_is_written_before_the_first_entry(tmp_path):
  with Log(tmp_path / 'run', resumed_at=0):
    pass
  assert not (tmp_path / 'run').exists()
