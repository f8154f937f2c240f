"""Every setting with its default, and the checks made before any device work."""

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jax_ddpm.errors import UserError


def default() -> ConfigDict:
    """All fields; a config in ``configs/`` changes those that make its experiment."""
    config = ConfigDict()
    config.task = "diffusion"  # or classification, which ignores process to loss, and sampling
    config.seed = 0
    config.parallel = "jit"  # over a mesh of all devices; or pmap
    config.init_from = ""  # workdir whose averaged parameters to start from

    config.data = ConfigDict()
    config.data.source = "digits"  # digits | npz | idx | cifar10 | folder | tfds
    config.data.path = ""  # of the file or folder; for tfds its data_dir
    config.data.name = ""  # of the tfds set, e.g. "cifar10" or "imagenet_resized/64x64:0.1.0"
    config.data.image_size = 0  # resize and crop to a square (folder, tfds); 0: as they are
    config.data.flip = False  # random horizontal flips
    config.data.shift = 0  # random shifts by up to so many pixels (classification)

    config.model = ConfigDict()
    config.model.base_channels = 128
    config.model.channel_multipliers = (1, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16,)  # heights of feature maps
    config.model.num_groups = 32  # of GroupNorm
    config.model.dropout = 0.1
    config.model.class_conditional = False
    config.model.dtype = "float32"  # of computation: float32 | bfloat16
    config.model.remat = False  # recompute activations to save memory

    config.process = ConfigDict()
    config.process.name = "linear"  # schedule: see diffusion/schedules.py
    config.process.num_timesteps = 1000
    config.process.beta_start = 1e-4  # meant for T = 1000, scaled by 1000/T
    config.process.beta_end = 0.02

    config.parameterisation = ConfigDict()
    config.parameterisation.target = "eps"  # eps | x0 | v | score | posterior_mean
    config.parameterisation.variance = "fixedlarge"  # fixedsmall | learned | learned_range

    config.loss = ConfigDict()
    config.loss.kind = "error"  # error | bound (variational) | hybrid (iDDPM)
    config.loss.weighting = "simple"  # on the ε-error: see diffusion/losses.py
    config.loss.bound_weight = 1e-3  # of the bound in the hybrid loss
    config.loss.time_sampler = "uniform"  # uniform | stratified | loss_second_moment

    config.training = ConfigDict()
    config.training.num_steps = 800_000
    config.training.batch_size = 128
    config.training.accumulate = 1  # micro-batches per step
    config.training.learning_rate = 2e-4
    config.training.warmup_steps = 5000
    config.training.decay = "constant"  # constant | cosine (to 0 at num_steps)
    config.training.adam_b1 = 0.9
    config.training.adam_b2 = 0.999
    config.training.adam_eps = 1e-8
    config.training.grad_clip = 1.0  # of the global norm
    config.training.ema_decay = 0.9999
    config.training.label_drop = 0.1  # share of labels replaced by the null label
    config.training.log_every = 100
    config.training.heldout_every = 5000
    config.training.heldout_examples = 1024  # at most
    config.training.sample_every = 20_000
    config.training.checkpoint_every = 5000
    config.training.keep_last = 2  # checkpoints
    config.training.keep_every = 100_000  # and each at a multiple of this step for good

    config.sampling = ConfigDict()
    config.sampling.num_samples = 64
    config.sampling.batch_size = 64
    config.sampling.clip = True  # the predicted x_0 to [-1, 1] in every step
    config.sampling.num_steps = 0  # evenly spaced over the chain; 0: all of it
    config.sampling.guidance_scale = 1.0  # classifier-free; 0: unconditional, 1: conditional
    return config.lock()  # a mistyped field in a config file is an error, not a new field


_CHOICES = {
    "task": ("diffusion", "classification"),
    "parallel": ("jit", "pmap"),
    "data.source": ("digits", "npz", "idx", "cifar10", "folder", "tfds"),
    "model.dtype": ("float32", "bfloat16"),
    "parameterisation.variance": ("fixedsmall", "fixedlarge", "learned", "learned_range"),
    "loss.kind": ("error", "bound", "hybrid"),
    "training.decay": ("constant", "cosine"),
}
_POSITIVE = (
    "model.num_res_blocks",
    "model.num_groups",
    "training.batch_size",
    "training.accumulate",
    "training.learning_rate",
    "training.adam_eps",
    "training.grad_clip",
    "training.log_every",
    "training.heldout_every",
    "training.heldout_examples",
    "training.sample_every",
    "training.checkpoint_every",
    "training.keep_last",
    "training.num_steps",
    "sampling.num_samples",
    "sampling.batch_size",
)
_FRACTIONS = (
    "model.dropout",
    "training.label_drop",
    "training.adam_b1",
    "training.adam_b2",
    "training.ema_decay",
)


def validate(config: ConfigDict, num_devices: int) -> None:
    """Checks all that needs no data.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    from jax_ddpm.diffusion import losses, parameterisation, schedules, time_sampling

    choices = _CHOICES | {
        "process.name": schedules.SCHEDULES,
        "parameterisation.target": tuple(parameterisation.TARGETS),
        "loss.weighting": tuple(losses.WEIGHTINGS),
        "loss.time_sampler": tuple(time_sampling.TIME_SAMPLERS),
    }
    _require(config, "seed", lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1")
    for field, known in choices.items():
        _require(config, field, known.__contains__, f"one of {', '.join(known)}")
    for field in _POSITIVE:
        _require(config, field, lambda value: value > 0, "positive")
    for field in _FRACTIONS:
        _require(config, field, lambda value: 0 <= value < 1, "in [0, 1)")
    for field in ("loss.bound_weight", "training.warmup_steps", "training.keep_every"):
        _require(config, field, lambda value: value >= 0, "0 or more")
    _require(config, "process.num_timesteps", lambda value: value >= 2, "at least 2")
    _require(
        config,
        "model.class_conditional",
        lambda value: not value or config.task == "diffusion",
        "False: a classifier is not told the class",
    )
    _validate_data(config)
    _validate_process(config)
    validate_sampling(config)

    part = config.training.accumulate * num_devices
    _require(
        config,
        "training.batch_size",
        lambda value: value % part == 0,
        f"divisible by training.accumulate × devices = {part}",
    )
    _require(
        config, "model.base_channels", lambda value: value >= 4, "at least 4, to embed the time"
    )
    _require(
        config,
        "model.channel_multipliers",
        lambda value: value and all(multiplier > 0 for multiplier in value),
        "positive numbers, one per level",
    )
    widths = [config.model.base_channels * m for m in config.model.channel_multipliers]
    _require(
        config,
        "model.num_groups",
        lambda value: all(width % value == 0 for width in widths),
        f"a divisor of every level's width {widths}",
    )


def _validate_data(config: ConfigDict) -> None:
    source = config.data.source
    if source in ("npz", "idx", "cifar10", "folder"):
        _require(config, "data.path", bool, f"the path of the data for data.source={source}")
    if source == "tfds":
        _require(config, "data.name", bool, "the name of a set of TensorFlow Datasets")
    shifts = config.task == "classification"
    _require(
        config,
        "data.shift",
        lambda value: value == 0 or (value > 0 and shifts),
        "0 or more" if shifts else "0: a diffusion model would learn to draw shifted images",
    )
    resizes = source in ("folder", "tfds")
    _require(
        config,
        "data.image_size",
        lambda value: value == 0 or (value > 0 and resizes),
        "0 or more" if resizes else f"0: data.source={source} takes images as they are",
    )


def _validate_process(config: ConfigDict) -> None:
    from jax_ddpm.diffusion.schedules import make_betas

    try:
        betas = make_betas(**config.process)
    except ValueError as error:
        raise UserError(f"config.process: {error}") from error
    if betas[-1] == 1:
        _require(
            config,
            "parameterisation.target",
            lambda value: value in ("x0", "v"),
            f"x0 or v under schedule {config.process.name!r}, which ends without signal",
        )
    learned = config.parameterisation.variance in ("learned", "learned_range")
    _require(
        config,
        "loss.kind",
        lambda value: learned or value != "hybrid",
        "error or bound while parameterisation.variance is fixed: hybrid trains a variance",
    )
    _require(
        config,
        "loss.kind",
        lambda value: not learned or value != "error",
        "hybrid or bound: the error alone does not train the variance",
    )


def validate_sampling(config: ConfigDict) -> None:
    """Checks the section ``sampling`` against the model; raises like ``validate``."""
    num_timesteps = config.process.num_timesteps
    _require(
        config,
        "sampling.num_steps",
        lambda value: 0 <= value <= num_timesteps,
        f"at most process.num_timesteps = {num_timesteps}, or 0 for all of them",
    )
    _require(
        config,
        "sampling.num_steps",
        lambda value: value in (0, num_timesteps) or config.parameterisation.variance != "learned",
        "0: the variances of parameterisation.variance=learned are for single steps of the chain",
    )
    guided = config.model.class_conditional and config.training.label_drop > 0
    _require(
        config,
        "sampling.guidance_scale",
        lambda value: value == 1 or (guided and 0 <= value < math.inf),
        "0 or more, and finite"
        if guided
        else "1: guidance needs a class-conditional model trained with training.label_drop > 0",
    )


def validate_for_data(
    config: ConfigDict, image_shape: tuple[int, int, int], num_classes: int
) -> None:
    """Checks what the data decides: sizes, attention, labels; raises like ``validate``."""
    _require(
        config,
        "task",
        lambda value: value == "diffusion" or num_classes > 0,
        "diffusion: this data has no labels",
    )
    height, width, _ = image_shape
    levels = len(config.model.channel_multipliers)
    factor = 2 ** (levels - 1)
    _require(
        config,
        "model.channel_multipliers",
        lambda value: height % factor == 0 and width % factor == 0,
        f"fewer than {levels} levels: {height}×{width} images cannot be halved {levels - 1} times",
    )
    heights = tuple(height >> level for level in range(levels))
    _require(
        config,
        "model.attention_resolutions",
        lambda value: set(value) <= set(heights),
        f"among the heights of the feature maps, {heights}",
    )
    _require(
        config,
        "model.class_conditional",
        lambda value: not value or num_classes > 0,
        "False: this data has no labels",
    )


def _require(config: ConfigDict, field: str, holds: Callable[[Any], bool], must_be: str) -> None:
    value = config
    for name in field.split("."):
        value = value[name]
    if not holds(value):
        raise UserError(f"config.{field} is {value!r}; it must be {must_be}")
