"""Trains, samples and checks from the command line.

python -m jax_ddpm.main --config=configs/digits.py
python -m jax_ddpm.main --mode=check --config=configs/cifar10.py
python -m jax_ddpm.main --mode=sample --workdir=runs/digits --num_samples=100 --out=more.png

Exit codes: 0 done; 1 a mistake, explained in one line; 75 stopped by SIGTERM or Ctrl-C with
everything saved: the same command goes on.
"""

import pathlib
import sys
import warnings

from absl import app, flags, logging
from ml_collections import config_flags

from jax_ddpm.command_line import parse_flags
from jax_ddpm.errors import UserError
from jax_ddpm.stopping import EXIT_CODE, Poll, Stopped, StopRequest

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file; set single fields with --config.section.field=value."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; for training runs/<config name> by default."
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "sample", "check"], "What to do.")
_ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes", False, "Go on with a run although its config or data has changed in meaning."
)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 100, "Images to sample.", lower_bound=1)
_SAMPLE_BATCH = flags.DEFINE_integer(
    "sample_batch", None, "Images at a time; by default as in the run's config.", lower_bound=1
)
_CLASS = flags.DEFINE_integer("class", None, "Class to sample; all in turn by default.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the samples.", lower_bound=0, upper_bound=2**32 - 1
)
_EMA = flags.DEFINE_bool("ema", None, "Sample from the averaged parameters (the default).")
_RAW = flags.DEFINE_bool("raw", None, "Sample from the raw parameters.")
_CHECKPOINT_STEP = flags.DEFINE_integer(
    "checkpoint_step", None, "Sample from the checkpoint of this step; the newest by default."
)
_PROGRESSIVE = flags.DEFINE_integer(
    "progressive", 1, "Show each image at this many moments of its making.", lower_bound=1
)
_OUT = flags.DEFINE_string(
    "out", None, "A .png for a grid, an .npz, or a folder of images; <workdir>/samples.png."
)


def _train_workdir() -> pathlib.Path:
    if _CONFIG.value is None:
        raise UserError("--config is missing; for example --config=configs/digits.py")
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    return pathlib.Path(_WORKDIR.value or f"runs/{name}")


def run_train(poll: Poll) -> pathlib.Path:
    """Trains what ``--config`` says and returns the last picture."""
    workdir = _train_workdir()
    import jax

    from jax_ddpm.config import validate
    from jax_ddpm.training.loop import train

    validate(_CONFIG.value, jax.device_count())
    return train(_CONFIG.value, workdir, accept_changes=_ACCEPT_CHANGES.value, poll=poll)


def run_check(poll: Poll) -> str:
    """Says whether ``--config`` would train here, without training."""
    workdir = _train_workdir()
    from jax_ddpm.preflight import Preflight

    Preflight(_CONFIG.value, workdir).run(poll)
    return "ready to train"


def run_sample(poll: Poll) -> pathlib.Path:
    """Samples from the run in ``--workdir`` and returns what was written."""
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --mode=sample --workdir=runs/digits")
    if _EMA.value and _RAW.value:
        raise UserError("--ema and --raw: give one of them")
    from jax_ddpm.sampling import write_samples
    from jax_ddpm.trained import load

    workdir = pathlib.Path(_WORKDIR.value)
    out = pathlib.Path(_OUT.value or workdir / "samples.png")
    raw = bool(_RAW.value) or _EMA.value is False
    trained = load(workdir, _CHECKPOINT_STEP.value, raw)
    write_samples(
        trained,
        out,
        _NUM_SAMPLES.value,
        seed=_SEED.value,
        label=_CLASS.value,
        batch_size=_SAMPLE_BATCH.value,
        moments=_PROGRESSIVE.value,
        poll=poll,
    )
    kind = "raw" if raw else "averaged"
    print(
        f"{_NUM_SAMPLES.value} images from the {kind} parameters of step {trained.step:,}",
        file=sys.stderr,
    )
    return out


def main(argv: list[str]) -> None:
    """Runs one mode; a mistake of the user's is one line and exit code 1."""
    logging.set_verbosity(logging.FATAL)  # Orbax logs with tracebacks what it then raises
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    modes = {"train": run_train, "sample": run_sample, "check": run_check}
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value")
        with StopRequest() as stop:
            result = modes[_MODE.value](stop.poll)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'writing failed'}: {error.strerror or error}")
    except RuntimeError as error:  # XLA's
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(
            "error: the device is out of memory; raise training.accumulate, set model.remat, or "
            "lower training.batch_size or --sample_batch; --mode=check estimates what is needed"
        )
    except Stopped as signal:
        print(f"stopped by {signal}; the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit("interrupted; what was saved before stays valid")
    print(result)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
