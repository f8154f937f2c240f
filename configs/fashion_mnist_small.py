"""Fashion-MNIST with its ten classes, small enough for two CPU cores.

Expected result: plainly recognisable clothes, some of them frayed; held-out ε-error 0.078 (one
seed, 1,024 images). Cost: 29 minutes on 2 cores of an Intel Xeon with AVX-512 that other jobs
shared. Measured with ``python -m jax_ddpm.main --config=configs/fashion_mnist_small.py``,
2026-11-24; see ``experiments/results/fashion_mnist_small``.

Data: as for ``configs/fashion_mnist.py``.
"""

from ml_collections import ConfigDict

from jax_ddpm.config import default


def get_config() -> ConfigDict:
    """687,473 parameters: class-conditional, at 28, 14 and 7 pixels."""
    config = default()
    config.data.source = "idx"
    config.data.path = "data/fashion_mnist"
    config.data.flip = True
    config.data.class_names = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip

    config.model.class_conditional = True
    config.model.base_channels = 16
    config.model.channel_multipliers = (1, 2, 4)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (7,)
    config.model.num_groups = 4
    config.model.dropout = 0.0

    config.process.name = "cosine"
    config.parameterisation.variance = "fixedsmall"
    config.loss.time_sampler = "stratified"

    config.training.label_drop = 0.1
    config.training.num_steps = 1500
    config.training.batch_size = 64
    config.training.learning_rate = 2e-3
    config.training.warmup_steps = 100
    config.training.decay = "cosine"
    config.training.ema_decay = 0.99
    config.training.heldout_every = 500
    config.training.sample_every = 1500
    config.training.checkpoint_every = 250
    config.sampling.num_samples = 20
    config.sampling.batch_size = 20
    return config
