"""What a run was trained on: the file trained_on.json of its workdir.

It holds the fingerprints of the training and test images, and the names of the
classes. A path is no identity: the images behind it can change. That of an
imported run holds the names alone.
"""

import json
import pathlib

from runtime.files import write_json
from runtime.progress import say

FILE = 'trained_on.json'
_SPLITS = {'train': 'training data', 'test': 'test data'}


def _fingerprints(split):
  return {'size': len(split), 'fingerprint': split.fingerprint}


def read(workdir):
  """Return the record of a run; {} if it has none, as those of older versions.

  Raises:
    ValueError: the file is damaged.
  """
  path = pathlib.Path(workdir) / FILE
  try:
    found = json.loads(path.read_text())
    return {
      **{split: dict(found[split]) for split in _SPLITS if split in found},
      'classes': tuple(map(str, found['classes'])),
    }
  except FileNotFoundError:
    return {}
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path} is damaged ({error!r}): remove it, and the next training writes '
      'it again'
    ) from None


def classes(workdir):
  """Return the names of the classes that a run was trained on, if known."""
  return read(workdir).get('classes', ())


def check(workdir, train, test, *, allow_other=False):
  """Raise ValueError if a run was trained on other data; say other names.

  Args:
    workdir: folder of the run.
    train, test: the Datasets with which training is to go on.
    allow_other: whether other data are allowed.
  """
  known = read(workdir)
  for split, dataset in (('train', train), ('test', test)):
    before, now = known.get(split), _fingerprints(dataset)
    if before in (None, now):
      continue
    line = (
      f'{workdir} was trained with other {_SPLITS[split]} '
      f'({before.get("size")} of fingerprint {before.get("fingerprint")}) than '
      f'those of config.data ({now["size"]} of {now["fingerprint"]})'
    )
    if not allow_other:
      raise ValueError(
        f'{line}: choose those data, another --workdir, or '
        'config.training.allow_other_data=True.'
      )
    say(f'warning: {line}.')
  names, now = known.get('classes'), tuple(train.classes)
  if names and names != now:
    say(
      f'warning: the classes {", ".join(names)} of {workdir} are now called '
      f'{", ".join(now) or "by their numbers"}, in the same order.'
    )


def write(workdir, train, test):
  """Write the record of a run."""
  value = {
    'name': train.name,
    'train': _fingerprints(train),
    'test': _fingerprints(test),
    'classes': list(train.classes),
  }
  write_json(pathlib.Path(workdir) / FILE, value)


def write_classes(workdir, classes):
  """Write the record of a run of which the names of the classes are known."""
  write_json(pathlib.Path(workdir) / FILE, {'classes': list(classes)})
