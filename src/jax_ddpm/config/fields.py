"""Every field of a config: those read off the tables' rows, and all other settings."""

from collections.abc import Mapping
from typing import Any

from jax_ddpm import options
from jax_ddpm.data.table import SOURCES
from jax_ddpm.diffusion.guidance import RescaledGuidance
from jax_ddpm.diffusion.losses import OWN_TARGET, WEIGHTINGS
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.processes import CONTINUOUS, PROCESSES
from jax_ddpm.diffusion.samplers.grid import GRIDS
from jax_ddpm.diffusion.samplers.table import SAMPLERS
from jax_ddpm.diffusion.thresholding import ThresholdedDenoiser
from jax_ddpm.models.table import CLASSIFIERS, NETWORKS
from jax_ddpm.options import (
    OneOf,
    Option,
    Table,
    Where,
    fraction,
    noise_levels,
    not_negative,
    numbers,
    positive,
)
from jax_ddpm.tasks.table import TASKS

GUIDANCE = ("classifier_free", "classifier", "autoguidance")


def tables() -> dict[str, Mapping[str, Any]]:
    """The choosing field → its choices; the options of a choice are ``options.of(row)``."""
    return {
        "task": TASKS,
        "data.source": SOURCES,
        "model.name": Table(NETWORKS | CLASSIFIERS),
        "process.name": PROCESSES,
        "sampling.sampler": SAMPLERS,
        "sampling.grid": GRIDS,
        "sampling.process": CONTINUOUS,
    }


def fields() -> dict[str, Option]:
    """All fields by their names, ``section.field``.

    An option that several rows of a table declare is one field, with the default of the first. A
    sampler is chosen anew each time, so its options are None by default, which stands for the
    sampler's own default; options of another sampler are refused.
    """
    sections = {
        "": _RUN,
        "data": {"source": _source()} | _of(SOURCES) | _DATA,
        "model": {"name": _network()} | _of(NETWORKS | CLASSIFIERS) | _MODEL,
        "process": {"name": _process()} | _of(PROCESSES),
        "parameterisation": options.of(Parameterisation) | _PARAMETERISATION,
        "loss": _LOSS,
        "training": _TRAINING,
        "sampling": _sampling(),
    }
    return {
        f"{section}.{name}".lstrip("."): option
        for section, of_section in sections.items()
        for name, option in of_section.items()
    }


def _of(table: Mapping[str, Any]) -> dict[str, Option]:
    found: dict[str, Option] = {}
    for row in table.values():
        found = options.of(row) | found
    return found


def _source() -> Option:
    return Option("Where images come from.", OneOf(SOURCES), "digits")


def _network() -> Option:
    meaning = "The network; '': the task's usual."
    return Option(meaning, OneOf(NETWORKS | CLASSIFIERS, also=("",)), "")


def _process() -> Option:
    return Option(
        "A chain's schedule, or a process of continuous time.", OneOf(PROCESSES), "linear"
    )


def _sampling() -> dict[str, Option]:
    own_default = {
        name: option._replace(default=() if option.kind is tuple else None)
        for name, option in _of(SAMPLERS).items()
    }
    return {name: option._replace(free=True) for name, option in (_SAMPLING | own_default).items()}


_RUN = {
    "task": Option("What is trained.", OneOf(TASKS), "diffusion"),
    "modules": Option(
        "Your own modules, imported for the rows that they add to the tables.", default=()
    ),
    "seed": Option(
        "Of everything random.", Where(lambda s: 0 <= s < 2**32, "from 0 to 2**32 - 1"), 0
    ),
    "parallel": Option(
        "jit over a mesh of all devices, or pmap.", OneOf(("jit", "pmap")), "jit", free=True
    ),
    "fsdp": Option("Neighbouring devices that share the train state.", positive, 1, free=True),
    "deterministic": Option("Bit for bit the same on a GPU too.", default=False, free=True),
    "init_from": Option("Workdir whose averaged parameters to start from.", default=""),
}
_DATA = {
    "flip": Option("Random horizontal flips.", default=False),
    "resident_gigabytes": Option(
        "A set up to this size lies on every device as uint8.", not_negative, 1.0, free=True
    ),
    "shift": Option("Random shifts by up to so many pixels, for classifiers.", default=0),
}
_MODEL = {
    "class_conditional": Option("The network is told the class.", default=False),
    "self_condition": Option("It is told its own earlier estimate of x_0.", default=False),
    "dtype": Option("Of computation.", OneOf(("float32", "bfloat16")), "float32"),
}
_PARAMETERISATION = {
    "variance": Option(
        "Of the reverse steps.",
        OneOf(("fixedsmall", "fixedlarge", "learned", "learned_range")),
        "fixedlarge",
    ),
}
_LOSS = {
    "kind": Option(
        "The error, the variational bound, or both (iDDPM).",
        OneOf(("error", "bound", "hybrid")),
        "error",
    ),
    "weighting": Option(
        "On the ε-error; target: the plain error in the network's own target.",
        OneOf(WEIGHTINGS | {OWN_TARGET: None}),
        "simple",
    ),
    "bound_weight": Option("Of the bound in the hybrid loss.", not_negative, 1e-3),
    "time_sampler": Option(
        "uniform | stratified; loss_second_moment (chain), log_normal (edm), logit_normal (flow).",
        default="uniform",
    ),
    "time_mean": Option("Of log t or of log(t/(1-t)).", default=-1.2),
    "time_std": Option("Likewise.", positive, 1.2),
}
_TRAINING = {
    "num_steps": Option("Steps in all.", positive, 800_000, free=True),
    "batch_size": Option("Images per step, over all devices.", positive, 128),
    "accumulate": Option("Micro-batches per step.", positive, 1, free=True),
    "steps_per_dispatch": Option("Steps in a row without the host.", positive, 1, free=True),
    "learning_rate": Option("After the warm-up.", positive, 2e-4),
    "warmup_steps": Option("Steps of linear warm-up.", not_negative, 5000),
    "decay": Option(
        "Of the learning rate: cosine, to 0 at num_steps.",
        OneOf(("constant", "cosine")),
        "constant",
    ),
    "adam_b1": Option("Decay of the first moment.", fraction, 0.9),
    "adam_b2": Option("Decay of the second moment.", fraction, 0.999),
    "adam_eps": Option("Added to the root of the second moment.", positive, 1e-8),
    "grad_clip": Option("Of the gradient's global norm.", positive, 1.0),
    "ema_decay": Option("Of the averaged parameters.", fraction, 0.9999),
    "label_drop": Option("Share of labels replaced by the null label.", fraction, 0.1),
    "log_every": Option("Steps between lines of metrics.", positive, 100, free=True),
    "heldout_every": Option("Steps between held-out losses.", positive, 5000, free=True),
    "heldout_examples": Option("Of the held-out loss, at most.", positive, 1024, free=True),
    "sample_every": Option("Steps between pictures.", positive, 20_000, free=True),
    "checkpoint_every": Option("Steps between checkpoints.", positive, 5000, free=True),
    "keep_last": Option("Checkpoints kept.", positive, 2, free=True),
    "keep_every": Option(
        "Each at a multiple of this step is kept for good; 0: none.",
        not_negative,
        100_000,
        free=True,
    ),
}
_SAMPLING = {
    "num_samples": Option("Images of the pictures in training.", positive, 64),
    "batch_size": Option("Images at a time.", positive, 64),
    "clip": Option("The predicted x_0 to [-1, 1] in every step.", default=True),
    "dynamic_threshold": options.of(ThresholdedDenoiser)["quantile"]._replace(default=0.0),
    "sampler": Option("The method.", OneOf(SAMPLERS), "ancestral"),
    "num_steps": Option("Steps; 0: all of a chain.", default=0),
    "grid": Option("How steps are spaced; '': the sampler's usual.", OneOf(GRIDS, also=("",)), ""),
    "times": Option("Or these times, falling.", numbers, ()),
    "process": Option(
        "To sample under, of continuous time; '': the one of training.",
        OneOf(CONTINUOUS, also=("",)),
        "",
    ),
    "guidance": Option("By what.", OneOf(GUIDANCE), "classifier_free"),
    "guidance_scale": Option(
        "0: without the guide; classifier-free 0: unconditional.", default=1.0
    ),
    "guidance_interval": Option(
        "Noise levels σ/α where it guides; (): everywhere.", noise_levels, ()
    ),
    "guidance_rescale": options.of(RescaledGuidance)["phi"]._replace(default=0.0),
    "guide": Option("Workdir of the classifier, or of the worse model.", default=""),
    "guide_step": Option("Of its checkpoint; 0: the newest.", default=0),
    "negative_class": Option("To be guided away from.", kind=int),
}
