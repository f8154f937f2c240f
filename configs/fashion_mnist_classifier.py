"""A classifier of Fashion-MNIST, to measure samples of it by its features and classes.

Expected result: 90.6 % of the 10,000 test images right, at a cross-entropy of 0.259 nats (one
seed). Measured with ``python -m jax_ddpm.main --config=configs/fashion_mnist_classifier.py`` on 2
cores of an Intel Xeon with AVX-512, 2026-11-23; cost: 17 minutes on cores shared with other work, 6
minutes of processor time.

Data: as for ``configs/fashion_mnist.py``.
"""

from ml_collections import ConfigDict

from jax_ddpm.config import default


def get_config() -> ConfigDict:
    """64 features: a residual network at 28, 14 and 7 pixels."""
    config = default()
    config.task = "classification"
    config.data.source = "idx"
    config.data.path = "data/fashion_mnist"
    config.data.flip = True
    config.data.class_names = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip

    config.model.base_channels = 8
    config.model.channel_multipliers = (1, 4, 8)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = ()
    config.model.num_groups = 4
    config.model.dropout = 0.0

    config.training.num_steps = 4000
    config.training.batch_size = 64
    config.training.learning_rate = 3e-3
    config.training.warmup_steps = 100
    config.training.decay = "cosine"
    config.training.ema_decay = 0.99
    config.training.log_every = 100
    config.training.heldout_every = 2000
    config.training.heldout_examples = 10_000
    config.training.checkpoint_every = 500
    return config
