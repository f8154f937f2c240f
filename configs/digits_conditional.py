"""Handwritten digits with their class: the columns of the sample grid are the classes 0 to 9.

One label in ten is dropped in training, so the network is also an unconditional model, which
classifier-free guidance needs (Ho & Salimans 2022).

Expected result: every column plainly its class; held-out ε-error 0.128 (one seed, 359 images).
Cost: 6 minutes on two busy CPU cores. Measured with
``python -m jax_ddpm.main --config=configs/digits_conditional.py``; see
``experiments/results/digits_conditional``, also for the measured samples and likelihood.
"""

from ml_collections import ConfigDict

from jax_ddpm.config import default


def get_config() -> ConfigDict:
    """The network of ``configs/digits.py`` with labels, trained longer."""
    config = default()
    config.data.source = "digits"

    config.model.class_conditional = True
    config.model.base_channels = 32
    config.model.channel_multipliers = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (4,)
    config.model.num_groups = 8
    config.model.dropout = 0.0

    config.process.name = "cosine"
    config.parameterisation.variance = "fixedsmall"
    config.loss.time_sampler = "stratified"

    config.training.label_drop = 0.1
    config.training.num_steps = 3000
    config.training.checkpoint_every = 500
    config.training.batch_size = 64
    config.training.learning_rate = 2e-3
    config.training.warmup_steps = 100
    config.training.decay = "cosine"
    config.training.ema_decay = 0.995
    config.training.log_every = 100
    config.training.heldout_every = 500
    config.training.sample_every = 1500
    config.sampling.num_samples = 100
    config.sampling.batch_size = 100
    return config
