r"""Write examples/tutorial.ipynb: docs/tutorial.md as an executed notebook.

  python -m examples.make_notebook

It needs `pip install -e .[notebook]`. The tests compare the notebook with the
page, so run this after each change of the page.
"""

import doctest
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'tutorial.md'
NOTEBOOK = ROOT / 'examples' / 'tutorial.ipynb'

FIRST = (
  'This notebook is [docs/tutorial.md](../docs/tutorial.md), executed. It is '
  'written by `python -m examples.make_notebook`: do not edit it by hand.'
)
# Jupyter starts in the folder of the notebook.
SETUP = """\
import os

if not os.path.exists('main.py'):
  os.chdir('..')"""


def cells(page):
  """Return the cells of a page with doctests.

  A code cell ends where the page shows an output, so that the notebook shows
  it as well. Links are relative to the folder of the notebook.

  Args:
    page: text in Markdown with fenced `pycon` blocks.

  Returns:
    List of (type of cell, source, output that the page shows).
  """
  found = []
  parts = re.split(r'^```pycon\n(.*?)^```$', page, flags=re.M | re.S)
  for number, part in enumerate(parts):
    if number % 2 == 0:
      text = re.sub(r'\]\((?!https?://|#)', '](../docs/', part.strip())
      if text:
        found.append(('markdown', text, ''))
      continue
    source = ''
    for example in doctest.DocTestParser().get_examples(part):
      source += example.source
      if example.want:
        found.append(('code', source.rstrip(), example.want.rstrip()))
        source = ''
    if source:
      found.append(('code', source.rstrip(), ''))
  return [('markdown', FIRST, ''), ('code', SETUP, ''), *found]


def output_of(cell):
  """Return what a code cell of a notebook has printed and returned."""
  text = ''
  for output in cell['outputs']:
    shown = output['text'] if 'text' in output else output['data']['text/plain']
    text += ''.join(shown)
  return text.rstrip()


def main():
  """Execute the page, and save the notebook."""
  # Needed for this only, so not at the top.
  import nbclient
  import nbformat

  new = {
    'markdown': nbformat.v4.new_markdown_cell,
    'code': nbformat.v4.new_code_cell,
  }
  notebook = nbformat.v4.new_notebook()
  notebook.cells = [
    new[kind](source, id=f'cell-{number}')
    for number, (kind, source, _) in enumerate(cells(PAGE.read_text()))
  ]
  nbclient.NotebookClient(
    notebook,
    kernel_name='python3',
    resources={'metadata': {'path': str(NOTEBOOK.parent)}},
    record_timing=False,
  ).execute()
  # The version of the interpreter is that of whoever runs it.
  notebook.metadata.get('language_info', {}).pop('version', None)
  notebook.metadata['kernelspec'] = {
    'display_name': 'Python 3',
    'language': 'python',
    'name': 'python3',
  }
  NOTEBOOK.write_text(nbformat.writes(notebook) + '\n')


if __name__ == '__main__':
  main()
