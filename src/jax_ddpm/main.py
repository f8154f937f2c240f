"""Trains, samples, edits and measures from the command line.

python -m jax_ddpm.main --config=configs/digits.py
python -m jax_ddpm.main --mode=check --config=configs/cifar10.py
python -m jax_ddpm.main --mode=sample --workdir=runs/digits --num_samples=100 --out=more.png
python -m jax_ddpm.main --mode=edit --workdir=runs/digits --images=mine --mask=mask.png
python -m jax_ddpm.main --mode=eval --workdir=runs/digits --metrics=bpd
python -m jax_ddpm.main --mode=variance --workdir=runs/digits
python -m jax_ddpm.main --mode=fid_stats --config=configs/cifar10.py --out=cifar10.npz
python -m jax_ddpm.main --mode=compare a.json b.json

Exit codes: 0 done; 1 a mistake, or another process of the job is lost, explained in one line; 75
stopped by SIGTERM or Ctrl-C with everything saved: the same command goes on.
"""

import contextlib
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import app, flags, logging
from ml_collections import config_flags

from jax_ddpm.cli import arguments as options
from jax_ddpm.cli.parsing import parse_flags
from jax_ddpm.errors import UserError
from jax_ddpm.runtime.stopping import EXIT_CODE, Poll, Stopped, StopRequest

if TYPE_CHECKING:
    from jax_ddpm.data.source import Source
    from jax_ddpm.inference.trained import Trained


def _train_workdir() -> pathlib.Path:
    if options.CONFIG.value is None:
        raise UserError("--config is missing; for example --config=configs/digits.py")
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    return pathlib.Path(options.WORKDIR.value or f"runs/{name}")


def run_train(poll: Poll) -> pathlib.Path:
    """Trains what ``--config`` says; returns the last picture, or a classifier's checkpoint."""
    workdir = _train_workdir()
    import jax

    from jax_ddpm.config.validation import validate
    from jax_ddpm.training.loop import train

    validate(options.CONFIG.value, jax.device_count())
    return train(
        options.CONFIG.value,
        workdir,
        accept_changes=options.ACCEPT_CHANGES.value,
        profile=options.PROFILE.value,
        poll=poll,
    )


def run_check(poll: Poll) -> str:
    """Says whether ``--config`` would train here, without training."""
    workdir = _train_workdir()
    from jax_ddpm.training.preflight import Preflight

    Preflight(options.CONFIG.value, workdir).run(poll)
    return "ready to train"


def run_sample(poll: Poll) -> pathlib.Path:
    """Samples from the run in ``--workdir`` and returns what was written."""
    if options.WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --mode=sample --workdir=runs/digits")
    from jax_ddpm.inference.sampling import write_samples
    from jax_ddpm.runtime.distributed import is_first

    workdir = pathlib.Path(options.WORKDIR.value)
    out = pathlib.Path(options.OUT.value or workdir / "samples.png")
    trained, num_samples = _load(), options.NUM_SAMPLES.value or 100
    write_samples(
        trained,
        out,
        num_samples,
        seed=options.SEED.value,
        label=options.CLASS.value,
        batch_size=options.SAMPLE_BATCH.value,
        moments=options.PROGRESSIVE.value,
        poll=poll,
    )
    kind = "averaged" if trained.item == "ema" else "raw"
    if is_first():
        print(
            f"{num_samples} images from the {kind} parameters of step {trained.step:,}",
            file=sys.stderr,
        )
    return out


def run_edit(poll: Poll) -> pathlib.Path:
    """Edits ``--images`` with the run in ``--workdir`` and returns what was written."""
    from jax_ddpm.inference.edits import Request, write_edits

    if options.WORKDIR.value is None or options.IMAGES.value is None:
        missing = "workdir" if options.WORKDIR.value is None else "images"
        raise UserError(f"--{missing} is missing; editing takes --workdir=runs/x --images=folder")
    out = options.OUT.value or f"{options.WORKDIR.value}/{options.EDIT.value}.png"
    request = Request(
        edit=options.EDIT.value,
        images=pathlib.Path(options.IMAGES.value),
        num_samples=options.NUM_SAMPLES.value or 4,
        mask=pathlib.Path(options.MASK.value) if options.MASK.value else None,
        factor=options.FACTOR.value,
        strength=options.STRENGTH.value,
        jump_length=options.JUMP_LENGTH.value,
        resamplings=options.RESAMPLINGS.value,
        label=options.CLASS.value,
    )
    write_edits(
        _load(),
        pathlib.Path(out),
        request,
        seed=options.SEED.value,
        batch_size=options.SAMPLE_BATCH.value,
        poll=poll,
    )
    return pathlib.Path(out)


def _load() -> "Trained":
    """The run in ``--workdir``, to be sampled as the flags say."""
    from jax_ddpm.inference.trained import load

    if options.EMA.value and options.RAW.value:
        raise UserError("--ema and --raw: give one of them")
    raw = bool(options.RAW.value) or options.EMA.value is False
    fields = {
        "sampler": options.SAMPLER.value,
        "num_steps": options.NUM_STEPS.value,
        "guidance_scale": options.GUIDANCE_SCALE.value,
    }
    given = config_flags.get_override_values(flags.FLAGS["sampling"]) | {
        name: value for name, value in fields.items() if value is not None
    }
    assert options.WORKDIR.value is not None
    return load(options.WORKDIR.value, options.CHECKPOINT_STEP.value, raw, **given)


def run_eval(poll: Poll) -> str:
    """Measures the run in ``--workdir``, or ``--samples``, and returns the results as a table."""
    from jax_ddpm.evaluation.evaluate import evaluate
    from jax_ddpm.evaluation.quality import Evaluation

    if options.WORKDIR.value is None and options.SAMPLES.value is None:
        raise UserError("--workdir is missing; for example --mode=eval --workdir=runs/digits")
    if options.SEED.value + options.NUM_SEEDS.value > 2**32:
        raise UserError(
            f"--num_seeds={options.NUM_SEEDS.value} from --seed={options.SEED.value} on: there "
            "are seeds below 2**32 only; give a smaller one"
        )
    trained = _load() if options.WORKDIR.value else None
    folder = pathlib.Path(options.WORKDIR.value or ".") / "evaluation"
    what = Evaluation(
        cache=pathlib.Path(options.CACHE.value or folder / "cache"),
        trained=trained,
        source=_source(),
        samples=pathlib.Path(options.SAMPLES.value) if options.SAMPLES.value else None,
        num_samples=options.NUM_SAMPLES.value,
        seeds=tuple(range(options.SEED.value, options.SEED.value + options.NUM_SEEDS.value)),
        extractor=options.EXTRACTOR.value,
        reference=options.REFERENCE.value,
        split=options.SPLIT.value or "heldout",
        num_examples=options.NUM_EXAMPLES.value,
        calibrate=options.CALIBRATE.value,
        batch_size=_batch_size(trained),
    )
    out = pathlib.Path(options.OUT.value) if options.OUT.value else None
    path, results = evaluate(what, options.METRICS.value, folder, out, poll)
    return f"{results}\n{path}"


def run_variance(poll: Poll) -> pathlib.Path:
    """Estimates what ``--sampling.variance=optimal`` needs, and stores it with the checkpoint."""
    from jax_ddpm.evaluation.x0_error import store_x0_error

    if options.WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --mode=variance --workdir=runs/digits")
    trained, source = _load(), _source()
    assert source is not None
    return store_x0_error(
        trained,
        source,
        pathlib.Path(options.WORKDIR.value),
        options.NUM_EXAMPLES.value or 1000,
        _batch_size(trained),
        poll,
    )


def run_fid_stats(poll: Poll) -> pathlib.Path:
    """Moments of the features of real images, for ``--reference``, into ``--out``."""
    from jax_ddpm.evaluation.extractors import make_extractor
    from jax_ddpm.evaluation.features import extract
    from jax_ddpm.evaluation.image_sets import file_set, split_set
    from jax_ddpm.evaluation.reference import reference_of, save_moments

    if options.OUT.value is None or not options.OUT.value.endswith(".npz"):
        raise UserError("--out is missing; give the name of an .npz, such as --out=cifar10.npz")
    if options.SAMPLES.value:
        images = file_set(pathlib.Path(options.SAMPLES.value))
    else:
        source = _source()
        if source is None:
            raise UserError("--config is missing: of the data, or give its images by --samples")
        images = split_set(source, options.SPLIT.value or "train")
    out = pathlib.Path(options.OUT.value)
    cache = pathlib.Path(options.CACHE.value or out.with_name(out.name + ".cache"))
    extractor = make_extractor(options.EXTRACTOR.value, images.shape())
    features = extract(extractor, images, images.count, _batch_size(None), cache, poll)
    save_moments(out, reference_of(features), extractor)
    return out


def _source() -> "Source | None":
    """The data of the run in ``--workdir``, or of ``--config``."""
    from jax_ddpm.config.validation import validate
    from jax_ddpm.factory import make_source
    from jax_ddpm.runs.identity import load_identity

    config, spec = options.CONFIG.value, None
    if options.WORKDIR.value:
        config, spec = load_identity(pathlib.Path(options.WORKDIR.value))
    if config is None:
        return None
    if options.DATA_PATH.value:
        config.data.path = options.DATA_PATH.value
    validate(config, num_devices=1)
    source = make_source(config)
    if spec not in (None, source.spec):
        raise UserError(
            f"the run was trained on {spec.identity}, but its data is {source.spec.identity} now; "
            "give the place of the former by --data_path"
        )
    return source


def _batch_size(trained: "Trained | None") -> int:
    return options.SAMPLE_BATCH.value or (trained.config.sampling.batch_size if trained else 64)


def run_compare(paths: list[str]) -> str:
    """Two records side by side."""
    from jax_ddpm.evaluation.record import compare

    if len(paths) != 2:
        raise UserError("--mode=compare takes two records: --mode=compare a.json b.json")
    return compare(*map(pathlib.Path, paths))


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Ends the program with a line of explanation where that is enough."""
    try:
        yield
    except Stopped as signal:
        print(f"stopped by {signal}; the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit("interrupted; what was saved before stays valid")
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


def main(argv: list[str]) -> None:
    """Runs one mode; a mistake of the user's is one line and exit code 1."""
    logging.set_verbosity(logging.FATAL)  # Orbax logs with tracebacks what it then raises
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    modes = {
        "train": run_train,
        "check": run_check,
        "sample": run_sample,
        "edit": run_edit,
        "eval": run_eval,
        "variance": run_variance,
        "fid_stats": run_fid_stats,
    }
    with _one_line():
        for name in options.unused(options.MODE.value):
            fits = [mode for mode, taken in options.MODES.items() if name in taken]
            raise UserError(
                f"--{name} does nothing with --mode={options.MODE.value}: it is for "
                f"--mode={' or '.join(fits)}"
            )
        if options.MODE.value == "compare":
            print(run_compare(argv[1:]))
            return
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value")
    from jax_ddpm.runtime import backend, distributed
    from jax_ddpm.runtime.launch import join

    config = options.CONFIG.value
    backend.set_flags(deterministic=config is not None and config.deterministic)
    backend.keep_memory()
    backend.keep_compiled()
    with distributed.ending(), _one_line():
        join(
            options.DISTRIBUTED.value,
            options.COORDINATOR.value,
            options.NUM_PROCESSES.value,
            options.PROCESS_ID.value,
        )
        with distributed.noticing_loss(), StopRequest() as stop:
            result = modes[options.MODE.value](distributed.shared_poll(stop.poll))
        if distributed.is_first():
            print(result)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
