"""Documentation: links lead somewhere, code runs, and commands parse.

Python blocks of a page run in one namespace, one after the other. Shell blocks
run too. Blocks that begin with ```sh skip or ```python skip take long, or need
a network: they are not run, but their commands are parsed, like all others.

`python -m tests.test_docs` writes the table of keys in docs/configuration.md.
"""

import doctest
import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import models
from configs import schema
from runtime import options
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
TOP = ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')
PAGES = [name for name in TOP if (ROOT / name).is_file()]
PAGES += sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md'))
KEYS = re.compile('(?<=<!-- keys -->\n).*(?=<!-- /keys -->)', re.DOTALL)
FENCE = re.compile(r'^```(.*?)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
# Files that pages speak of without having them.
IMAGINED = {'solvers/midpoint.py'}


def read(page):
  return (ROOT / page).read_text()


def blocks(page, *languages):
  """Return (first line, text) of the fenced blocks in some languages."""
  text = read(page)
  return [
    (text[: block.start(2)].count('\n') + 1, block[2])
    for block in FENCE.finditer(text)
    if block[1].strip() in languages
  ]


def spans(page):
  """Return the inline code of a page, as single lines."""
  text = FENCE.sub('', read(page))
  return [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', text)]


def commands(page):
  """Return the commands of a page, each a list of words."""
  text = '\n'.join(block for _, block in blocks(page, 'sh', 'sh skip'))
  lines = text.replace('\\\n', ' ').splitlines()
  lines += [s for s in spans(page) if re.match(r'(python|make|pip) \S', s)]
  return [words for s in lines if (words := shlex.split(s, comments=True))]


@pytest.fixture(scope='module')
def sandbox(tmp_path_factory):
  """Return a folder like the project's, with a trained run runs/quickstart."""
  import run_lib

  folder = tmp_path_factory.mktemp('sandbox')
  for path in ROOT.iterdir():
    if path.name != 'runs' and not path.name.startswith('.'):
      (folder / path.name).symlink_to(path)
  config = tiny.get_config(training__n_iters=4)
  with tiny.quick_network():
    run_lib.train(config, folder / 'runs' / 'quickstart')
  return folder


def test_tutorial(monkeypatch):
  monkeypatch.chdir(ROOT)
  result = doctest.testfile(
    str(ROOT / 'docs/tutorial.md'), module_relative=False
  )
  assert result.attempted > 40
  assert not result.failed


@pytest.mark.parametrize(
  'page', [page for page in PAGES if blocks(page, 'python')]
)
def test_python(page, sandbox, monkeypatch):
  monkeypatch.chdir(sandbox)
  if page == 'README.md':  # It loads the run.
    monkeypatch.setitem(models.MODELS, 'ncsnpp', tiny.Convolutions)
  namespace = {'__name__': page}
  for line, block in blocks(page, 'python'):
    # Lines before the block are empty, so that errors have the page's lines.
    code = '\n' * (line - 1) + block
    exec(compile(code, ROOT / page, 'exec'), namespace)
  if page == 'README.md':
    images = namespace['images']
    assert images.shape == (16, 8, 8, 1) and images.dtype == 'uint8'


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'sh')])
def test_shell(page, sandbox):
  folders = [os.path.dirname(sys.executable), os.environ['PATH']]
  for _, block in blocks(page, 'sh'):
    # Trained for fewer steps, without samples at the end.
    few = ' --config.training.n_iters=100 --noconfig.training.snapshot_sampling'
    block = block.replace('--mode train', f'--mode train {few}')
    done = subprocess.run(
      ['bash', '-euc', block],
      cwd=sandbox,
      env=os.environ
      | {
        'PATH': os.pathsep.join(folders),
        'SCORE_SDE_CACHE': str(sandbox / 'cache'),
        'JAX_COMPILATION_CACHE_DIR': tiny.CACHE,
      },
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, f'{block}\n{done.stdout}\n{done.stderr}'


# ---------------------------------------------------------------------- links


def anchors(page):
  """Return the anchors of the headings of a page, as GitHub makes them."""
  found = []
  for heading in re.findall(r'^#+ (.+)$', FENCE.sub('', read(page)), re.M):
    slug = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
    copies = sum(re.sub(r'-\d+$', '', other) == slug for other in found)
    found.append(f'{slug}-{copies}' if copies else slug)
  return found


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
  text = FENCE.sub('', read(page))
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if target.startswith(('https://', 'http://', 'mailto:')):
      continue
    name, _, anchor = target.partition('#')
    path = (ROOT / page).parent / name if name else ROOT / page
    assert path.exists(), f'{page}: {target}'
    if anchor:
      assert anchor in anchors(path.resolve().relative_to(ROOT)), target


# ---------------------------------------------------------------------- names


def exists(name):
  """Return whether a dotted name is a module, or in a module."""
  parts = name.split('.')
  for count in range(len(parts), 0, -1):
    try:
      found = importlib.import_module('.'.join(parts[:count]))
    except ModuleNotFoundError:
      continue
    for attribute in parts[count:]:
      found = getattr(found, attribute, None)
    return found is not None
  return False


@pytest.mark.parametrize('page', PAGES)
def test_names(page):
  """Keys of configs, names of Python and paths, as inline code, exist."""
  if page == 'CHANGELOG.md':  # It speaks of the past.
    return
  modules = {path.stem for path in ROOT.glob('*.py')}
  folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
  for span in spans(page):
    name = span.partition('=')[0].partition('(')[0]
    first = name.partition('.')[0]
    if re.fullmatch(r'[a-z_]+(\.\w+)+', name) and not (ROOT / name).exists():
      if first in {*modules, *folders, *schema.SECTIONS}:
        assert name in schema.KEYS or exists(name), f'{page}: {name}'
    elif name.partition('/')[0] in folders - {'runs'} and '/' in name:
      assert name in IMAGINED or (ROOT / name).exists(), f'{page}: {name}'


# ------------------------------------------------------------------- commands


def check_main(main, arguments):
  """Check a command line of main.py: its flags, config and overrides."""
  main.parse(['main.py', *arguments])
  if main.FLAGS.config:
    schema.check(main.read_config())
  for path, key in schema.KEYS.items():
    flag = main.FLAGS[f'config.{path}']
    if flag.present:
      assert not options.problem(key.option, flag.value), arguments


# Runs modules up to the point where their arguments are parsed.
PARSE = """
import argparse, json, runpy, sys
from absl import app, flags

class Parsed(Exception):
  pass

def stop_after(parse):
  def parsed(*args, **options):
    parse(*args, **options)
    raise Parsed
  return parsed

argparse.ArgumentParser.parse_args = stop_after(
  argparse.ArgumentParser.parse_args)
app.run = stop_after(
  lambda main, argv=None, flags_parser=flags.FLAGS: flags_parser(sys.argv))
for module, *arguments in json.loads(sys.argv[1]):
  sys.argv = [module, *arguments]
  try:
    runpy.run_module(module, run_name='__main__', alter_sys=True)
  except Parsed:
    continue
  sys.exit(f'{module} does not parse arguments')
"""


def test_commands(monkeypatch):
  """Every command that a page shows has flags and files that exist."""
  from absl.testing import flagsaver

  import main

  monkeypatch.chdir(ROOT)
  with open('Makefile') as file:
    targets = re.findall(r'^([\w-]+):', file.read(), re.M)
  modules, seen = [], []
  for page in PAGES:
    for words in commands(page):
      words = words[words[0] == 'srun' :]
      seen.append(words[0])
      if words[:2] == ['python', 'main.py']:
        with flagsaver.flagsaver():
          check_main(main, words[2:])
      elif words[:2] == ['python', '-m'] and words[2] != 'pytest':
        assert importlib.util.find_spec(words[2]), words
        if words[3:] and words[2:] not in modules:
          modules.append(words[2:])
      elif words[0] == 'make':
        assert set(words[1:]) <= {*targets, 'PYTHON=python3.12'}, words
      elif words[0] == '.ci/run':
        assert os.access('.ci/run', os.X_OK)
      elif words[:2] == ['pip', 'install'] and '-r' in words:
        assert os.path.isfile(words[words.index('-r') + 1]), words
  assert seen.count('python') > 30 and seen.count('make') > 3
  done = subprocess.run(
    [sys.executable, '-c', PARSE, json.dumps(modules)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- README


def test_readme():
  text = read('README.md')
  assert len(text.splitlines()) <= 150
  for path in ROOT.glob('*.py'):
    assert f'| `{path.name}` |' in text, path
  folders = {path.parent.name for path in ROOT.glob('[a-z]*/*.py')} | {'docs'}
  everywhere = '\n'.join(read(page) for page in PAGES if page != 'README.md')
  for folder in folders:
    assert f'| `{folder}/` |' in text, folder
    assert folder == 'docs' or f'`{folder}/' in everywhere, folder
  pages = {page for page in PAGES if page.startswith('docs/')}
  assert pages == set(re.findall(r'\((docs/\w+\.md)\) \|', text))


def test_keys():
  """`python -m tests.test_docs` writes the table anew."""
  assert KEYS.search(read('docs/configuration.md'))[0] == schema.markdown()


if __name__ == '__main__':
  page = ROOT / 'docs' / 'configuration.md'
  page.write_text(KEYS.sub(lambda _: schema.markdown(), page.read_text()))
