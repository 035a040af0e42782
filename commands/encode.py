"""The mode `encode`: latent codes of test images and their use (Section 4.3).

The probability flow maps an image to a code at t = 1, and back. Codes between
two codes are interpolations of images; codes of a smaller or larger norm are
images at another temperature.
"""

import dataclasses
import pathlib

import jax
import numpy as np

import experiment
import likelihood
from commands import trained
from data import datasets
from reporting import pictures
from runtime.devices import each_its_part, on_first_host
from runtime.files import check_output, save_npz, write_json
from runtime.progress import Progress, say

WEIGHTS = np.linspace(0, 1, 10)  # of the second image of a pair
TEMPERATURES = np.array([0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5])
ROWS = 8  # of the pictures of interpolations and of temperatures
TOLERANCES = 'config.sampling.rtol', 'config.sampling.atol'


@dataclasses.dataclass(frozen=True)
class Coder:
  """Encodes and decodes any number of examples, in batches over all devices."""

  run: trained.Run
  batch_size: int

  def encode(self, images, **given):
    """Return (latent codes [N, ...], mean NFE) of images [N, ...].

    `given` are their conditions, `condition` [N, ...], if there are.
    """

    def encoder(params, x, given):
      found = self.run.model.encode(params, x, **given)
      return found.y, found.nfe, found.success, found.not_finite_at

    return self._in_batches('encoded', encoder, images, given)

  def decode(self, z, **given):
    """Return (samples in [0, 1], mean NFE) of latent codes z [N, ...]."""

    def decoder(params, z, given):
      found = self.run.model.decode(params, z, **given)
      return found.x, found.nfe, found.success, found.not_finite_at

    return self._in_batches('decoded', decoder, z, given)

  def _in_batches(self, what, function, x, given):
    layout, size = self.run.layout, self.batch_size
    call = jax.jit(
      lambda params, x, given: function(
        params, each_its_part(x, layout), given
      ),
      in_shardings=(layout.replicated,) * 3,
      out_shardings=layout.replicated,
    )
    progress = Progress(what, len(x), 'images')
    outputs, nfe = [], []
    for start in range(0, len(x), size):
      part = x[start : start + size]
      # The last batch is filled up with copies: one shape, one program.
      rows = start + np.arange(size) % len(part)
      full, some = x[rows], {k: v[rows] for k, v in given.items()}
      y, evaluations, success, bad = call(self.run.params, full, some)
      if not success:
        failed = f'The ODE solver failed: not all images were {what}'
        line = experiment.why_failed(failed, bad, TOLERANCES)
        raise FloatingPointError(line)
      outputs.append(np.asarray(y)[: len(part)])
      nfe.append(float(evaluations))
      progress(start + len(part))
    return np.concatenate(outputs), float(np.mean(nfe))


def _save(path, samples, columns):
  """Write a PNG of images [R, K, ...] in rows of `columns`, or of arrays."""
  flat = samples.reshape(-1, *samples.shape[2:])
  if samples.dtype == np.uint8:
    pictures.save_grid(path, flat, columns=columns, scale_to=800)
  else:
    pictures.save_samples(path, flat)


def _variations(coder, z, **given):
  """Return what codes z [N, ...] and codes made of them decode to.

  Conditions are those of the codes, and of the first of two codes.

  Returns:
    (reconstructions [N, ...], interpolations [R, K, ...] between the codes 2r
    and 2r + 1 at WEIGHTS [K], and codes at TEMPERATURES [T], [R, T, ...]).
  """
  pairs = min(ROWS, len(z) // 2)
  between = likelihood.interpolate(
    z[0::2][:pairs], z[1::2][:pairs], WEIGHTS
  ).swapaxes(0, 1)
  rescaled = np.multiply.outer(TEMPERATURES, z[:ROWS]).swapaxes(0, 1)
  # All are [R, K, ...], and are decoded together.
  codes = [np.float32(c) for c in (z[:, None], between, rescaled)]
  flat = np.concatenate([c.reshape(-1, *z.shape[1:]) for c in codes])
  owners = np.arange(len(z)), 2 * np.arange(pairs), np.arange(len(rescaled))
  owners = np.concatenate(
    [np.repeat(o, c.shape[1]) for o, c in zip(owners, codes, strict=True)]
  )
  given = {k: v[owners] for k, v in given.items()}
  decoded = coder.run.model.to_data(coder.decode(flat, **given)[0])
  ends = np.cumsum([c.shape[0] * c.shape[1] for c in codes])
  again, between, rescaled = (
    part.reshape(c.shape)
    for part, c in zip(np.split(decoded, ends[:-1]), codes, strict=True)
  )
  return again[:, 0], between, rescaled


def encode(config, workdir):
  """Encode config.sampling.num_samples test images, or points, and decode them.

  Writes to workdir/latent/step_N-HASH-DATA-COUNT, where HASH is of all that the
  codes depend on besides the images (weights and config), and DATA is of the
  test data: codes.npz, with `images`, their
  codes `z`, `reconstructions`, `interpolations` [R, K, ...] between images 2r
  and 2r + 1 at `weights` [K], and images r at `temperatures` [T], `rescaled`
  [R, T, ...];
  a PNG of each of the three (in the first every image is followed by its
  reconstruction); and result.json, with the error of the reconstructions.

  Raises:
    FileNotFoundError, ValueError: there is no such checkpoint or data.
    FloatingPointError: the ODE solver failed.
  """
  latent = pathlib.Path(workdir) / 'latent'
  on_first_host(check_output, latent)
  run = trained.restore(config, workdir)
  test_set = datasets.load(run.model.config.data, 'test')
  experiment.check_conditions(run.model, test_set)
  count = min(config.sampling.num_samples, len(test_set))
  coder = Coder(run, trained.batch_size(config, count))
  images = test_set.fetch(np.arange(count))
  given = run.model.given(test_set, count)
  given.pop('label', None)  # Codes are made without classes.
  z, nfe = coder.encode(images, **given)
  again, between, rescaled = _variations(coder, z, **given)
  error = np.abs(np.float64(again) - images)
  result = {
    'step': run.step,
    'count': count,
    'nfe': nfe,
    'mean_error': float(error.mean()),
    'max_error': float(error.max()),
    'config': experiment.json_of(config),
  }
  if jax.process_index():
    return
  name = f'{run.name}-{test_set.fingerprint[:8]}-{count}'
  folder = latent / name
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
  if len(between):  # A single image has no pair.
    _save(folder / 'interpolations.png', between, len(WEIGHTS))
  _save(folder / 'temperatures.png', rescaled, len(TEMPERATURES))
  write_json(folder / 'result.json', result)
  shape = run.model.config.data.shape
  unit = 'units of the data' if shape else 'grey levels of 255'
  say(
    f'{count} codes and their decodings are in {folder}; reconstructions are '
    f'{error.mean():.3g} {unit} off in the mean, {error.max():.3g} at most.'
  )
