"""Checks of a config, made before any device work: a mistake is one line naming the field."""

import math

import numpy as np
from ml_collections import ConfigDict

from jax_ddpm.config.requirements import process_of, require, require_choice
from jax_ddpm.config.sampling_validation import validate_sampling
from jax_ddpm.diffusion import losses, parameterisation, time_sampling
from jax_ddpm.diffusion.processes import CONTINUOUS, PROCESSES
from jax_ddpm.models.remat import REMAT_POLICIES
from jax_ddpm.runtime.distributed import several

_CHOICES = {
    "task": ("diffusion", "classification", "noisy_classification"),
    "parallel": ("jit", "pmap"),
    "data.source": ("digits", "npz", "idx", "cifar10", "folder", "tfds"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("", *REMAT_POLICIES),
    "process.name": PROCESSES,
    "parameterisation.target": tuple(parameterisation.TARGETS),
    "parameterisation.variance": ("fixedsmall", "fixedlarge", "learned", "learned_range"),
    "parameterisation.condition_on": ("time", "log_snr"),
    "loss.kind": ("error", "bound", "hybrid"),
    "loss.weighting": (*losses.WEIGHTINGS, losses.OWN_TARGET),
    "training.decay": ("constant", "cosine"),
}
_POSITIVE = (
    "fsdp",
    "model.num_res_blocks",
    "model.num_groups",
    "training.batch_size",
    "training.accumulate",
    "training.steps_per_dispatch",
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
    "process.sigma_min",
    "parameterisation.data_std",
    "loss.time_std",
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
    require(config, "seed", lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1")
    for field, known in _CHOICES.items():
        require_choice(config, field, known)
    for field in _POSITIVE:
        require(config, field, lambda value: value > 0, "positive")
    for field in _FRACTIONS:
        require(config, field, lambda value: 0 <= value < 1, "in [0, 1)")
    for field in (
        "loss.bound_weight",
        "training.warmup_steps",
        "training.keep_every",
        "data.resident_gigabytes",
    ):
        require(config, field, lambda value: value >= 0, "0 or more")
    require(config, "process.num_timesteps", lambda value: value >= 2, "at least 2")
    require(
        config,
        "sampling.variance",
        lambda value: value != "optimal",
        "left out in training: the optimal variance is estimated of a trained model",
    )
    require(
        config,
        "sampling.guidance",
        lambda value: value == "classifier_free",
        "classifier_free in training: a guide is taken when the trained model is sampled",
    )
    require(
        config,
        "model.class_conditional",
        lambda value: not value or config.task == "diffusion",
        "False: a classifier is not told the class",
    )
    _validate_data(config)
    _validate_process(config)
    validate_sampling(config)

    require(
        config,
        "fsdp",
        lambda value: num_devices % value == 0,
        f"a divisor of the {num_devices} devices",
    )
    require(
        config,
        "fsdp",
        lambda value: value == 1 or config.parallel == "jit",
        "1 under parallel=pmap, which keeps the state whole on every device",
    )
    require(
        config,
        "parallel",
        lambda value: value == "jit" or not several(),
        "jit for a job of several processes",
    )
    part = config.training.accumulate * num_devices
    require(
        config,
        "training.batch_size",
        lambda value: value % part == 0,
        f"divisible by training.accumulate × devices = {part}",
    )
    require(
        config, "model.base_channels", lambda value: value >= 4, "at least 4, to embed the time"
    )
    require(
        config,
        "model.channel_multipliers",
        lambda value: value and all(multiplier > 0 for multiplier in value),
        "positive numbers, one per level",
    )
    widths = [config.model.base_channels * m for m in config.model.channel_multipliers]
    require(
        config,
        "model.num_groups",
        lambda value: all(width % value == 0 for width in widths),
        f"a divisor of every level's width {widths}",
    )


def _validate_data(config: ConfigDict) -> None:
    source = config.data.source
    if source in ("npz", "idx", "cifar10", "folder"):
        require(config, "data.path", bool, f"the path of the data for data.source={source}")
    if source == "tfds":
        require(config, "data.name", bool, "the name of a set of TensorFlow Datasets")
    shifts = config.task != "diffusion"
    require(
        config,
        "data.shift",
        lambda value: value == 0 or (value > 0 and shifts),
        "0 or more" if shifts else "0: a diffusion model would learn to draw shifted images",
    )
    resizes = source in ("folder", "tfds")
    require(
        config,
        "data.image_size",
        lambda value: value == 0 or (value > 0 and resizes),
        "0 or more" if resizes else f"0: data.source={source} takes images as they are",
    )


def _validate_process(config: ConfigDict) -> None:
    continuous, name = config.process.name in CONTINUOUS, config.process.name
    require(
        config,
        "process.sigma_max",
        lambda value: config.process.sigma_min < value < math.inf,
        "above process.sigma_min, and finite",
    )
    require(config, "process.shift", lambda value: 0 < value < math.inf, "positive, and finite")
    require(
        config,
        "process.zero_terminal_snr",
        lambda value: not (value and continuous),
        f"False: {name} is no chain",
    )
    process = process_of(config)
    if process.alpha(np.array([process.time_range[1]]))[0] == 0:
        require(
            config,
            "parameterisation.target",
            lambda value: value in ("x0", "v", "velocity", "edm"),
            f"x0, v, velocity or edm under {name}, which ends without signal",
        )
    require(
        config,
        "parameterisation.target",
        lambda value: value != "posterior_mean" or not continuous,
        f"another one: {name} is no chain, and has no posterior mean",
    )
    require(
        config,
        "loss.weighting",
        lambda value: value not in ("vlb", "posterior_mean") or not continuous,
        f"another one: {name} is no chain",
    )
    require(
        config,
        "loss.kind",
        lambda value: value == "error" or not continuous,
        f"error: {name} is no chain, whose bound could be trained",
    )
    samplers = {
        False: tuple(time_sampling.TIME_SAMPLERS),
        True: ("uniform", "stratified", "log_normal", "logit_normal"),
    }[continuous]
    require_choice(config, "loss.time_sampler", samplers, f" under {name}")
    require(
        config,
        "loss.time_sampler",
        lambda value: value != "log_normal" or name == "edm",
        "another one: log_normal times are for process.name=edm",
    )
    require(
        config,
        "loss.time_sampler",
        lambda value: value != "logit_normal" or name != "edm",
        "another one: logit_normal times are in (0, 1), those of process.name=edm are σ",
    )
    learned = config.parameterisation.variance in ("learned", "learned_range")
    require(
        config,
        "parameterisation.variance",
        lambda value: not (learned and continuous),
        f"fixedsmall or fixedlarge: {name} is no chain, of whose steps variances are learned",
    )
    require(
        config,
        "loss.kind",
        lambda value: learned or value != "hybrid",
        "error or bound while parameterisation.variance is fixed: hybrid trains a variance",
    )
    require(
        config,
        "loss.kind",
        lambda value: not learned or value != "error",
        "hybrid or bound: the error alone does not train the variance",
    )


def validate_for_data(
    config: ConfigDict, image_shape: tuple[int, int, int], num_classes: int
) -> None:
    """Checks what the data decides: sizes, attention, labels; raises like ``validate``."""
    require(
        config,
        "task",
        lambda value: value == "diffusion" or num_classes > 0,
        "diffusion: this data has no labels",
    )
    height, width, _ = image_shape
    levels = len(config.model.channel_multipliers)
    factor = 2 ** (levels - 1)
    require(
        config,
        "model.channel_multipliers",
        lambda value: height % factor == 0 and width % factor == 0,
        f"fewer than {levels} levels: {height}×{width} images cannot be halved {levels - 1} times",
    )
    heights = tuple(height >> level for level in range(levels))
    require(
        config,
        "model.attention_resolutions",
        lambda value: set(value) <= set(heights),
        f"among the heights of the feature maps, {heights}",
    )
    require(
        config,
        "model.class_conditional",
        lambda value: not value or num_classes > 0,
        "False: this data has no labels",
    )
    require(
        config,
        "sampling.negative_class",
        lambda value: value is None or value < num_classes,
        f"one of this data's classes, 0 to {num_classes - 1}",
    )
