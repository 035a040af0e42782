"""Keys of configs: declared once, checked, upgraded, marked."""

import dataclasses
import json
import pathlib
import re
import types

import jax
import ml_collections
import numpy as np
import pytest

import experiment
import losses
from configs import schema
from runtime import files, options
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(
  path
  for path in (ROOT / 'configs').rglob('*.py')
  if 'def get_config' in path.read_text()
)


def names(paths):
  return [str(path.relative_to(ROOT / 'configs')) for path in paths]


def changed(**changes):
  """Return the tiny config with changes that nothing has checked."""
  config = tiny.get_config().to_dict()
  for key, value in changes.items():
    section, _, name = key.rpartition('__')
    (config[section] if section else config)[name] = value
  return ml_collections.ConfigDict(config)


# --------------------------------------------------------------- declarations


@pytest.mark.parametrize('path', schema.KEYS)
def test_key(path):
  """Every key has a meaning, a type and a default that is allowed."""
  key = schema.KEYS[path]
  assert key.path == path and path.endswith(key.option.name)
  assert len(key.option.meaning) > 5 and key.option.meaning.endswith('.')
  assert options.problem(key.option, key.option.default) == ''
  assert set(key.marks) <= {'run', 'samples', 'result', 'cost'}
  if key.option.within:  # It is an interval.
    options.inside(key.option.within, 0.0)


def test_a_key_has_one_meaning():
  """Classes that share a key of a section agree on what it is."""
  for section, declared in schema.SECTIONS.items():
    for cls in declared.owners:
      for o, _ in schema._walk(cls):
        path = f'{section}.{o.name}'.lstrip('.')
        ours = schema.KEYS[path].option
        assert (o.type, o.within) == (ours.type, ours.within), path
        if not schema.SECTIONS[section].varies:
          assert o.default == ours.default, path


def test_old_names_are_no_names_of_today():
  old = [key.option.formerly for key in schema.KEYS.values()]
  assert not set(filter(None, old)) & set(schema.KEYS)
  for key in schema.KEYS.values():
    allowed = key.option.table or key.option.choices
    for before, after in key.option.renamed.items():
      assert before not in allowed and after in allowed


def test_marks():
  config = tiny.get_config()
  run = schema.marked(config, 'run')
  assert run['model.nf'] == 8 and run['sde.sigma_max'] == 10.0
  assert {'data.image_size', 'training.num_scales'} <= set(run)
  assert not any(key.startswith(('sampling', 'eval')) for key in run)
  assert [key for key in run if key.startswith('optim')] == ['optim.optimizer']
  assert not {'model.dtype', 'model.remat', 'data.path'} & set(run)
  samples = schema.marked(config, 'samples')
  assert {'seed', 'sampling.num_steps', 'sampling.rounding'} <= set(samples)
  assert {'model.dtype', 'eval.batch_size', 'control.scale'} <= set(samples)
  for free in (
    'sampling.num_samples',
    'sampling.frames',
    'eval.num_samples',
    'eval.stats_path',
    'data.path',
    'training.log_freq',
    'optim.lr',
  ):
    assert free not in samples
  cost = schema.names_marked('cost')
  assert cost == {
    'num_steps', 'rtol', 'atol', 'sde_rtol', 'sde_atol',
  }  # fmt: skip
  result = schema.marked(config, 'result')
  assert {'eval.num_samples', 'eval.bpd_probes'} <= set(result)
  assert not {'eval.checkpoint', 'eval.inception_path'} & set(result)


# --------------------------------------------------------------------- checks

OUT_OF_RANGE = {
  'seed': -1,
  'data__image_size': 0,
  'sde__sigma_max': 0.0,
  'model__nf': 0,
  'model__dropout': 1.5,
  'training__batch_size': 0,
  'training__ema_rate': 1.0,
  'training__log_freq': -1,
  'training__eps': -1e-5,
  'optim__lr': -1.0,
  'optim__beta2': 1.0,
  'sampling__num_steps': 0,
  'sampling__eps': 0.0,
  'sampling__rtol': 0.0,
  'sampling__snr': -1.0,
  'control__repeats': 0,
  'control__factor': 0,
  'eval__bpd_probes': 0,
  'eval__bpd_eps': 1.0,
}


@pytest.mark.parametrize('key', OUT_OF_RANGE)
def test_out_of_range(key):
  path, value = key.replace('__', '.'), OUT_OF_RANGE[key]
  with pytest.raises(ValueError, match=r'is not in [\[(]') as error:
    schema.check(changed(**{key: value}))
  line = str(error.value)
  assert line.startswith(f'config.{path}={value!r} ') and '\n' not in line
  assert 'the default is' in line
  # The same line, from where a config is built.
  with pytest.raises(ValueError) as again:
    experiment.build(changed(**{key: value}))
  assert str(again.value) == line


@pytest.mark.parametrize('value', [float('nan'), 1.5, '3', None, True, (1,)])
def test_wrong_type(value):
  with pytest.raises(ValueError, match='config.training.batch_size='):
    schema.check(changed(training__batch_size=value))


@pytest.mark.parametrize(
  ('key', 'value', 'wanted'),
  [
    ('seed', 1.0, 'int'),
    ('data__centered', 1, 'bool'),
    ('data__path', 3, 'str'),
    ('sde__sigma_max', '50', 'float'),
    ('model__ch_mult', 2, 'tuple of int'),
    ('model__ch_mult', (1.5, 2), 'tuple of int'),
    ('training__ema_rate', True, 'float'),
    ('optim__lr', None, 'float'),
    ('sampling__final_denoise', 'yes', 'bool'),
    ('control__label', 0.5, 'int or str'),
    ('eval__checkpoint', None, 'str or int'),
  ],
)
def test_wrong_type_is_named(key, value, wanted):
  path = key.replace('__', '.')
  with pytest.raises(ValueError, match=f'is not of type {wanted};') as error:
    schema.check(changed(**{key: value}))
  assert str(error.value).startswith(f'config.{path}={value!r} ')


def test_nan_is_no_number():
  with pytest.raises(ValueError, match='optim.lr=nan is not a number'):
    schema.check(changed(optim__lr=float('nan')))


def test_integers_are_floats():
  schema.check(changed(optim__lr=1, optim__grad_clip=np.float32(1)))
  schema.check(changed(training__n_iters=np.int64(7)))


@pytest.mark.parametrize(
  ('path', 'hint'),
  [
    ('training.batch_sise', 'training.batch_size'),
    ('sampling.num_step', 'sampling.num_steps'),
    ('sampling.lr', 'optim.lr'),
    ('sde.num_scales', 'training.num_scales'),
    ('sde.sigma_data', 'model.sigma_data'),
    ('lr', 'optim.lr'),
    ('eval.bpd_prob', 'eval.bpd_probes'),
    ('optim.beta_1', 'optim.beta1'),
    ('data.imagesize', 'data.image_size'),
    ('model.num_resblocks', 'model.num_res_blocks'),
    ('control.scal', 'control.scale'),
  ],
)
def test_unknown_key(path, hint):
  assert path not in schema.KEYS
  config = changed(**{path.replace('.', '__'): 1})
  wanted = f'config.{path} does not exist: did you mean '
  with pytest.raises(ValueError) as error:
    schema.check(config)
  line = str(error.value)
  assert line.startswith(wanted) and hint in line and '\n' not in line
  # From JSON, too.
  with pytest.raises(ValueError, match='does not exist'):
    schema.from_dict({'training': {'batch_sise': 1}})


def test_unknown_section():
  config = changed(sample={'num_steps': 3})
  with pytest.raises(ValueError, match='config.sample.num_steps does not ex'):
    schema.check(config)
  config = changed()
  del config['eval']
  with pytest.raises(ValueError, match="no section 'eval'"):
    schema.check(config)


@pytest.mark.parametrize(
  ('key', 'value', 'hint'),
  [
    ('sde__name', 'vpe', "'vp'"),
    ('model__name', 'ncsnp', "'ncsnpp'"),
    ('model__conditioning', 'sigm', "'sigma'"),
    ('training__objective', 'denoise', "'denoising'"),
    ('training__weighting', 'likelyhood', "'likelihood'"),
    ('sampling__method', 'dpmpp2m', "'dpmpp_2m'"),
    ('sampling__corrector', 'langevine', "'langevin'"),
    ('sampling__rounding', 'half', 'half_up'),
    ('eval__bpd_trace', 'hutchinson', 'rademacher'),
    ('control__method', 'piGDM', 'pigdm'),
  ],
)
def test_unknown_choice(key, value, hint):
  path = key.replace('__', '.')
  with pytest.raises(ValueError, match='is unknown: ') as error:
    schema.check(changed(**{key: value}))
  assert str(error.value).startswith(f'config.{path}={value!r} ')
  assert hint in str(error.value)


def test_key_of_another_choice():
  """Sections that describe the model hold keys of the chosen classes only."""
  for key, value, mine in (
    ('sde__beta_max', 20.0, 'sigma_max'),
    ('model__num_layers', 3, 'ch_mult'),
  ):
    with pytest.raises(ValueError, match='is no option of config') as error:
      schema.check(changed(**{key: value}))
    assert mine in str(error.value)


# --------------------------------------------------------- what has no effect


def test_unused():
  assert schema.unused(tiny.get_config()) == []
  config = tiny.get_config(
    sampling__method='heun', sampling__order=3, sampling__s_churn=1.0
  )
  # ve sets a predictor and a corrector, which heun does not have.
  (line,) = schema.unused(config)
  assert line.startswith("config.sampling: with method='heun', nothing uses ")
  assert 'order=3' in line and 's_churn' not in line
  config = tiny.get_config(training__p_mean=0.5)
  (line,) = schema.unused(config)
  assert line.startswith('config.training: with ')
  assert "times='uniform'" in line and line.endswith('uses p_mean=0.5.')
  with pytest.warns(UserWarning, match='nothing uses p_mean=0.5'):
    experiment.build(config)
  (line,) = schema.unused(tiny.get_config(optim__horizon=5))
  assert line.endswith("with schedule='constant', nothing uses horizon=5.")
  inpaint = {'control__name': 'inpaint', 'control__known': 0.5}
  config = tiny.get_config(**inpaint, control__factor=8, control__ramp=2.0)
  (line,) = schema.unused(config)
  assert "config.control: with method='projection', name='inpaint', " in line
  assert line.endswith('nothing uses factor=8, ramp=2.0.')
  # A network that is told classes is guided without a control.
  config = tiny.get_config(control__scale=2.0)
  assert len(schema.unused(config)) == 1
  schema.override(config, 'model.num_labels', 10)
  assert schema.unused(config) == []


@pytest.mark.parametrize('path', FILES, ids=names(FILES))
def test_every_option_of_a_file_has_an_effect(path):
  config = experiment.load_config(path)
  schema.check(config)
  idle = schema.unused(config)
  if path.parts[-3:-1] == ('vp', 'ddpm') and config.sampling.snr == 0.075:
    # The release gives the snr of a corrector that is not switched on.
    assert all(line.endswith('nothing uses snr=0.075.') for line in idle)
  else:
    assert idle == []


# ------------------------------------------------------------------ old files


def old_config():
  """Return the dicts of a config as they were before keys were moved."""
  old = experiment.json_of(tiny.get_config())
  old['sde'] |= {'num_scales': old['training'].pop('num_scales')}
  for name in ('p_mean', 'p_std'):
    old['training'].pop(name)
  return old


def test_upgrade():
  old = old_config()
  old['sde']['num_scales'] = 7
  old['sampling']['corrector'] = 'annealed_langevin'
  new = schema.upgrade(old)
  assert new['training']['num_scales'] == 7
  assert 'num_scales' not in new['sde']
  assert new['sampling']['corrector'] == 'ald'
  assert old['sde']['num_scales'] == 7  # The argument does not change.
  # What has no old name stays, with tuples for lists.
  assert new['model']['ch_mult'] == (1,)
  assert new['optim'] == old['optim'] and new['seed'] == old['seed']
  assert schema.upgrade(new) == new
  want = tiny.get_config(training__num_scales=7, sampling__corrector='ald')
  assert schema.from_dict(old) == want


def test_upgrade_of_edm():
  config = experiment.load_config(ROOT / 'configs/edm/cifar10_ddpmpp.py')
  old = experiment.json_of(config)
  old['sde'] |= {
    'sigma_data': old['model'].pop('sigma_data'),
    'p_mean': -1.0,
    'p_std': old['training'].pop('p_std'),
  }
  old['training'].pop('p_mean')
  new = schema.from_dict(old)
  assert new.model.sigma_data == config.model.sigma_data == 0.5
  assert new.training.p_mean == -1.0
  assert new.training.p_std == config.training.p_std
  assert set(new.sde) == set(config.sde)
  schema.check(new)


def test_upgrade_leaves_out_what_does_not_exist():
  """Parts of a config stay parts, and missing keys get their default."""
  assert schema.upgrade({'seed': 3}) == {'seed': 3}
  assert schema.from_dict({'seed': 3}).seed == 3
  found = schema.from_dict({'training': {'n_iters': 5}})
  assert found.training.n_iters == 5
  assert found.training.batch_size == 128


# ------------------------------------------------------------------ round trip


@pytest.mark.parametrize('path', FILES, ids=names(FILES))
def test_round_trip(path):
  """A config of a file is the same after it was written as JSON."""
  config = experiment.load_config(path)
  text = json.dumps(experiment.json_of(config))
  again = schema.from_dict(json.loads(text))
  assert dict(schema.leaves(again)) == dict(schema.leaves(config))
  types = lambda c: {key: type(v) for key, v in schema.leaves(c)}
  assert types(again) == types(config)
  assert again.is_locked
  schema.check(again)


def test_defaults_hold_all_keys_that_do_not_vary():
  leaves = dict(schema.leaves(schema.defaults()))
  for path, key in schema.KEYS.items():
    varies = schema.SECTIONS[path.rpartition('.')[0]].varies
    assert (path in leaves) != varies
    if not varies:
      assert leaves[path] == key.option.default


# ----------------------------------------------------------- runs and samples


def test_claim(tmp_path):
  """Keys marked 'run' are refused; all others are free."""
  config = tiny.get_config()
  experiment.claim(config, tmp_path)
  assert experiment.run_config(tmp_path) == config
  free = {
    'sampling__num_steps': 9,
    'sampling__method': 'ode',
    'sampling__snr': 0.3,
    'training__batch_size': 16,
    'training__weighting': 'likelihood',
    'optim__lr': 0.1,
    'eval__num_samples': 3,
    'control__scale': 2.0,
    'model__dtype': 'bfloat16',
    'model__remat': True,
    'data__path': 'elsewhere',
    'seed': 1,
  }
  for key, value in free.items():
    experiment.claim(tiny.get_config(**{key: value}), tmp_path, write=False)
  fixed = {
    'sde__sigma_min': 0.02,
    'model__nf': 16,
    'model__ch_mult': (1, 2),
    'data__image_size': 16,
    'data__random_flip': False,
    'training__num_scales': 10,
  }
  for key, value in fixed.items():
    path = key.replace('__', '.')
    with pytest.raises(ValueError, match=f'config.{path}=') as error:
      experiment.claim(tiny.get_config(**{key: value}), tmp_path, write=False)
    assert f'not {value!r}' in str(error.value)
  assert experiment.run_config(tmp_path) == config


def test_claim_of_a_run_of_older_keys(tmp_path):
  """Values are compared under the names of today."""
  (tmp_path / 'config.json').write_text(json.dumps(old_config()))
  experiment.claim(tiny.get_config(), tmp_path, write=False)
  with pytest.raises(ValueError, match='config.training.num_scales=0, not 10'):
    experiment.claim(
      tiny.get_config(training__num_scales=10), tmp_path, write=False
    )


# -------------------------------------------------------------- documentation


def test_text_and_markdown():
  text, page = schema.text(), schema.markdown()
  for path, key in schema.KEYS.items():
    assert f'--config.{path}={key.option.default!r}\n' in text
    row = next(x for x in page.splitlines() if x.startswith(f'| `{path}` |'))
    # A bar within a cell is escaped, so that a row has five cells.
    assert key.option.meaning.replace('|', r'\|') in row
    assert row.replace(r'\|', '').count('|') == 6


def test_override():
  config = tiny.get_config()
  schema.override(config, 'sampling.corrector', 'annealed_langevin')
  schema.override(config, 'seed', 5)
  assert config.sampling.corrector == 'ald' and config.seed == 5
  assert config.is_locked


# --------------------------------------------------------------------- builds


def test_build_names_what_a_sampler_cannot_do():
  with pytest.raises(ValueError, match='sampling.frames=4'):
    experiment.build(
      tiny.get_config(sampling__method='mala', sampling__frames=4)
    )


def test_conditioning_on_labels_needs_levels():
  with pytest.raises(ValueError, match='training.num_scales'):
    experiment.build(tiny.get_config(model__conditioning='smld_label'))


@pytest.mark.parametrize(
  ('changes', 'key'),
  [
    ({'training__times': 'lognormal'}, 'training.times'),
    ({'training__weighting': 'edm'}, 'training.weighting'),
    ({'training__times': 'grid'}, 'training.num_scales'),
    ({'training__objective': 'explicit'}, 'training.objective'),
    ({'training__n_jitted_steps': 3}, 'training.n_jitted_steps'),
  ],
)
def test_build_names_choices_that_do_not_fit(changes, key):
  with pytest.raises(ValueError, match=key) as error:
    experiment.build(tiny.get_config(**changes))
  assert '\n' not in str(error.value)


def test_sampler_has_the_options_of_its_section():
  model = experiment.build(tiny.get_config(sampling__snr=0.2))
  assert model.sampler.num_steps == 3
  assert model.sampler.corrector.snr == 0.2
  assert model.sampler.num_scales == 0
  assert jax.tree.leaves(model.abstract_params())


# -------------------------------------------------------------------- numbers


def _numbers():
  """Yield the keys whose values are numbers."""
  for path, key in schema.KEYS.items():
    wanted = options.type_name(key.option.type)
    free = key.option.choices or key.option.table
    if not free and re.search(r'\b(int|float)\b', wanted):
      yield path


@pytest.mark.parametrize('path', [*_numbers()])
def test_every_number_has_a_range(path):
  """Nonsense is refused: not a number, infinite, and beyond the ends."""
  o = schema.KEYS[path].option
  if path in ('eval.checkpoint', 'control.weak_checkpoint'):  # Or a word.
    return
  assert o.within
  many = isinstance(o.default, tuple)
  make = (lambda v: (v,)) if many else lambda v: v
  whole = o.type is int or many
  refused = [float('nan'), float('-inf'), True, 'a', None]
  if not o.within.endswith('inf]'):  # All noise levels.
    refused.append(float('inf'))
  low, high = map(float, o.within[1:-1].split(','))
  for end, beyond, open_end in (
    (low, -1, o.within[0] == '('),
    (high, 1, o.within[-1] == ')'),
  ):
    if np.isfinite(end):
      refused += [end + beyond, end + 1000 * beyond]
      refused += [end] * open_end
  for value in refused:
    if whole and isinstance(value, float) and value.is_integer():
      value = int(value)
    if isinstance(value, str) and o.type == int | str:
      continue
    assert options.problem(o, make(value)), value


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'training__eps': 1e-46, 'sde': 'vp'}, 'config.training.eps=1e-46'),
    ({'training__eps': 0.0, 'sde': 'vp'}, 'config.training.eps=0.0 does not'),
    ({'training__eps': 0.0, 'sde': 'edm'}, 'config.training.eps=0.0 does not'),
    ({'training__eps': 1e-30, 'sde': 'subvp'}, 'config.training.eps=1e-30'),
    ({'sampling__eps': 1e-46, 'sde': 'vp'}, 'config.sampling.eps=1e-46'),
    ({'eval__bpd_eps': 1e-46, 'sde': 'vp'}, 'config.eval.bpd_eps=1e-46'),
    ({'sde__sigma_max': 1e30}, 'no finite signal-to-noise ratio at t = 1'),
    ({'sampling__frames': 5}, 'sampling.frames=5 is more than the 3 states'),
    (
      {'sampling__eps': 0.9999999, 'sampling__num_steps': 9},
      'times would repeat in float32',
    ),
    (
      {'sampling__method': 'heun', 'sampling__s_min': 60.0},
      'config.sampling.s_min=60.0 is above config.sampling.s_max=50.0',
    ),
    ({'model__ch_mult': ()}, 'ch_mult=[(][)] is empty'),
    ({'data__shape': (2,)}, r"data.shape=\(2,\), .* for data.dataset='arrays'"),
    ({'model__ch_mult': (1, 1, 1, 1, 1)}, 'config.data.image_size=8: .*pixels'),
  ],
)
def test_keys_that_depend_on_each_other(changes, message):
  process = changes.pop('sde', None)
  config = changed(**changes)
  if process:
    config.sde = {'name': process}
    config.model.update(conditioning='time', embedding_type='positional')
  with pytest.raises(ValueError, match=message) as error:
    experiment.build(config)
  assert '\n' not in str(error.value)


def test_times_that_suit_the_process():
  """Variance-exploding noise is there at t = 0 too, and levels have theirs."""
  experiment.build(tiny.get_config(training__eps=0.0))
  config = changed(training__eps=0.0, training__num_scales=10)
  config.sde = {'name': 'ddpm', 'beta_min': 0.01, 'beta_max': 5.0}
  config.model.update(conditioning='ddpm_label', embedding_type='positional')
  config.training.times = 'grid'
  experiment.build(config)
  config.sde = {'name': 'vp'}  # Its noise is zero at t = 0.
  with pytest.raises(ValueError, match='config.training.eps'):
    experiment.build(config)


def test_levels_of_ncsn():
  config = experiment.load_config(ROOT / 'configs/ve/ncsn/cifar10.py')
  with config.unlocked():
    config.model.num_classes = 9
  with pytest.raises(ValueError, match='num_classes=9 needs to equal config'):
    experiment.build(config)


def test_attention_at_no_resolution():
  with pytest.warns(UserWarning, match='no effect at 16: .*resolutions 8[.]'):
    experiment.build(tiny.get_config(model__attn_resolutions=(16, 8)))


@pytest.mark.parametrize(
  ('gpu', 'fields', 'objective', 'message'),
  [
    ('9.0', {}, 'denoising', ''),
    ('12.0', {'nf': 128}, 'denoising', ''),
    ('8.6', {'nf': 64}, 'denoising', ''),
    ('9.0', {'dtype': 'float32'}, 'denoising', 'needs config.model.dtype='),
    ('7.5', {}, 'denoising', 'needs an NVIDIA GPU from Ampere on'),
    ('gfx942', {}, 'denoising', 'needs an NVIDIA GPU'),
    (None, {}, 'denoising', "not 'cpu'; 'xla' runs everywhere.$"),
    ('9.0', {}, 'sliced', 'config.training.objective needs'),
    ('8.6', {'nf': 128}, 'denoising', "up to 128 .* 'GPU', .* one of 256"),
    ('9.0', {'nf': 12}, 'denoising', 'multiples of 8 up to 256 .* of 12'),
  ],
)
def test_attention_of_cudnn(monkeypatch, gpu, fields, objective, message):
  model = experiment.build(tiny.get_config(training__objective=objective))
  fields = {'attn_resolutions': (8,), 'ch_mult': (1, 2)} | fields
  fields = {'dtype': 'bfloat16', 'attention': 'cudnn'} | fields
  network = model.network.clone(**fields)
  chosen = dataclasses.replace(model, network=network)
  if gpu:
    device = types.SimpleNamespace(
      platform='gpu', compute_capability=gpu, device_kind='GPU'
    )
    monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  if message:
    with pytest.raises(ValueError, match=f"attention='cudnn' .*{message}"):
      experiment._check_attention(chosen)
  else:
    experiment._check_attention(chosen)
    # It has no Jacobian-vector products, which likelihoods need.
    assert chosen._with_jvp.network == network.clone(attention='xla')


def test_attention_is_checked_before_training():
  with pytest.raises(ValueError, match="attention='cudnn' needs config.model"):
    experiment.build(changed(model__attention='cudnn'))


def test_infinity_in_json():
  """It is the text 'inf', because JSON has no such number."""
  config = tiny.get_config(sampling__s_max=float('inf'))
  stored = json.loads(files.to_json(experiment.json_of(config)))
  assert stored['sampling']['s_max'] == 'inf'
  assert schema.from_dict(stored) == config


@pytest.mark.parametrize('values', [[1], 3, 'text', None])
def test_a_config_that_is_no_mapping(values):
  with pytest.raises(ValueError, match='mapping of sections'):
    schema.from_dict(values)


def test_a_config_without_a_process():
  with pytest.raises(ValueError, match='config.sde.name is missing'):
    schema.check(schema.from_dict({'seed': 1}))


def test_keys_of_two_types_take_both():
  """In Python as on the command line: a class by its name or its number."""
  config = tiny.get_config()
  for label in ('dog', 3):
    config.control.label = label
    assert config.control.label == label
    again = schema.from_dict(experiment.json_of(config))
    again.control.label = 'cat'
    assert config.control.label == label
  config.eval.checkpoint = 4
  schema.check(config)


def test_paths_may_begin_with_a_tilde(monkeypatch):
  """All keys that name files or folders; checking replaces it."""
  monkeypatch.setenv('HOME', '/home/me')
  config = tiny.get_config(control__name='inpaint')
  paths = {path for path, key in schema.KEYS.items() if key.option.path}
  assert paths == {
    'control.classifier_workdir',
    'control.condition',
    'control.images',
    'control.mask',
    'control.measurements',
    'control.weak_workdir',
    'data.path',
    'eval.inception_path',
    'eval.stats_path',
    'training.begin_with',
  }
  for path in paths | {'eval.extractor'}:
    schema.override(config, path, '~/a')
  schema.check(config)
  values = dict(schema.leaves(config))
  assert {values[path] for path in paths} == {'/home/me/a'}
  assert config.eval.extractor == '~/a'  # It is no path.


def test_results_depend_on_all_that_the_test_loss_depends_on():
  """The options of what a loss consists of, besides those of training alone."""
  of_training = {'noise', 'uncertainty'}
  for option, _ in schema._walk(losses.ScoreMatching):
    marks = schema.KEYS[f'training.{option.name}'].marks
    assert ('samples' in marks) == (option.name not in of_training), option.name
