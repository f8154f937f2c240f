"""A trained model, read from the folder of its run."""

import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from jax_ddpm import factory, images
from jax_ddpm.config import validate_sampling
from jax_ddpm.data.source import Spec
from jax_ddpm.errors import UserError
from jax_ddpm.generate import Generator
from jax_ddpm.training import checkpoint
from jax_ddpm.training.identity import load_identity
from jax_ddpm.training.step import data_mesh


class Trained:
    """A model with the parameters of one checkpoint.

    Attributes:
      config, spec: of the run and of its data.
      step: of the checkpoint.
      item: "ema" for averaged parameters, "params" for raw ones.
      model, params: the network's functions and its parameters as NumPy arrays.
    """

    def __init__(self, config: ConfigDict, spec: Spec, step: int, item: str, params: Any):
        self.config, self.spec, self.step, self.item, self.params = config, spec, step, item, params
        self._record = {
            "parameters": item,
            "checkpoint_step": step,
            "sha256": digest(params),
            "process": config.process.to_dict(),
            "parameterisation": config.parameterisation.to_dict(),
            "clip": config.sampling.clip,
            "sampler": "ancestral",
            "num_steps": config.sampling.num_steps or config.process.num_timesteps,
            "guidance_scale": config.sampling.guidance_scale,
            "dtype": config.model.dtype,
        }
        self.model = factory.Model(config, spec)

        self._generators: dict[tuple[int, int], Generator] = {}

    @property
    def record(self) -> dict[str, Any]:
        """What decides a sample besides seed and class, as JSON."""
        return self._record | {"random_numbers": str(jax.random.key_impl(jax.random.key(0)))}

    def generator(self, batch_size: int, num_snapshots: int = 1) -> Generator:
        """The sampler for batches of this size over all devices, compiled at its first use."""
        size = batch_size, num_snapshots
        if size not in self._generators:
            self._generators[size] = Generator(self.model, batch_size, data_mesh(), num_snapshots)
        return self._generators[size]

    def sample(
        self,
        num_samples: int,
        seed: int = 0,
        label: int | None = None,
        batch_size: int | None = None,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """Samples 0, …, num_samples-1 of the seed; sample i depends on (seed, i, label) alone.

        Without a label the classes of a conditional model take turns. ``batch_size`` is by default
        that of ``config.sampling``, at most.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be 1 or more")
        size = min(num_samples, batch_size or self.config.sampling.batch_size)
        return images.to_uint8(self.generator(size)(self.params, seed, num_samples, label))


def load(
    workdir: str | pathlib.Path, step: int | None = None, raw: bool = False, **sampling: Any
) -> Trained:
    """Reads a run: its averaged (or ``raw``) parameters at ``step``, the newest by default.

    ``sampling`` overrides fields of that section of its config, such as ``guidance_scale=2.0``.

    Raises:
      UserError: where there is no run, no such checkpoint, it is damaged, or this model cannot be
        sampled so.
    """
    workdir = pathlib.Path(workdir)
    config, spec = load_identity(workdir)
    if config.task != "diffusion":
        raise UserError(f"--workdir={workdir} holds a classifier; give a diffusion model's run")
    config.sampling.update(sampling)
    validate_sampling(config)
    item = "params" if raw else "ema"
    known = checkpoint.steps(workdir)
    if step is None:
        step = checkpoint.newest(workdir, [item])
    if step is None or not known:
        raise UserError(f"--workdir={workdir}: no checkpoint there yet; train on")
    if step not in known:
        raise UserError(
            f"--checkpoint_step={step}: {workdir} has checkpoints at {', '.join(map(str, known))}"
        )
    return Trained(
        config, spec, step, item, checkpoint.restore_item(workdir, step, item)["network"]
    )


def digest(params: Any) -> str:
    """Tells parameters apart, wherever their run lies."""
    sha256 = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        sha256.update(np.ascontiguousarray(leaf).tobytes())
    return sha256.hexdigest()
