"""Tests of batches: the same on any number of hosts, with every image."""

import threading

import numpy as np
import pytest

from data import batches
from tests.data.shared import numbered


@pytest.mark.parametrize('process_count', [1, 2, 4])
@pytest.mark.parametrize('batch_size', [8, 28])
def test_processes_together_hold_the_same_batch(process_count, batch_size):
  dataset = numbered(11)  # batches cross the ends of epochs
  for step in range(7):
    whole = batches.train_batch(dataset, step, batch_size=batch_size, seed=3)
    parts = [
      batches.train_batch(
        dataset,
        step,
        batch_size=batch_size,
        seed=3,
        process_index=i,
        process_count=process_count,
      )
      for i in range(process_count)
    ]
    for key, value in whole.items():
      np.testing.assert_array_equal(
        value, np.concatenate([part[key] for part in parts])
      )
    np.testing.assert_array_equal(whole['image'][:, 0, 0, 0], whole['index'])
    np.testing.assert_array_equal(whole['label'], whole['index'] % 3)
    assert whole['image'].dtype == np.uint8
    assert whole['label'].dtype == np.int32
    assert whole['index'].dtype == np.int64


def test_every_epoch_is_a_fresh_permutation():
  dataset = numbered(11)
  stream = np.concatenate(
    [
      batches.train_batch(dataset, step, batch_size=4, seed=5)['index']
      for step in range(11)
    ]
  )
  epochs = stream.reshape(4, 11)
  np.testing.assert_array_equal(np.sort(epochs), [np.arange(11)] * 4)
  assert len({tuple(epoch) for epoch in epochs}) == 4
  other = batches.train_batch(dataset, 0, batch_size=4, seed=6)['index']
  assert list(other) != list(stream[:4])


def test_a_step_needs_no_earlier_step():
  first = [
    batches.train_batch(numbered(50), step, batch_size=8, seed=1)
    for step in range(20)
  ]
  batches.permutation.cache_clear()
  resumed = batches.train_batch(numbered(50), 17, batch_size=8, seed=1)
  np.testing.assert_array_equal(resumed['index'], first[17]['index'])


def test_the_order_never_changes():
  """Runs must resume, and splits must stay, with any version of NumPy."""
  assert list(batches.permutation(8, 0, 0)) == [0, 2, 1, 5, 4, 3, 6, 7]
  assert list(batches.permutation(8, 1, 2)) == [4, 2, 0, 6, 1, 5, 7, 3]


@pytest.mark.parametrize('process_count', [1, 2])
@pytest.mark.parametrize('size', [1, 7, 8, 9, 16])
def test_evaluation_sees_every_image_once(size, process_count):
  dataset = numbered(size)
  found = [
    list(
      batches.eval_batches(
        dataset,
        batch_size=8,
        process_index=i,
        process_count=process_count,
      )
    )
    for i in range(process_count)
  ]
  assert {len(b) for b in found} == {-(-size // 8)}
  flat = [b for of_process in found for b in of_process]
  assert {b['image'].shape for b in flat} == {(8 // process_count, 2, 2, 1)}
  seen = np.concatenate([b['image'][b['mask'] == 1, 0, 0, 0] for b in flat])
  np.testing.assert_array_equal(np.sort(seen), np.arange(size))
  index = np.concatenate([b['index'] for b in flat])
  np.testing.assert_array_equal(np.sort(index), np.arange(len(index)))
  assert flat[0]['mask'].dtype == np.float32


def test_evaluation_resumes():
  dataset = numbered(21)
  whole = list(batches.eval_batches(dataset, batch_size=4))
  rest = list(batches.eval_batches(dataset, batch_size=4, start=3))
  assert len(rest) == len(whole) - 3
  for a, b in zip(whole[3:], rest, strict=True):
    np.testing.assert_array_equal(a['index'], b['index'])


def test_batch_must_divide_by_processes():
  with pytest.raises(ValueError, match='batch size 9 .* 2 processes'):
    batches.train_batch(numbered(9), 0, batch_size=9, seed=0, process_count=2)


def test_prefetch_keeps_order_and_stays_ahead():
  started = []
  stream = batches.prefetch(lambda s: started.append(s) or s * s, range(9))
  assert next(stream) == (0, 0)
  assert max(started) <= 2  # two ahead, no more
  assert list(stream) == [(s, s * s) for s in range(1, 9)]


def test_prefetch_raises_where_it_failed_and_leaves_no_thread():
  before = set(threading.enumerate())

  def fetch(step):
    if step == 3:
      raise OSError('disk gone')
    return step

  seen = []
  with pytest.raises(OSError, match='disk gone'):
    for step, _ in batches.prefetch(fetch, iter(range(100))):
      seen.append(step)
  assert seen == [0, 1, 2]
  for _ in (stream := batches.prefetch(lambda s: s, range(100))):
    break
  stream.close()
  assert set(threading.enumerate()) <= before
