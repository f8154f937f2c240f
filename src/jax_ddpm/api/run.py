"""jax_ddpm from Python: what the command line does, by the same functions.

    import jax_ddpm

    jax_ddpm.train("digits")
    run = jax_ddpm.load("runs/digits", sampler="dpmpp_2m", num_steps=20)
    images = run.sample(64, seed=1)  # uint8 [64, 8, 8, 1]
    print(run.evaluate(["bpd"]))

A ``UserError`` explains a mistake in one line, which names arguments as they are called here.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from jax_ddpm.api.arguments import in_python, require
from jax_ddpm.conditions.label import with_label
from jax_ddpm.config.reading import Named, read_config
from jax_ddpm.data.source import Source
from jax_ddpm.diffusion.denoiser import Denoiser
from jax_ddpm.diffusion.samplers.grid import Grid
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.evaluate import Report
from jax_ddpm.inference import trained
from jax_ddpm.inference.trained import Trained
from jax_ddpm.runtime import backend
from jax_ddpm.runtime.distributed import shared_poll
from jax_ddpm.runtime.stopping import Poll, Stopped, StopRequest, never

Config: TypeAlias = ConfigDict | Named | str | os.PathLike[str]
Path: TypeAlias = str | os.PathLike[str]
P = ParamSpec("P")
R = TypeVar("R")


def _checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function with its arguments and JAX's settings checked, and mistakes as Python says."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*map(_plain, args), **{k: _plain(v) for k, v in kwargs.items()})
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            parameter = signature.parameters[name]
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= value
            elif value is not parameter.default:
                given[name] = value
        try:
            require(given)
            backend.require_usual_settings()
            return function(*bound.args, **bound.kwargs)
        except UserError as error:
            error.args = (in_python(error.flags),)
            raise

    return call


def _plain(value: Any) -> Any:
    """A NumPy number as a Python number, which JSON can hold."""
    return value.item() if isinstance(value, np.generic) else value


@_checked
def train(
    config: Config,
    workdir: Path | None = None,
    *,
    accept_changes: bool = False,
    profile: bool = False,
    poll: Poll | None = None,
) -> pathlib.Path:
    """Trains into ``workdir``, by default ``runs/<name of the config>``: see ``training.loop``.

    Ctrl-C saves everything before it raises KeyboardInterrupt, and the same call then goes on.

    Args:
      config: a config, its name (``"digits"``), its file, or the ``config.json`` of a run.
      accept_changes: go on although the config differs in meaning from the run's.
      profile: write a trace of a few steps into ``profile/``.
      poll: called between steps in place of waiting for Ctrl-C; raises ``Stopped`` to stop.

    Returns:
      The last sample grid; for a classifier, the last checkpoint.
    """
    from jax_ddpm.config.validation import validate
    from jax_ddpm.training import loop

    settings, folder = _to_train(config, workdir)
    _start(settings)
    validate(settings, jax.device_count())
    with _stopping(poll) as asked:
        return loop.train(
            settings, folder, accept_changes=accept_changes, profile=profile, poll=asked
        )


@_checked
def check(config: Config, workdir: Path | None = None, *, poll: Poll = never) -> None:
    """Tries out all that training would need, prints a row for each, and trains nothing."""
    from jax_ddpm.training.preflight import Preflight

    settings, folder = _to_train(config, workdir)
    _start(settings)
    Preflight(settings, folder).run(poll)


class Run(Trained):
    """A run's model, with the parameters of one checkpoint.

    Attributes:
      workdir: the folder of the run; the others are those of ``Trained``.
    """

    def __init__(self, workdir: pathlib.Path, *parts: Any):
        super().__init__(*parts)
        self.workdir = workdir

    @_checked
    def sample(
        self,
        num_samples: int = 100,
        seed: int = 0,
        label: int | float | str | None = None,
        batch_size: int | None = None,
        **request: Any,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """Samples as arrays: see ``Trained.sample``."""
        return super().sample(num_samples, seed, label, batch_size, **request)

    @_checked
    def write_samples(
        self,
        out: Path | None = None,
        num_samples: int = 100,
        seed: int = 0,
        label: int | float | str | None = None,
        batch_size: int | None = None,
        moments: int = 1,
        *,
        poll: Poll = never,
        **request: Any,
    ) -> pathlib.Path:
        """Samples into files, by default ``samples.png`` in the workdir.

        See ``inference.sampling.write_samples``; ``moments`` > 1 shows how each image is made.
        ``request`` is as in ``sample``.
        """
        from jax_ddpm.inference import sampling

        path = pathlib.Path(out or self.workdir / "samples.png")
        sampling.write_samples(
            self,
            path,
            num_samples,
            seed=seed,
            request=request | with_label(label),
            batch_size=batch_size,
            moments=moments,
            poll=poll,
        )
        return path

    @_checked
    def edit(
        self,
        images: Path | np.ndarray,
        edit: str = "inpaint",
        *,
        mask: Path | np.ndarray | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        **settings: Any,
    ) -> dict[str, np.ndarray]:
        """Edited images as arrays: see ``inference.edits.edit_images``.

        Args:
          images: a folder of images, an ``.npz``, or uint8 ``[n, height, width, channels]``.
          edit: "inpaint", "colourise", "superres", "sdedit", "interpolate" or "encode".
          mask: for "inpaint", an image, white where images are made anew, or an array, True there.
          settings: ``num_samples``, ``factor``, ``strength``, ``jump_length`` and ``resamplings``
            of ``inference.edits.Request``; ``label`` and what else the model is told.
        """
        from jax_ddpm.inference import edits

        request = _request(edit, images, mask, settings)
        return edits.edit_images(self, request, seed=seed, batch_size=batch_size)

    @_checked
    def write_edits(
        self,
        images: Path | np.ndarray,
        edit: str = "inpaint",
        *,
        out: Path | None = None,
        mask: Path | np.ndarray | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        poll: Poll = never,
        **settings: Any,
    ) -> pathlib.Path:
        """As ``edit``, into a ``.png`` or ``.npz``, by default ``<edit>.png`` in the workdir."""
        from jax_ddpm.inference import edits

        request = _request(edit, images, mask, settings)
        path = pathlib.Path(out or self.workdir / f"{edit}.png")
        edits.write_edits(self, path, request, seed=seed, batch_size=batch_size, poll=poll)
        return path

    @_checked
    def evaluate(self, metrics: str | Sequence[str], **how: Any) -> Report:
        """Measures the model, or ``samples`` beside its data: see ``evaluate``."""
        return evaluate(metrics, run=self, **how)

    @_checked
    def variance(
        self,
        num_examples: int = 1000,
        batch_size: int | None = None,
        data_path: Path | None = None,
        *,
        poll: Poll = never,
    ) -> pathlib.Path:
        """Estimates what ``variance="optimal"`` needs, and stores it with the checkpoint."""
        from jax_ddpm.evaluation.x0_error import store_x0_error

        source = _source(None, self.workdir, data_path, self.step)
        assert source is not None
        size = batch_size or self.config.sampling.batch_size
        return store_x0_error(self, source, self.workdir, num_examples, size, poll)

    def denoiser(self) -> Denoiser:
        """The sampler's denoiser, guided: a pytree, ``(x_t, t, conditioning) → Prediction``."""
        return self.model.guided_denoiser(self.params)

    def grid(self) -> Grid:
        """Where sampling goes, from noise to clean data."""
        return self.model.grid()


@_checked
def load(workdir: Path, step: int | None = None, raw: bool = False, **sampling: Any) -> Run:
    """Reads a run: its averaged (or ``raw``) parameters at ``step``, the newest by default.

    ``sampling`` overrides fields of that section of its config, such as ``guidance_scale=2.0``.
    Another sampler than the run's starts from its own options, not from those of the run's sampler.
    """
    _start()
    path = pathlib.Path(workdir)
    return Run(path, *trained.read(path, step, raw, **sampling))


@_checked
def evaluate(
    metrics: str | Sequence[str],
    *,
    run: Run | None = None,
    config: Config | None = None,
    samples: Path | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    num_seeds: int = 1,
    batch_size: int | None = None,
    extractor: Path | None = None,
    reference: Path = "train",
    split: str = "heldout",
    num_examples: int | None = None,
    calibrate: bool = False,
    data_path: Path | None = None,
    cache: Path | None = None,
    out: Path | None = None,
    poll: Poll = never,
) -> Report:
    """Measures a run, or ``samples`` in files, and writes a record: see ``evaluation.evaluate``.

    Args:
      metrics: names, in a list or a line such as "fid,kid".
      config: the config of the real data, where there is no run.
      num_samples, seed, num_seeds: how many samples of each seed; the first seed; how many seeds.
      data_path: where the data lies now.

    The other arguments are those of ``evaluation.quality.Evaluation``. ``print`` shows a table.
    """
    from jax_ddpm.evaluation import evaluate as evaluation
    from jax_ddpm.evaluation.quality import Evaluation

    _start()
    if run is None and samples is None:
        raise UserError("--workdir is missing; for example --mode=eval --workdir=runs/digits")
    if seed + num_seeds > 2**32:
        raise UserError(
            f"--num_seeds={num_seeds} from --seed={seed} on: there are seeds below 2**32 only; "
            "give a smaller one"
        )
    names = metrics.split(",") if isinstance(metrics, str) else metrics
    folder = (run.workdir if run else pathlib.Path()) / "evaluation"
    what = Evaluation(
        cache=pathlib.Path(cache or folder / "cache"),
        trained=run,
        source=_source(config, run.workdir if run else None, data_path, run.step if run else None),
        samples=None if samples is None else pathlib.Path(samples),
        num_samples=num_samples,
        seeds=tuple(range(seed, seed + num_seeds)),
        extractor=None if extractor is None else os.fspath(extractor),
        reference=os.fspath(reference),
        split=split,
        num_examples=num_examples,
        calibrate=calibrate,
        batch_size=batch_size or (run.config.sampling.batch_size if run else 64),
    )
    return evaluation.evaluate(
        what, list(names), folder, None if out is None else pathlib.Path(out), poll
    )


@_checked
def fid_stats(
    out: Path,
    *,
    config: Config | None = None,
    workdir: Path | None = None,
    samples: Path | None = None,
    extractor: Path | None = None,
    split: str = "train",
    batch_size: int | None = None,
    data_path: Path | None = None,
    cache: Path | None = None,
    poll: Poll = never,
) -> pathlib.Path:
    """Writes the moments of the features of real images into ``out``, for ``reference``.

    The images are a split of the data of ``config`` or of a run, or ``samples`` in files.
    """
    from jax_ddpm.evaluation.extractors import make_extractor
    from jax_ddpm.evaluation.features import extract
    from jax_ddpm.evaluation.image_sets import file_set, split_set
    from jax_ddpm.evaluation.reference import reference_of, request_of, save_moments
    from jax_ddpm.inference.outputs import require_place, require_writable

    _start()
    path = pathlib.Path(out)
    if path.suffix != ".npz":
        raise UserError(f"--out={out}: give the name of an .npz, such as --out=cifar10.npz")
    require_writable(path, f"--out={out}")
    if samples is not None:
        images = file_set(pathlib.Path(samples))
    else:
        source = _source(config, workdir, data_path)
        if source is None:
            raise UserError("--config is missing: of the data, or give its images by --samples")
        images = split_set(source, split)
    folder = pathlib.Path(cache or path.with_name(path.name + ".cache"))
    measure = make_extractor(None if extractor is None else os.fspath(extractor), images.shape())
    known = images.identity | {"count": images.count}
    require_place(path, request_of(known, measure))
    features = extract(measure, images, images.count, batch_size or 64, folder, poll)
    save_moments(path, reference_of(features), measure)
    return path


@_checked
def compare(one: Path, other: Path) -> str:
    """Two records side by side, as a table."""
    from jax_ddpm.evaluation import record

    return record.compare(pathlib.Path(one), pathlib.Path(other))


def _to_train(config: Config, workdir: Path | None) -> tuple[ConfigDict, pathlib.Path]:
    settings, name = read_config(config)
    if workdir is None and not name:
        raise UserError("--workdir is missing: this config has no name to call its folder by")
    return settings, pathlib.Path(workdir or f"runs/{name}")


def _start(config: ConfigDict | None = None) -> None:
    """Sets up XLA as the command line does, unless it has already started."""
    backend.set_flags(deterministic=config is not None and config.deterministic)
    backend.keep_compiled()


@contextlib.contextmanager
def _stopping(poll: Poll | None) -> Iterator[Poll]:
    """The given poll, or one that a signal stops; the signal acts as ever once all is saved."""
    if poll is not None or threading.current_thread() is not threading.main_thread():
        yield poll or never
        return
    try:
        with StopRequest() as stop:
            yield shared_poll(stop.poll)
    except Stopped as asked:
        signal.raise_signal(signal.Signals[str(asked)])
        raise


def _request(
    edit: str, images: Path | np.ndarray, mask: Path | np.ndarray | None, settings: dict[str, Any]
) -> Any:
    from jax_ddpm.inference.edits import Request

    def read(given: Path | np.ndarray) -> pathlib.Path | np.ndarray:
        return pathlib.Path(given) if isinstance(given, str | os.PathLike) else np.asarray(given)

    own = {field.name for field in dataclasses.fields(Request)}
    asked = {k: v for k, v in settings.items() if k not in own and v is not None}
    settings = {k: v for k, v in settings.items() if k in own}
    mask = None if mask is None else read(mask)
    return Request(edit, read(images), mask=mask, asked=asked, **settings)


def _source(
    config: Config | None, workdir: Path | None, data_path: Path | None, step: int | None = None
) -> Source | None:
    """The data of the run in ``workdir`` at a step, or of ``config``."""
    from jax_ddpm.config.validation import validate
    from jax_ddpm.factory import make_source
    from jax_ddpm.runs.identity import load_identity

    spec = None
    if workdir is not None and config is not None:
        raise UserError("--config and --workdir: give one of them; a run has its own data")
    if workdir is not None:
        settings, spec = load_identity(pathlib.Path(workdir), step)
    elif config is not None:
        settings = read_config(config).config
    else:
        return None
    if data_path is not None:
        settings.data.path = os.fspath(data_path)
    validate(settings, num_devices=1)
    source = make_source(settings)
    if spec and spec.meaning() != source.spec.as_noted(spec).meaning():
        raise UserError(
            f"the run was trained on {spec.identity}, but its data is {source.spec.identity} now; "
            "give the place of the former by --data_path"
        )
    return source
