"""Every key of a config: its type, default, range and meaning, checked here.

Keys are declared on the classes that own them (see `runtime.options`): those of
a sampler on the sampler, those of training as a whole on `Training` below.
`SECTIONS` says which classes make up a section. Nothing else lists keys: the
defaults, the flags of the command line, the page of documentation, what must
not change when a run is resumed and what results depend on all come from here.

Marks say what depends on a key:

- run: the trained weights belong to this value; it cannot change on resume.
- samples: samples, losses and likelihoods depend on it.
- result: a result depends on it, but not the samples.
- cost: it sets the number of score evaluations.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

import likelihood
import losses
import models
import optimization
import sampling
import sde_lib
from controllable_generation import CONTROLS, Control
from data import datasets, pixels
from features import inception
from models import score
from runtime import options
from runtime.options import Options, option

# Counts are 32-bit integers on the devices.
POSITIVE = '[1, 2147483647]'
OR_NEVER = '[0, 2147483647]'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Top(Options):
  """Keys that are in no section."""

  seed: int = option(
    # The keys of JAX have 32 bits; some are of seed + 1.
    42,
    'Seed of everything random.',
    '[0, 4294967295)',
    marks=('samples',),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process(Options):
  """The section `sde`."""

  name: Any = option('vp', 'Forward process.', table=sde_lib.SDES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network(Options):
  """The section `model`."""

  name: Any = option(
    'ncsnpp', 'Network.', table=models.MODELS | models.CLASSIFIERS
  )
  conditioning: Any = option(
    'time',
    'What the network is told of the noise level, and what its output means.',
    table=score.CONDITIONINGS,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Options):
  """The section `training`, besides the loss."""

  batch_size: int = option(
    128, 'Examples of a step, on all devices together.', POSITIVE
  )
  n_iters: int = option(1_300_000, 'Training steps.', OR_NEVER)
  begin_with: str = option(
    '',
    'Workdir of a run of the same network, whose averaged weights a new run '
    "begins with; '' for random weights.",
    path=True,
  )
  allow_other_data: bool = option(
    False, 'Whether a run may be resumed with other images than before.'
  )
  num_scales: int = option(
    0,
    'Noise levels that the network is trained on; 0 for continuous time.',
    '[0, 1e7]',
    formerly='sde.num_scales',
    marks=('run', 'samples'),
  )
  ema_rate: float = option(
    0.9999, 'Decay of the average of the parameters.', '[0, 1)'
  )
  ema_warmup: bool = option(
    False, 'Whether the decay is min(ema_rate, (1 + n) / (10 + n)) at step n.'
  )
  ema_lengths: tuple[float, ...] = option(
    (),
    'Relative lengths of further averages that are kept, such as 0.05,0.1.',
    optimization.LENGTHS,
  )
  n_jitted_steps: int = option(5, 'Steps in one compiled call.', POSITIVE)
  grad_accumulation: int = option(
    1, 'Parts that a batch is split into, to save memory.', POSITIVE
  )
  shard_state: bool = option(
    False,
    'Whether parameters, their average and the moments of Adam are split over '
    'the devices, to save memory.',
  )
  prng: str = option(
    'threefry2x32',
    'Generator of the random numbers of training steps, by its name in JAX.',
    choices=('threefry2x32', 'rbg', 'unsafe_rbg'),
    marks=('run',),
  )
  log_freq: int = option(
    50, 'Steps between two lines of the log; 0 for never.', OR_NEVER
  )
  eval_freq: int = option(
    500, 'Steps between two test losses; 0 for never.', OR_NEVER
  )
  checkpoint_freq: int = option(
    10_000,
    'Steps between two checkpoints, of which the last two are kept; 0 for one '
    'at the end.',
    OR_NEVER,
  )
  snapshot_freq: int = option(
    50_000, 'Steps between two checkpoints that are kept; 0 for none.', OR_NEVER
  )
  snapshot_sampling: bool = option(
    True, 'Whether a picture of samples is drawn at each kept checkpoint.'
  )
  condition_dropout: float = option(
    0.1,
    'Share of examples without class and condition, with model.num_labels or '
    'model.condition.',
    '[0, 1]',
    formerly='training.label_dropout',
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization(Options):
  """The section `optim`."""

  optimizer: Any = option(
    'adam', 'Optimizer.', table=optimization.OPTIMIZERS, marks=('run',)
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Options):
  """The section `sampling`, besides the options of samplers."""

  method: Any = option('pc', 'Sampler.', table=sampling.SAMPLERS)
  num_samples: int = option(64, 'Samples of --mode sample.', POSITIVE, marks=())
  frames: int = option(
    0,
    'States that --mode sample shows on the way from noise to samples; 0 for '
    'none, else 2 or more.',
    '[0, 1e4]',
    marks=(),
  )
  rounding: str = option(
    'half_up',
    "How samples become 8 bits; 'truncate' is the paper's release.",
    choices=tuple(pixels.ROUNDINGS),
  )
  rtol: float = option(
    1e-5,
    'Relative tolerance of the ODE solver, in likelihoods too.',
    '(0, inf)',
    marks=('samples', 'cost'),
  )
  atol: float = option(
    1e-5,
    'Absolute tolerance of the ODE solver, in likelihoods too.',
    '(0, inf)',
    marks=('samples', 'cost'),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Options):
  """The section `eval`."""

  checkpoint: str | int = option(
    'last', "'last', 'best', 'all', a step, or 'first:last'.", marks=()
  )
  ema_length: tuple[float, ...] = option(
    (),
    'Relative length of the average of the parameters, combined from those of '
    'training.ema_lengths; --mode eval takes several; empty for that of '
    'training.ema_rate.',
    optimization.LENGTHS,
    marks=(),  # Results are named by the parameters.
  )
  batch_size: int = option(
    1024,
    'Examples at a time, on all devices together.',
    POSITIVE,
    marks=('samples', 'result'),
  )
  enable_loss: bool = option(True, 'Whether the test loss is computed.')
  enable_bpd: bool = option(False, 'Whether bits per dimension are computed.')
  bpd_eps: float = option(
    1e-5, 'Time at which the likelihood puts the data.', '(0, 1)'
  )
  bpd_trace: str = option(
    'rademacher',
    "Probes of the divergence, or 'exact', which suits few dimensions.",
    choices=(*likelihood.PROBES, 'exact'),
  )
  bpd_probes: int = option(
    1, 'Probes per image; from 2 on their error is known.', '[1, 1e6]'
  )
  bpd_repeats: int = option(
    5, 'Passes over the test set, each dequantised anew.', POSITIVE
  )
  ood: tuple[str, ...] = option(
    (),
    'Data sets that the model should tell from its own: names of data.ood.SETS '
    'or of data sets, or paths of folders and files.',
  )
  ood_images: int = option(
    1000, 'Examples of each of these sets, at most.', '[50, inf)'
  )
  enable_sampling: bool = option(
    True, 'Whether samples are drawn and compared with the data.'
  )
  num_samples: int = option(50_000, 'Samples that are compared.', POSITIVE)
  inception_path: str = option(
    '',
    "File of Inception weights; '' for the cache or a download.",
    path=True,
    marks=(),
  )
  inception_variant: str = option(
    'tensorflow',
    'How images enter the Inception network.',
    choices=tuple(inception.VARIANTS),
  )
  extractor: str = option(
    '', "Your own features in place of Inception's, as 'module:function'."
  )
  stats_path: str = option(
    '',
    "File of reference statistics; '' for the cache, computed if missing.",
    path=True,
    marks=(),
  )
  allow_few_samples: bool = option(
    False, 'Whether the FID of fewer samples than features is reported.'
  )


@dataclasses.dataclass(frozen=True)
class Section:
  """Classes that declare the keys of a section, and the marks of its keys.

  `varies` says that a config holds the keys of the chosen classes only.
  """

  owners: tuple[type, ...]
  marks: tuple[str, ...] = ()
  varies: bool = False


SECTIONS = {
  '': Section((Top,)),
  'data': Section((datasets.Data,), ('run', 'samples')),
  'sde': Section((Process,), ('run', 'samples'), varies=True),
  'model': Section((Network,), ('run', 'samples'), varies=True),
  'training': Section((Training, losses.ScoreMatching)),
  'optim': Section((Optimization,)),
  'sampling': Section((Sampling,), ('samples',)),
  'control': Section((Control,), ('samples',)),
  'eval': Section((Evaluation,), ('result',)),
}


@dataclasses.dataclass(frozen=True)
class Key:
  """A key of a config.

  Attributes:
    path: dotted, such as 'sampling.snr'.
    option: its declaration.
    marks: what depends on it.
    choices: the choices that it belongs to, such as 'corrector=langevin'; empty
      if it always has a meaning.
  """

  path: str
  option: options.Option
  marks: tuple[str, ...]
  choices: tuple[str, ...] = ()


def _walk(cls, choice='') -> Iterator[tuple[options.Option, str]]:
  """Yield the options of a class and of the classes in their tables."""
  for o in options.declared(cls):
    if o.given:
      continue
    yield o, choice
    for name, entry in (o.table or {}).items():
      yield from _walk(entry, f'{o.name}={name}')


def _keys() -> dict[str, Key]:
  found = {}
  for section, declared in SECTIONS.items():
    for o, choice in (pair for c in declared.owners for pair in _walk(c)):
      path = f'{section}.{o.name}'.lstrip('.')
      marks = declared.marks if o.marks is None else o.marks
      key = found.setdefault(path, Key(path, o, marks, (choice,)))
      always = '' in key.choices or not choice
      choices = ('',) if always else (*key.choices, choice)
      found[path] = dataclasses.replace(
        key, choices=tuple(dict.fromkeys(choices))
      )
  return {
    path: dataclasses.replace(key, choices=tuple(filter(None, key.choices)))
    for path, key in found.items()
  }


KEYS = _keys()


def defaults() -> dict[str, Any]:
  """Return all sections with their defaults, those that vary empty."""
  config = {name: {} for name in SECTIONS if name}
  for path, key in KEYS.items():
    section, _, name = path.rpartition('.')
    if not SECTIONS[section].varies:
      (config[section] if section else config)[name] = key.option.default
  return config


def leaves(config, prefix='') -> Iterator[tuple[str, Any]]:
  """Yield (dotted key, value) of a nested mapping."""
  for name, value in config.items():
    if isinstance(value, (Mapping, ml_collections.ConfigDict)):
      yield from leaves(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value


def unknown(path: str, known=KEYS) -> str:
  """Return one line for a key that does not exist, with the likeliest meant."""
  name = path.rpartition('.')[2]
  if path in SECTIONS:
    return f'config.{path} is a section, not a key: see --help_config.'
  # The same name in another section comes first, then the closest spelling.
  close = [key for key in known if key.rpartition('.')[2] == name]
  close = close or difflib.get_close_matches(path, list(known), n=1)
  hint = f'did you mean config.{close[0]}?' if close else 'see --help_config.'
  return f'config.{path} does not exist: {hint}'


def chosen_keys(config) -> set[str]:
  """Return the dotted keys that mean something with what is chosen."""
  found = set()
  for section, declared in SECTIONS.items():
    values = config[section] if section else config
    for owner in declared.owners:
      for o in options.declared(owner):
        found.add(f'{section}.{o.name}'.lstrip('.'))
        if o.table is not None and values.get(o.name):
          parts = options.chosen(o.table, values, f'{section}.{o.name}')
          found |= {f'{section}.{part.name}' for part in parts}
  return found


def own_guidance(config) -> set[str]:
  """Return the dotted keys of a network's guidance by what it is told."""
  if not (config.model.get('num_labels') or config.model.get('condition')):
    return set()
  return {f'control.{o.name}' for o in options.declared(CONTROLS['labels'])}


def check(config) -> None:
  """Raise ValueError for a key or a value that cannot be, naming both.

  In paths, ~ is replaced by the home folder.

  Args:
    config: a ConfigDict, or nested dicts.
  """
  for name in SECTIONS:
    if name and name not in config:
      raise ValueError(f'The config has no section {name!r}.')
  values = dict(leaves(config))
  for path, value in values.items():
    if path not in KEYS:
      raise ValueError(unknown(path))
    o = KEYS[path].option
    if wrong := options.problem(o, value) or options.float32_problem(o, value):
      raise ValueError(f'config.{path}={value!r} {wrong}')
  for section, declared in SECTIONS.items():
    for o in (o for owner in declared.owners for o in options.declared(owner)):
      if declared.varies and f'{section}.{o.name}' not in values:
        raise ValueError(f'config.{section}.{o.name} is missing.')
  chosen = chosen_keys(config)
  for path in values:
    section = path.partition('.')[0]
    if section in SECTIONS and SECTIONS[section].varies and path not in chosen:
      known = [key for key in chosen if key.startswith(f'{section}.')]
      raise ValueError(
        f'config.{path} is no option of config.{section}.name='
        f'{values[f"{section}.name"]!r}: use '
        f'{", ".join(sorted(key.rpartition(".")[2] for key in known))}.'
      )
  for path, value in values.items():
    if (expanded := options.expanded(KEYS[path].option, value)) != value:
      section, _, name = path.rpartition('.')
      config[section][name] = expanded


def unused(config) -> list[str]:
  """Return lines about values that nothing reads: one for each section.

  They differ from the default, but belong to a choice that was not made.
  """
  chosen, lines = chosen_keys(config) | own_guidance(config), []
  for section in ('training', 'optim', 'sampling', 'control'):
    idle = {
      path: value
      for path, value in leaves(config[section], f'{section}.')
      if path not in chosen and value != KEYS[path].option.default
    }
    if idle:
      name = lambda path: path.rpartition('.')[2]
      choices = (c for path in idle for c in KEYS[path].choices)
      names = {choice.partition('=')[0] for choice in choices}
      made = [
        f'{name(path)}={value!r}'
        for path, value in leaves(config[section], f'{section}.')
        if path in chosen and name(path) in names
      ]
      unread = [f'{name(path)}={value!r}' for path, value in idle.items()]
      lines.append(
        f'config.{section}: with {", ".join(made)}, nothing uses '
        f'{", ".join(unread)}.'
      )
  return lines


def marked(config, mark: str) -> dict[str, Any]:
  """Return {dotted key: value} of the keys with a mark, sorted."""
  return {
    path: value
    for path, value in sorted(leaves(config))
    if mark in KEYS[path].marks
  }


def names_marked(mark: str) -> set[str]:
  """Return the names, without sections, of the keys with a mark."""
  return {key.option.name for key in KEYS.values() if mark in key.marks}


def _of_first_version(old: dict[str, Any]) -> None:
  """Change two values of version 1.0 in place, whose meaning has changed."""
  if old.get('data.centered') and 'sampling.sde_atol' in old:
    old['sampling.sde_atol'] /= 2  # It was in units of the model's range.
  exploding = old.get('sde.name') in ('ve', 'edm')
  rule = 'posterior' if exploding else 'forward'  # What 'paper' means today.
  if old.get('sampling.ancestral_variance') == rule:
    old['sampling.ancestral_variance'] = 'paper'


def upgrade(config: dict[str, Any]) -> dict[str, Any]:
  """Return the nested dicts of an older config with today's keys and values."""
  old = {
    path: tuple(v) if isinstance(v, list) else v for path, v in leaves(config)
  }
  present = {path.partition('.')[0] for path in old}
  if 'training' in present and 'training.num_scales' not in old:
    _of_first_version(old)
  for path, key in KEYS.items():
    if key.option.formerly in old:
      value = old.pop(key.option.formerly)
      if path == 'data.shape':
        value = (value,) if value else ()  # It was the number of coordinates.
      if path.partition('.')[0] in present:
        old[path] = value
    value = old.get(path)
    if isinstance(value, str) and value in key.option.renamed:
      old[path] = key.option.renamed[value]
    if value in ('inf', '-inf') and key.option.type is float:
      old[path] = float(value)  # JSON has no infinite numbers.
  nested = {}
  for path, value in old.items():
    section, _, name = path.rpartition('.')
    (nested.setdefault(section, {}) if section else nested)[name] = value
  return nested


def config_dict(values: dict[str, Any]) -> ml_collections.ConfigDict:
  """Return nested dicts as a ConfigDict whose keys take all declared types."""
  config = ml_collections.ConfigDict(values)
  for path, key in KEYS.items():
    section, _, name = path.rpartition('.')
    target = config[section] if section else config
    if isinstance(key.option.type, types.UnionType) and name in target:
      # ConfigDict would refuse text where the default is a number.
      value = target[name]
      del target[name]
      target[name] = ml_collections.FieldReference(value, object)
  return config


def from_dict(values: dict[str, Any]) -> ml_collections.ConfigDict:
  """Return the locked ConfigDict of nested dicts, missing keys by default.

  Raises:
    ValueError: a key does not exist.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f'A config is a mapping of sections, not {values!r:.40}.')
  config = defaults()
  for path, value in leaves(upgrade(values)):
    section, _, name = path.rpartition('.')
    if path not in KEYS:
      raise ValueError(unknown(path))
    (config[section] if section else config)[name] = value
  return config_dict(config).lock()


def override(config, path: str, value) -> None:
  """Set a key of a ConfigDict in place, as the command line does."""
  section, _, name = path.rpartition('.')
  target = config[section] if section else config
  declared = KEYS[path].option
  with config.unlocked():
    target[name] = declared.renamed.get(value, value)


# ------------------------------------------------------------ documentation


def _allowed(key: Key) -> str:
  """Return the values that a key can have, for people."""
  o = key.option
  if o.table is not None or o.choices:
    names = map(str, o.table if o.table is not None else o.choices)
    return ', '.join(f'`{name}`' if name else 'empty' for name in names)
  return f'{options.type_name(o.type)} {o.within}'.strip()


def _condition(key: Key) -> str:
  """Return with which choices a key has a meaning, for people."""
  if len(key.choices) <= 4:
    return ', '.join(f'`{choice}`' for choice in key.choices)
  names = dict.fromkeys(choice.partition('=')[0] for choice in key.choices)
  return f'{len(key.choices)} choices of `{"`, `".join(names)}`'


def markdown() -> str:
  """Return the tables of all keys, a part of docs/configuration.md."""
  lines = []
  for section in SECTIONS:
    lines += [
      f'## {section or "no section"}',
      '',
      '| key | default | allowed | meaning | with |',
      '|---|---|---|---|---|',
    ]
    for path, key in KEYS.items():
      if path.rpartition('.')[0] == section:
        cells = (
          f'`{path}`',
          f'`{key.option.default!r}`',
          _allowed(key),
          key.option.meaning,
          _condition(key),
        )
        row = ' | '.join(cell.replace('|', r'\|') for cell in cells)
        lines.append(f'| {row} |')
    lines.append('')
  return '\n'.join(lines)


def text() -> str:
  """Return all keys as plain text, for --help_config."""
  lines = []
  for path, key in KEYS.items():
    choices = f' (with {_condition(key)})' if key.choices else ''
    about = f'{key.option.meaning} {_allowed(key)}{choices}'
    lines += [
      f'--config.{path}={key.option.default!r}',
      f'    {about.replace("`", "")}',
    ]
  return '\n'.join(lines)
