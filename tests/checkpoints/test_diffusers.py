"""diffusers computes the same from an exported folder as this project.

tests/arrays/diffusers.npz holds the outputs of its UNet2DModel for the folders
that this file exports (see record_diffusers.py). The NCSN++ has random
parameters, the DDPM those of the golden case of the paper's release.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

import experiment
from checkpoints import diffusers
from tests import golden
from tests.checkpoints import record_diffusers

ROOT = pathlib.Path(__file__).parents[2]
_SMALL = {'nf': 32, 'num_res_blocks': 1, 'dropout': 0.0}
CASES = ('ddpm', 'ncsnpp')


def load_model(path, size=None, **fields):
  config = experiment.load_config(ROOT / 'configs' / f'{path}.py')
  config.data.image_size = size or config.data.image_size
  config.model.update(fields)
  return experiment.build(config)


def case(name):
  """Return (model, parameters, x, cond)."""
  if name == 'ddpm':
    model = load_model(
      'vp/ddpm/cifar10', 16, **_SMALL, ch_mult=(1, 2), attn_resolutions=(8,)
    )
    arrays, params = golden.load('vp_ddpm')
    return model, params, arrays['x'], arrays['cond'].astype(np.float32)
  model = load_model(
    've/ffhq_256_ncsnpp_continuous',
    8,
    **_SMALL,
    ch_mult=(1, 4),
    attn_resolutions=(4,),
  )
  rng = np.random.default_rng(0)
  flat = {
    path: rng.normal(size=like.shape, scale=np.prod(like.shape[:-1]) ** -0.5)
    + (path[-1] == 'scale')
    for path, like in sorted(
      traverse_util.flatten_dict(model.abstract_params()).items()
    )
  }
  params = jax.tree.map(
    lambda v: v.astype(np.float32), traverse_util.unflatten_dict(flat)
  )
  x = rng.uniform(size=(2, 8, 8, 3)).astype(np.float32)
  return model, params, x, np.array([0.3, 20.0], np.float32)


@pytest.fixture(scope='module')
def recorded():
  with np.load(golden.DATA / 'diffusers.npz') as file:
    return dict(file)


@pytest.fixture(scope='module', params=CASES)
def exported(request, tmp_path_factory):
  """Return (case, folder) of an export."""
  folder = tmp_path_factory.mktemp('diffusers') / request.param
  model, params, _, _ = case(request.param)
  diffusers.export(folder, model, params)
  assert [p.name for p in folder.parent.iterdir()] == [request.param]
  return request.param, folder


def read(folder):
  path = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
  return safetensors.numpy.load_file(path)


def test_tensors_are_those_that_diffusers_had(exported, recorded):
  name, folder = exported
  tensors = read(folder)
  shapes = [f'{key} {tensors[key].shape}' for key in sorted(tensors)]
  assert shapes == list(recorded[f'{name}/shapes'])
  assert all(value.dtype == np.float32 for value in tensors.values())
  assert record_diffusers.digest(tensors) == recorded[f'{name}/digest']


@pytest.mark.parametrize('name', CASES)
def test_output_is_that_of_diffusers(name, recorded):
  model, params, x, cond = case(name)
  apply = lambda x, cond: model.network.apply(
    {'params': params}, x, cond, train=False
  )
  got, want = jax.jit(apply)(x, cond), recorded[f'{name}/output']
  if name == 'ncsnpp':  # There diffusers divides by sigma.
    got = got / cond[:, None, None, None]
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_noise_levels_are_those_of_diffusers(exported, recorded):
  name, _ = exported
  sde = case(name)[0].sde
  _, sigma = sde.marginal(np.float32(record_diffusers.LEVELS) / 999)
  np.testing.assert_allclose(sigma, recorded[f'{name}/sigmas'], rtol=2e-4)


def test_files(exported):
  name, folder = exported
  read_json = lambda path: json.loads((folder / path).read_text())
  index, scheduler = read_json('model_index.json'), 'scheduler'
  pipeline, kind = {
    'ddpm': ('DDPMPipeline', 'DDPMScheduler'),
    'ncsnpp': ('ScoreSdeVePipeline', 'ScoreSdeVeScheduler'),
  }[name]
  assert index['_class_name'] == pipeline
  assert index['unet'] == ['diffusers', 'UNet2DModel']
  assert index[scheduler] == ['diffusers', kind]
  settings = read_json('scheduler/scheduler_config.json')
  unet = read_json('unet/config.json')
  assert settings['_class_name'] == kind
  if name == 'ddpm':
    assert settings['beta_start'] == pytest.approx(1e-4)
    assert settings['beta_end'] == pytest.approx(0.02)
    assert settings['variance_type'] == 'fixed_large'
    assert unet['up_block_types'] == ['AttnUpBlock2D', 'UpBlock2D']
    assert not unet['center_input_sample']
  else:
    assert settings['num_train_timesteps'] == 2000
    assert (settings['sigma_max'], settings['snr']) == (348.0, 0.075)
    assert unet['down_block_types'] == [
      'SkipDownBlock2D',
      'AttnSkipDownBlock2D',
    ]
    assert unet['center_input_sample']


def test_attention_that_ddpm_has_not_adds_nothing(exported):
  name, folder = exported
  added = [
    value
    for key, value in read(folder).items()
    if key.startswith('up_blocks.0.attentions.0.')
  ]
  assert any(value.any() for value in added) == (name == 'ncsnpp')


EXACT = {
  've/ffhq_256_ncsnpp_continuous': 'ScoreSdeVePipeline',
  've/ffhq_ncsnpp_continuous': 'ScoreSdeVePipeline',
  've/celebahq_256_ncsnpp_continuous': 'ScoreSdeVePipeline',
  've/celebahq_ncsnpp_continuous': 'ScoreSdeVePipeline',
  've/bedroom_ncsnpp_continuous': 'ScoreSdeVePipeline',
  've/church_ncsnpp_continuous': 'ScoreSdeVePipeline',
  'vp/ddpm/cifar10': 'DDPMPipeline',
  'vp/ddpm/bedroom': 'DDPMPipeline',
  'vp/ddpm/church': 'DDPMPipeline',
  'vp/ddpm/celebahq': 'DDPMPipeline',
  'vp/ddpm/cifar10_continuous': None,
  'subvp/cifar10_ddpm_continuous': None,
  've/cifar10_ddpm': None,
}


@pytest.mark.parametrize(
  'path',
  sorted(
    str(path.relative_to(ROOT / 'configs').with_suffix(''))
    for path in (ROOT / 'configs').glob('*/**/*.py')
  ),
)
def test_every_config_is_exact_or_refused(path, monkeypatch):
  """At full size: all parameters have a place there, or one line says why."""
  # tests/configs has checked it; most are refused without being traced.
  monkeypatch.setattr(experiment, '_check', lambda model: None)
  model = load_model(path)
  if path not in EXACT:
    with pytest.raises(ValueError, match='cannot be this network exactly') as e:
      diffusers.check(model)
    assert '\n' not in str(e.value)
    return
  diffusers.check(model)
  ours, _, theirs = zip(*diffusers._modules(model), strict=True)
  assert sorted(ours) == sorted(model.abstract_params())
  assert len(set(theirs)) == len(theirs)
  assert diffusers._pipeline(model)[0] == EXACT[path]


@pytest.mark.parametrize(
  ('path', 'fields', 'reason'),
  [
    (
      've/cifar10_ncsnpp_continuous',
      {},
      "model.progressive is 'none', where it can only be 'output_skip'",
    ),
    (
      've/ffhq_256_ncsnpp_continuous',
      {'skip_rescale': False},
      'model.skip_rescale is False, where it can only be True',
    ),
    (
      've/ffhq_256_ncsnpp_continuous',
      {'nf': 32},
      'there are 64 at one of model.attn_resolutions',
    ),
    (
      'vp/ddpm/cifar10_unconditional',
      {},
      'model.conditional is False, where it can only be True',
    ),
    ('ve/ncsnv2/cifar10', {}, "it has no equivalent of model.name='ncsnv2'"),
  ],
)
def test_refusals_name_the_reason(tmp_path, path, fields, reason):
  with pytest.raises(ValueError, match=reason):
    diffusers.export(tmp_path / 'model', load_model(path, **fields), {})
  assert not any(tmp_path.iterdir())


def test_folder_is_whole_or_absent(tmp_path):
  model, params, _, _ = case('ddpm')
  params = {key: value for key, value in params.items() if key != 'Conv_1'}
  with pytest.raises(KeyError):
    diffusers.export(tmp_path / 'model', model, params)
  assert not (tmp_path / 'model').exists()
  (tmp_path / 'mine').mkdir()
  with pytest.raises(ValueError, match='mine exists already'):
    diffusers.export(tmp_path / 'mine', model, params)


def main(folder):
  """Export the cases for tests/checkpoints/record_diffusers.py."""
  folder.mkdir()
  for name in CASES:
    model, params, x, cond = case(name)
    diffusers.export(folder / name, model, params)
    np.savez(folder / f'{name}.npz', x=x, cond=cond)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
