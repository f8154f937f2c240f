"""Every field of a config: those read off the tables' rows, and all other settings."""

from collections.abc import Iterable, Mapping
from typing import Any

from jax_ddpm import options
from jax_ddpm.codecs.table import CODECS
from jax_ddpm.data.table import SOURCES
from jax_ddpm.diffusion.guidance import RescaledGuidance
from jax_ddpm.diffusion.losses import OWN_TARGET, WEIGHTINGS
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.processes import CONTINUOUS, PROCESSES
from jax_ddpm.diffusion.samplers.grid import GRIDS
from jax_ddpm.diffusion.samplers.table import SAMPLERS
from jax_ddpm.diffusion.thresholding import ThresholdedDenoiser
from jax_ddpm.errors import UserError
from jax_ddpm.models.table import CLASSIFIERS, NETWORKS
from jax_ddpm.options import (
    NAME_OR_NUMBER,
    OneOf,
    Option,
    Where,
    at_most,
    between,
    finite,
    fraction,
    noise_levels,
    not_negative,
    not_negative_and_finite,
    numbers,
    positive,
    positive_and_finite,
)
from jax_ddpm.tasks.optimisers import OPTIMISERS
from jax_ddpm.tasks.table import TASKS

GUIDANCE = ("classifier_free", "classifier", "autoguidance")


def tables(modules: Iterable[str] = ()) -> dict[str, Mapping[str, Any]]:
    """The field that chooses → its choices, those of the user's modules among them.

    The options of a choice are ``options.of(row)``.
    """
    modules = tuple(modules)
    return {
        "task": TASKS.of(modules),
        "data.source": SOURCES.of(modules),
        "model.name": NETWORKS.of(modules) | CLASSIFIERS.of(modules),
        "model.codec": CODECS.of(modules),
        "process.name": PROCESSES.of(modules),
        "training.optimiser": OPTIMISERS.of(modules),
        "sampling.sampler": SAMPLERS.of(modules),
        "sampling.grid": GRIDS.of(modules),
        "sampling.process": CONTINUOUS.of(modules),
    }


def fields(modules: Iterable[str] = ()) -> dict[str, Option]:
    """All fields by their names, ``section.field``.

    An option that several rows of a table declare is one field, with the default of the first. How
    to sample is asked anew each time, so a sampler's options are None there, which stands for the
    sampler's own default, and those of another sampler are refused.

    Raises:
      UserError: where a row's option is named like another field, or of another kind than before.
    """
    known = tables(modules)
    samplers = {
        name: option._replace(default=() if option.kind is tuple else None)
        for name, option in _of(known["sampling.sampler"]).items()
    }
    sections: dict[str, tuple[dict[str, Option], ...]] = {
        "": (_RUN, _of(known["task"])),
        "data": (_of(known["data.source"]), _DATA),
        "model": (_of(known["model.name"]), _of(known["model.codec"]), _MODEL),
        "process": (_of(known["process.name"]), _PROCESS),
        "parameterisation": (options.of(Parameterisation), _PARAMETERISATION),
        "loss": (_LOSS,),
        "training": (_TRAINING, _of(known["training.optimiser"])),
        "sampling": (samplers, _SAMPLING),
    }
    found = {}
    for section, parts in sections.items():
        for name, option in ((name, option) for part in parts for name, option in part.items()):
            field = f"{section}.{name}".lstrip(".")
            if field in found:
                raise UserError(f"an option named {name}: config.{field} is something else")
            if field in known:
                usual = ("",) if option.default == "" else ()
                option = option._replace(range=OneOf(known[field], also=usual))
            found[field] = option._replace(free=option.free or section == "sampling")
    return found


def _of(table: Mapping[str, Any]) -> dict[str, Option]:
    found: dict[str, Option] = {}
    for row, choice in table.items():
        for name, option in options.of(choice).items():
            if name in found and found[name].kind is not option.kind:
                known, other = (getattr(k, "__name__", k) for k in (found[name].kind, option.kind))
                kinds = f"{known}, not {other}"
                raise UserError(f"the option {name} of {row} is {kinds}, elsewhere; rename it")
            found.setdefault(name, option)
    return found


_RUN = {
    "task": Option("What is trained.", default="diffusion"),
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
    "source": Option("Where images come from.", default="digits"),
    "flip": Option("Random horizontal flips.", default=False),
    "resident_gigabytes": Option(
        "A set up to this size lies on every device as uint8.", not_negative, 1.0, free=True
    ),
    "shift": Option("Random shifts by up to so many pixels, for classifiers.", between(0, 1000), 0),
}
_MODEL = {
    "name": Option("The network; '': the task's usual.", default=""),
    "codec": Option("What images are diffused as.", default="pixels"),
    "class_conditional": Option("The network is told the class.", default=False),
    "self_condition": Option("It is told its own earlier estimate of x_0.", default=False),
    "dtype": Option("Of computation.", OneOf(("float32", "bfloat16")), "float32"),
}
_PROCESS = {
    "name": Option("A chain's schedule, or a process of continuous time.", default="linear"),
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
    "bound_weight": Option("Of the bound in the hybrid loss.", not_negative_and_finite, 1e-3),
    "time_sampler": Option(
        "uniform | stratified; loss_second_moment (chain), log_normal (edm), logit_normal (flow).",
        default="uniform",
    ),
    "time_mean": Option("Of log t or of log(t/(1-t)).", finite, -1.2),
    "time_std": Option("Likewise.", positive_and_finite, 1.2),
}
_TRAINING = {
    "num_steps": Option("Steps in all.", positive, 800_000, free=True),
    "batch_size": Option("Images per step, over all devices.", between(1, 10**6), 128),
    "accumulate": Option("Micro-batches per step.", positive, 1, free=True),
    "steps_per_dispatch": Option(
        "Steps in a row without the host.", between(1, 10**4), 1, free=True
    ),
    "learning_rate": Option("After the warm-up.", positive_and_finite, 2e-4),
    "warmup_steps": Option("Steps of linear warm-up.", not_negative, 5000),
    "decay": Option(
        "Of the learning rate: cosine, to 0 at num_steps.",
        OneOf(("constant", "cosine")),
        "constant",
    ),
    "optimiser": Option("The method.", default="adam"),
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
    "num_samples": Option("Images of the pictures in training.", between(1, 10**6), 64),
    "batch_size": Option("Images at a time.", between(1, 10**6), 64),
    "clip": Option("The predicted x_0 to [-1, 1] in every step.", default=True),
    "dynamic_threshold": options.of(ThresholdedDenoiser)["quantile"]._replace(default=0.0),
    "sampler": Option("The method.", default="ancestral"),
    "num_steps": Option("Steps; 0: all of a chain.", at_most(10**6), 0),
    "grid": Option("How steps are spaced; '': the sampler's usual.", default=""),
    "times": Option("Or these times, falling.", numbers, ()),
    "process": Option(
        "To sample under, of continuous time; '': the one of training.",
        default="",
    ),
    "guidance": Option("By what.", OneOf(GUIDANCE), "classifier_free"),
    "guidance_scale": Option(
        "1: the model itself; 0: unconditional, without the classifier, or the worse model alone.",
        not_negative_and_finite,
        1.0,
    ),
    "guidance_interval": Option(
        "Noise levels σ/α where it guides; (): everywhere.", noise_levels, ()
    ),
    "guidance_rescale": options.of(RescaledGuidance)["phi"]._replace(default=0.0),
    "guide": Option("Workdir of the classifier, or of the worse model.", default=""),
    "guide_step": Option("Of its checkpoint; 0: the newest.", default=0),
    "negative_class": Option(
        "To be guided away from, by its name or its number.", kind=NAME_OR_NUMBER
    ),
}
