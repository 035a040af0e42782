"""The U-Net of DDPM (Ho et al. 2020, Appendix B)."""

from models.unet import UNet


class DDPM(UNet):
  """U-Net of residual blocks with attention and sinusoidal time features.

  The defaults are the CIFAR-10 model's. As in the paper's release, attention on
  the way up comes once per resolution, after the last block. `cond` are steps
  in 0..999, integer or not; nf must be a multiple of 32.

  Example:
    >>> DDPM(nf=64).ch_mult
    (1, 2, 2, 2)
  """

  num_groups = 32

  def block_style(self):
    return 'ResnetBlockDDPM', {'nin_shortcut': True, 'num_groups': 32}

  def attention_style(self):
    return 'AttnBlock', {'num_groups': 32}
