"""Data sets and their batches, which are pure functions of the step.

A training batch depends on the seed and the step only. It needs no state, and
the rows of all hosts together are the same for any number of hosts. Therefore
a resumed run sees the batches that the run would have seen without the stop.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import numpy as np

from runtime.files import digest


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
  """Labelled images, or other arrays, in a fixed order and read by index.

  Attributes:
    name: name of the data set, a key of `datasets.DATASETS`.
    size: number of images.
    read: function of indices [n] that returns images, uint8 [n, H, W, C], and
      labels, int32 [n]. What is no 8-bit image is float32 [n, *space, C].
    num_classes: number of classes; 0 without labels, which are then all 0.
    fingerprint: 16 hexadecimal digits that identify the content: the pixels at
      this resolution, and the labels. They do not depend on names of files.
    classes: names of the classes; empty where they have only numbers.
    notes: lines about what of the files is not used, or was changed.
    more: function of indices [n] that returns further arrays [n, ...] by name,
      which batches hold too: 'condition', where there are conditions.
  """

  name: str
  size: int
  read: Callable
  num_classes: int
  fingerprint: str
  classes: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()
  more: Callable = lambda indices: {}

  def __len__(self):
    return self.size

  def fetch(self, indices):
    """Return the images, uint8 [n, H, W, C] (or arrays), at indices [n]."""
    return self.read(np.asarray(indices))[0]

  def batch(self, indices):
    """Return a batch of the images at indices [n].

    Returns:
      {'image': uint8 [n, H, W, C], 'label': int32 [n], 'index': int64 [n]}, and
      what `more` returns.
    """
    indices = np.asarray(indices, np.int64)
    images, labels = self.read(indices)
    known = {'image': images, 'label': labels, 'index': indices}
    return known | self.more(indices)


@functools.lru_cache(maxsize=4)
def permutation(size, seed, epoch):
  """Return a random order of range(size), a pure function of the arguments.

  The order sorts the raw output of a counter-based generator. NumPy promises
  never to change that output; it may change its methods for shuffling.
  """
  raw = np.random.Philox(key=[seed, epoch]).random_raw(size)
  order = np.argsort(raw, kind='stable')
  order.flags.writeable = False
  return order


def unlabelled(x, name):
  """Return a Dataset of an array x [N, ...], without labels."""
  labels = np.zeros(len(x), np.int32)
  return Dataset(
    name=name,
    size=len(x),
    read=lambda indices: (x[indices], labels[indices]),
    num_classes=0,
    fingerprint=digest(x),
  )


def some_of(dataset, count):
  """Return `count` examples of a data set, a fixed random subset, or all."""
  order = np.arange(len(dataset))
  if count < len(dataset):
    order = np.sort(permutation(len(dataset), 0, 0)[:count])
  return dataset.fetch(order)


def _rows(batch_size, process_index, process_count):
  """Return the rows of a global batch that belong to a process."""
  if batch_size % process_count:
    raise ValueError(
      f'batch size {batch_size} must divide by the {process_count} processes'
    )
  local = batch_size // process_count
  return np.arange(process_index * local, (process_index + 1) * local)


def train_batch(
  dataset, step, *, batch_size, seed, process_index=0, process_count=1
):
  """Return the rows of this process of the training batch of a step.

  Each epoch is a new random order of all images. The epochs are concatenated
  and cut into batches, so no image is dropped.

  Args:
    dataset: a `Dataset`.
    step: number of the step, from 0.
    batch_size: size of the global batch, a multiple of process_count.
    seed: seed of the orders.
    process_index: number of this process, in [0, process_count).
    process_count: number of processes. The rows of all processes, in order,
      are the same global batch for any number of them.

  Returns:
    {'image': uint8 [b, H, W, C], 'label': int32 [b], 'index': int64 [b]} with
    b = batch_size / process_count.

  Raises:
    ValueError: batch_size does not divide by process_count.
  """
  rows = _rows(batch_size, process_index, process_count)
  epochs, places = np.divmod(step * batch_size + rows, len(dataset))
  indices = np.empty_like(places)
  for epoch in np.unique(epochs):
    order = permutation(len(dataset), seed, int(epoch))
    indices[epochs == epoch] = order[places[epochs == epoch]]
  return dataset.batch(indices)


def prefetch(fetch, steps, depth=2):
  """Yield (step, fetch(step)) in order; threads fetch ahead of the consumer.

  When the consumer stops, running fetches are completed and waiting ones are
  cancelled.

  Args:
    fetch: function of a step. When it raises, the exception is raised here in
      the place of its step.
    steps: iterable of steps.
    depth: number of steps that are fetched ahead.
  """
  steps = iter(steps)
  pool = concurrent.futures.ThreadPoolExecutor(max_workers=depth)
  pending = collections.deque()
  try:
    while True:
      for step in itertools.islice(steps, depth + 1 - len(pending)):
        pending.append((step, pool.submit(fetch, step)))
      if not pending:
        return
      step, batch = pending.popleft()
      yield step, batch.result()
  finally:
    pool.shutdown(cancel_futures=True)


def eval_batches(
  dataset, *, batch_size, process_index=0, process_count=1, start=0
):
  """Yield the rows of this process of batches that hold every image once.

  The images come in order, in ceil(size / batch_size) batches. The last batch
  is filled with copies of the last image, whose 'mask' is 0 and whose 'index'
  continues to count. So the batches of all processes have one shape, and all
  processes have the same number of batches.

  Args:
    dataset: a `Dataset`.
    batch_size: size of the global batch, a multiple of process_count.
    process_index: number of this process, in [0, process_count).
    process_count: number of processes.
    start: number of batches to leave out at the beginning.

  Yields:
    What `train_batch` returns, and 'mask', float32 [b], which is 1 for images
    and 0 for copies.

  Raises:
    ValueError: batch_size does not divide by process_count.
  """
  rows = _rows(batch_size, process_index, process_count)

  def fetch(number):
    index = number * batch_size + rows
    batch = dataset.batch(np.minimum(index, len(dataset) - 1))
    mask = (index < len(dataset)).astype(np.float32)
    return batch | {'index': index, 'mask': mask}

  numbers = range(start, math.ceil(len(dataset) / batch_size))
  for _, batch in prefetch(fetch, numbers):
    yield batch
