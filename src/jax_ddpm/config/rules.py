"""Rules between fields of different sections."""

import operator

import numpy as np
from ml_collections import ConfigDict

from jax_ddpm import factory, options
from jax_ddpm.data.table import SOURCES
from jax_ddpm.diffusion.parameterisation import WITHOUT_SIGNAL
from jax_ddpm.diffusion.process import Process
from jax_ddpm.diffusion.processes import CONTINUOUS, PROCESSES
from jax_ddpm.diffusion.samplers.table import SAMPLERS, usual_grid
from jax_ddpm.diffusion.time_sampling import TIME_SAMPLERS
from jax_ddpm.options import OneOf, require
from jax_ddpm.runtime.distributed import several
from jax_ddpm.tasks.optimisers import OPTIMISERS
from jax_ddpm.tasks.table import task_of


def check_devices(config: ConfigDict, num_devices: int) -> None:
    """Checks how the work is shared."""
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


def check_task(config: ConfigDict) -> None:
    """Checks what only some tasks take."""
    shifts = not task_of(config).draws
    require(
        config,
        "data.shift",
        lambda value: value == 0 or (value > 0 and shifts),
        "0 or more" if shifts else "0: a diffusion model would learn to draw shifted images",
    )
    require(
        config,
        "model.class_conditional",
        lambda value: not (value and shifts),
        "False: a classifier is not told the class",
    )


def check_optimiser(config: ConfigDict) -> None:
    """Refuses options of other optimisers, which would do nothing."""
    name, rows = config.training.optimiser, OPTIMISERS.of(config.modules)
    others = {option: usual for row in rows.values() for option, usual in options.of(row).items()}
    for option in others.keys() - options.of(rows[name]):
        usual = others[option].default
        must_be = f"left at {usual}: it is not for optimiser={name}"
        require(config, f"training.{option}", (usual,).__contains__, must_be)


def check_source(config: ConfigDict) -> None:
    """Refuses what the source cannot do: resize images, call classes by names of the user's."""
    source = config.data.source
    unable = {
        "image_size": "0: data.source={} takes images as they are",
        "class_names": "left out: data.source={} has names of its own, or no classes",
    }
    for name, must_be in unable.items():
        if name not in options.of(SOURCES[source]):
            require(config, f"data.{name}", operator.not_, must_be.format(source))


def check_process(config: ConfigDict) -> None:
    """Checks what only a chain has (zero terminal SNR, bound, weights); targets at pure noise."""
    name, process = config.process.name, factory.make_process(config)
    if process.alpha(np.array(process.time_range))[1] == 0:
        must_be = f"{', '.join(WITHOUT_SIGNAL)} under {name}, which ends without signal"
        require(config, "parameterisation.target", WITHOUT_SIGNAL.__contains__, f"one of {must_be}")
    require(
        config,
        "process.zero_terminal_snr",
        lambda value: not value or "zero_terminal_snr" in options.of(PROCESSES[name]),
        f"False: {name} is no chain",
    )
    if name not in CONTINUOUS:
        return
    require(
        config,
        "loss.weighting",
        lambda value: value not in ("vlb", "posterior_mean"),
        f"another one: {name} is no chain",
    )
    require(
        config,
        "loss.kind",
        lambda value: value == "error",
        f"error: {name} is no chain, whose bound could be trained",
    )


def check_loss(config: ConfigDict) -> None:
    """Checks that times fit the process, and that the loss trains the variance if it is learned."""
    name = config.process.name
    continuous = ("uniform", "stratified", "log_normal", "logit_normal")
    times = OneOf(continuous if name in CONTINUOUS else tuple(TIME_SAMPLERS))
    require(config, "loss.time_sampler", times.holds, f"{times.must_be} under {name}")
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


def check_training_samples(config: ConfigDict) -> None:
    """Refuses what pictures cannot use during training."""
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


def check_steps(config: ConfigDict, process: Process) -> None:
    """Checks the number of steps and the times of sampling, under the process of training."""
    sampling = config.sampling
    low, high = process.time_range
    own_steps = process.num_timesteps > 0 and not sampling.process
    on_chain = (sampling.grid or usual_grid(sampling.sampler, process)) == "uniform"
    if own_steps and on_chain:
        total = config.process.num_timesteps
        require(
            config,
            "sampling.num_steps",
            lambda value: 0 <= value <= total,
            f"at most process.num_timesteps = {total}, or 0 for all of them",
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
    if config.parameterisation.variance == "learned" and sampling.sampler == "ancestral":
        _check_single_steps(config)


def _check_single_steps(config: ConfigDict) -> None:
    if config.sampling.variance is not None:
        return
    total = config.process.num_timesteps
    usual = {"num_steps": (0, total), "grid": ("", "uniform"), "times": ((),), "process": ("",)}
    for name, allowed in usual.items():
        require(
            config,
            f"sampling.{name}",
            allowed.__contains__,
            f"{allowed[0]!r}: the variances of parameterisation.variance=learned are for single "
            "steps of the chain",
        )


def check_options(config: ConfigDict) -> None:
    """Refuses options of other samplers."""
    name = config.sampling.sampler
    rows = SAMPLERS.of(config.modules)
    taken_by = {method: options.of(row) for method, row in rows.items()}
    for option in {option: None for row in taken_by.values() for option in row}:
        fits = [method for method, row in taken_by.items() if option in row]
        if name not in fits:
            must_be = f"left out for sampler={name}: it is for {', '.join(fits)}"
            require(config, f"sampling.{option}", (None, ()).__contains__, must_be)


def check_guidance(config: ConfigDict) -> None:
    """Checks what guides a model, and how strongly, apart from what it is told."""
    sampling = config.sampling
    free = sampling.guidance == "classifier_free"
    require(
        config,
        "sampling.guide",
        lambda value: bool(value) != free,
        "empty: classifier-free guidance needs no other model"
        if free
        else f"the folder of a run: what guidance={sampling.guidance} is guided by",
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
        lambda value: value is None or not (without or str(value).startswith("-")),
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
