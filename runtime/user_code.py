"""Functions of the user that a config names as 'module:function'."""

import functools
import importlib
import pathlib
import traceback
from collections.abc import Callable


def find(key: str, name: str) -> tuple[Callable, bytes]:
  """Return a function of the user, and the source of its module.

  What the function raises becomes a ValueError of one line, with the place in
  its module.

  Args:
    key: the dotted key of the config that names it, for errors.
    name: 'module:function', such as 'my_features:colours'.

  Raises:
    ValueError: there is no such module or function.
  """
  module_name, _, function_name = name.partition(':')
  try:
    module = importlib.import_module(module_name)
    function = getattr(module, function_name)
    source = pathlib.Path(module.__file__).read_bytes()
    if not callable(function):
      raise TypeError(f'{function_name} is no function')
  except (Exception, SystemExit) as error:  # It is a program of the user.
    raise ValueError(
      f'config.{key}={name!r} is no module:function that can be '
      f'imported: {error or type(error).__name__}'
    ) from error

  @functools.wraps(function, updated=())
  def guarded(*args, **kwargs):
    try:
      return function(*args, **kwargs)
    except MemoryError:
      raise
    except (Exception, SystemExit) as error:  # It is a program of the user.
      lines = traceback.extract_tb(error.__traceback__)
      own = [line for line in lines if line.filename == module.__file__]
      line = (own or lines)[-1]
      reason = ' '.join(str(error).split())
      raise ValueError(
        f'config.{key}={name!r} raised {type(error).__name__}: {reason:.200} '
        f'({line.filename}, line {line.lineno})'
      ) from error

  return guarded, source
