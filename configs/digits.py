"""Handwritten digits, unconditional."""

from ml_collections import ConfigDict

from jax_ddpm.config import default


def get_config() -> ConfigDict:
    """The smallest useful run."""
    config = default()
    config.data.source = "digits"

    config.model.base_channels = 32
    config.model.channel_multipliers = (1, 2)
    config.model.attention_resolutions = (4,)
    config.model.num_groups = 8
    config.model.dropout = 0.0
    config.process.name = "cosine"
    config.parameterisation.variance = "fixedsmall"

    config.training.num_steps = 800
    config.training.learning_rate = 1e-3
    config.training.warmup_steps = 50
    config.training.decay = "cosine"
    config.training.ema_decay = 0.99
    config.training.log_every = 50
    config.training.heldout_every = 200
    config.training.sample_every = 800
    return config
