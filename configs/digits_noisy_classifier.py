"""A classifier of noisy handwritten digits, for guiding an unconditional model of them.

It sees the noise of ``configs/digits.py`` and ``configs/digits_conditional.py`` at every time of
their chain (Dhariwal & Nichol 2021, section 4).
"""

from ml_collections import ConfigDict

from jax_ddpm.config import default


def get_config() -> ConfigDict:
    """The network of ``configs/digits_classifier.py``, conditioned on the time, trained longer."""
    config = default()
    config.task = "noisy_classification"
    config.data.source = "digits"
    config.data.shift = 1

    config.model.base_channels = 32
    config.model.channel_multipliers = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = ()
    config.model.num_groups = 8
    config.model.dropout = 0.1

    config.process.name = "cosine"
    config.loss.time_sampler = "stratified"

    config.training.num_steps = 1500
    config.training.checkpoint_every = 500
    config.training.batch_size = 64
    config.training.learning_rate = 2e-3
    config.training.warmup_steps = 100
    config.training.decay = "cosine"
    config.training.ema_decay = 0.99
    config.training.log_every = 100
    config.training.heldout_every = 500
    return config
