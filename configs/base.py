"""What every configuration is made of: one base and presets composed over it.

A file of `configs/` is `compose(dataset preset, SDE preset, network preset)`
and whatever else differs. Hyper-parameters are those of Song et al. 2021,
App. H, unless a line says otherwise.
"""

import difflib
import functools

import ml_collections


def base():
  """Everything but the sections `sde` and `model`, which presets define."""
  return ml_collections.ConfigDict(
    {
      'seed': 42,
      'data': {
        'dataset': 'cifar10',  # a key of datasets.DATASETS
        'path': '',  # file or folder; '': the default cache
        'image_size': 32,
        'num_channels': 3,
        'dims': 0,  # of points, where the data are no images
        'random_flip': True,
        'uniform_dequantization': False,
        'centered': False,  # the model's range is [-1, 1], not [0, 1]
      },
      'sde': {},
      'model': {},
      'training': {
        'batch_size': 128,  # of all devices together
        'n_iters': 1_300_000,
        'objective': 'denoising',  # score_matching.OBJECTIVES
        'times': 'uniform',  # losses.TIMES
        'weighting': 'variance',  # losses.WEIGHTINGS
        'reduction': 'mean',  # losses.REDUCTIONS
        'eps': 1e-5,  # smallest time
        'ema_rate': 0.9999,
        'ema_warmup': False,  # min(ema_rate, (1 + n) / (10 + n))
        'n_jitted_steps': 5,  # steps in one compiled call
        'grad_accumulation': 1,  # parts that a batch is split into
        'log_freq': 50,
        'eval_freq': 500,  # loss of a test batch, with the averaged parameters
        'checkpoint_freq': 10_000,  # to resume from; only the last two are kept
        'snapshot_freq': 50_000,  # checkpoints that are kept for good
        'snapshot_sampling': True,  # a grid of samples at each snapshot
        'label_dropout': 0.1,  # share without label, if model.num_labels
      },
      'optim': {
        'lr': 2e-4,
        'beta1': 0.9,
        'beta2': 0.999,
        'eps': 1e-8,
        'weight_decay': 0.0,
        'warmup': 5000,
        'grad_clip': 1.0,
      },
      'sampling': {
        'method': 'pc',  # sampling.SAMPLERS
        'predictor': 'euler_maruyama',  # predictors.PREDICTORS
        'corrector': 'none',  # predictors.CORRECTORS
        'num_steps': 1000,  # independent of training
        'grid': 'uniform',  # grids.GRIDS: of times between 1 and eps
        'rho': 7.0,  # of the grid 'edm'
        'eps': 1e-3,  # smallest time
        'corrector_steps': 1,
        'snr': 0.16,
        'step_size': 1e-5,  # of 'ula', 'mala' and 'annealed_langevin'
        'ancestral_variance': 'forward',  # or 'posterior'
        'probability_flow': False,  # predictors follow the ODE
        'final_denoise': True,
        'rtol': 1e-5,  # of adaptive steps, in likelihoods too
        'atol': 1e-5,
        'sde_rtol': 0.02,  # of the method 'adaptive_sde'
        'sde_atol': 1 / 256,  # one grey level
        'order': 2,  # of the method 'unipc'
        's_churn': 0.0,  # noise that 'heun' adds on the way
        's_min': 0.05,  # between these levels sigma / alpha
        's_max': 50.0,
        's_noise': 1.003,
        'num_samples': 64,  # of --mode sample
        'frames': 0,  # of its pictures of the way from noise to samples
        'rounding': 'half_up',  # or 'truncate', as the paper's release
      },
      'control': {
        'name': '',  # of --mode sample: control_lib.CONTROLS; '': none
        # Classes: 'classifier', or 'labels' where model.num_labels.
        'scale': 1.0,  # of the guidance; 1: Bayes' rule
        'label': -1,  # the class; -1: all in turn
        'classifier_workdir': '',  # of a run with a classifier's config
        # Inverse problems: controllable_generation.OPERATORS.
        'method': 'projection',  # controllable_generation.METHODS
        'images': '',  # folder or .npz of originals; '': the test set
        'num_images': 8,
        'repeats': 4,  # reconstructions of each
        'noise_std': 0.0,  # of the measurement, in the model's range
        'data_std': 0.5,  # of the data, as 'pigdm' takes them to be
        # 'dps', 'pigdm': guidance fades where sigma / alpha is above 1 / ramp,
        # for a network's errors are amplified there; 0: it never does.
        'ramp': 1.0,
        'fresh_noise': False,  # 'projection' as in the paper; not for ODEs
        'mask': 'half',  # 'center', 'half', 'random', or an image file
        'known': 0.25,  # share of pixels that a random mask shows
        'factor': 4,  # of super_resolution
        'width': 1.0,  # standard deviation of the blur, in pixels
        'gain': 2.0,  # of the exposure
      },
      'eval': {
        'checkpoint': 'last',  # 'last', 'best', 'all', a step, or 'first:last'
        'batch_size': 1024,
        'enable_loss': True,
        'enable_bpd': False,
        'bpd_eps': 1e-5,
        'bpd_trace': 'rademacher',  # likelihood.PROBES, or 'exact' (few dims)
        'bpd_probes': 1,  # of 2 or more the error is known
        'bpd_repeats': 5,  # passes over the test set, each dequantised anew
        'enable_sampling': True,
        'num_samples': 50_000,
        'inception_path': '',  # weights; '': the cache, or a download
        'inception_variant': 'tensorflow',  # models.inception.VARIANTS
        'extractor': '',  # a 'module:function' of yours in Inception's place
        'stats_path': '',  # reference statistics; '': computed and kept
        'allow_few_samples': False,  # a FID of fewer than 2,049 samples
      },
    }
  )


# ---------------------------------------------------------------- processes


def ve(config):
  """Variance exploding, [0, 1] images, reverse diffusion and Langevin."""
  config.sde = {'name': 've', 'sigma_min': 0.01, 'sigma_max': 50.0}
  config.data.centered = False
  config.training.update(reduction='half_sum', ema_rate=0.999)
  config.sampling.update(
    predictor='reverse_diffusion',
    corrector='langevin',
    eps=1e-5,
    ancestral_variance='posterior',
  )


def vp(config):
  """Variance preserving, [-1, 1] images, Euler-Maruyama."""
  config.sde = {'name': 'vp', 'beta_min': 0.1, 'beta_max': 20.0}
  config.data.centered = True
  config.sampling.sde_atol = 2 / 256


def subvp(config):
  """Sub-VP, otherwise as `vp`."""
  vp(config)
  config.sde.name = 'subvp'


def discrete(config):
  """Training on 1000 noise levels: SMLD with `ve`, DDPM with `vp`."""
  if config.sde.name == 'vp':
    config.sde.name = 'ddpm'
    config.model.conditioning = 'ddpm_label'
    config.sampling.predictor = 'ancestral'
  else:
    config.model.conditioning = 'smld_label'
  config.sde.num_scales = 1000
  config.training.times = 'grid'


def edm(config):
  """EDM (Karras et al. 2022, Table 2, configuration E) for a preset's network.

  For [-1, 1] images; to follow `vp` and `ddpmpp`, or `ve` and `ncsnpp`, which
  are that paper's two networks.
  """
  config.sde = {'name': 'edm', 'sigma_max': 80.0, 'sigma_data': 0.5}
  config.sde.update(p_mean=-1.2, p_std=1.2)
  fourier = config.model.get('embedding_type') == 'fourier'
  config.model.conditioning = 'edm_fourier' if fourier else 'edm'
  config.data.centered = True
  config.training.update(times='lognormal', weighting='edm')
  # 200M images; a half-life of the average of 0.5M; a warm-up of 10M.
  config.training.update(reduction='half_sum', batch_size=512, n_iters=390_625)
  config.training.update(ema_rate=0.99929, ema_warmup=True)
  config.optim.update(lr=1e-3, warmup=19_531, grad_clip=0.0)
  config.sampling.update(method='heun', grid='edm', num_steps=18)
  config.sampling.eps = 0.002 / 80


# ----------------------------------------------------------------- networks

_ALL = {
  'nf': 128,
  'dtype': 'float32',  # or 'bfloat16', for convolutions and products
  'remat': False,  # recompute blocks in the backward pass
}
_UNET = {
  **_ALL,
  'ch_mult': (1, 2, 2, 2),
  'attn_resolutions': (16,),
  'num_labels': 0,  # classes that the network is told of; 0 for none
}


def ncsnpp(config):
  """NCSN++: FIR resampling and a residual input pyramid.

  Fourier features of log sigma under VE, sinusoids of time otherwise.
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
  """DDPM++: NCSN++ with plain resampling and no pyramid."""
  ncsnpp(config)
  config.model.update(fir=False, progressive_input='none')


def deep(config):
  """Twice the residual blocks per resolution, 0.95M iterations."""
  config.model.num_res_blocks = 8
  config.training.n_iters = 950_000


def ncsnpp_256(config):
  """NCSN++ for 256 pixels: image pyramids at input and output."""
  ncsnpp(config)
  config.model.update(ch_mult=(1, 1, 2, 2, 2, 2, 2), num_res_blocks=2)
  config.model.update(progressive='output_skip', progressive_input='input_skip')
  config.model.dropout = 0.0
  config.sampling.num_steps = 2000


def ncsnpp_1024(config):
  """NCSN++ for 1024 pixels."""
  ncsnpp_256(config)
  config.model.update(nf=16, num_res_blocks=1)
  config.model.ch_mult = (1, 2, 4, 8, 16, 32, 32, 32)
  config.training.ema_rate = 0.9999


def ddpm(config):
  """DDPM (Ho et al. 2020)."""
  config.model = {
    'name': 'ddpm',
    'conditioning': 'time',
    **_UNET,
    'num_res_blocks': 2,
    'dropout': 0.1,
    'conditional': True,  # whether it is told the noise level
  }


def ddpm_256(config):
  """DDPM for 256 pixels."""
  ddpm(config)
  config.model.update(ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
  config.optim.lr = 2e-5


def ncsnv2(config):
  """NCSNv2 (Song & Ermon 2020); to be followed by `annealed`."""
  config.model = {'name': 'ncsnv2', 'conditioning': 'smld_label', **_ALL}
  config.model.nonlinearity = 'elu'
  config.training.times = 'grid'
  config.optim.update(lr=1e-4, warmup=0, grad_clip=0.0)


def ncsnv2_128(config):
  """NCSNv2 for 128 pixels."""
  ncsnv2(config)
  config.model.name = 'ncsnv2_128'
  config.data.image_size = config.training.batch_size = 128
  config.training.ema_rate = 0.9999


def ncsn(config):
  """NCSN (Song & Ermon 2019); to be followed by `annealed`."""
  ncsnv2(config)
  # Its output is the score itself, not to be divided by sigma.
  config.model.update(name='ncsn', conditioning='ncsn_label', num_classes=0)
  config.optim.lr = 1e-3
  config.sampling.final_denoise = False  # a discovery of the year after


def mlp(config):
  """A multilayer perceptron, for points; told of noise as `ncsnpp` is."""
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
    'energy': False,  # whether the score is the gradient of a scalar
  }


def classifier(config):
  """A Wide ResNet 28-10 of noisy images (App. I.1), for any process.

  The paper gives its network and its loss, and no more; the rest is as for the
  score networks, in fewer steps.
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
  """A preset: the network is told the class (Ho & Salimans 2022)."""

  def preset(config):
    config.model.num_labels = num_labels

  return preset


def annealed(num_scales, *, snr, steps):
  """A preset: annealed Langevin dynamics, `steps` at each noise level."""

  def preset(config):
    config.sde.num_scales = num_scales
    if 'num_classes' in config.model:
      config.model.num_classes = num_scales
    config.sampling.update(predictor='none', corrector='annealed_langevin')
    config.sampling.update(num_steps=num_scales, corrector_steps=steps, snr=snr)

  return preset


# ----------------------------------------------------------------- datasets


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


def toy(dataset):
  """A preset: points in the plane, trained in seconds on a CPU."""

  def preset(config):
    config.data.update(dataset=f'toy/{dataset}', dims=2, centered=False)
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


def _set(config, path, value):
  *sections, key = path.split('.')
  section = config
  for name in sections:
    section = section[name]
  if key not in section:
    raise KeyError(unknown_key(config, path))
  section[key] = value


def leaves(config, prefix=''):
  """All dotted paths of a config's values."""
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key


def unknown_key(config, path):
  """One line for a key that does not exist, with the likeliest meant."""
  known = list(leaves(config))
  # The same name in another section first, then the closest spelling.
  name = path.rpartition('.')[2]
  same = [k for k in known if k.rpartition('.')[2] == name]
  close = same or difflib.get_close_matches(path, known, n=1, cutoff=0.5)
  hint = f' Did you mean config.{close[0]}?' if close else ''
  return f'config.{path} does not exist.{hint}'


def compose(*parts):
  """Applies presets (functions) and overrides (dicts of dotted keys) in order.

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
        _set(config, path, value)
  return config.lock()
