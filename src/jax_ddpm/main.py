"""Trains and samples from the command line.

python -m jax_ddpm.main --config=configs/digits.py
python -m jax_ddpm.main --mode=sample --workdir=runs/digits --num_samples=100 --out=more.png
"""

import pathlib
import sys
import warnings

from absl import app, flags, logging
from ml_collections import config_flags

from jax_ddpm.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file; set single fields with --config.section.field=value."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; for training runs/<config name> by default."
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "sample"], "What to do.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 100, "Images to sample.", lower_bound=1)
_CLASS = flags.DEFINE_integer("class", None, "Class to sample; one in each column by default.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)
_PROGRESSIVE = flags.DEFINE_integer(
    "progressive", 1, "Show each image at this many moments of its making.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", None, "PNG to write; <workdir>/samples.png by default.")


def run_train() -> pathlib.Path:
    """Trains what ``--config`` says and returns the last picture."""
    import jax

    from jax_ddpm.config import validate
    from jax_ddpm.training.loop import train

    if _CONFIG.value is None:
        raise UserError("--config is missing; for example --config=configs/digits.py")
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    validate(_CONFIG.value, jax.device_count())
    return train(_CONFIG.value, pathlib.Path(_WORKDIR.value or f"runs/{name}"))


def run_sample() -> pathlib.Path:
    """Samples from the averaged parameters in ``--workdir`` and returns the picture."""
    import numpy as np

    from jax_ddpm import factory, images
    from jax_ddpm.generate import Generator
    from jax_ddpm.training import checkpoint
    from jax_ddpm.training.step import data_mesh

    if _WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --mode=sample --workdir=runs/digits")
    workdir = pathlib.Path(_WORKDIR.value)
    out = pathlib.Path(_OUT.value or workdir / "samples.png")
    if out.is_dir() or out.suffix != ".png":
        raise UserError(f"--out={out}: give the name of a .png file")
    config, spec = checkpoint.load_identity(workdir)
    model = factory.Model(config, spec)
    params = checkpoint.restore(workdir)["ema"]["network"]
    moments = _PROGRESSIVE.value
    if moments > model.chain.num_timesteps:
        raise UserError(f"--progressive={moments}: the chain has {model.chain.num_timesteps} steps")
    generator = Generator(model, config.sampling.batch_size, data_mesh(), moments)
    x, x0 = generator.snapshots(params, _SEED.value, _NUM_SAMPLES.value, _CLASS.value)
    if moments == 1:
        images.save_grid(out, x[-1], generator.columns(_NUM_SAMPLES.value, _CLASS.value))
    else:
        pairs = np.stack([x, x0]).transpose(2, 0, 1, 3, 4, 5)  # image, x_t or x_0, moment
        images.save_grid(out, pairs.reshape(-1, *x.shape[2:]), columns=moments)
    return out


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; what it does not understand is one line and exit code 1."""
    for flag, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        name, equals, path = flag.partition("=")
        path = path if equals else following
        if name in ("-config", "--config") and not pathlib.Path(path).is_file():
            sys.exit(f"error: --config: no file {path!r}; give the path of a config in configs/")
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        message: object = error
    except (AttributeError, KeyError) as error:  # ml_collections' word for an unknown field
        message = error
        while isinstance(message, Exception) and message.args:
            message = message.args[0]
        message = f"--config: unknown field {message}"
    sys.exit(f"error: {' '.join(str(message).split())}; --help lists all flags")


def main(argv: list[str]) -> None:
    """Runs one mode; a mistake of the user's is one line and exit code 1."""
    logging.set_verbosity(logging.WARNING)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value")
        picture = {"train": run_train, "sample": run_sample}[_MODE.value]()
    except UserError as error:
        sys.exit(f"error: {error}")
    print(picture)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
