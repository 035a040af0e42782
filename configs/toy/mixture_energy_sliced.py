r"""An energy of the two Gaussians, by sliced score matching at all levels.

python main.py --mode train --workdir W \
  --config configs/toy/mixture_energy_sliced.py
"""

from configs.base import compose, mlp, toy, ve


def get_config():
  energy = {'model.energy': True, 'training.objective': 'sliced_vr'}
  scale = {'sde.sigma_max': 20.0, 'model.input_scale': 0.0}
  return compose(ve, mlp, toy('mixture'), energy, scale)
