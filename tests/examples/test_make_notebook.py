"""The notebook is the tutorial, with the outputs that the tutorial shows."""

import json

from examples import make_notebook


def test_cells():
  page = (
    'See [this](a.md).\n\n'
    '```pycon\n>>> a = 1\n>>> a\n1\n>>> b = 2\n\n```\n\n[That](https://b.org)\n'
  )
  assert make_notebook.cells(page)[2:] == [
    ('markdown', 'See [this](../docs/a.md).', ''),
    ('code', 'a = 1\na', '1'),
    ('code', 'b = 2', ''),
    ('markdown', '[That](https://b.org)', ''),
  ]


def test_notebook_is_the_tutorial():
  notebook = json.loads(make_notebook.NOTEBOOK.read_text())
  page = make_notebook.PAGE.read_text()
  expected = make_notebook.cells(page)
  found = [
    (
      cell['cell_type'],
      ''.join(cell['source']),
      make_notebook.output_of(cell) if cell['cell_type'] == 'code' else '',
    )
    for cell in notebook['cells']
  ]
  # If this fails: python -m examples.make_notebook
  assert found == expected
  assert sum(bool(output) for _, _, output in found) > 20
