"""DDPM on CIFAR-10, the paper's recipe field by field (Ho et al. 2020, appendix B).

Expected from the paper: FID 3.17 against the training set, Inception score 9.46 ± 0.11,
at most 3.75 bits/dim, after 800,000 steps (10.6 h on a TPU v3-8). Not yet reproduced here.

Data: ``cifar-10-python.tar.gz`` (or ``-binary``) from https://www.cs.toronto.edu/~kriz/cifar.html,
as it is, in ``data/`` or at ``--config.data.path=…``; its checksum is verified.
"""

from ml_collections import ConfigDict

from jax_ddpm.config import default


def get_config() -> ConfigDict:
    """35,746,307 parameters, unconditional."""
    config = default()
    config.data.source = "cifar10"
    config.data.path = "data/cifar-10-python.tar.gz"
    config.data.flip = True

    config.model.base_channels = 128
    config.model.channel_multipliers = (1, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16,)
    config.model.num_groups = 32
    config.model.dropout = 0.1

    config.process.name = "linear"
    config.process.num_timesteps = 1000
    config.process.beta_start = 1e-4
    config.process.beta_end = 0.02
    config.parameterisation.target = "eps"
    config.parameterisation.variance = "fixedlarge"
    config.loss.kind = "error"
    config.loss.weighting = "simple"
    config.loss.time_sampler = "uniform"

    config.training.num_steps = 800_000
    config.training.batch_size = 128
    config.training.learning_rate = 2e-4
    config.training.warmup_steps = 5000
    config.training.decay = "constant"
    config.training.adam_b1 = 0.9
    config.training.adam_b2 = 0.999
    config.training.adam_eps = 1e-8
    config.training.grad_clip = 1.0
    config.training.ema_decay = 0.9999
    config.sampling.clip = True
    return config
