"""Fashion-MNIST with its ten classes (Xiao et al. 2017), one in each column of the sample grid.

Expected result: plainly recognisable clothes. Never trained to the end here. Measured: a train
step of 128 images takes 3.5 GB (``--mode=check --config=configs/fashion_mnist.py`` on a CPU,
2026-11-22).

Data: the four files ``train-images-idx3-ubyte.gz``, ``train-labels-idx1-ubyte.gz``,
``t10k-images-idx3-ubyte.gz`` and ``t10k-labels-idx1-ubyte.gz`` in ``data/fashion_mnist`` or
``--config.data.path=…``. MNIST and similar data sets come in the same files.
"""

from ml_collections import ConfigDict

from jax_ddpm.config import default


def get_config() -> ConfigDict:
    """6,472,705 parameters: class-conditional, at 28, 14 and 7 pixels."""
    config = default()
    config.data.source = "idx"
    config.data.path = "data/fashion_mnist"
    config.data.flip = True
    config.data.class_names = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip

    config.model.class_conditional = True
    config.model.base_channels = 64
    config.model.channel_multipliers = (1, 2, 2)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (7,)
    config.model.dropout = 0.1

    config.process.name = "cosine"
    config.parameterisation.variance = "fixedsmall"
    config.loss.time_sampler = "stratified"

    config.training.num_steps = 50_000
    config.training.batch_size = 128
    config.training.learning_rate = 4e-4
    config.training.warmup_steps = 1000
    config.training.decay = "cosine"
    config.training.ema_decay = 0.999
    config.training.heldout_every = 2000
    config.training.sample_every = 10_000
    config.training.checkpoint_every = 2000
    config.sampling.num_samples = 100
    config.sampling.batch_size = 100
    return config
