"""Record the outputs of diffusers for exported folders, for the tests.

Writes tests/arrays/diffusers.npz. This is not a test: it needs torch and
diffusers, which nothing else in this project needs. First export the folders in
this project's environment, then run this script in one with diffusers:

  python -m tests.checkpoints.test_diffusers FOLDER
  python tests/checkpoints/record_diffusers.py FOLDER
"""

import hashlib
import pathlib
import sys

import numpy as np

LEVELS = [0, 1, 500, 999]  # Some of 1000 noise levels.


def digest(tensors):
  """Return a digest of names, shapes and contents."""
  whole = hashlib.sha256()
  for name in sorted(tensors):
    value = np.ascontiguousarray(tensors[name], np.float32)
    whole.update(f'{name} {value.shape}'.encode() + value.tobytes())
  return whole.hexdigest()


def main(folder):
  import diffusers
  import torch

  versions = f'diffusers {diffusers.__version__}, torch {torch.__version__}'
  recorded = {'versions': versions}
  for path in sorted(folder.iterdir()):
    if not path.is_dir():
      continue
    network = diffusers.UNet2DModel.from_pretrained(path / 'unet').eval()
    with np.load(path.with_suffix('.npz')) as file:
      x, cond = torch.tensor(file['x']).permute(0, 3, 1, 2), file['cond']
    with torch.no_grad():
      y = network(x, torch.tensor(cond)).sample.permute(0, 2, 3, 1)
    scheduler = diffusers.DiffusionPipeline.from_pretrained(path).scheduler
    if path.name == 'ddpm':
      sigmas = (1 - scheduler.alphas_cumprod) ** 0.5
    else:
      scheduler.set_sigmas(1000)
      sigmas = scheduler.discrete_sigmas
    tensors = {k: v.numpy() for k, v in network.state_dict().items()}
    recorded |= {
      f'{path.name}/output': y.numpy(),
      f'{path.name}/sigmas': sigmas[LEVELS].numpy(),
      f'{path.name}/shapes': [
        f'{name} {value.shape}' for name, value in sorted(tensors.items())
      ],
      f'{path.name}/digest': digest(tensors),
    }
  out = pathlib.Path(__file__).parents[1] / 'arrays' / 'diffusers.npz'
  np.savez_compressed(out, **recorded)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
