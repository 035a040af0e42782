"""The examples in docstrings show what their code returns."""

import ast
import doctest
import importlib
import inspect
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ('', 'checkpoints', 'commands', 'configs', 'data', 'features')
FOLDERS += ('models', 'reporting', 'runtime', 'solvers')
MODULES = sorted(
  '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  for folder in FOLDERS
  for path in (ROOT / folder).glob('*.py')
  if '>>> ' in path.read_text()
)
TABLES = (
  'controllable_generation.CONTROLS',
  'controllable_generation.METHODS',
  'controllable_generation.OPERATORS',
  'losses.OBJECTIVES',
  'losses.TIMES',
  'losses.WEIGHTINGS',
  'models.CLASSIFIERS',
  'models.MODELS',
  'models.score.CONDITIONINGS',
  'optimization.OPTIMIZERS',
  'optimization.SCHEDULES',
  'sampling.SAMPLERS',
  'sde_lib.SDES',
  'solvers.grids.GRIDS',
  'solvers.predictors.CORRECTORS',
  'solvers.predictors.PREDICTORS',
)


def table(name):
  module, _, attribute = name.rpartition('.')
  return getattr(importlib.import_module(module), attribute)


def docstrings(source):
  """Yield (name, line, docstring) of all that has one in a module's source."""
  documented = ast.Module | ast.ClassDef | ast.FunctionDef
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, documented) and (text := ast.get_docstring(node)):
      yield getattr(node, 'name', 'module'), node.body[0].lineno, text


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
  # The finder of doctest overlooks functions whose types tests check.
  module = importlib.import_module(name)
  runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
  parser, path = doctest.DocTestParser(), module.__file__
  for where, line, text in docstrings(pathlib.Path(path).read_text()):
    namespace = dict(vars(module))
    test = parser.get_doctest(text, namespace, f'{name}.{where}', path, line)
    runner.run(test)
  assert runner.tries
  assert not runner.failures


@pytest.mark.parametrize('name', TABLES)
def test_classes_in_tables_have_examples(name):
  for entry in table(name).values():
    if inspect.isclass(entry):
      assert '>>> ' in (entry.__doc__ or ''), entry
