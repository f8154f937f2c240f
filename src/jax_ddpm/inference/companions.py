"""What sampling needs beside the model itself: a guide, a statistic."""

import pathlib

import numpy as np

from jax_ddpm import factory
from jax_ddpm.diffusion.guidance import NoisyClassifier
from jax_ddpm.diffusion.optimal_variance import X0Error
from jax_ddpm.errors import UserError
from jax_ddpm.factory import Companions
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.checkpoint import digest
from jax_ddpm.runs.frozen import FrozenReader
from jax_ddpm.runs.served import Served, served
from jax_ddpm.runtime.files import read_json
from jax_ddpm.tasks.classification import NoisyImageClassifier
from jax_ddpm.tasks.table import make_model

_GUIDES = {
    "classifier": (NoisyImageClassifier, "a classifier of noisy images"),
    "autoguidance": (factory.Model, "a diffusion model"),
}


def load_companions(run: Served, workdir: pathlib.Path, item: str) -> Companions:
    """All that ``config.sampling`` of a run needs beside its own parameters.

    Raises:
      UserError: where something is missing, damaged, or does not fit the model.
    """
    config, spec, sampling = run.config, run.spec, run.config.sampling
    companions = Companions(FrozenReader(config, workdir))
    if sampling.variance == "optimal":
        statistic = load_x0_error(workdir, run.step, item, digest(run.params))
        record = {"x0_error_sha256": digest(statistic)}
        companions = companions._replace(x0_error=statistic, record=record)
    if sampling.guidance == "classifier_free":
        return companions
    guide = pathlib.Path(sampling.guide)
    guide_config, guide_spec, _, params = served(guide, sampling.guide_step or None, item)
    reading = Companions(FrozenReader(guide_config, guide))
    model = make_model(guide_config, guide_spec, reading)
    kind, needed_kind = _GUIDES[sampling.guidance]
    codec = factory.make_codec(config, spec, companions.read)
    differs = {
        "task": (guide_config.task, guide_config.task if isinstance(model, kind) else needed_kind),
        "process": (guide_config.process.to_dict(), config.process.to_dict()),
        "image shape": (guide_spec.image_shape, spec.image_shape),
        "codec": tuple(
            factory.codec_record(*each) for each in ((guide_config, model.codec), (config, codec))
        ),
    }
    for name, (held, needed) in differs.items():
        if held != needed:
            raise UserError(
                f"config.sampling.guide={guide}: its {name} is {held}; needed is {needed}"
            )
    record = companions.record | {"guide_sha256": digest(params)}
    companions = companions._replace(record=record)
    if isinstance(model, factory.Model):
        return companions._replace(guide=model.denoiser(params, clip=False))
    assert isinstance(model, NoisyImageClassifier)
    classifier = NoisyClassifier(params, model.network.apply, model.parameterisation)
    return companions._replace(guide=classifier, class_names=guide_spec.class_names)


def x0_error_path(workdir: pathlib.Path, step: int, item: str) -> pathlib.Path:
    """The file of the statistic of a checkpoint's optimal variance."""
    return checkpoint.folder(workdir) / str(step) / f"x0_error_{item}.json"


def load_x0_error(workdir: pathlib.Path, step: int, item: str, sha256: str) -> X0Error:
    """The statistic that ``--mode=variance`` has stored with a checkpoint.

    ``sha256`` is the hash of the parameters.

    Raises:
      UserError: where none is stored, it is damaged, or it is that of other parameters.
    """
    path = x0_error_path(workdir, step, item)
    try:
        stored = read_json(path)
        table = np.array([stored[name] for name in X0Error._fields], float)
        rises = table.ndim == 2 and table.size > 0 and np.all(np.diff(table[0]) > 0)
        if not (rises and np.all(np.isfinite(table))):
            raise ValueError("no table of finite numbers at rising λ")
        if stored["sha256"] != digest(table):
            raise ValueError("changed since it was written")
        measured = stored["model"]["sha256"]
    except FileNotFoundError as error:
        raise UserError(
            f"config.sampling.variance=optimal: {path} is missing; make it by "
            f"--mode=variance --workdir={workdir}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; make it anew by --mode=variance") from error
    if measured != sha256:
        raise UserError(f"{path} is of other parameters; make it anew by --mode=variance")
    return X0Error(*table)
