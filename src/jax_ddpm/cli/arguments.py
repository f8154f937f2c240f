"""Every flag of the command line."""

from absl import flags
from ml_collections import config_flags

from jax_ddpm.config import default

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file; set single fields with --config.section.field=value."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; for training runs/<config name> by default."
)
_OF_A_JOB = ("distributed", "coordinator", "num_processes", "process_id")
_OF_A_RUN = (
    *_OF_A_JOB,
    *("workdir", "ema", "raw", "checkpoint_step"),
    *("sampling", "sampler", "num_steps", "guidance_scale"),
)
# What each mode does, and the flags that it takes.
MODES = {
    "train": (*_OF_A_JOB, "config", "workdir", "accept_changes", "profile"),
    "check": (*_OF_A_JOB, "config", "workdir"),
    "sample": (
        *_OF_A_RUN,
        *("num_samples", "sample_batch", "class", "seed", "progressive", "out"),
    ),
    "edit": (
        *_OF_A_RUN,
        *("num_samples", "sample_batch", "class", "seed", "out", "edit", "images", "mask"),
        *("factor", "strength", "resamplings", "jump_length"),
    ),
    "eval": (
        *_OF_A_RUN,
        *("config", "num_samples", "sample_batch", "seed", "out", "metrics", "num_seeds"),
        *("samples", "reference", "extractor", "split", "num_examples", "calibrate"),
        *("cache", "data_path"),
    ),
    "variance": (*_OF_A_RUN, "sample_batch", "num_examples", "data_path"),
    "fid_stats": (
        *_OF_A_JOB,
        *("config", "workdir", "sample_batch", "out", "samples", "extractor", "split"),
        *("cache", "data_path"),
    ),
    "compare": (),
}
MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")
ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes", False, "Go on with a run although its config or data has changed in meaning."
)
PROFILE = flags.DEFINE_bool(
    "profile", False, "Write a trace of a few steps into <workdir>/profile."
)
DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "off", "manual"],
    "Several processes as one job: as SLURM, Open MPI or the TPU says, or as the next three do.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port at which the first process listens to the others."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this job.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this one is, from 0 on.", lower_bound=0
)
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", None, "Images to sample: 100 by default, to be given for metrics.", lower_bound=1
)
SAMPLE_BATCH = flags.DEFINE_integer(
    "sample_batch", None, "Images at a time; by default as in the run's config.", lower_bound=1
)
CLASS = flags.DEFINE_integer("class", None, "Class to sample; all in turn by default.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0, upper_bound=2**32 - 1)
EMA = flags.DEFINE_bool("ema", None, "Sample from the averaged parameters (the default).")
RAW = flags.DEFINE_bool("raw", None, "Sample from the raw parameters.")
CHECKPOINT_STEP = flags.DEFINE_integer(
    "checkpoint_step", None, "Sample from the checkpoint of this step; the newest by default."
)
PROGRESSIVE = flags.DEFINE_integer(
    "progressive", 1, "Show each image at this many moments of its making.", lower_bound=1
)
OUT = flags.DEFINE_string(
    "out", None, "Samples: a .png grid, a .gif film, an .npz or a folder. Results: a .json or .npz."
)
SAMPLER = flags.DEFINE_string("sampler", None, "Short for --sampling.sampler, such as dpmpp_2m.")
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Short for --sampling.num_steps.")
GUIDANCE_SCALE = flags.DEFINE_float(
    "guidance_scale", None, "Classifier-free: 0 unconditional, 1 conditional, more beyond it."
)
METRICS = flags.DEFINE_list(
    "metrics",
    [],
    "What to measure: bpd, nll, coding, fid, kid, is, prdc, memorisation, agreement.",
)
NUM_SEEDS = flags.DEFINE_integer(
    "num_seeds", 1, "Measure samples of this many seeds, from --seed on.", lower_bound=1
)
SAMPLES = flags.DEFINE_string(
    "samples", None, "Images to measure: a folder or .npz; by default the model is sampled."
)
REFERENCE = flags.DEFINE_string(
    "reference", "train", "Real images: train, heldout, a folder, an .npz of images or of moments."
)
EXTRACTOR = flags.DEFINE_string(
    "extractor", None, "Network to measure by: efficientnet_lite0, Inception's file, or a run."
)
SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["train", "heldout"],
    "Of the data: heldout for bpd and nll, train for fid_stats.",
)
NUM_EXAMPLES = flags.DEFINE_integer(
    "num_examples",
    None,
    "Images of the split for bpd and nll, all by default; for --mode=variance 1,000 by default.",
    lower_bound=1,
)
CALIBRATE = flags.DEFINE_bool(
    "calibrate", False, "Measure real images as well, as they are and with noise."
)
CACHE = flags.DEFINE_string(
    "cache", None, "Folder of computed samples and features; <workdir>/evaluation/cache."
)
DATA_PATH = flags.DEFINE_string(
    "data_path", None, "Where the run's data lies now; by default where it did."
)
EDITS = ["inpaint", "colourise", "superres", "sdedit", "interpolate", "encode"]
EDIT = flags.DEFINE_enum("edit", "inpaint", EDITS, "What to do to --images.")
IMAGES = flags.DEFINE_string(
    "images", None, "Images to edit: a folder of PNGs or an .npz, of the model's size."
)
MASK = flags.DEFINE_string(
    "mask", None, "For inpaint: a PNG, white where images are made anew and black where kept."
)
FACTOR = flags.DEFINE_integer("factor", 2, "For superres: pixels along a block that is known.")
STRENGTH = flags.DEFINE_float(
    "strength", 0.5, "For sdedit, interpolate: fraction of the steps taken; 1 keeps least.", 0, 1
)
RESAMPLINGS = flags.DEFINE_integer(
    "resamplings", 1, "RePaint: how often each stretch of steps is taken.", lower_bound=1
)
JUMP_LENGTH = flags.DEFINE_integer("jump_length", 10, "RePaint: steps in a stretch.", lower_bound=1)


def define_sampling(argv: list[str]) -> None:
    """Adds --sampling; those of its fields that are given are looked for at once."""
    config_flags.DEFINE_config_dict(
        "sampling",
        default().sampling,
        "How to sample: each field of the config's section, in place of what the run says.",
        sys_argv=argv,
    )


def unused(mode: str) -> list[str]:
    """The flags that are given although the mode does not take them."""
    ours = [flag.name for flag in flags.FLAGS.get_key_flags_for_module("jax_ddpm.cli.arguments")]
    given = [name for name in ours if flags.FLAGS[name].present]
    if config_flags.get_override_values(flags.FLAGS["sampling"]):
        given.append("sampling")
    return [name for name in given if name not in ("mode", *MODES[mode])]
