"""What the command line does: a function for each mode."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jax_ddpm.api.arguments import ARGUMENTS
from jax_ddpm.cli import help
from jax_ddpm.errors import UserError
from jax_ddpm.runtime.stopping import Poll

if TYPE_CHECKING:
    from jax_ddpm.api.run import Run

Given = dict[str, Any]  # arguments by their names in Python


def train(given: Given, poll: Poll) -> object:
    """Trains, and returns the last picture; for a classifier, the last checkpoint."""
    from jax_ddpm.api import run as api

    return api.train(**_with_config(given), poll=poll)


def check(given: Given, poll: Poll) -> object:
    """Says whether ``--config`` would train here, without training."""
    from jax_ddpm.api import run as api

    api.check(**_with_config(given), poll=poll)
    return "ready to train"


def sample(given: Given, poll: Poll) -> object:
    """Samples from a run, and returns what was written."""
    from jax_ddpm.runtime.distributed import is_first

    run = _load(given, "--mode=sample --workdir=runs/digits")
    out = run.write_samples(**given, poll=poll)
    if is_first():
        kind = "averaged" if run.item == "ema" else "raw"
        number = given.get("num_samples", ARGUMENTS["num_samples"].default)
        print(f"{number} images from the {kind} parameters of step {run.step:,}", file=sys.stderr)
    return out


def edit(given: Given, poll: Poll) -> object:
    """Edits images with a run, and returns what was written."""
    example = "--mode=edit --workdir=runs/digits --images=folder"
    if "images" not in given:
        raise UserError(f"--images is missing; for example {example}")
    return _load(given, example).write_edits(**given, poll=poll)


def evaluate(given: Given, poll: Poll) -> object:
    """Measures a run, or images in files, and returns the results as a table."""
    from jax_ddpm.api import run as api

    example = "--mode=eval --workdir=runs/digits"
    if "workdir" not in given and "samples" not in given:
        raise UserError(f"--workdir is missing; for example {example}")
    run = _load(given, example) if "workdir" in given else None
    return api.evaluate(given.pop("metrics", ()), **given, run=run, poll=poll)


def variance(given: Given, poll: Poll) -> object:
    """Estimates what ``--sampling.variance=optimal`` needs, and stores it with the checkpoint."""
    return _load(given, "--mode=variance --workdir=runs/digits").variance(**given, poll=poll)


def fid_stats(given: Given, poll: Poll) -> object:
    """Writes moments of the features of real images, for ``--reference``."""
    from jax_ddpm.api import run as api

    if "out" not in given:
        raise UserError("--out is missing; give the name of an .npz, such as --out=cifar10.npz")
    return api.fid_stats(**given, poll=poll)


def compare(given: Given, poll: Poll) -> object:
    """Two records side by side."""
    from jax_ddpm.api import run as api

    records = given["records"]
    if len(records) != 2:
        raise UserError("--mode=compare takes two records: --mode=compare a.json b.json")
    return api.compare(*records)


def choices(given: Given, poll: Poll) -> object:
    """Every name that can be chosen, and its options."""
    return help.of_choices(given["config"].config.modules if "config" in given else ())


def show_help(given: Given, poll: Poll) -> object:
    """The flags, or the fields of ``--config``."""
    return help.of_fields(given["config"]) if "config" in given else help.of_flags()


def _with_config(given: Given) -> Given:
    if "config" not in given:
        raise UserError("--config is missing; for example --config=digits")
    return given


def _load(given: Given, example: str) -> "Run":
    """The run in ``--workdir``; removes from ``given`` the arguments of loading."""
    from jax_ddpm.api import run as api

    if "workdir" not in given:
        raise UserError(f"--workdir is missing; for example {example}")
    ema, raw = given.pop("ema", None), given.pop("raw", None)
    if ema and raw:
        raise UserError("--ema and --raw: give one of them")
    sampling = given.pop("sampling", {})
    for name in ("sampler", "num_steps", "guidance_scale"):
        if name in given and name in sampling:
            raise UserError(f"--{name} and --sampling.{name}: give one of them")
        if name in given:
            sampling[name] = given.pop(name)
    return api.load(
        given.pop("workdir"), given.pop("step", None), bool(raw) or ema is False, **sampling
    )


RUN: dict[str, Callable[[Given, Poll], object]] = {
    "train": train,
    "check": check,
    "sample": sample,
    "edit": edit,
    "eval": evaluate,
    "variance": variance,
    "fid_stats": fid_stats,
    "compare": compare,
    "choices": choices,
    "help": show_help,
}
