"""EDM on the digits (Karras et al. 2022): σ is the time, preconditioned F, log-normal σ.

Sampled by Heun's method in 18 steps, 35 evaluations, as in their table 2.

Expected result: FD 0.045 ± 0.008 to the training set over the features of
``configs/digits_classifier.py`` (N = 1,000, 3 seeds), 98.5 % of the digits recognised as the class
asked for; samples and record in ``experiments/results/digits_edm``, which names its command and
machine. It is one training run, not timed by itself: the network and the steps are those of
``configs/digits_conditional.py``.
"""

from ml_collections import ConfigDict

from jax_ddpm.config import default


def get_config() -> ConfigDict:
    """The network and the steps of ``configs/digits_conditional.py``."""
    config = default()
    config.data.source = "digits"

    config.model.class_conditional = True
    config.model.base_channels = 32
    config.model.channel_multipliers = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (4,)
    config.model.num_groups = 8
    config.model.dropout = 0.0

    config.process.name = "edm"
    config.parameterisation.target = "edm"
    config.parameterisation.normalise_input = True
    config.parameterisation.condition_on = "log_snr"
    config.parameterisation.data_std = 0.75  # of the digits
    config.loss.weighting = "target"
    config.loss.time_sampler = "log_normal"
    config.loss.time_mean = -1.2
    config.loss.time_std = 1.2

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
    config.sampling.clip = False
    config.sampling.sampler = "heun"
    config.sampling.num_steps = 18
    return config
