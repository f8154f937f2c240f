"""Checks of a config, made before any device work: a mistake is one line naming the field."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jax_ddpm.diffusion import losses, parameterisation, time_sampling
from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.process import Process
from jax_ddpm.diffusion.processes import CONTINUOUS, PROCESSES, make_process
from jax_ddpm.diffusion.samplers.grid import GRIDS
from jax_ddpm.diffusion.samplers.methods import METHODS, OPTIONS, usual_grid
from jax_ddpm.errors import UserError

_CHOICES = {
    "task": ("diffusion", "classification", "noisy_classification"),
    "parallel": ("jit", "pmap"),
    "data.source": ("digits", "npz", "idx", "cifar10", "folder", "tfds"),
    "model.dtype": ("float32", "bfloat16"),
    "process.name": PROCESSES,
    "parameterisation.target": tuple(parameterisation.TARGETS),
    "parameterisation.variance": ("fixedsmall", "fixedlarge", "learned", "learned_range"),
    "parameterisation.condition_on": ("time", "log_snr"),
    "loss.kind": ("error", "bound", "hybrid"),
    "loss.weighting": (*losses.WEIGHTINGS, losses.OWN_TARGET),
    "training.decay": ("constant", "cosine"),
}
_SAMPLING_CHOICES = {
    "sampling.sampler": tuple(METHODS),
    "sampling.grid": ("", *GRIDS),
    "sampling.process": ("", *CONTINUOUS),
    "sampling.guidance": ("classifier_free", "classifier", "autoguidance"),
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
    _require(config, "seed", lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1")
    for field, known in _CHOICES.items():
        _require_choice(config, field, known)
    for field in _POSITIVE:
        _require(config, field, lambda value: value > 0, "positive")
    for field in _FRACTIONS:
        _require(config, field, lambda value: 0 <= value < 1, "in [0, 1)")
    for field in ("loss.bound_weight", "training.warmup_steps", "training.keep_every"):
        _require(config, field, lambda value: value >= 0, "0 or more")
    _require(config, "process.num_timesteps", lambda value: value >= 2, "at least 2")
    _require(
        config,
        "sampling.variance",
        lambda value: value != "optimal",
        "left out in training: the optimal variance is estimated of a trained model",
    )
    _require(
        config,
        "sampling.guidance",
        lambda value: value == "classifier_free",
        "classifier_free in training: a guide is taken when the trained model is sampled",
    )
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
    shifts = config.task != "diffusion"
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
    continuous, name = config.process.name in CONTINUOUS, config.process.name
    _require(
        config,
        "process.sigma_max",
        lambda value: config.process.sigma_min < value < math.inf,
        "above process.sigma_min, and finite",
    )
    _require(config, "process.shift", lambda value: 0 < value < math.inf, "positive, and finite")
    _require(
        config,
        "process.zero_terminal_snr",
        lambda value: not (value and continuous),
        f"False: {name} is no chain",
    )
    process = _process(config)
    if process.alpha(np.array([process.time_range[1]]))[0] == 0:
        _require(
            config,
            "parameterisation.target",
            lambda value: value in ("x0", "v", "velocity", "edm"),
            f"x0, v, velocity or edm under {name}, which ends without signal",
        )
    _require(
        config,
        "parameterisation.target",
        lambda value: value != "posterior_mean" or not continuous,
        f"another one: {name} is no chain, and has no posterior mean",
    )
    _require(
        config,
        "loss.weighting",
        lambda value: value not in ("vlb", "posterior_mean") or not continuous,
        f"another one: {name} is no chain",
    )
    _require(
        config,
        "loss.kind",
        lambda value: value == "error" or not continuous,
        f"error: {name} is no chain, whose bound could be trained",
    )
    samplers = {
        False: tuple(time_sampling.TIME_SAMPLERS),
        True: ("uniform", "stratified", "log_normal", "logit_normal"),
    }[continuous]
    _require_choice(config, "loss.time_sampler", samplers, f" under {name}")
    _require(
        config,
        "loss.time_sampler",
        lambda value: value != "log_normal" or name == "edm",
        "another one: log_normal times are for process.name=edm",
    )
    _require(
        config,
        "loss.time_sampler",
        lambda value: value != "logit_normal" or name != "edm",
        "another one: logit_normal times are in (0, 1), those of process.name=edm are σ",
    )
    learned = config.parameterisation.variance in ("learned", "learned_range")
    _require(
        config,
        "parameterisation.variance",
        lambda value: not (learned and continuous),
        f"fixedsmall or fixedlarge: {name} is no chain, of whose steps variances are learned",
    )
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


def _process(config: ConfigDict) -> Process:
    try:
        return make_process(**config.process)
    except ValueError as error:
        raise UserError(f"config.process: {error}") from error


def validate_sampling(config: ConfigDict) -> None:
    """Checks the section ``sampling`` against the model; raises like ``validate``."""
    for field, known in _SAMPLING_CHOICES.items():
        _require_choice(config, field, known)
    for field in ("sampling.num_samples", "sampling.batch_size"):
        _require(config, field, lambda value: value > 0, "positive")
    for field in ("sampling.times", "sampling.churn_range", "sampling.guidance_interval"):
        _require(
            config,
            field,
            lambda value: all(isinstance(x, int | float) for x in value),
            "numbers, or ()",
        )
    _validate_grid(config)
    _validate_options(config)
    _validate_guidance(config)
    _require(
        config, "sampling.dynamic_threshold", lambda value: 0 <= value <= 1, "a quantile, 0 to 1"
    )


def _validate_grid(config: ConfigDict) -> None:
    sampling, process = config.sampling, _process(config)
    low, high = process.time_range
    signal = bool(sampling.process) or process.alpha(np.array([high]))[0] > 0
    _require(
        config,
        "sampling.grid",
        lambda value: signal or value not in ("karras", "log_snr"),
        f"uniform or quadratic: {config.process.name} ends without signal, at infinite σ/α",
    )
    own_steps = isinstance(process, Chain) and not sampling.process
    if own_steps and (sampling.grid or usual_grid(sampling.sampler, process)) == "uniform":
        num_timesteps = config.process.num_timesteps
        _require(
            config,
            "sampling.num_steps",
            lambda value: 0 <= value <= num_timesteps,
            f"at most process.num_timesteps = {num_timesteps}, or 0 for all of them",
        )
    elif not sampling.times:
        _require(
            config,
            "sampling.num_steps",
            lambda value: value > 0 or (value == 0 and own_steps),
            "1 or more" if own_steps else "1 or more: there is no chain whose steps could be taken",
        )
    if sampling.process:
        _require(config, "sampling.times", lambda value: not value, "empty with sampling.process")
    _require(
        config,
        "sampling.times",
        lambda value: all(low <= t <= high for t in value) and all(np.diff(np.array(value)) < 0),
        f"falling times from {high:g} to {low:g}",
    )


def _validate_options(config: ConfigDict) -> None:
    sampling = config.sampling
    taken = METHODS[sampling.sampler].options
    for name in set(OPTIONS) - set(taken):
        fits = [method for method, entry in METHODS.items() if name in entry.options]
        _require(
            config,
            f"sampling.{name}",
            lambda value: value in (None, ()),
            f"left out for sampler={sampling.sampler}: it is for {', '.join(fits)}",
        )
    _require(
        config,
        "sampling.variance",
        lambda value: value in (None, "fixedsmall", "fixedlarge", "optimal"),
        "one of fixedsmall, fixedlarge, optimal",
    )
    if (
        config.parameterisation.variance == "learned"
        and sampling.sampler == "ancestral"
        and sampling.variance is None
    ):
        every_step: dict[str, tuple[Any, ...]] = {
            "num_steps": (0, config.process.num_timesteps),
            "grid": ("", "uniform"),
            "times": ((),),
            "process": ("",),
        }
        for name, allowed in every_step.items():
            _require(
                config,
                f"sampling.{name}",
                allowed.__contains__,
                f"{allowed[0]!r}: the variances of parameterisation.variance=learned are for "
                "single steps of the chain",
            )
    ranges: dict[str, tuple[Callable[[Any], bool], str]] = {
        "eta": (lambda value: 0 <= value <= 1, "in [0, 1]"),
        "churn": (lambda value: 0 <= value < math.inf, "0 or more, and finite"),
        "churn_noise": (lambda value: 0 <= value < math.inf, "0 or more, and finite"),
        "order": (lambda value: 1 <= value <= 4, "from 1 to 4"),
        "snr": (lambda value: 0 < value < math.inf, "positive and finite"),
        "corrector_steps": (lambda value: value >= 0, "0 or more"),
    }
    for name, (holds, must_be) in ranges.items():
        if sampling[name] is not None:
            _require(config, f"sampling.{name}", holds, must_be)
    for name in ("churn_range", "guidance_interval"):
        _require(
            config,
            f"sampling.{name}",
            lambda value: not value or (len(value) == 2 and 0 <= value[0] < value[1]),
            "two noise levels σ/α, the lower first, or ()",
        )


def _validate_guidance(config: ConfigDict) -> None:
    sampling, conditional = config.sampling, config.model.class_conditional
    free = sampling.guidance == "classifier_free"
    _require(
        config,
        "sampling.guide",
        lambda value: bool(value) != free,
        "empty: classifier-free guidance needs no other model"
        if free
        else f"the folder of a run: what guidance={sampling.guidance} is guided by",
    )
    guided = not free or (conditional and config.training.label_drop > 0)
    _require(
        config,
        "sampling.guidance_scale",
        lambda value: value == 1 or (guided and 0 <= value < math.inf),
        "0 or more, and finite"
        if guided
        else "1: guidance needs a class-conditional model trained with training.label_drop > 0",
    )
    _require(
        config,
        "sampling.guide_step",
        lambda value: value == 0 or (value > 0 and not free),
        "0: there is no guide" if free else "the step of one of its checkpoints, or 0",
    )
    without = not free or sampling.guidance_scale in (0, 1)
    _require(
        config,
        "sampling.negative_class",
        lambda value: value is None or not (without or value < 0),
        "left out: it is for guidance=classifier_free with a scale beyond 0 and 1"
        if without
        else "a class of the data",
    )
    unguided = free and sampling.guidance_scale == 1
    for name in ("guidance_interval", "guidance_rescale"):
        _require(
            config,
            f"sampling.{name}",
            lambda value: not (value and unguided),
            "left out where guidance_scale is 1: nothing is guided",
        )
    _require(config, "sampling.guidance_rescale", lambda value: 0 <= value <= 1, "from 0 to 1")


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
    _require(
        config,
        "sampling.negative_class",
        lambda value: value is None or value < num_classes,
        f"one of this data's classes, 0 to {num_classes - 1}",
    )


def _require_choice(
    config: ConfigDict, field: str, known: tuple[str, ...], where: str = ""
) -> None:
    named = ", ".join(name or "''" for name in known)
    _require(config, field, known.__contains__, f"one of {named}{where}")


def _require(config: ConfigDict, field: str, holds: Callable[[Any], bool], must_be: str) -> None:
    value = config
    for name in field.split("."):
        value = value[name]
    if not holds(value):
        raise UserError(f"config.{field} is {value!r}; it must be {must_be}")
