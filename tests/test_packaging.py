"""The lists of dependencies agree, and name what the code imports."""

import ast
import importlib.metadata
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']


def listed(path):
  """Return the lines of a file of requirements that name packages."""
  lines = [
    line.partition('#')[0].strip() for line in path.read_text().split('\n')
  ]
  return sorted(line for line in lines if line and not line.startswith('-r '))


def distribution(requirement):
  """Return the normalised name of the package of a requirement."""
  name = re.match(r'[\w.-]+', requirement)[0]
  return re.sub(r'[-_.]+', '-', name).lower()


def imports():
  """Yield (path, top-level name) of imports of other projects' modules."""
  folders = {path.parent for path in ROOT.glob('[a-z]*/*.py')}
  paths = [*ROOT.glob('*.py')]
  own = {path.stem for path in paths} | {folder.name for folder in folders}
  paths += [path for folder in folders for path in folder.rglob('*.py')]
  for path in paths:
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
      for name in {name.partition('.')[0] for name in names}:
        if name not in own | sys.stdlib_module_names:
          yield path.relative_to(ROOT), name


def test_requirements_agree():
  wanted = sorted(PROJECT['dependencies'] + EXTRAS['test'])
  assert listed(ROOT / 'requirements.txt') == wanted
  wanted = sorted(EXTRAS['tensorflow'])
  assert listed(ROOT / 'requirements-tensorflow.txt') == wanted


def test_what_the_code_imports_is_declared():
  declared = {distribution(r) for r in PROJECT['dependencies'] + EXTRAS['test']}
  # These need more than the tests: tools to compare with, and `data prepare`.
  more = {'diffusers', 'pytorch_fid', 'torch', 'torch_fidelity'}
  more |= {distribution(r) for r in EXTRAS['tensorflow'] + EXTRAS['notebook']}
  more |= {'tensorflow'}
  providers = importlib.metadata.packages_distributions()
  found = 0
  for path, name in imports():
    if name not in more:
      packages = {distribution(p) for p in providers.get(name, [])}
      assert packages & declared, f'{path} imports {name}'
      found += 1
  assert found > 100


def test_installed_versions_are_allowed():
  assert sys.version_info >= (3, 11)
  for requirement in PROJECT['dependencies'] + EXTRAS['test']:
    installed = importlib.metadata.version(distribution(requirement))
    for sign, bound in re.findall(r'(>=|<)([\d.]+)', requirement):
      numbers = [
        tuple(map(int, re.findall(r'\d+', v))) for v in (installed, bound)
      ]
      inside = (
        numbers[0] >= numbers[1] if sign == '>=' else numbers[0] < numbers[1]
      )
      assert inside, f'{requirement}: {installed} is installed'


def test_workflow_tests_the_versions_of_python():
  workflow = (ROOT / '.github/workflows/test.yml').read_text()
  found = re.search(r'python-version: \[(.*)\]', workflow)[1]
  versions = [version.strip(' "') for version in found.split(',')]
  assert f'>={versions[0]}' == PROJECT['requires-python']
  assert versions == ['3.11', '3.12', '3.13']
