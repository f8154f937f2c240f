"""Your own pictures at 64×64: point ``data.path`` at a folder and edit what follows.

Data: any images in any subfolders of ``data/pictures`` or ``--config.data.path=…``, resized and
cropped to squares. Set ``model.class_conditional`` to True if each subfolder is a class.

Expected result and cost depend on the pictures. A few thousand of one kind need a GPU and some
100,000 steps. Watch ``heldout_loss``: the model begins to memorise them when it rises. Set
``init_from`` to the workdir of another run of the same network to start from it.

Run ``python -m jax_ddpm.main --mode=check --config=configs/folder64.py`` before a long run: it
finds that a train step of 64 images takes 15.7 GB (on a CPU, 2026-11-22). Set
``training.accumulate`` to 2 or 4, or ``model.remat``, with less memory.
"""

from ml_collections import ConfigDict

from jax_ddpm.config import default


def get_config() -> ConfigDict:
    """37,064,707 parameters, the cosine schedule, flips."""
    config = default()
    config.data.source = "folder"
    config.data.path = "data/pictures"
    config.data.image_size = 64
    config.data.flip = True  # False where left and right differ, as in writing

    config.model.class_conditional = False
    config.model.base_channels = 128
    config.model.channel_multipliers = (1, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16, 8)
    config.model.dropout = 0.1

    config.process.name = "cosine"
    config.parameterisation.variance = "fixedsmall"
    config.loss.time_sampler = "stratified"

    config.training.num_steps = 200_000
    config.training.batch_size = 64
    config.training.learning_rate = 1e-4
    config.training.warmup_steps = 2000
    config.training.ema_decay = 0.9999
    config.training.heldout_every = 2000
    config.training.sample_every = 10_000
    config.training.checkpoint_every = 2000
    config.sampling.num_samples = 64
    config.sampling.batch_size = 64
    return config
