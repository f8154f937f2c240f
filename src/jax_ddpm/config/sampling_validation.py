"""Checks of a config's section ``sampling`` against its model, made before any device work."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jax_ddpm.config.requirements import process_of, require, require_choice
from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.processes import CONTINUOUS
from jax_ddpm.diffusion.samplers.grid import GRIDS
from jax_ddpm.diffusion.samplers.methods import METHODS, OPTIONS, usual_grid

_CHOICES = {
    "sampling.sampler": tuple(METHODS),
    "sampling.grid": ("", *GRIDS),
    "sampling.process": ("", *CONTINUOUS),
    "sampling.guidance": ("classifier_free", "classifier", "autoguidance"),
}


def validate_sampling(config: ConfigDict) -> None:
    """Checks ``sampling`` against the model; raises a UserError that names the field."""
    for field, known in _CHOICES.items():
        require_choice(config, field, known)
    for field in ("sampling.num_samples", "sampling.batch_size"):
        require(config, field, lambda value: value > 0, "positive")
    for field in ("sampling.times", "sampling.churn_range", "sampling.guidance_interval"):
        require(
            config,
            field,
            lambda value: all(isinstance(x, int | float) for x in value),
            "numbers, or ()",
        )
    _validate_grid(config)
    _validate_options(config)
    _validate_guidance(config)
    require(
        config, "sampling.dynamic_threshold", lambda value: 0 <= value <= 1, "a quantile, 0 to 1"
    )


def _validate_grid(config: ConfigDict) -> None:
    sampling, process = config.sampling, process_of(config)
    low, high = process.time_range
    signal = bool(sampling.process) or process.alpha(np.array([high]))[0] > 0
    require(
        config,
        "sampling.grid",
        lambda value: signal or value not in ("karras", "log_snr"),
        f"uniform or quadratic: {config.process.name} ends without signal, at infinite σ/α",
    )
    own_steps = isinstance(process, Chain) and not sampling.process
    if own_steps and (sampling.grid or usual_grid(sampling.sampler, process)) == "uniform":
        num_timesteps = config.process.num_timesteps
        require(
            config,
            "sampling.num_steps",
            lambda value: 0 <= value <= num_timesteps,
            f"at most process.num_timesteps = {num_timesteps}, or 0 for all of them",
        )
    elif not sampling.times:
        require(
            config,
            "sampling.num_steps",
            lambda value: value > 0 or (value == 0 and own_steps),
            "1 or more" if own_steps else "1 or more: there is no chain whose steps could be taken",
        )
    if sampling.process:
        require(config, "sampling.times", lambda value: not value, "empty with sampling.process")
    require(
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
        require(
            config,
            f"sampling.{name}",
            lambda value: value in (None, ()),
            f"left out for sampler={sampling.sampler}: it is for {', '.join(fits)}",
        )
    require(
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
            require(
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
            require(config, f"sampling.{name}", holds, must_be)
    for name in ("churn_range", "guidance_interval"):
        require(
            config,
            f"sampling.{name}",
            lambda value: not value or (len(value) == 2 and 0 <= value[0] < value[1]),
            "two noise levels σ/α, the lower first, or ()",
        )


def _validate_guidance(config: ConfigDict) -> None:
    sampling, conditional = config.sampling, config.model.class_conditional
    free = sampling.guidance == "classifier_free"
    require(
        config,
        "sampling.guide",
        lambda value: bool(value) != free,
        "empty: classifier-free guidance needs no other model"
        if free
        else f"the folder of a run: what guidance={sampling.guidance} is guided by",
    )
    guided = not free or (conditional and config.training.label_drop > 0)
    require(
        config,
        "sampling.guidance_scale",
        lambda value: value == 1 or (guided and 0 <= value < math.inf),
        "0 or more, and finite"
        if guided
        else "1: guidance needs a class-conditional model trained with training.label_drop > 0",
    )
    require(
        config,
        "sampling.guide_step",
        lambda value: value == 0 or (value > 0 and not free),
        "0: there is no guide" if free else "the step of one of its checkpoints, or 0",
    )
    without = not free or sampling.guidance_scale in (0, 1)
    require(
        config,
        "sampling.negative_class",
        lambda value: value is None or not (without or value < 0),
        "left out: it is for guidance=classifier_free with a scale beyond 0 and 1"
        if without
        else "a class of the data",
    )
    unguided = free and sampling.guidance_scale == 1
    for name in ("guidance_interval", "guidance_rescale"):
        require(
            config,
            f"sampling.{name}",
            lambda value: not (value and unguided),
            "left out where guidance_scale is 1: nothing is guided",
        )
    require(config, "sampling.guidance_rescale", lambda value: 0 <= value <= 1, "from 0 to 1")
