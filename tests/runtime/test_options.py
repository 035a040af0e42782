"""Options are declared once, and checked when an object is made of them."""

import dataclasses
import doctest
import math
import typing

import pytest

from runtime import options
from runtime.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coarse(Options):
  """A grid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fine(Options):
  """A grid with an option, and one that another section owns."""

  rho: float = option(7.0, 'Exponent.', '[1, inf)')
  scales: int = option(0, 'Levels.', '[0, inf)', given=True)


def half(x):
  """A function in a table."""
  return x / 2


GRIDS = {'coarse': Coarse, 'fine': Fine, 'half': half}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(Options):
  """Options of every kind."""

  num_steps: int = option(10, 'Steps.', '[1, inf)', marks=('cost',))
  rate: float = option(0.5, 'Rate.', '[0, 1)', formerly='old.rate')
  kind: str = option('slow', 'Kind.', choices=('slow', 'fast'))
  sizes: tuple[int, ...] = option((1, 2), 'Sizes.', '[1, inf)')
  final: bool = option(True, 'Whether it ends.')
  label: str | int = option('last', 'A name or a number.')
  limit: float | None = option(None, 'A limit.', '(0, inf)')
  grid: typing.Any = option(
    'coarse', 'Grid.', table=GRIDS, renamed={'rough': 'coarse'}
  )


SOLVERS = {'steps': Steps, 'half': half}


def of(name):
  return next(o for o in options.declared(Steps) if o.name == name)


# ---------------------------------------------------------------- declared


def test_declared():
  found = list(options.declared(Steps))
  assert [o.name for o in found] == [f.name for f in dataclasses.fields(Steps)]
  assert of('num_steps').type is int
  assert of('num_steps').default == 10
  assert of('num_steps').meaning == 'Steps.'
  assert of('num_steps').within == '[1, inf)'
  assert of('num_steps').marks == ('cost',)
  assert of('rate').marks is None
  assert of('rate').formerly == 'old.rate'
  assert of('kind').choices == ('slow', 'fast')
  assert of('grid').default == 'coarse'
  assert of('grid').table is GRIDS
  assert of('grid').renamed == {'rough': 'coarse'}
  assert [o.given for o in options.declared(Fine)] == [False, True]


def test_nothing_else_is_declared():
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Mixed(Steps):
    other: int = 3

  assert len(list(options.declared(Mixed))) == len(
    list(options.declared(Steps))
  )
  assert not list(options.declared(half))
  assert not list(options.declared(object))
  assert not list(options.declared(None))


def test_defaults():
  steps = Steps()
  assert (steps.num_steps, steps.rate, steps.limit) == (10, 0.5, None)
  assert steps.grid == Coarse()
  with pytest.raises(dataclasses.FrozenInstanceError):
    steps.num_steps = 3
  with pytest.raises(TypeError):
    Steps(3)


# ----------------------------------------------------------------- problem


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('num_steps', 1),
    ('num_steps', 10**9),
    ('rate', 0),  # An integer is a float as well.
    ('rate', 0.0),
    ('rate', 1 - 1e-9),
    ('kind', 'fast'),
    ('sizes', (3, 4)),
    ('sizes', [3, 4]),
    ('sizes', ()),
    ('final', False),
    ('label', 'best'),
    ('label', 3),
    ('limit', None),
    ('limit', 1e300),
    ('grid', 'fine'),
    ('grid', 'half'),
  ],
)
def test_values_that_are_allowed(name, value):
  assert options.problem(of(name), value) == ''


@pytest.mark.parametrize(
  ('name', 'value', 'wrong'),
  [
    ('num_steps', 0, 'is not in [1, inf); the default is 10.'),
    ('num_steps', 1.0, 'is not of type int; the default is 10.'),
    ('num_steps', True, 'is not of type int; the default is 10.'),
    ('num_steps', None, 'is not of type int; the default is 10.'),
    ('rate', 1, 'is not in [0, 1); the default is 0.5.'),
    ('rate', -1e-9, 'is not in [0, 1); the default is 0.5.'),
    ('rate', math.nan, 'is not a number; the default is 0.5.'),
    ('rate', '0.5', 'is not of type float; the default is 0.5.'),
    ('rate', False, 'is not of type float; the default is 0.5.'),
    ('kind', 'fats', "is unknown: did you mean 'fast'?"),
    ('kind', 3, 'is unknown: use one of slow, fast.'),
    ('sizes', 3, 'is not of type tuple of int; the default is (1, 2).'),
    ('sizes', (3, 'x'), 'is not of type tuple of int; the default is (1, 2).'),
    ('sizes', (3, 0), 'is not in [1, inf); the default is (1, 2).'),
    ('final', 1, 'is not of type bool; the default is True.'),
    ('label', 3.5, "is not of type str or int; the default is 'last'."),
    ('limit', 0, 'is not in (0, inf); the default is None.'),
    ('grid', 'fin', "is unknown: did you mean 'fine'?"),
    ('grid', 'zzz', 'is unknown: use one of coarse, fine, half.'),
  ],
)
def test_values_that_are_wrong(name, value, wrong):
  assert options.problem(of(name), value) == wrong


@pytest.mark.parametrize(
  ('interval', 'inner', 'outer'),
  [
    ('[0, 1]', (0, 0.5, 1), (-0.1, 1.1)),
    ('(0, 1)', (0.5,), (0, 1)),
    ('[0, 1)', (0,), (1,)),
    ('(0, 1]', (1,), (0,)),
    ('(-inf, inf)', (-1e9, 0), (math.inf, -math.inf)),
    ('[-1.5, 2e3]', (-1.5, 2000), (-1.6, 2001)),
  ],
)
def test_intervals(interval, inner, outer):
  assert all(options.inside(interval, value) for value in inner)
  assert not any(options.inside(interval, value) for value in outer)


@pytest.mark.parametrize('interval', ['', '0, 1', '[0 1]', 'positive'])
def test_what_is_no_interval(interval):
  with pytest.raises(ValueError, match='is no interval'):
    options.inside(interval, 0)


def test_objects_check_themselves():
  with pytest.raises(ValueError, match=r'^Steps: num_steps=0 is not in \[1, '):
    Steps(num_steps=0)
  with pytest.raises(ValueError, match="^Steps: kind='fats' is unknown: did "):
    Steps(kind='fats')
  assert Steps(grid=Fine(rho=2.0)).grid.rho == 2


# ------------------------------------------------------------------- build


def test_build_takes_from_given_then_section_then_default():
  section = {'name': 'fine', 'rho': 3, 'scales': 5}
  assert options.build(GRIDS, section, 'a.name') == Fine(rho=3)
  assert options.build(GRIDS, section, 'a.name', scales=9) == Fine(
    rho=3, scales=9
  )
  assert options.build(GRIDS, section, 'a.name', rho=2, other=1) == Fine(rho=2)
  assert options.build(GRIDS, {'name': 'fine'}, 'a.name') == Fine()


def test_build_of_a_function_is_the_function():
  assert options.build(GRIDS, {'name': 'half'}, 'a.name') is half


def test_build_of_nested_tables():
  section = {'method': 'steps', 'grid': 'fine', 'rho': 2.0, 'sizes': [3, 4]}
  found = options.build(SOLVERS, section, 'sampling.method', scales=8)
  assert found == Steps(grid=Fine(rho=2.0, scales=8), sizes=(3, 4))
  assert hash(found) == hash(dataclasses.replace(found))
  plain = options.build(
    SOLVERS, {'method': 'steps', 'grid': 'half'}, 'sampling.method'
  )
  assert plain.grid is half


@pytest.mark.parametrize(
  ('section', 'message'),
  [
    (
      {'method': 'stps'},
      "config.sampling.method='stps' is unknown: did you mean 'steps'?",
    ),
    (
      {'method': 'steps', 'grid': 'fin'},
      "config.sampling.grid='fin' is unknown: did you mean 'fine'?",
    ),
    (
      {'method': 'steps', 'rate': 2},
      'config.sampling.rate=2 is not in [0, 1); the default is 0.5.',
    ),
    (
      {'method': 'steps', 'grid': 'fine', 'rho': 0.5},
      'config.sampling.rho=0.5 is not in [1, inf); the default is 7.0.',
    ),
  ],
)
def test_build_names_the_key(section, message):
  with pytest.raises(ValueError) as error:
    options.build(SOLVERS, section, 'sampling.method')
  assert str(error.value) == message


def test_build_ignores_options_of_other_choices():
  section = {'method': 'steps', 'grid': 'coarse', 'rho': -1.0}
  assert options.build(SOLVERS, section, 'sampling.method') == Steps()


# ------------------------------------------------------------------ chosen


def test_chosen():
  def names(**section):
    found = options.chosen(SOLVERS, section, 'sampling.method')
    return {o.name for o in found}

  own = {o.name for o in options.declared(Steps)}
  assert names(method='steps') == own
  assert names(method='steps', grid='coarse', rho=2) == own
  assert names(method='steps', grid='half') == own
  assert names(method='steps', grid='fine') == own | {'rho'}  # Not `scales`.
  assert names(method='half') == set()
  assert names(method='unknown') == set()


def test_examples():
  assert doctest.testmod(options).failed == 0
