"""Presets that configurations are composed of.

A file of `configs/` is `compose(dataset preset, SDE preset, network preset)`
and whatever else differs. The keys and their defaults are declared in
`configs.schema`. Hyper-parameters are those of Song et al. 2021, Appendix H,
unless a line says otherwise.
"""

import functools

from configs import schema


def base():
  """Return a config of all keys with their defaults, without a network."""
  return schema.config_dict(schema.defaults())


# ---------------------------------------------------------------- processes


def ve(config):
  """Use the VE process: images in [0, 1], reverse diffusion and Langevin."""
  config.sde = {'name': 've', 'sigma_min': 0.01, 'sigma_max': 50.0}
  config.data.centered = False
  config.training.update(reduction='half_sum', ema_rate=0.999)
  config.sampling.update(
    predictor='reverse_diffusion',
    corrector='langevin',
    eps=1e-5,
  )


def vp(config):
  """Use the VP process: images in [-1, 1], Euler-Maruyama."""
  config.sde = {'name': 'vp', 'beta_min': 0.1, 'beta_max': 20.0}
  config.data.centered = True


def subvp(config):
  """Use the sub-VP process; everything else is as in `vp`."""
  vp(config)
  config.sde.name = 'subvp'


def discrete(config):
  """Train on 1000 noise levels: SMLD after `ve`, DDPM after `vp`."""
  if config.sde.name == 'vp':
    config.sde.name = 'ddpm'
    config.model.conditioning = 'ddpm_label'
    config.sampling.predictor = 'ancestral'
  else:
    config.model.conditioning = 'smld_label'
  config.training.update(num_scales=1000, times='grid')


def edm(config):
  """Train as EDM (Karras et al. 2022, Table 2, configuration E).

  Images are in [-1, 1]. Put it after `vp` and `ddpmpp`, or after `ve` and
  `ncsnpp`: these are the two networks of that paper.
  """
  config.sde = {'name': 'edm', 'sigma_max': 80.0}
  fourier = config.model.get('embedding_type') == 'fourier'
  config.model.conditioning = 'edm_fourier' if fourier else 'edm'
  config.model.sigma_data = 0.5
  config.data.centered = True
  config.training.update(times='lognormal', weighting='edm')
  # 200M images; a half-life of the average of 0.5M; a warm-up of 10M.
  config.training.update(reduction='half_sum', batch_size=512, n_iters=390_625)
  config.training.update(ema_rate=0.99929, ema_warmup=True)
  config.optim.update(lr=1e-3, warmup=19_531, grad_clip=0.0)
  config.sampling.update(method='heun', grid='edm', num_steps=18)
  config.sampling.update(predictor='euler_maruyama', corrector='none')
  config.sampling.eps = 0.002 / 80


def flow(config):
  """Train a rectified flow (Liu et al. 2023). Put it after `vp` and a network.

  Times are uniform, as there; `training.times='logit_normal'` is the choice of
  Esser et al. (2024).
  """
  config.sde = {'name': 'rectified_flow'}
  config.model.conditioning = 'velocity'
  config.training.weighting = 'velocity'
  config.sampling.method = 'ode'


# ----------------------------------------------------------------- networks

_ALL = {
  'nf': 128,
  'dtype': 'float32',
  'remat': False,
}
_UNET = {
  **_ALL,
  'ch_mult': (1, 2, 2, 2),
  'attn_resolutions': (16,),
  'attention': 'xla',
  'num_labels': 0,
}


def ncsnpp(config):
  """Use NCSN++: FIR resampling and a residual input pyramid.

  The network is told Fourier features of log sigma under VE, and sinusoids of
  the time under other processes.
  """
  fourier = config.sde.name == 've'
  config.model = {
    'name': 'ncsnpp',
    'conditioning': 'sigma' if fourier else 'time',
    'embedding_type': 'fourier' if fourier else 'positional',
    **_UNET,
    'num_res_blocks': 4,
    'dropout': 0.1,
    'resblock_type': 'biggan',
    'fir': True,
    'progressive': 'none',
    'progressive_input': 'residual',
    'progressive_combine': 'sum',
    'fourier_scale': 16.0,
    'init_scale': 0.0,
    'skip_rescale': True,
  }


def ddpmpp(config):
  """Use DDPM++: NCSN++ with plain resampling and no pyramid."""
  ncsnpp(config)
  config.model.update(fir=False, progressive_input='none')


def deep(config):
  """Double the residual blocks per resolution; 0.95M iterations."""
  config.model.num_res_blocks = 8
  config.training.n_iters = 950_000


def ncsnpp_256(config):
  """Use NCSN++ for 256 pixels: image pyramids at input and output."""
  ncsnpp(config)
  config.model.update(ch_mult=(1, 1, 2, 2, 2, 2, 2), num_res_blocks=2)
  config.model.update(progressive='output_skip', progressive_input='input_skip')
  config.model.dropout = 0.0
  config.sampling.num_steps = 2000


def ncsnpp_1024(config):
  """Use NCSN++ for 1024 pixels."""
  ncsnpp_256(config)
  config.model.update(nf=16, num_res_blocks=1)
  config.model.ch_mult = (1, 2, 4, 8, 16, 32, 32, 32)
  config.training.ema_rate = 0.9999


def ddpm(config):
  """Use DDPM's network (Ho et al. 2020)."""
  config.model = {
    'name': 'ddpm',
    'conditioning': 'time',
    **_UNET,
    'num_res_blocks': 2,
    'dropout': 0.1,
    'conditional': True,
  }


def ddpm_256(config):
  """Use DDPM's network for 256 pixels."""
  ddpm(config)
  config.model.update(ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
  config.optim.lr = 2e-5


def ncsnv2(config):
  """Use NCSNv2 (Song & Ermon 2020). Put `annealed` after it."""
  config.model = {'name': 'ncsnv2', 'conditioning': 'smld_label', **_ALL}
  config.model.nonlinearity = 'elu'
  config.training.times = 'grid'
  config.optim.update(lr=1e-4, warmup=0, grad_clip=0.0)


def ncsnv2_128(config):
  """Use NCSNv2 for 128 pixels."""
  ncsnv2(config)
  config.model.name = 'ncsnv2_128'
  config.data.image_size = config.training.batch_size = 128
  config.training.ema_rate = 0.9999


def ncsn(config):
  """Use NCSN (Song & Ermon 2019). Put `annealed` after it."""
  ncsnv2(config)
  # Its output is the score itself; it is not divided by sigma.
  config.model.update(name='ncsn', conditioning='ncsn_label', num_classes=0)
  config.optim.lr = 1e-3
  config.sampling.final_denoise = False  # It was introduced a year later.


def mlp(config):
  """Use a multilayer perceptron, for points."""
  fourier = config.sde.name == 've'
  config.model = {
    'name': 'mlp',
    'conditioning': 'sigma' if fourier else 'time',
    'embedding_type': 'fourier' if fourier else 'positional',
    'nf': 64,
    'num_layers': 3,
    'nonlinearity': 'swish',
    'fourier_scale': 0.5,
    'input_scale': 0.5,
    'num_labels': 0,
    'energy': False,
  }


def classifier(config):
  """Use a Wide ResNet 28-10 that classifies noisy images (App. I.1).

  It suits every process. The paper describes the network and the loss only; the
  rest is as for score networks, in fewer steps.
  """
  config.model = {
    'name': 'wideresnet_noise_conditional',
    'conditioning': 'sigma',
    'blocks_per_group': 4,
    'channel_multiplier': 10,
    'num_outputs': 10,
    'dtype': 'float32',
    'remat': False,
  }
  config.training.update(n_iters=200_000, snapshot_sampling=False)
  config.eval.enable_sampling = False


def conditional(num_labels):
  """Return a preset: the network is told the class (Ho & Salimans 2022)."""

  def preset(config):
    config.model.num_labels = num_labels

  return preset


def annealed(num_scales, *, snr, steps):
  """Return a preset: annealed Langevin dynamics, `steps` at each level."""

  def preset(config):
    config.training.num_scales = num_scales
    if 'num_classes' in config.model:
      config.model.num_classes = num_scales
    config.sampling.update(predictor='none', corrector='ald')
    config.sampling.update(num_steps=num_scales, corrector_steps=steps, snr=snr)

  return preset


# ----------------------------------------------------------------- datasets


def digits(config):
  """Handwritten digits, which are other signs when they are mirrored."""
  config.data.update(dataset='digits', image_size=8, num_channels=1)
  config.data.random_flip = False


def cifar10(config):
  config.data.update(dataset='cifar10', image_size=32)


def celeba(config):
  config.data.update(dataset='celeba', image_size=64)
  config.sampling.snr = 0.17


def _large(config, dataset, size, batch_size, snr):
  config.data.update(dataset=dataset, image_size=size)
  config.training.update(batch_size=batch_size, n_iters=2_400_000)
  config.training.checkpoint_freq = 5000
  config.sampling.snr = snr
  config.eval.batch_size = 8 * batch_size


_256 = functools.partial(_large, size=256, batch_size=64, snr=0.075)
_1024 = functools.partial(_large, size=1024, batch_size=8, snr=0.15)
bedroom = functools.partial(_256, dataset='lsun/bedroom')
church = functools.partial(_256, dataset='lsun/church_outdoor')
celebahq_256 = functools.partial(_256, dataset='celeba_hq')
celebahq_1024 = functools.partial(_1024, dataset='celeba_hq')
ffhq_256 = functools.partial(_256, dataset='ffhq')
ffhq_1024 = functools.partial(_1024, dataset='ffhq')


def arrays(path=''):
  """Return a preset: your own arrays. Put it after process and network."""

  def preset(config):
    config.data.update(dataset='arrays', path=path, centered=True)
    config.data.random_flip = False
    if 'sigma_data' in config.model:
      config.model.sigma_data = 1.0  # That of scaled data.

  return preset


def toy(dataset):
  """Return a preset: points in the plane, trained in seconds on a CPU."""

  def preset(config):
    config.data.update(dataset=f'toy/{dataset}', shape=(2,), centered=False)
    config.data.random_flip = False
    config.training.update(
      batch_size=512,
      n_iters=2000,
      n_jitted_steps=100,
      log_freq=100,
      checkpoint_freq=1000,
      snapshot_freq=2000,
      ema_rate=0.995,
      ema_warmup=True,
    )
    config.optim.update(lr=4e-3, warmup=100)
    config.sampling.update(num_steps=200, num_samples=2048)
    config.sampling.update(rtol=1e-4, atol=1e-4)
    config.eval.update(batch_size=2000, num_samples=4000, bpd_repeats=1)
    config.eval.update(enable_bpd=True, bpd_trace='exact')

  return preset


# -------------------------------------------------------------- composition


def compose(*parts):
  """Apply presets (functions) and overrides (dicts of dotted keys) in order.

  Returns:
    A locked ConfigDict.

  Raises:
    KeyError: an override names a key that does not exist.
  """
  config = base()
  for part in parts:
    if callable(part):
      with config.unlocked():
        part(config)
    else:
      for path, value in part.items():
        if path not in schema.KEYS:
          raise KeyError(schema.unknown(path))
        schema.override(config, path, value)
  return config.lock()
