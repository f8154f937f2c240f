"""The arguments of Python and of the command line: the meaning and the range of each."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jax_ddpm.errors import UserError
from jax_ddpm.options import (
    NAME_OR_NUMBER,
    OneOf,
    Option,
    at_least,
    between,
    did_you_mean,
    is_a,
    kind_of,
    words_for,
)

# By the names of their flags. An argument without a default may be None, that is left out.
ARGUMENTS = {
    "workdir": Option(
        "Folder of the run; for training runs/<config name> by default.", kind=pathlib.Path
    ),
    "accept_changes": Option(
        "Go on with a run although its config or data has changed in meaning.", default=False
    ),
    "profile": Option("Write a trace of a few steps into <workdir>/profile.", default=False),
    "raw": Option("Take the raw parameters, not their average.", default=False),
    "checkpoint_step": Option("Take the checkpoint of this step; the newest by default.", kind=int),
    "num_samples": Option(
        "Images to sample; to make of each in an edit, there 4; for metrics to be given.",
        between(1, 10**7),
        100,
    ),
    "sample_batch": Option(
        "Images at a time; by default as in the run's config.", between(1, 10**6), kind=int
    ),
    "class": Option(
        "Class to sample, by its name or its number; all in turn by default.", kind=NAME_OR_NUMBER
    ),
    "seed": Option("Seed of the samples.", between(0, 2**32 - 1), 0),
    "progressive": Option("Show each image at this many moments of its making.", at_least(1), 1),
    "out": Option(
        "Samples: a .png grid, a .gif film, an .npz or a folder. Edits: a .png or an .npz. "
        "Results: a .json. Moments: an .npz.",
        kind=pathlib.Path,
    ),
    "edit": Option(
        "What to do to --images: inpaint, colourise, superres, sdedit, interpolate or encode.",
        default="inpaint",
    ),
    "images": Option(
        "Images to edit: one, a folder of them or an .npz, of the model's size.", kind=pathlib.Path
    ),
    "mask": Option(
        "For inpaint: an image, white where images are made anew and black where kept.",
        kind=pathlib.Path,
    ),
    "factor": Option("For superres: pixels along a block that is known.", default=2),
    "strength": Option(
        "For sdedit, interpolate: fraction of the steps taken; 1 keeps least.", default=0.5
    ),
    "resamplings": Option("RePaint: how often a stretch of steps is taken.", between(1, 1000), 1),
    "jump_length": Option("RePaint: steps in a stretch.", between(1, 10**6), 10),
    "metrics": Option(
        "What to measure: bpd, nll, coding, fid, kid, is, prdc, memorisation, agreement.",
        kind=list,
    ),
    "num_seeds": Option("Measure samples of so many seeds, from --seed on.", between(1, 10**4), 1),
    "samples": Option(
        "Images to measure: a folder or .npz; by default the model is sampled.",
        kind=pathlib.Path,
    ),
    "reference": Option(
        "Real images: train, heldout, a folder, an .npz of images or of moments.",
        default="train",
        kind=pathlib.Path,
    ),
    "extractor": Option(
        "Network to measure by: efficientnet_lite0, Inception's file, or a run.",
        kind=pathlib.Path,
    ),
    "split": Option(
        "Of the data: heldout by default for bpd and nll, train for fid_stats.",
        OneOf(("train", "heldout")),
        kind=str,
    ),
    "num_examples": Option(
        "Images of the split for bpd and nll, all by default; for --mode=variance 1,000.",
        at_least(1),
        kind=int,
    ),
    "calibrate": Option("Measure real images as well, as they are and with noise.", default=False),
    "cache": Option(
        "Folder of computed samples and features; <workdir>/evaluation/cache.",
        kind=pathlib.Path,
    ),
    "data_path": Option(
        "Where the run's data lies now; by default where it did.", kind=pathlib.Path
    ),
}
_IN_PYTHON = {
    "class": "label",
    "sample_batch": "batch_size",
    "progressive": "moments",
    "checkpoint_step": "step",
}
_MAY_BE_ARRAYS = ("images", "mask")  # checked where they are read
_FLAGS = {_IN_PYTHON.get(flag, flag): flag for flag in ARGUMENTS}


def python_name(flag: str) -> str:
    """What Python calls the argument of a flag."""
    return _IN_PYTHON.get(flag, flag)


def require(given: Mapping[str, Any]) -> None:
    """Checks arguments by their names in Python; those without a flag are passed over.

    Raises:
      UserError: naming the first argument that is not what it must be.
    """
    for name in [name for name in given if name in _FLAGS]:
        flag, value = _FLAGS[name], given[name]
        left_out = value is None and ARGUMENTS[flag].default is None
        array = flag in _MAY_BE_ARRAYS and hasattr(value, "__array__")
        if not (left_out or array):
            check(flag, value, ARGUMENTS[flag])


def check(flag: str, value: Any, option: Option) -> None:
    """Raises UserError where a flag's argument is not what it must be."""
    if not is_a(value, kind_of(option)):
        raise UserError(f"--{flag}={value}: it must be {words_for(kind_of(option))}")
    if not option.range.holds(value):
        near = did_you_mean(value, option.range.known) if isinstance(option.range, OneOf) else ""
        raise UserError(f"--{flag}={value}: it must be {option.range.must_be}{near}")


def in_python(line: str) -> str:
    """A message with its flags as Python's arguments; a whole command stays as it is."""

    def spelled(found: re.Match[str]) -> str:
        flag, equals = found["flag"], found["equals"]
        if flag is None:
            return found[0]
        given = flag not in ARGUMENTS or kind_of(ARGUMENTS[flag]) is not bool or equals
        return python_name(flag) + (equals if given else "=True")

    command = r"--mode=\S+(?: --[\w.]+=\S+)*"
    return re.sub(
        rf"{command}|(?<![\w-])--(?:sampling\.)?(?P<flag>[a-z_]+)(?P<equals>=?)", spelled, line
    )
