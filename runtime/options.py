"""Options: typed fields that say their range and meaning, filled from configs.

A class with options is a frozen dataclass whose fields are made by `option`:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Heun(Options):
      s_churn: float = option(0.0, 'Noise added over all steps.', '[0, inf)')

Each option is declared there and nowhere else: its type, default, range and
meaning, and what depends on it. `build` makes an object of a table of such
classes from a section of a config, `check` finds values that cannot be, and
`configs.schema` collects all declarations into one list of keys.
"""

import collections.abc
import dataclasses
import difflib
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from runtime.files import not_local


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
  """A declared option.

  Attributes:
    name: name of the field, and of the key in its section.
    type: its type.
    default: its default; of an option with a table, the default's name.
    meaning: one sentence.
    within: interval that numbers lie in, such as '[0, 1)'; '' for any.
    choices: allowed values; empty for any.
    path: whether it is a path, in which ~ is the home folder.
    table: names to classes, if the value is an object of such a table.
    given: whether another section owns it, so that it is not a key here.
    marks: what depends on it (see `configs.schema`); None for what its section
      says of all keys.
    formerly: the dotted key that it had in older configs, or ''.
    renamed: old values and what they are called now.
  """

  name: str
  type: Any
  default: Any
  meaning: str
  within: str = ''
  choices: tuple = ()
  path: bool = False
  table: Mapping[str, Any] | None = None
  given: bool = False
  marks: tuple[str, ...] | None = None
  formerly: str = ''
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


def option(default, meaning, within='', **declared) -> Any:
  """Declare a field of a class with options.

  Args:
    default: its default; with a `table`, the name of the default.
    meaning: one sentence, for people.
    within: interval that numbers lie in, such as '[0, 1)' or '(0, inf)'.
    **declared: further fields of `Option`.

  Returns:
    A dataclass field.
  """
  declared |= {'default': default, 'meaning': meaning, 'within': within}
  metadata = {'option': declared}
  if declared.get('table') is not None:
    return dataclasses.field(
      default_factory=lambda: _made(declared['table'][default]),
      metadata=metadata,
    )
  return dataclasses.field(default=default, metadata=metadata)


def _made(entry):
  """An object of a table's class with its defaults; functions are objects."""
  return entry() if isinstance(entry, type) else entry


def declared(cls) -> Iterator[Option]:
  """Yield the options of a class in the order of their declaration."""
  if not dataclasses.is_dataclass(cls):  # A function in a table has none.
    return
  for field in dataclasses.fields(cls):
    if 'option' in field.metadata:
      yield Option(name=field.name, type=field.type, **field.metadata['option'])


def inside(interval: str, value: float) -> bool:
  """Return whether a number lies in an interval such as '[0, 1)'."""
  found = re.fullmatch(r'([\[(])\s*(\S+),\s*(\S+?)\s*([\])])', interval)
  if found is None:
    raise ValueError(f'{interval!r} is no interval such as [0, 1).')
  left, low, high, right = found.groups()
  low, high = float(low), float(high)
  above = value >= low if left == '[' else value > low
  below = value <= high if right == ']' else value < high
  return above and below


def _fits(value, wanted) -> bool:
  """Whether a value is of an annotated type; integers are floats as well."""
  if wanted is Any:
    return True
  if wanted is None or wanted is types.NoneType:
    return value is None
  origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, one) for one in inner)
  if wanted is bool:
    return isinstance(value, bool)
  if wanted is int:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if wanted is float:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
  if origin in (tuple, list, collections.abc.Sequence):
    return isinstance(value, (tuple, list)) and all(
      _fits(v, inner[0]) for v in value
    )
  return isinstance(value, origin or wanted)


def type_name(wanted) -> str:
  """Return a type as people write it, such as 'float' or 'tuple of int'."""
  origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
  if origin in (tuple, list, collections.abc.Sequence):
    return f'tuple of {inner[0].__name__}'
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(type_name(one) for one in inner)
  return getattr(wanted, '__name__', str(wanted))


def suggestion(name, known) -> str:
  """Return the closest of the known names as a question, or all of them."""
  close = difflib.get_close_matches(str(name), [*map(str, known)], n=1)
  if close:
    return f'did you mean {close[0]!r}?'
  return f'use one of {", ".join(map(str, known))}.'


def problem(declared_as: Option, value) -> str:
  """Return what is wrong with the value of an option and how to fix it, or ''.

  The text continues 'config.KEY=VALUE '. Of an option with a table the value is
  a name.
  """
  o, default = declared_as, f'the default is {declared_as.default!r}.'
  choices = o.table if o.table is not None else o.choices
  if choices:
    if isinstance(value, collections.abc.Hashable) and value in choices:
      return ''
    return f'is unknown: {suggestion(value, choices)}'
  if not _fits(value, o.type):
    return f'is not of type {type_name(o.type)}; {default}'
  for v in value if isinstance(value, (tuple, list)) else [value]:
    if isinstance(v, str) and (wrong := not_local(v)):
      return wrong
    if isinstance(v, numbers.Real) and not isinstance(v, bool):
      if math.isnan(v):
        return f'is not a number; {default}'
      if o.within and not inside(o.within, v):
        return f'is not in {o.within}; {default}'
  return ''


def expanded(declared_as: Option, value):
  """Return the value of an option, with the home folder for ~ in a path."""
  is_path = declared_as.path and isinstance(value, str)
  return os.path.expanduser(value) if is_path else value


def float32_problem(declared_as: Option, value) -> str:
  """Return what is wrong with a float on devices, which round it, or ''.

  Example:
    >>> rate = Option(
    ...   name='rate', type=float, default=0.5, meaning='', within='[0, 1)'
    ... )
    >>> float32_problem(rate, 0.999999999)
    'is 1.0 in float32, not in [0, 1); the default is 0.5.'
  """
  o, default = declared_as, f'the default is {declared_as.default!r}.'
  if o.type is not float:
    return ''
  with np.errstate(over='ignore', under='ignore'):
    rounded = np.float32(value)
  tiny = value and abs(rounded) < np.finfo(np.float32).smallest_normal
  if tiny or np.isinf(rounded) != math.isinf(value):
    return f'is too large or too small for float32; {default}'
  if o.within and not inside(o.within, float(rounded)):
    return f'is {rounded} in float32, not in {o.within}; {default}'
  return ''


def check(self) -> None:
  """Raise ValueError for an option of an object that cannot have its value."""
  for declared_as in declared(type(self)):
    value = getattr(self, declared_as.name)
    if declared_as.table is None and (wrong := problem(declared_as, value)):
      raise ValueError(
        f'{type(self).__name__}: {declared_as.name}={value!r} {wrong}'
      )


class Options:
  """Base of frozen dataclasses of options: checks them when it is made."""

  def __post_init__(self):
    check(self)


def build(table, section, key, **given):
  """Make the object that a section of a config chooses from a table.

  Options of the class are taken from `given`, else from the section, else they
  have their default. Options that are objects of a table are built likewise, by
  the name that the section has for them.

  Args:
    table: names to classes with options; a function stands for itself.
    section: mapping with the name and values of options, of any class.
    key: dotted key of the name, such as 'sampling.method'.
    **given: values that other sections own, of any class.

  Returns:
    The object.

  Raises:
    ValueError: the name is unknown, or a value cannot be; the key is named.

  Example:
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Steps(Options):
    ...   num_steps: int = option(10, 'Number of steps.', '[1, inf)')
    >>> build({'steps': Steps}, {'method': 'steps', 'num_steps': 5}, 'a.method')
    Steps(num_steps=5)
  """
  prefix, _, last = key.rpartition('.')
  name = section[last]
  if name not in table:
    raise ValueError(
      f'config.{key}={name!r} is unknown: {suggestion(name, table)}'
    )
  cls, values = table[name], {}
  if not isinstance(cls, type):
    return cls
  for o in declared(cls):
    if o.name in given:
      values[o.name] = given[o.name]
    elif o.given or o.name not in section:
      continue
    elif o.table is not None:
      values[o.name] = build(o.table, section, f'{prefix}.{o.name}', **given)
    else:
      value = section[o.name]
      if wrong := problem(o, value):
        raise ValueError(f'config.{prefix}.{o.name}={value!r} {wrong}')
      value = expanded(o, value)
      values[o.name] = tuple(value) if isinstance(value, list) else value
  return cls(**values)


def chosen(table, section, key) -> Iterator[Option]:
  """Yield the options that the chosen object reads from its section."""
  prefix, _, last = key.rpartition('.')
  for o in declared(table.get(section[last])):
    if not o.given:
      yield o
      if o.table is not None and o.name in section:
        yield from chosen(o.table, section, f'{prefix}.{o.name}')
