"""What people and programs read of a run: progress, logs and pictures."""

import json
import pathlib

import experiment
from reporting.pictures import pyplot, save_figure
from runtime.files import write_text
from runtime.progress import say

METRICS = (
  'test_loss', 'bits_per_dim', 'nats', 'true_nats', 'fid', 'kid',
  'is_1_split', 'is_10_splits', 'precision', 'recall', 'density', 'coverage',
  'sliced_wasserstein', 'true_sliced_wasserstein', 'energy_distance',
  'true_energy_distance', *experiment.ACCURACIES,
)  # fmt: skip
# What sets the number of evaluations, and so is no line of its own over NFE.
_COST = ('num_steps', 'rtol', 'atol', 'sde_rtol', 'sde_atol')
OF_SAMPLE = ('num_samples', 'frames')  # Of --mode sample only.


def _settings(result):
  """What may tell results of one checkpoint apart."""
  settings = {
    k: v for k, v in result.get('sampler', {}).items() if k not in OF_SAMPLE
  }
  settings['seed'] = result.get('seed')
  if 'sampler' in result:
    settings['N'] = result.get('count')
    settings['variant'] = result.get('inception_variant')
  return settings


def _labels(results, leave_out=()):
  """A text for each result: the settings in which results differ."""
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
  if metric['value'] is None:
    return 'n/a'
  error, probes = metric.get('std_error'), metric.get('probe_error')
  text = f'{metric["value"]:.5g}' + (f' +- {error:.2g}' if error else '')
  return text + (f' (probes {probes:.1g})' if probes else '')


def table(results):
  """Results as lines of text: a row each, and why some numbers are missing.

  Args:
    results: dicts with 'step' or 'images', and where measured 'nfe', 'count'
      and, by name, metrics {'value', 'std_error', 'note', ..}.
  """
  names = [name for name in METRICS if any(name in r for r in results)]
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
    column
    for column in zip(head, *rows, strict=True)
    if any(column[1:])  # Not one in which there is nothing.
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


def save_results(folder, results):
  """Prints results; writes results.json, .txt (the table) and .png (curves)."""
  folder = pathlib.Path(folder)
  order = lambda r: (r['step'], r.get('nfe', 0), r.get('count', 0))
  results = sorted(results, key=order)
  say(table(results))
  text = json.dumps(results, indent=1) + '\n'
  write_text(folder / 'results.json', text)
  write_text(folder / 'results.txt', table(results) + '\n')
  save_curves(folder / 'results.png', results, METRICS)
  say(f'All results are in {folder}/results.json, .txt and .png.')


def save_curves(path, results, names):
  """Plots metrics against step, and the FID against NFE, as one PNG.

  Results that differ in more than the axis, as by their sampler, are lines of
  their own, named by what they differ in.

  Args:
    path: of the picture.
    results: see `table`.
    names: of metrics, a panel each if any result has it.
  """

  over_steps = _labels(results)
  steps = {result['step'] for result in results}
  over_nfe = [
    ', '.join(filter(None, [label, f'step {r["step"]}' * (len(steps) > 1)]))
    for r, label in zip(results, _labels(results, _COST), strict=True)
  ]

  def lines(x, name, labels):
    """{label: [(x, value, error)]}."""
    found = {}
    for result, label in zip(results, labels, strict=True):
      metric = result.get(name, {})
      if x in result and metric.get('value') is not None:
        point = result[x], metric['value'], metric.get('std_error') or 0
        found.setdefault(label, []).append(point)
    return found

  panels = [('step', name, lines('step', name, over_steps)) for name in names]
  panels.append(('nfe', 'fid', lines('nfe', 'fid', over_nfe)))
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
    ax.set(xlabel={'nfe': 'NFE'}.get(x, x), ylabel=name)
    ax.grid(alpha=0.3)
    if any(found):
      ax.legend(fontsize='xx-small')
  save_figure(path, figure)
