"""Latent codes of test images, and what can be done with them (Section 4.3).

The probability flow turns an image into a code at t = 1 and back. Between two
codes lie images that are interpolations; codes of a smaller or larger norm are
images at another temperature.
"""

import json
import pathlib

import jax
import numpy as np

import experiment
import likelihood
import run_lib
from data import datasets
from reporting.pictures import save_grid, save_samples
from runtime.files import save_npz, write_text
from runtime.progress import Progress, say

WEIGHTS = np.linspace(0, 1, 10)  # of the second image of a pair
TEMPERATURES = np.array([0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5])
ROWS = 8  # of the pictures of interpolations and of temperatures


def _in_batches(what, function, batch, x):
  """function(x [batch, ...]) -> (y, nfe, success) over all x; (y, mean NFE)."""
  progress = Progress(what, len(x), 'images')
  outputs, nfe = [], []
  for start in range(0, len(x), batch):
    part = x[start : start + batch]
    # The last is filled up with copies: one shape, one compiled program.
    y, evaluations, success = function(np.resize(part, (batch, *x.shape[1:])))
    if not success:
      raise FloatingPointError(
        f'The ODE solver failed on {what}; larger config.sampling.rtol and '
        'atol may help.'
      )
    outputs.append(np.asarray(y)[: len(part)])
    nfe.append(float(evaluations))
    progress(start + len(part))
  return np.concatenate(outputs), float(np.mean(nfe))


def _code_functions(config, layout, params, batch):
  """encode(images) and decode(z), each -> (y, nfe, success), compiled."""
  split = lambda x: jax.lax.with_sharding_constraint(x, layout.split)
  encoder = experiment.make_encoder(config)
  decoder = experiment.make_decoder(config, batch)

  def compiled(function):
    call = jax.jit(
      lambda params, x: function(params, split(x)),
      in_shardings=(layout.replicated, layout.replicated),
      out_shardings=layout.replicated,
    )
    return lambda x: call(params, x)

  return compiled(encoder), compiled(decoder)


def _save(path, samples, columns):
  """A PNG of images [R, K, ...] in rows of `columns`; points are scattered."""
  flat = samples.reshape(-1, *samples.shape[2:])
  if samples.ndim > 3:
    save_grid(path, flat, columns=columns, scale_to=800)
  else:
    save_samples(path, flat)


def encode(config, workdir):
  """Encodes config.sampling.num_samples test images, or points, and decodes.

  Writes to workdir/latent/step_N: codes.npz, with `images`, their codes `z`,
  `reconstructions`, `interpolations` [R, K, ...] between images 2r and 2r + 1
  at `weights` [K], and images r at `temperatures` [T], `rescaled` [R, T, ...];
  a PNG of each of the three (in the first every image is followed by its
  reconstruction); and result.json, with the error of the reconstructions.

  Raises:
    FileNotFoundError, ValueError: no such checkpoint or data.
    FloatingPointError: the ODE solver failed.
  """
  experiment.check(config)
  workdir, test_set = pathlib.Path(workdir), datasets.load(config.data, 'test')
  count = min(config.sampling.num_samples, len(test_set))
  if count < 2:
    raise ValueError('config.sampling.num_samples must be at least 2.')
  step, params, layout, batch = run_lib.restore(config, workdir, count)
  encoder, decoder = _code_functions(config, layout, params, batch)

  images = test_set.fetch(np.arange(count))
  z, nfe = _in_batches('encoded', encoder, batch, images)
  pairs = min(ROWS, count // 2)
  between = likelihood.interpolate(
    z[0::2][:pairs], z[1::2][:pairs], WEIGHTS
  ).swapaxes(0, 1)
  rescaled = np.multiply.outer(TEMPERATURES, z[:ROWS]).swapaxes(0, 1)

  # All [R, K, ...], decoded in one go.
  codes = [np.float32(c) for c in (z[:, None], between, rescaled)]
  flat = np.concatenate([c.reshape(-1, *z.shape[1:]) for c in codes])
  decoded, _ = _in_batches('decoded', decoder, batch, flat)
  decoded = experiment.to_data(config, decoded)
  ends = np.cumsum([c.shape[0] * c.shape[1] for c in codes])
  again, between, rescaled = (
    part.reshape(c.shape)
    for part, c in zip(np.split(decoded, ends[:-1]), codes, strict=True)
  )
  again = again[:, 0]
  error = np.abs(np.float64(again) - images)
  result = {
    'step': step,
    'count': count,
    'nfe': nfe,
    'mean_error': float(error.mean()),
    'max_error': float(error.max()),
    'config': json.loads(config.to_json_best_effort()),
  }
  if jax.process_index() == 0:
    folder = workdir / 'latent' / f'step_{step}'
    save_npz(
      folder / 'codes.npz',
      images=images,
      z=z,
      reconstructions=again,
      interpolations=between,
      weights=WEIGHTS,
      rescaled=rescaled,
      temperatures=TEMPERATURES,
    )
    both = np.stack([images, again], axis=1)[: ROWS * ROWS]
    _save(folder / 'reconstructions.png', both, 2 * ROWS)
    _save(folder / 'interpolations.png', between, len(WEIGHTS))
    _save(folder / 'temperatures.png', rescaled, len(TEMPERATURES))
    text = json.dumps(result, indent=1) + '\n'
    write_text(folder / 'result.json', text)
    unit = 'units of the data' if config.data.dims else 'grey levels of 255'
    say(
      f'{count} codes and their decodings are in {folder}; reconstructions are '
      f'{error.mean():.3g} {unit} off in the mean, {error.max():.3g} at most.'
    )
