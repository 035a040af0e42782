r"""Two Gaussians, weights 0.2 and 0.8 (Song & Ermon 2019, Sec. 3.2), under VE.

python main.py --mode train --workdir W \
  --config configs/toy/mixture_ve.py
"""

from configs.base import compose, mlp, toy, ve


def get_config():
  return compose(
    ve, mlp, toy('mixture'), {'sde.sigma_max': 20.0, 'model.input_scale': 0.0}
  )
