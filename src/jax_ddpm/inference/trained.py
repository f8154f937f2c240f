"""A trained model, read from the folder of its run."""

import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from jax_ddpm import factory, options
from jax_ddpm.conditions.label import class_number, with_label
from jax_ddpm.config import default
from jax_ddpm.config.validation import validate_sampling
from jax_ddpm.data.source import Spec
from jax_ddpm.diffusion.processes import CONTINUOUS
from jax_ddpm.diffusion.samplers.table import SAMPLERS
from jax_ddpm.errors import UserError
from jax_ddpm.factory import Companions
from jax_ddpm.generate import Generator
from jax_ddpm.inference.companions import load_companions
from jax_ddpm.options import did_you_mean, is_a, words_for
from jax_ddpm.runs.checkpoint import digest
from jax_ddpm.runs.served import served
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.tasks.table import make_model, task_of


class Trained:
    """A model with the parameters of one checkpoint.

    Attributes:
      config, spec: those of the run and of its data.
      step: that of the checkpoint.
      item: "ema" for averaged parameters, "params" for raw ones.
      model, params: the network's functions and its parameters as NumPy arrays.
      model_record, record: what decides a prediction, and a sample besides seed and class, as JSON.
    """

    def __init__(
        self,
        config: ConfigDict,
        spec: Spec,
        step: int,
        item: str,
        params: Any,
        companions: Companions = factory.ALONE,
    ):
        self.config, self.spec, self.step, self.item, self.params = config, spec, step, item, params
        self.model = make_model(config, spec, companions)
        self._record = {
            "parameters": item,
            "checkpoint_step": step,
            "sha256": digest(params),
            "process": config.process.to_dict(),
            "parameterisation": config.parameterisation.to_dict(),
            "clip": config.sampling.clip,
            "dtype": config.model.dtype,
        }
        if self.model.codec.record:
            self._record["codec"] = dict(self.model.codec.record)
        self._sampling_record = sampling_record(config) | companions.record
        self._generators: dict[tuple[int, int], Generator] = {}

    @property
    def model_record(self) -> dict[str, Any]:
        return self._record | {
            "random_numbers": str(jax.random.key_impl(jax.random.key(0))),
            "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        }

    @property
    def record(self) -> dict[str, Any]:
        return self.model_record | self._sampling_record

    def generator(self, batch_size: int, num_snapshots: int = 1) -> Generator:
        """The sampler for batches of this size over all devices, compiled at its first use."""
        size = batch_size, num_snapshots
        if size not in self._generators:
            self._generators[size] = Generator(self.model, batch_size, make_mesh(), num_snapshots)
        return self._generators[size]

    def sample(
        self,
        num_samples: int,
        seed: int = 0,
        label: int | float | str | None = None,
        batch_size: int | None = None,
        **request: Any,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """Samples 0, …, num_samples-1 of the seed; sample i depends only on (seed, i, request).

        Without a label the classes of a conditional model take turns. A batch has ``batch_size``
        images, by default that of ``config.sampling``, and at most ``num_samples``. ``request``
        holds what else the model is told, by the names of its conditions.
        """
        size = min(num_samples, batch_size or self.config.sampling.batch_size)
        request |= with_label(label)
        samples = self.generator(size)(self.params, seed, num_samples, request)
        return self.model.codec.decode(samples)


def read(
    workdir: pathlib.Path, step: int | None, raw: bool, **sampling: Any
) -> tuple[ConfigDict, Spec, int, str, Any, Companions]:
    """The arguments of ``Trained``: averaged (or ``raw``) parameters at ``step``, or the newest.

    ``sampling`` overrides fields of that section of the run's config, such as ``guidance_scale``.

    Raises:
      UserError: where there is no run or no such checkpoint, it is damaged, or this model cannot
        be sampled so.
    """
    item = "params" if raw else "ema"
    run = served(workdir, step, item)
    config, spec = run.config, run.spec
    if not task_of(config).draws:
        raise UserError(f"--workdir={workdir} holds a classifier; give a diffusion model's run")
    _override(config, sampling)
    negative = class_number(spec.class_names, config.sampling.negative_class)
    if negative is not None:  # samples have one record, whether by its name or its number
        config.sampling.negative_class = negative
    validate_sampling(config)
    companions = load_companions(run, workdir, item)
    return config, spec, run.step, item, run.params, companions


def _override(config: ConfigDict, sampling: dict[str, Any]) -> None:
    """Another sampler than the run's is meant with options of its own."""
    section, usual = config.sampling, default(*config.modules).sampling
    former = section.sampler
    if sampling.get("sampler", former) != former:
        for name in options.of(SAMPLERS[former]):
            section[name] = usual[name]
    for name, value in sampling.items():
        if name not in section:
            raise UserError(f"--sampling: unknown field {name!r}{did_you_mean(name, section)}")
        kind = section.get_type(name)
        left_out = value is None and usual[name] is None
        if not (left_out or is_a(value, kind)):
            raise UserError(f"--sampling.{name}={value}: it must be {words_for(kind)}")
        section[name] = tuple(value) if kind is tuple else value


def sampling_record(config: ConfigDict) -> dict[str, Any]:
    """How samples are drawn, as JSON: sampler, steps, scale, and fields not at their default."""
    sampling, usual = config.sampling, default(*config.modules).sampling
    own_steps = config.process.name not in CONTINUOUS and not sampling.process
    steps = sampling.num_steps or (config.process.num_timesteps if own_steps else 0)
    always = {"sampler": sampling.sampler, "guidance_scale": sampling.guidance_scale}
    passed_over = (*always, "num_steps", "num_samples", "batch_size", "clip", "guide", "guide_step")
    return (
        always
        | {"num_steps": len(sampling.times) or steps}
        | {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in sampling.to_dict().items()
            if name not in passed_over and value != usual[name]
        }
    )
