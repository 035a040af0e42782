"""Check of the types and shapes in annotations, for `tests/conftest.py`."""

from beartype import BeartypeConf, beartype

# Integers are floats as well.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
  """Return the function with a check of its arguments and of its result.

  The `__init__` of dataclasses stays as it is, because `runtime.options` checks
  their fields and raises errors that tests expect.
  """
  if getattr(function, '__name__', '') == '__init__':
    return function
  return _check(function)
