r"""Two rings, as a rectified flow.

python main.py --mode train --workdir W \
  --config configs/toy/rings_flow.py
"""

from configs.base import compose, flow, mlp, toy, vp


def get_config():
  change = {'sampling.method': 'flow_heun', 'sampling.num_steps': 50}
  return compose(vp, mlp, flow, toy('rings'), change)
