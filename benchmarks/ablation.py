r"""Measure what each ingredient of a modern recipe does on small real images.

  python -m benchmarks.ablation [--seeds 5] [--images 10240] [--folder F] \
    [--report]

The images are scikit-learn's handwritten digits. Every row of the table is a
training with the same network, number of images, batch, peak learning rate and
number of score evaluations, repeated with several seeds: the recipe of Song et
al. (2021), and with one ingredient more; then the modern recipe, of which
`RECIPE` names the ingredients, without each of them and with each of the
others. A row's number is the Frechet distance between its samples and the
training images, by features of one classifier, which is trained first. The
standard error is that of the mean over seeds.

Trainings and results are kept in F under the content that they depend on, and
not computed again, so the program can be stopped at any time. At the end it
writes benchmarks/ablation.json, docs/ablation.png and the table in
docs/results.md; with --report it writes the rows that are there. It uses one
core: put `taskset -c 0` before it.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

import evaluation
import experiment
import run_lib
from commands.control import ByWeakNetwork
from configs import base
from controllable_generation import Autoguidance
from data import batches as batching
from data import datasets
from features.statistics import Moments
from reporting.pictures import pyplot, save_figure
from runtime.devices import keep_programs, make_layout
from runtime.files import (
  cache_dir,
  digest,
  load_npz,
  save_npz,
  write_json,
  write_text,
)
from runtime.progress import Progress, say

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'ablation.json'
PICTURE, PAGE = ROOT / 'docs' / 'ablation.png', ROOT / 'docs' / 'results.md'
TABLE = re.compile('(?<=<!-- ablation -->\n).*(?=<!-- /ablation -->)', re.S)
# Programs of a small network: less effort in compiling costs no speed.
QUICK = {'xla_backend_optimization_level': 1}
BATCH, SAMPLES, AT_A_TIME = 32, 750, 250
FEWEST = 20 * BATCH  # Images of a training: its warm-up is a 20th.
LENGTHS = 0.1, 0.05  # Of power-function averages.
WEAK_AT = 4  # The weak network of autoguidance has this part of the training.

DIGITS = {
  'data.dataset': 'digits',
  'data.image_size': 8,
  'data.num_channels': 1,
  'data.random_flip': False,  # A mirrored digit is none.
  'model.nf': 8,
  'model.ch_mult': (1, 2),
  'model.num_res_blocks': 1,
  'model.attn_resolutions': (4,),
  'optim.lr': 3e-3,
  'training.ema_warmup': False,
  'training.ema_lengths': LENGTHS,
  'sampling.method': 'heun',
  'sampling.grid': 'edm',
  'sampling.num_steps': 10,
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table.

  Attributes:
    name: what it is.
    parts: of `configs.base.compose`, after process and network.
    change: dotted keys that concern samples only.
    average: relative length of the average; 0 for the paper's, with a constant
      decay.
    weak: strength of autoguidance by an earlier part of the training; 0 for
      none.
    after: parts of the recipe that the training goes on from.
  """

  name: str
  parts: tuple[Any, ...] = ()
  change: dict[str, Any] = dataclasses.field(default_factory=dict)
  average: float = 0.0
  weak: float = 0.0
  after: tuple[Any, ...] | None = None


# Groups of rows.
PAPER, MODERN = "the paper's recipe and one more", 'the modern recipe, changed'
# What can be in one recipe at the same time. A number is the length of an
# average.
INGREDIENTS = {
  'EDM': base.edm,
  'rate falls to 0 linearly': {'optim.schedule': 'linear'},
  'power-function average 0.1': LENGTHS[0],
  'told the class': {'model.num_labels': 10},
  'dropout 0.05 instead of 0.1': {'model.dropout': 0.05},
  'Muon': {'optim.optimizer': 'muon'},
  'greedy noise assignment': {'training.noise': 'greedy'},
  'augmentation 0.12': {'data.augment': 0.12},
  'learned uncertainty': {'training.uncertainty': True},
}
RECIPE = tuple(INGREDIENTS)[:5]
# What takes the place of another choice.
INSTEAD = {
  'min-SNR weighting': ({'training.weighting': 'min_snr'},),
  'rectified flow': (
    base.flow,
    {'sampling.method': 'flow_heun', 'sampling.grid': 'uniform'},
  ),
}
# Consistency fine-tuning: half as many images again.
ECT = {
  'training.objective': 'consistency',
  'optim.lr': 3e-4,
  'sampling.method': 'consistency',
}


def made_of(name, ingredients, more=(), **others) -> Row:
  """Return the row of some ingredients and of further parts."""
  parts = [INGREDIENTS[i] for i in ingredients]
  average = LENGTHS[0] if LENGTHS[0] in parts else 0.0
  parts = [part for part in parts if part != LENGTHS[0]]
  return Row(name, (*parts, *more), average=average, **others)


def rows() -> dict[str, list[Row]]:
  """Return the rows of each group; the first is what others compare with."""
  own = {'method': 'pc', 'grid': 'uniform', 'num_steps': 50}
  own = {f'sampling.{key}': value for key, value in own.items()}
  paper = [Row("the paper's recipe")]
  paper += [made_of(f'+ {name}', [name]) for name in INGREDIENTS]
  paper += [Row(f'+ {name}', parts) for name, parts in INSTEAD.items()]
  paper += [Row('Euler-Maruyama, 50 evaluations', change=own)]
  kept = made_of('the modern recipe', RECIPE)
  recipe = [kept]
  for name in INGREDIENTS:
    others = [n for n in RECIPE if n != name]
    inside = len(others) < len(RECIPE)
    sign, found = ('-', others) if inside else ('+', [*RECIPE, name])
    recipe.append(made_of(f'{sign} {name}', found))
  for name, parts in INSTEAD.items():
    left = RECIPE if name == 'min-SNR weighting' else RECIPE[1:]
    recipe.append(made_of(f'{name} instead', left, parts))
  recipe += [made_of('all ingredients together', INGREDIENTS)]
  return {PAPER: paper, MODERN: [*recipe, *_of_samples(kept)]}


def _of_samples(kept):
  """Return the rows that sample the recipe otherwise."""
  guided = {'control.scale': 1.5}
  interval = {'control.interval_low': 0.2, 'control.interval_high': 5.0}
  change = functools.partial(dataclasses.replace, kept)
  return [
    change(name='power-function average 0.05 instead', average=LENGTHS[1]),
    change(name='+ guidance 1.5', change=guided),
    change(
      name='+ guidance 1.5 at noise levels 0.2 to 5', change=guided | interval
    ),
    change(name='+ autoguidance 1.5', weak=1.5),
    change(name='Heun, 3 evaluations', change={'sampling.num_steps': 2}),
    change(
      name='+ ECT fine-tuning, 2 evaluations',
      parts=(*kept.parts, ECT),
      after=kept.parts,
    ),
  ]


# ------------------------------------------------------------------ trainings


def config_of(row: Row, images: int):
  """Return the config of a row, for a number of images of a training."""
  steps = images // BATCH // (2 if row.after is not None else 1)
  presets = [part for part in row.parts if callable(part)]
  budget = {
    'training.batch_size': BATCH,
    'training.n_iters': steps,
    'training.ema_rate': 1 - 10 / steps,
    'optim.warmup': steps // 20,
  }
  changes = [part for part in row.parts if not callable(part)]
  parts = (base.vp, base.ddpmpp, *presets, DIGITS, budget, *changes)
  return base.compose(*parts, row.change)


def build(config) -> experiment.Experiment:
  """Return the Experiment without warnings of options that have no effect."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return experiment.build(config)


def text_of(config, *sections) -> str:
  """Return sections of a config as text, or all others after 'not'."""
  found = experiment.json_of(config)
  leave_out = sections[0] == 'not'
  found = {k: v for k, v in found.items() if (k in sections) != leave_out}
  return json.dumps(found, sort_keys=True)


def of_training(config) -> str:
  """Return what a training depends on, besides its seed, as text."""
  return text_of(config, 'not', 'sampling', 'control', 'eval')


@dataclasses.dataclass
class Program:
  """What the seeds of a training share: the Experiment, compiled functions."""

  model: experiment.Experiment
  init_params: Callable
  start: Callable
  step: Callable


class Trainer:
  """Trains a config with a seed, unless its folder has the result."""

  def __init__(self, folder, data):
    """Use a folder, for trainings on a Dataset."""
    self.folder, self.data = pathlib.Path(folder), data
    self._layout, self._programs = make_layout(), {}

  def program(self, config) -> Program:
    """Return the compiled functions of a config."""
    key = of_training(config)
    if key not in self._programs:
      model, layout = build(config), self._layout

      def step(seed, state, batch):
        return run_lib.make_one_step(model, layout, True, seed)(state, batch)

      self._programs[key] = Program(
        model,
        # As `init_params` does, but compiled once.
        jax.jit(model._init, compiler_options=experiment.RUN_ONCE),
        jax.jit(run_lib.make_init(model, layout)[0]),
        jax.jit(step, donate_argnums=1, compiler_options=QUICK),
      )
    return self._programs[key]

  def name(self, config, seed, origin=None) -> str:
    """Return the name of a training, of all that it depends on.

    Args:
      config: a ConfigDict.
      seed: of everything random.
      origin: name of the training that it begins with, or None.
    """
    about = of_training(config), seed, self.data.fingerprint, origin
    return digest(*about, jax.__version__)

  def __call__(self, config, seed, origin=None, params=None):
    """Return {name: averaged parameters} at the end.

    They are '0.0', with the constant decay; those of the lengths of
    training.ema_lengths; and 'weak', the first of these at an earlier step.

    Args:
      config, seed, origin: see `name`.
      params: parameters to begin with; None for new ones.
    """
    path = self.folder / f'training-{self.name(config, seed, origin)}.npz'
    program = self.program(config)
    shapes = program.model.abstract_params()
    if path.exists():
      return _unflattened(load_npz(path), jax.tree.structure(shapes))
    if params is None:
      params = program.init_params(jax.random.key(seed))
    found = self._trained(program, config, seed, program.start(params))
    leaves = {name: jax.tree.leaves(v) for name, v in found.items()}
    save_npz(
      path,
      **{f'{k}-{i}': v for k, vs in leaves.items() for i, v in enumerate(vs)},
    )
    return found

  def _trained(self, program, config, seed, state):
    """Return the averages after the training of a state."""
    steps, done, weak = config.training.n_iters, 0, None
    config = config.copy_and_resolve_references()
    config.seed = seed  # Of the order of the images.
    model = dataclasses.replace(program.model, config=config)
    starts = run_lib.call_starts(0, steps, config.training.n_jitted_steps)
    fetch = run_lib.make_fetch(model, self.data)
    for _, batches in batching.prefetch(fetch, starts):
      for i in range(len(batches['image'])):
        batch = {k: v[i] for k, v in batches.items()}
        state, loss = program.step(seed, state, batch)
        done += 1
        if done == steps // WEAK_AT and state.averages:
          # A copy, because the state is donated.
          weak = jax.tree.map(jnp.copy, state.averages[LENGTHS[0]])
    if not np.isfinite(loss):
      raise FloatingPointError(f'The loss with seed {seed} is {loss}.')
    averages = {str(length): v for length, v in state.averages.items()}
    return {'0.0': state.ema, 'weak': weak} | averages


def _unflattened(arrays, structure):
  """Return the pytrees of arrays that are named NAME-NUMBER."""
  names = dict.fromkeys(name.partition('-')[0] for name in arrays)
  count = structure.num_leaves
  return {
    name: structure.unflatten([arrays[f'{name}-{i}'] for i in range(count)])
    for name in names
  }


# ------------------------------------------------------------------- distances


class Judge:
  """Frechet distance to the training images by features of a classifier.

  Attributes:
    name: of the training of the classifier.
    accuracy: share of test images that it gets right.
    of_test: distance of the test images.
  """

  def __init__(self, trainer, test):
    """Train a classifier of images without noise, or load it."""
    config = base.compose(
      base.vp, DIGITS, {'training.ema_lengths': ()}, base.classifier
    )
    with config.unlocked():
      config.model.update(blocks_per_group=1, channel_multiplier=1)
      config.training.update(batch_size=64, n_iters=300, ema_rate=0.95)
      config.training.update(times='single', eps=1e-3)
      config.optim.update(lr=1e-3, warmup=30)
    self.name, params = trainer.name(config, 0), trainer(config, 0)['0.0']
    model = trainer.program(config).model
    _, sigma = model.sde.marginal(config.training.eps)

    def features(images):
      """Return what the last layer is given, [B, 64]."""
      _, kept = model.network.apply(
        {'params': params},
        images / 127.5 - 1,
        jnp.full(len(images), sigma),
        train=False,
        capture_intermediates=lambda m, _: m.name == 'pre-pool-bn',
        mutable=['intermediates'],
      )
      h = kept['intermediates']['pre-pool-bn']['__call__'][0]
      return jax.nn.relu(h).mean((1, 2))

    self._features, data = jax.jit(features), trainer.data
    self._reference = self._moments(data.fetch(np.arange(len(data))))
    batch = test.batch(np.arange(len(test)))
    right = model.test_metrics(params, jax.random.key(0), batch)
    self.accuracy = float(right['accuracy_t0.0'].mean())
    self.of_test = self(batch['image'])

  def _moments(self, images):
    found = Moments()
    found.update(np.asarray(self._features(images)))
    return found

  def __call__(self, images) -> float:
    """Return the distance of uint8 images [N, H, W, C]."""
    found, wanted = self._moments(images), self._reference
    return evaluation.frechet_distance(
      found.mu, found.sigma, wanted.mu, wanted.sigma
    )


class Lab:
  """Trains and judges rows; keeps all in a folder."""

  def __init__(self, folder, images):
    """Load the digits, and train the classifier if it is missing.

    Args:
      folder: where trainings and results are kept.
      images: number of images of a training.
    """
    self.images = images
    data = config_of(Row(''), images).data
    self.train = Trainer(folder, datasets.load(data, 'train'))
    self.judge = Judge(self.train, datasets.load(data, 'test'))
    self._samplers = {}

  def _sampler(self, row, config):
    """Return (Experiment, compiled sampler) of a row."""
    key = of_training(config), text_of(config, 'sampling', 'control'), row.weak
    if key not in self._samplers:
      model, guide = build(config), None
      if row.weak:
        guide = ByWeakNetwork(
          Autoguidance(scale=row.weak), model, model.sampler.continuous
        )
      sample = model.make_sample(AT_A_TIME, guide=guide)
      self._samplers[key] = model, jax.jit(sample, compiler_options=QUICK)
    return self._samplers[key]

  def _samples(self, row, config, params, seed):
    """Return uint8 images [SAMPLES, H, W, C] of averaged parameters."""
    model, sample = self._sampler(row, config)
    images = []
    for number in range(SAMPLES // AT_A_TIME):
      rng, given = jax.random.fold_in(jax.random.key(seed), number), {}
      if row.weak:
        label = jax.random.randint(rng, (AT_A_TIME,), 0, model.num_labels)
        given = {'weak': params['weak'], 'label': label}
      found = sample(params[str(row.average)], rng, **given)
      images.append(model.to_data(found.x))
    return np.concatenate(images)

  def __call__(self, row, seed, kept=False) -> float | None:
    """Return the Frechet distance of a row with a seed.

    Args:
      row, seed: what is measured.
      kept: whether to return None rather than to measure what is missing.
    """
    config, origin, before = config_of(row, self.images), None, None
    if row.after is not None:
      before = config_of(Row('', row.after), self.images)
      origin = self.train.name(before, seed)
    about = self.train.name(config, seed, origin), row.average, row.weak
    about += text_of(config, 'sampling', 'control'), self.judge.name
    name = f'result-{digest(*about, SAMPLES, AT_A_TIME)}.json'
    if not (path := self.train.folder / name).exists():
      if kept:
        return None
      begin = before and self.train(before, seed)[str(row.average)]
      params = self.train(config, seed, origin, begin)
      images = self._samples(row, config, params, seed)
      found = {'row': row.name, 'seed': seed, 'distance': self.judge(images)}
      write_json(path, found)
    return json.loads(path.read_text())['distance']


# -------------------------------------------------------------------- results


def measure(lab, groups, seeds, kept=False, done=lambda *_: None):
  """Return {group: [{'row', 'distances'}]}, the seeds in order.

  With `kept` nothing is measured; rows that miss a seed are left out, and so
  are groups without rows.
  """
  found, number = {}, 0
  for group, members in groups.items():
    found[group] = []
    for row in members:
      distances = []
      for seed in range(seeds):
        distances.append(lab(row, seed, kept))
        number += 1
        done(number, row.name)
      if None not in distances:
        found[group].append({'row': row.name, 'distances': distances})
  return {group: members for group, members in found.items() if members}


def compared(members):
  """Yield (row, mean, error, difference, its error) of the rows of a group.

  The differences are to the first row, seed by seed: the same seed gives the
  same images in the same order, and the same noise. Errors are standard errors
  of means over seeds.
  """
  first = np.asarray(members[0]['distances'])
  error = lambda v: evaluation.standard_error(v) if len(v) > 1 else math.nan
  for member in members:
    values = np.asarray(member['distances'])
    gap = values - first
    yield (
      member['row'],
      *(values.mean(), error(values)),
      *(gap.mean(), error(gap)),
    )


def table(results):
  """Return the results as Markdown, clear differences in bold."""
  lines = []
  for group, members in results['rows'].items():
    lines += [f'| {group} | Fréchet distance | difference to the first row |']
    lines += ['|---|---|---|']
    for i, (row, mean, error, gap, of_gap) in enumerate(compared(members)):
      shown = f'{gap:+.2f} ± {of_gap:.2f}' if i else ''
      if i and abs(gap) > 2 * of_gap:
        shown = f'**{shown}**'
      lines += [f'| {row} | {mean:.2f} ± {error:.2f} | {shown} |']
    lines += ['']
  return '\n'.join(lines)


def draw(path, results):
  """Draw a panel for each group: every seed, means and two standard errors."""
  groups = results['rows']
  most = max(map(len, groups.values()))
  figure, axes = pyplot().subplots(
    1, len(groups), figsize=(6.5 * len(groups), 1 + 0.3 * most)
  )
  for ax, (group, members) in zip(axes, groups.items(), strict=True):
    found = list(compared(members))
    ax.axvline(found[0][1], color='gray', linewidth=0.8, linestyle=':')
    for i, (member, (_, mean, error, gap, of_gap)) in enumerate(
      zip(members, found, strict=True)
    ):
      clear = i and abs(gap) > 2 * of_gap
      color = ('C0', 'C2', 'C3')[int(clear and 1 + (gap > 0))]
      seeds = member['distances']
      ax.plot(seeds, [i] * len(seeds), '.', color='silver', zorder=0)
      ax.errorbar(mean, i, xerr=2 * error, fmt='o', color=color, capsize=3)
    ax.set_yticks(range(len(found)), [row for row, *_ in found])
    ax.set(title=group, xscale='log', ylim=(most - 0.5, -0.5))
    ax.set_xlabel('Fréchet distance: mean, two standard errors, seeds')
    ax.grid(alpha=0.3)
  save_figure(path, figure)


def publish(results):
  """Write the results as JSON, picture and table."""
  write_json(RESULTS, results)
  draw(PICTURE, results)
  write_text(PAGE, TABLE.sub(lambda _: table(results), PAGE.read_text()))
  say(f'{RESULTS}, {PICTURE} and {PAGE} have been written.')


def main(argv=None):
  """Measure what is missing, and write the results."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--seeds', type=int, default=5, help='of every row')
  parser.add_argument(
    '--images', type=int, default=10_240, help='of a training'
  )
  parser.add_argument('--folder', type=pathlib.Path, help='of what is kept')
  parser.add_argument('--report', action='store_true', help='measure nothing')
  args = parser.parse_args(argv)
  if args.seeds < 1 or args.images < FEWEST:
    parser.error(f'--seeds needs to be 1 or more, --images {FEWEST} or more.')
  keep_programs()
  lab = Lab(args.folder or cache_dir() / 'ablation', args.images)
  judge, network = lab.judge, lab.train.program(config_of(Row(''), args.images))
  shapes = jax.tree.leaves(network.model.abstract_params())
  say(f'Classifier: {judge.accuracy:.3f} right; test {judge.of_test:.3f}')
  groups = rows()
  total = args.seeds * sum(map(len, groups.values()))
  progress = Progress('run', total, 'runs')
  found = measure(lab, groups, args.seeds, args.report, progress)
  results = {
    'images': args.images,
    'batch': BATCH,
    'samples': SAMPLES,
    'seeds': args.seeds,
    'parameters': sum(v.size for v in shapes),
    'classifier_accuracy': judge.accuracy,
    'distance_of_test_images': judge.of_test,
    'versions': {m.__name__: m.__version__ for m in (jax, flax, np)},
    'rows': found,
  }
  publish(results)


if __name__ == '__main__':
  main()
