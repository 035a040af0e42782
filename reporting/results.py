"""Tables and curves of evaluation results.

A result is a dict, as in the JSON files of an evaluation:

- 'step', of the checkpoint, or 'images', the path of images that were scored;
- 'ema_length', of the average of the parameters, if it is not the constant one;
- 'sampler', 'nfe', 'count', 'seed' and 'inception_variant', where they apply;
- metrics, by name: every value that is a dict with a 'value', which is None if
  the metric is not available. It may have 'std_error', 'probe_error' and
  'note'.
"""

import math
import pathlib

from reporting.pictures import pyplot, save_figure
from runtime.files import write_json, write_text
from runtime.progress import say

# Options of --mode sample only; other results do not depend on them.
OF_SAMPLE = ('num_samples', 'frames')


def metrics(results):
  """Return the names of all metrics in the results, in order of appearance.

  The metric 'true_X', which is X for true data in place of samples, follows X.
  """
  order = {}
  for result in results:
    for name, value in result.items():
      if isinstance(value, dict) and 'value' in value:
        order.setdefault(name, len(order))
  place = lambda name: order.get(name.removeprefix('true_'), order[name])
  return sorted(order, key=lambda name: (place(name), len(name)))


def _settings(result):
  """Return the settings in which results of one checkpoint can differ."""
  settings = {
    k: v for k, v in result.get('sampler', {}).items() if k not in OF_SAMPLE
  }
  settings['seed'] = result.get('seed')
  if 'ema_length' in result:
    settings['ema_length'] = result['ema_length']
  if 'sampler' in result:
    settings['N'] = result.get('count')
    settings['variant'] = result.get('inception_variant')
  return settings


def _labels(results, leave_out=()):
  """Return a text for each result: the settings in which results differ."""
  all_settings = [_settings(result) for result in results]
  keys = dict.fromkeys(key for settings in all_settings for key in settings)
  vary = [
    key
    for key in keys
    if key not in leave_out
    and len({repr(s[key]) for s in all_settings if key in s}) > 1
  ]
  return [
    ', '.join(
      str(s[key]) if isinstance(s[key], str) else f'{key} {s[key]}'
      for key in vary
      if key in s
    )
    for s in all_settings
  ]


def _show(metric):
  """Return a metric as text, with its errors."""
  value, error, probes = (
    None if v is None or math.isnan(v) else v  # NaN is in old files.
    for v in map(metric.get, ('value', 'std_error', 'probe_error'))
  )
  if value is None:
    return 'n/a'
  text = f'{value:.5g}' + (f' +- {error:.2g}' if error else '')
  return text + (f' (probes {probes:.1g})' if probes else '')


def table(results):
  """Return results as text: a row for each, then the notes of the metrics.

  Settings are shown if results differ in them. Columns without content are left
  out.
  """
  names = metrics(results)
  head = ['of', 'settings', 'NFE', 'N', *names]
  rows = [
    [
      str(result.get('images') or f'step {result["step"]}'),
      label,
      f'{result["nfe"]:g}' if 'nfe' in result else '',
      str(result.get('count', '')),
      *(_show(result[name]) if name in result else '' for name in names),
    ]
    for result, label in zip(results, _labels(results), strict=True)
  ]
  columns = [
    column for column in zip(head, *rows, strict=True) if any(column[1:])
  ]
  widths = [max(map(len, column)) for column in columns]
  lines = [
    '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    for row in zip(*columns, strict=True)
  ]
  notes = {}
  for name in names:
    for result in results:
      if note := result.get(name, {}).get('note'):
        notes.setdefault(note, {})[name] = None
  lines += [f'{", ".join(where)}: {note}' for note, where in notes.items()]
  return '\n'.join(line.rstrip() for line in lines)


def save_results(folder, results, cost=()):
  """Print results; write results.json, .txt (the table) and .png (curves).

  Args:
    folder: folder for the files.
    results: results with a 'step'; they are sorted by it.
    cost: see `save_curves`.
  """
  folder = pathlib.Path(folder)
  order = lambda r: (
    r['step'], r.get('nfe', 0), r.get('count', 0), r.get('ema_length', 0)
  )  # fmt: skip
  results = sorted(results, key=order)
  say(table(results))
  write_json(folder / 'results.json', results)
  write_text(folder / 'results.txt', table(results) + '\n')
  save_curves(folder / 'results.png', results, metrics(results), cost)
  say(f'All results are in {folder}/results.json, .txt and .png.')


def _lines(results, labels, x, name):
  """Return {label: [(x, value, error)]} of a metric that results have."""
  found = {}
  for result, label in zip(results, labels, strict=True):
    metric = result.get(name, {})
    if x in result and metric.get('value') is not None:
      point = result[x], metric['value'], metric.get('std_error') or 0
      found.setdefault(label, []).append(point)
  return found


def save_curves(path, results, names, cost=()):
  """Plot metrics against step and EMA length, and FID against NFE, as one PNG.

  Results that differ in more than the horizontal axis, such as the sampler, are
  lines of their own, labelled with what they differ in. Nothing is written if
  there is nothing to plot.

  Args:
    path: path of the PNG.
    results: results with a 'step'.
    names: names of the metrics, each of which gets a panel if a result has it.
    cost: names of the sampler's options that only set the number of score
      evaluations. Results that differ in these alone are one line over the NFE.
  """
  over_steps = _labels(results)
  steps = {result['step'] for result in results}

  def over(left_out):
    return [
      ', '.join(filter(None, [label, f'step {r["step"]}' * (len(steps) > 1)]))
      for r, label in zip(results, _labels(results, left_out), strict=True)
    ]

  averaged = [r for r in results if 'ema_length' in r]
  several = len({r['ema_length'] for r in averaged}) > 1
  panels = [
    *(
      ('step', name, _lines(results, over_steps, 'step', name))
      for name in names
    ),
    ('nfe', 'fid', _lines(results, over(cost), 'nfe', 'fid')),
    *(
      (x, name, _lines(results, over([x]), x, name))
      for x in ['ema_length'] * several
      for name in names
    ),
  ]
  panels = [panel for panel in panels if panel[2]]
  if not panels:
    return
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  plt = pyplot()
  figure, axes = plt.subplots(
    rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False
  )
  for ax in axes.flat[len(panels) :]:
    ax.remove()
  for ax, (x, name, found) in zip(axes.flat, panels, strict=False):
    for label, points in found.items():
      at, value, error = zip(*sorted(points), strict=True)
      ax.errorbar(at, value, yerr=error, marker='o', capsize=3, label=label)
    labels = {'nfe': 'NFE', 'ema_length': 'EMA length'}
    ax.set(xlabel=labels.get(x, x), ylabel=name)
    ax.grid(alpha=0.3)
    if any(found):
      ax.legend(fontsize='xx-small')
  save_figure(path, figure)
