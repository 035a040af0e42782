"""Compare networks with the paper's release, closed forms and their options."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import models
from models import layers, ncsn
from tests import golden

# These tests spend most of their time on compilation: the networks are tiny.
TINY = {
  'name': 'ncsnpp',
  'nf': 4,
  'ch_mult': (1,),
  'num_res_blocks': 1,
  'attn_resolutions': (),
}


def shapes_of(model, size=8, channels=3):
  """Return parameter shapes by path, without drawing any parameter."""
  space = (size, size) if size else ()
  x = jax.ShapeDtypeStruct((1, *space, channels), jnp.float32)
  cond = jax.ShapeDtypeStruct((1,), jnp.float32)
  init = lambda x, cond: model.init(jax.random.key(0), x, cond, train=False)
  params = jax.eval_shape(init, x, cond)['params']
  flat = traverse_util.flatten_dict(params, sep='/')
  assert all(leaf.dtype == jnp.float32 for leaf in flat.values())
  return {path: leaf.shape for path, leaf in flat.items()}


def count(shapes):
  return sum(int(np.prod(shape)) for shape in shapes.values())


def random_params(model, size=8):
  """Return parameters of plausible size, all away from zero."""
  rng = np.random.default_rng(0)
  flat = {
    path: rng.normal(size=shape, scale=np.prod(shape[:-1]) ** -0.5).astype('f4')
    + np.float32(path.endswith(('scale', 'gamma')))
    for path, shape in shapes_of(model, size).items()
  }
  return traverse_util.unflatten_dict(flat, sep='/')


@functools.partial(jax.jit, static_argnames=('model', 'train'))
def apply(model, params, x, cond, *, train=False, seed=0):
  rngs = {'dropout': jax.random.key(seed)} if train else {}
  return model.apply({'params': params}, x, cond, train=train, rngs=rngs)


def images(size=8, batch=2):
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.uniform(size=(batch, size, size, 3)), jnp.float32)


def twice(x):
  """Return the first image twice, for two noise levels."""
  return jnp.concatenate([x[:1], x[:1]])


def assert_close(actual, expected, tolerance):
  """Compare on the scale of each example's largest value."""
  for a, e in zip(np.asarray(actual), np.asarray(expected), strict=True):
    np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


# The paper's release.


@pytest.mark.parametrize('case', golden.CASES)
def test_parameters_have_the_released_names_and_shapes(case):
  _, params = golden.load(case)
  released = traverse_util.flatten_dict(params, sep='/')
  released = {path: leaf.shape for path, leaf in released.items()}
  assert shapes_of(golden.model(case), size=16) == released


@pytest.mark.parametrize('case', golden.CASES)
def test_output_equals_the_release(case):
  arrays, params = golden.load(case)
  y = apply(golden.model(case), params, arrays['x'], arrays['cond'])
  expected = arrays['model_out']
  if case.startswith('ve_'):  # There the release's network divides by sigma.
    sigma = arrays['std']
    if case == 've_ncsnv2':
      sigma = np.geomspace(50, 0.01, 232)[arrays['cond']]
    expected = expected * sigma[:, None, None, None]
  assert y.dtype == jnp.float32
  assert_close(y, expected, 1e-5)


@pytest.mark.parametrize(
  ('millions', 'name'), [(62.76, 'ncsnpp'), (35.22, 'ddpm')]
)
def test_defaults_have_the_published_size(millions, name):
  """Other sizes are in tests/configs/test_configs.py."""
  assert round(count(shapes_of(models.create(name), 32)) / 1e6, 2) == millions


# Options.


@pytest.mark.parametrize(
  ('resblock_type', 'progressive', 'progressive_input', 'fir'),
  list(
    itertools.product(
      ('biggan', 'ddpm'),
      ('none', 'output_skip', 'residual'),
      ('none', 'input_skip', 'residual'),
      (True, False),
    )
  ),
)
def test_structural_options_combine(
  resblock_type, progressive, progressive_input, fir
):
  fields = {
    'ch_mult': (1, 2),
    'resblock_type': resblock_type,
    'progressive': progressive,
    'progressive_input': progressive_input,
    'fir': fir,
  }
  model = models.create(**{**TINY, **fields})
  top = {path.split('/')[0] for path in shapes_of(model)}
  block = {'biggan': 'BigGANpp', 'ddpm': 'DDPMpp'}[resblock_type]
  assert f'ResnetBlock{block}_0' in top
  assert ('Combine_0' in top) == (progressive_input == 'input_skip')
  # Only DDPM blocks and residual pyramids resample with parameters of their
  # own, but those without parameters are counted in the names as well.
  ddpm = int(resblock_type == 'ddpm')
  expected = {'Downsample_0', 'Upsample_0'} if ddpm else set()
  if progressive_input == 'residual':
    expected.add(f'Downsample_{ddpm}')
  if progressive == 'residual':
    expected.add(f'Upsample_{ddpm}')
  assert {name for name in top if 'sample' in name} == expected


@pytest.mark.parametrize(
  'fields',
  [
    {'progressive_input': 'input_skip', 'progressive_combine': 'cat'},
    {'resblock_type': 'ddpm', 'resamp_with_conv': False},
    {'skip_rescale': False},
    {'fir_kernel': [1, 2, 1], 'conv_size': 1},
    {'nonlinearity': 'lrelu', 'embedding_type': 'positional'},
    {'attn_resolutions': [8, 4]},
    {'ch_mult': [1]},
  ],
)
def test_other_options_run(fields):
  x = images(8, batch=1)
  model = models.create(**{**TINY, 'ch_mult': (1, 2), **fields})
  run = lambda x: model.init_with_output(
    jax.random.key(0), x, jnp.ones(1), train=False
  )
  assert jax.eval_shape(run, x)[0].shape == x.shape


# Axes of space.


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'fir': False, 'progressive_input': 'none', 'num_labels': 3},
    {'progressive': 'output_skip', 'progressive_input': 'input_skip'},
    {'progressive': 'residual', 'resblock_type': 'ddpm'},
    {'name': 'ddpm', 'nf': 32},
  ],
)
def test_one_network_for_any_axes_of_space(fields):
  """Its parameters differ in the shapes of kernels alone."""
  few = {'ch_mult': (1, 2), 'attn_resolutions': (4,)}
  network = models.create(**TINY | few | fields)

  def run(*space):
    def apply(x):
      rng, cond = jax.random.key(0), jnp.ones(2)
      return network.init_with_output(rng, x, cond, train=False)

    y, variables = jax.eval_shape(apply, jnp.zeros((2, *space, 3)))
    assert y.shape == (2, *space, 3) and y.dtype == jnp.float32
    flat = traverse_util.flatten_dict(variables['params'])
    return {path: leaf.shape for path, leaf in flat.items()}

  def kernel(shape, axes):
    return (*shape[:1] * axes, *shape[2:]) if len(shape) == 4 else shape

  wanted = run(8, 4)
  for space in ((8,), (8, 2, 4)):
    shapes = {path: kernel(v, len(space)) for path, v in wanted.items()}
    assert run(*space) == shapes


def test_a_signal_is_an_image_of_one_column():
  """So is an image a volume: only the middles of the kernels see it."""
  network = models.create(**TINY | {'attn_resolutions': (8,)})
  of_images, cond = random_params(network), jnp.array([0.3, 2.0])

  def narrow(kernel):
    return kernel[:, kernel.shape[1] // 2] if kernel.ndim == 4 else kernel

  def deepen(kernel):  # Zeros but for the middle of a third axis.
    if kernel.ndim != 4:
      return kernel
    k, channels = kernel.shape[0], kernel.shape[2:]
    deep = jnp.zeros((k, k, k, *channels))
    return deep.at[:, :, k // 2].set(kernel)

  x = images()[:, :, 0]
  image = apply(network, of_images, x[:, :, None], cond)[:, :, 0]
  of_signals = jax.tree.map(narrow, of_images)
  assert_close(apply(network, of_signals, x, cond), image, 1e-5)
  of_volumes = jax.tree.map(deepen, of_images)
  volume = apply(network, of_volumes, x[:, :, None, None], cond)
  assert_close(volume[:, :, 0, 0], image, 1e-5)


def test_unconditional_network_ignores_the_noise_level():
  model = models.create(**TINY, conditional=False)
  params = random_params(model)
  y = apply(model, params, twice(images()), jnp.array([0.1, 5.0]))
  assert_close(y[:1], y[1:], 1e-5)


def test_images_of_both_ranges_are_mapped_to_the_same():
  x, cond = images(), jnp.array([0.1, 1.0])
  params = random_params(models.create(**TINY))
  y = apply(models.create(**TINY), params, x, cond)
  centered = models.create(**TINY, centered=True)
  np.testing.assert_allclose(apply(centered, params, 2 * x - 1, cond), y)


def test_attention_is_the_published_formula(monkeypatch):
  """Check softmax(q k^T / sqrt(C)) v, and which implementation computes it."""
  block, rng = layers.AttnBlock('float32'), np.random.default_rng(0)
  x = rng.normal(size=(2, 4, 4, 8)).astype('f4')
  shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x)['params'])
  params = jax.tree.map(
    lambda v: rng.normal(size=v.shape, scale=0.6).astype('f4'), shapes
  )
  nin = lambda i, h: h @ params[f'NIN_{i}']['W'] + params[f'NIN_{i}']['b']
  norm = params['GroupNorm_0']
  h = layers.nn.GroupNorm(2, epsilon=1e-6).apply({'params': norm}, x)
  q, k, v = (nin(i, np.asarray(h).reshape(2, 16, 8)) for i in range(3))
  weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(8))
  weights /= weights.sum(-1, keepdims=True)
  expected = x + nin(3, weights @ v).reshape(x.shape)
  found = block.apply({'params': params}, x)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  chosen = []
  monkeypatch.setattr(
    jax.nn,
    'dot_product_attention',
    lambda q, k, v, implementation: chosen.append(implementation) or v,
  )
  for options in ({}, {'attention': 'cudnn'}):
    shapes_of(models.create(**TINY | {'attn_resolutions': (8,)} | options))
  assert chosen[:2] == ['xla'] * 2 and chosen[-2:] == ['cudnn'] * 2


def test_first_output_is_zero():
  """Check that with init_scale=0 the score begins near zero."""
  model = models.create(**TINY)
  x, cond = images(4), jnp.ones(2)
  init = jax.jit(
    lambda: model.init_with_output(jax.random.key(0), x, cond, train=False)
  )
  y, _ = init()
  assert 0 < jnp.abs(y).max() < 1e-3


def test_dropout_only_in_training():
  model = models.create(**TINY, dropout=0.5)
  params, x, cond = random_params(model), images(), jnp.ones(2)
  still = apply(model, params, x, cond)
  first = apply(model, params, x, cond, train=True, seed=0)
  again = apply(model, params, x, cond, train=True, seed=0)
  other = apply(model, params, x, cond, train=True, seed=1)
  np.testing.assert_array_equal(first, again)
  assert jnp.abs(first - still).max() > 1e-3
  assert jnp.abs(first - other).max() > 1e-3


class ShallowNCSN(ncsn.NCSN):
  """Two depths of four, which have all kinds of blocks."""

  levels = ncsn.NCSN.levels[:2]


ALL = [
  models.create(
    **{**TINY, 'ch_mult': (1, 1), 'attn_resolutions': (8,)},
    progressive='output_skip',
    progressive_input='input_skip',
  ),
  models.create('ddpm', nf=32, ch_mult=(1,), num_res_blocks=1),
  ShallowNCSN(nf=4, num_classes=3),
  models.create('ncsnv2', nf=4),
  models.create(
    'wideresnet_noise_conditional', blocks_per_group=1, channel_multiplier=1
  ),
]
CLASSIFIER = ALL[-1]


@pytest.mark.parametrize('model', ALL, ids=lambda model: type(model).__name__)
def test_remat_and_bfloat16_keep_the_parameters(model):
  expected = shapes_of(model)
  assert shapes_of(model.clone(remat=True)) == expected
  assert shapes_of(model.clone(dtype='bfloat16')) == expected


def test_gradients_and_remat():
  """Check that remat keeps outputs, dropout masks and gradients."""
  model = models.create(**TINY, dropout=0.2)
  params, x, cond = random_params(model), images(), jnp.array([1.0, 2.0])

  @functools.partial(jax.jit, static_argnums=1)
  @functools.partial(jax.grad, has_aux=True)
  def grad(params, model):
    rngs = {'dropout': jax.random.key(0)}
    y = model.apply({'params': params}, x, cond, train=True, rngs=rngs)
    return jnp.mean(y**2), y

  grads, y = grad(params, model)
  assert not grads['GaussianFourierProjection_0']['W'].any()  # Never trained.
  assert grads['Dense_0']['kernel'].any()
  remat = model.clone(remat=True)
  remat_grads, remat_y = grad(params, remat)
  assert_close(remat_y, y, 1e-5)
  scale = max(jnp.abs(g).max() for g in jax.tree.leaves(grads))
  jax.tree.map(
    lambda r, g: np.testing.assert_allclose(r, g, atol=1e-5 * scale),
    remat_grads,
    grads,
  )
  program = str(grad.trace(params, remat).jaxpr)
  assert 'remat' in program or 'checkpoint' in program


@pytest.mark.parametrize(
  'model', [ShallowNCSN(nf=4, num_classes=3), CLASSIFIER], ids=['ncsn', 'wrn']
)
def test_gradients_are_slopes(model):
  """Compare with differences along a direction of parameters and images."""
  cond = jnp.array([1.0, 2.0])
  at = random_params(model), images()
  direction = jax.tree.map(
    lambda v: np.random.default_rng(v.size).normal(size=v.shape) * v.std(), at
  )
  moved = lambda h: jax.tree.map(
    lambda v, d: v + np.float32(h * d), at, direction
  )

  @jax.jit
  @jax.value_and_grad
  def value(at):
    return jnp.mean(apply(model, at[0], at[1], cond) ** 2)

  _, gradient = value(at)
  slope = sum(
    np.vdot(g, d)
    for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
  )
  h = 1e-3
  (above, _), (below, _) = value(moved(h)), value(moved(-h))
  np.testing.assert_allclose((above - below) / (2 * h), slope, rtol=0.02)


@pytest.mark.parametrize(
  'model',
  [model for model in ALL if not isinstance(model, ncsn.NCSNv2)],
  ids=lambda model: type(model).__name__,
)
def test_bfloat16_is_close(model):
  params, x, cond = random_params(model), images(), jnp.array([1.0, 2.0])
  y = apply(model, params, x, cond)
  half_y = apply(model.clone(dtype='bfloat16'), params, x, cond)
  assert half_y.dtype == jnp.float32
  assert jnp.abs(half_y - y).max() > 0  # It computes with fewer bits.
  assert jnp.linalg.norm(half_y - y) < 0.03 * jnp.linalg.norm(y)


# NCSN and NCSNv2.


@pytest.mark.parametrize('name', ['ncsnv2_64', 'ncsnv2_128', 'ncsnv2_256'])
def test_deeper_ncsnv2_have_a_block_pair_per_level(name):
  model = models.create(name, nf=4)
  tops = {path.split('/')[0] for path in shapes_of(model, size=16)}
  depth = len(model.levels)
  assert {t for t in tops if t.startswith('Res')} == {
    f'ResidualBlock_{k}' for k in range(2 * depth)
  }
  assert {t for t in tops if t.startswith('Ref')} == {
    f'RefineBlock_{k}' for k in range(depth)
  }


def test_ncsnv2_ignores_and_ncsn_heeds_the_noise_level():
  for model in ALL:
    if isinstance(model, ncsn.NCSN | ncsn.NCSNv2):
      labels = jnp.array([0.0, 2.0])
      y = apply(model, random_params(model), twice(images()), labels)
      differs = bool(jnp.abs(y[0] - y[1]).max() > 1e-3)
      assert differs == isinstance(model, ncsn.NCSN)


def test_instance_norm_plus_plus():
  """Compare with Song & Ermon 2019, Appendix A, in numpy."""
  x = np.asarray(images(4)) * np.array([1, 2, 3]) + np.array([0, 5, 1])
  rng = np.random.default_rng(0)
  gamma, alpha, beta = rng.normal(size=(3, 2, 3)).astype('f4')  # [., level, C]
  mean, std = x.mean((1, 2)), np.sqrt(x.var((1, 2)) + 1e-5)
  shift = mean - mean.mean(-1, keepdims=True)
  shift /= np.sqrt(mean.var(-1, keepdims=True) + 1e-5)
  expand = lambda v: v[:, None, None, :]
  labels = np.array([1, 0])
  normal = (x - expand(mean)) / expand(std)
  expected = expand(gamma[labels]) * (
    normal + expand(alpha[labels] * shift)
  ) + expand(beta[labels])

  table = np.concatenate([gamma, alpha, beta], axis=-1)
  conditional = ncsn.ConditionalInstanceNorm2dPlus(2, jnp.float32)
  x = jnp.asarray(x, jnp.float32)
  params = {'Embed_0': {'embedding': table}}
  y = conditional.apply({'params': params}, x, labels)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  params = {
    name: value[None, None, :1]
    for name, value in {'gamma': gamma, 'alpha': alpha, 'beta': beta}.items()
  }
  y = ncsn.InstanceNorm2dPlus(jnp.float32).apply({'params': params}, x)
  np.testing.assert_allclose(y[1], expected[1], rtol=1e-4, atol=1e-4)


# The classifier.


def test_classifier_is_wide_resnet_28_10():
  shapes = shapes_of(models.create('wideresnet_noise_conditional'), size=32)
  convolutions = [s for s in shapes.values() if len(s) == 4]
  assert len(convolutions) == 28 - 3  # Without 2 shortcuts, 1 dense layer.
  assert shapes['WideResnetGroup_2/WideResnetBlock_3/conv2/kernel'] == (
    (3, 3, 640, 640)
  )
  assert shapes['GaussianFourierProjection_0/W'] == (128,)
  assert shapes['WideResnetGroup_0/WideResnetBlock_0/init_bn/scale'] == (16,)
  assert shapes['Dense_2/kernel'] == (640, 10)


def test_classifier_sees_sigma_and_not_the_scale_of_images():
  model, x = CLASSIFIER, images()
  params = random_params(model)
  y = apply(model, params, x, jnp.array([0.1, 1.0]))
  assert y.shape == (2, 10)
  assert_close(apply(model, params, 3 * x + 1, jnp.array([0.1, 1.0])), y, 1e-4)
  other = apply(model, params, x, jnp.array([1.0, 1.0]))
  assert jnp.abs(other[0] - y[0]).max() > 1e-3
  flat = apply(model, params, jnp.ones_like(x), jnp.ones(2))
  assert jnp.isfinite(flat).all()


# Mistakes.


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'name': 'ncsnp'}, "did you mean 'ncsnpp'"),
    ({'name': 'unet'}, 'use one of ncsnpp, ddpm'),
    ({'name': 'ncsnpp', 'ch_mul': (1,)}, "did you mean 'ch_mult'"),
    ({'name': 'ddpm', 'parent': None}, "field of model 'ddpm': 'parent'"),
    ({'name': 'ncsnpp', 'progressive': 'skip'}, 'none, output_skip, residual'),
    ({'name': 'ncsnpp', 'nonlinearity': 'gelu'}, "did you mean 'elu'"),
    ({'name': 'ncsnpp', 'nonlinearity': 'tanh'}, 'swish, elu, relu, lrelu'),
    ({'name': 'ddpm', 'dtype': 'float16'}, "did you mean 'bfloat16'"),
    ({'name': 'ncsn', 'dtype': 'half'}, 'float32, bfloat16'),
    ({'name': 'wideresnet_noise_conditional', 'dtype': 'x'}, 'bfloat16'),
    ({'name': 'ncsnpp', 'dropout': 1.0}, r'NCSNpp: dropout=1.0 is not in \[0'),
    ({'name': 'ddpm', 'ch_mult': [1, 0]}, 'DDPM: ch_mult'),
    ({'name': 'ncsnv2', 'nf': 0}, 'NCSNv2: nf=0'),
    ({'name': 'ncsn', 'num_classes': 0}, 'NCSN: num_classes=0'),
    ({'name': 'mlp', 'num_layers': 1.5}, 'MLP: num_layers=1.5'),
    (
      {'name': 'mlp', 'num_labels': 3, 'conditional': False},
      'num_labels=3 needs conditional=True',
    ),
  ],
)
def test_wrong_names_and_values_are_explained(fields, message):
  with pytest.raises(ValueError, match=message):
    models.create(**fields)


def test_impossible_sizes_are_explained():
  with pytest.raises(ValueError, match='multiples of 8'):
    shapes_of(models.create('ncsnpp'), size=28)
  with pytest.raises(ValueError, match="vectors of 3 .* model.name='mlp'"):
    shapes_of(models.create('ncsnpp'), size=None)
  with pytest.raises(ValueError, match='choose nf a multiple of 32'):
    shapes_of(models.create('ddpm', nf=48), size=8)


def test_positional_embedding():
  e = layers.positional_embedding(jnp.array([0, 500.5]), 9)
  assert e.shape == (2, 9)
  np.testing.assert_allclose(e[0], [0, 0, 0, 0, 1, 1, 1, 1, 0])
  angles = 500.5 * 10000.0 ** (-np.arange(4) / 3)
  np.testing.assert_allclose(e[1, :4], np.sin(angles), atol=1e-4)
