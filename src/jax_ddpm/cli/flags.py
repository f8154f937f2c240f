"""Every flag and mode of the command line; most flags are arguments of Python too."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from jax_ddpm.api.arguments import ARGUMENTS
from jax_ddpm.options import Kind, OneOf, Option, at_least, kind_of


class Mode(NamedTuple):
    """What a mode does, in words; the flags that it takes; whether it needs devices."""

    does: str
    takes: tuple[str, ...]
    on_devices: bool = True


OF_A_JOB = ("distributed", "coordinator", "num_processes", "process_id")
OF_A_RUN = (
    *("workdir", "ema", "raw", "checkpoint_step"),
    *("sampling", "sampler", "num_steps", "guidance_scale"),
)
MODES = {
    "train": Mode(
        "trains --config; the default",
        (*OF_A_JOB, "config", "workdir", "accept_changes", "profile"),
    ),
    "check": Mode("tries out all that training would need", (*OF_A_JOB, "config", "workdir")),
    "sample": Mode(
        "draws images",
        (
            *(*OF_A_JOB, *OF_A_RUN),
            *("num_samples", "sample_batch", "class", "seed", "progressive", "out"),
        ),
    ),
    "edit": Mode(
        "edits images",
        (
            *(*OF_A_JOB, *OF_A_RUN),
            *("num_samples", "sample_batch", "class", "seed", "out", "edit", "images", "mask"),
            *("factor", "strength", "resamplings", "jump_length"),
        ),
    ),
    "eval": Mode(
        "measures a run, or --samples",
        (
            *(*OF_A_JOB, *OF_A_RUN),
            *("config", "num_samples", "sample_batch", "seed", "out", "metrics", "num_seeds"),
            *("samples", "reference", "extractor", "split", "num_examples", "calibrate"),
            *("cache", "data_path"),
        ),
    ),
    "variance": Mode(
        "estimates what --sampling.variance=optimal needs",
        (*OF_A_JOB, *OF_A_RUN, "sample_batch", "num_examples", "data_path"),
    ),
    "fid_stats": Mode(
        "moments of real images' features, for --reference",
        (
            *OF_A_JOB,
            *("config", "workdir", "sample_batch", "out", "samples", "extractor", "split"),
            *("cache", "data_path"),
        ),
    ),
    "compare": Mode("two records side by side: a.json b.json", (), on_devices=False),
    "choices": Mode(
        "what fields and flags may be, by name; with --config also in its modules",
        ("config",),
        on_devices=False,
    ),
    "help": Mode("prints this, or the fields of --config", ("config",), on_devices=False),
}
FLAGS = {
    "mode": Option("What to do.", OneOf(tuple(MODES)), "train"),
    "config": Option(
        "Experiment: the name of one of ours, such as digits, a file, or the config.json of a run; "
        "--config.section.field=value changes a field.",
        kind=pathlib.Path,
    ),
    "sampling": Option(
        "--sampling.field=value changes a field of how the run is sampled.", kind=dict
    ),
    "sampler": Option("Short for --sampling.sampler, such as dpmpp_2m.", kind=str),
    "num_steps": Option("Short for --sampling.num_steps.", kind=int),
    "guidance_scale": Option(
        "Classifier-free: 0 unconditional, 1 conditional, more beyond it.", kind=float
    ),
    "ema": Option("Take the averaged parameters (the default).", kind=bool),
    "distributed": Option(
        "Several processes as one job: as SLURM, Open MPI or the TPU says, or manual, as the next "
        "three do.",
        OneOf(("auto", "off", "manual")),
        "auto",
    ),
    "coordinator": Option("host:port at which the first process listens to the others.", kind=str),
    "num_processes": Option("Processes of this job.", at_least(1), kind=int),
    "process_id": Option("Which of them this one is, from 0 on.", at_least(0), kind=int),
} | ARGUMENTS
_DEFINE: dict[Kind, Callable[..., Any]] = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    list: flags.DEFINE_list,
}


def define() -> flags.FlagValues:
    """All flags except the sections of a config; they have no defaults, as the api has them."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # records may stand between flags
    for name, option in FLAGS.items():
        if name not in ("config", "sampling"):
            make = _DEFINE.get(kind_of(option), flags.DEFINE_string)
            make(name, None, option.meaning, flag_values=values)
    return values
