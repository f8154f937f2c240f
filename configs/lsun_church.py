"""DDPM on LSUN church (outdoor) at 256×256 (Ho et al. 2020, appendix B; variance of their script).

Expected from the paper: FID 7.89 after 1,200,000 steps: 6 days on a TPU v3-8 at its
2.2 steps/s. Never trained here.

Data: the official LMDB of webp images, exported to files with the ``export`` command of the
LSUN authors' ``data.py``, as the folder ``data/lsun_church`` or ``--config.data.path=…``.
Images are resized to 256 pixels on the shorter side and cropped at the centre.
"""

from ml_collections import ConfigDict

from jax_ddpm.config import default


def get_config() -> ConfigDict:
    """113,673,219 parameters, unconditional; fields not set here are those of CIFAR-10."""
    config = default()
    config.data.source = "folder"
    config.data.path = "data/lsun_church"
    config.data.image_size = 256
    config.data.flip = True

    config.model.channel_multipliers = (1, 1, 2, 2, 4, 4)
    config.model.dropout = 0.0

    config.parameterisation.variance = "fixedsmall"

    config.training.num_steps = 1_200_000
    config.training.batch_size = 64
    config.training.learning_rate = 2e-5
    config.training.sample_every = 50_000
    config.sampling.num_samples = 16
    config.sampling.batch_size = 16
    return config
