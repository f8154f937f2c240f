"""Every flag of the command line."""

from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file; set single fields with --config.section.field=value."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; for training runs/<config name> by default."
)
MODES = ["train", "check", "sample", "eval", "fid_stats", "compare"]
MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")
ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes", False, "Go on with a run although its config or data has changed in meaning."
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
    "out", None, "Samples: a .png for a grid, an .npz, or a folder. Results: a .json or .npz."
)
NUM_STEPS = flags.DEFINE_integer(
    "num_steps", None, "Steps of sampling; by default as in the run's config."
)
GUIDANCE_SCALE = flags.DEFINE_float(
    "guidance_scale", None, "Classifier-free: 0 unconditional, 1 conditional, more beyond it."
)
METRICS = flags.DEFINE_list(
    "metrics", [], "What to measure: bpd, coding, fid, kid, is, prdc, memorisation, agreement."
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
    "split", None, ["train", "heldout"], "Of the data: heldout for bpd, train for fid_stats."
)
NUM_EXAMPLES = flags.DEFINE_integer(
    "num_examples", None, "Measure bpd on this many of the split, all by default.", lower_bound=1
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
