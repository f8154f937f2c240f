"""From config to parts: explicit functions and dictionaries, the one place where they meet."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_ddpm.config.validation import validate_for_data
from jax_ddpm.data.cifar10 import cifar10
from jax_ddpm.data.digits import digits
from jax_ddpm.data.folder import folder
from jax_ddpm.data.idx import idx
from jax_ddpm.data.npz import npz
from jax_ddpm.data.source import Source, Spec
from jax_ddpm.data.tfds import tfds
from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.denoiser import Denoiser, InProcess, NetworkDenoiser
from jax_ddpm.diffusion.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    Guidance,
    GuidanceInterval,
    LikelihoodGuidance,
    RescaledGuidance,
)
from jax_ddpm.diffusion.likelihood import ModelVariance
from jax_ddpm.diffusion.optimal_variance import X0Error, optimal_variance
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.process import Process
from jax_ddpm.diffusion.processes import make_process, over_the_range_of
from jax_ddpm.diffusion.samplers.grid import GRIDS, Grid, to_clean
from jax_ddpm.diffusion.samplers.loop import Sampler
from jax_ddpm.diffusion.samplers.methods import METHODS, usual_grid
from jax_ddpm.diffusion.thresholding import ClippedDenoiser, ThresholdedDenoiser
from jax_ddpm.diffusion.time_densities import (
    Continuous,
    LogitNormalDensity,
    LogNormalDensity,
    UniformDensity,
)
from jax_ddpm.diffusion.time_sampling import TIME_SAMPLERS, TimeSampler
from jax_ddpm.errors import UserError
from jax_ddpm.models.network import Network, make_network
from jax_ddpm.models.unet import UNet

SOURCES = {
    "digits": lambda data: digits(),
    "npz": lambda data: npz(data.path),
    "idx": lambda data: idx(data.path),
    "cifar10": lambda data: cifar10(data.path),
    "folder": lambda data: folder(data.path, data.image_size),
    "tfds": lambda data: tfds(data.name, data.path, data.image_size),
}


def make_source(config: ConfigDict) -> Source:
    """The data set, checked against the config."""
    source = SOURCES[config.data.source](config.data)
    validate_for_data(config, source.spec.image_shape, source.spec.num_classes)
    return source


def module_fields(config: ConfigDict, module: type) -> dict[str, Any]:
    """The fields of the section ``model`` that a network has."""
    fields = config.model.to_dict() | {"dtype": jnp.dtype(config.model.dtype)}
    known = {field.name for field in dataclasses.fields(module)}
    return {name: value for name, value in fields.items() if name in known}


class Companions(NamedTuple):
    """What sampling takes from elsewhere than the model's own parameters.

    Attributes:
      guide: a worse denoiser for autoguidance, or log p(label | x_t) for classifier guidance.
      num_classes: of that classifier.
      x0_error: the statistic of the optimal variance.
      record: which guide it is, as JSON.
    """

    guide: Any = None
    num_classes: int = 0
    x0_error: X0Error | None = None
    record: dict[str, Any] = {}  # noqa: RUF012


ALONE = Companions()


def make_parameterisation(config: ConfigDict) -> tuple[Process, Parameterisation]:
    """The process of training, and what the network is fed and gives in it."""
    meaning, process = config.parameterisation, make_process(**config.process)
    length = process.num_timesteps if isinstance(process, Chain) else 1
    in_output = meaning.variance in ("learned", "learned_range")
    return process, Parameterisation(
        process,
        meaning.target,
        time_scale=1000 / length,
        condition_on=meaning.condition_on,
        data_std=meaning.data_std,
        normalise_input=meaning.normalise_input,
        variance=meaning.variance if in_output else "none",
    )


class Model:
    """What training and sampling share: the process, the network and what its output means.

    Attributes:
      process, parameterisation, network: of training.
      num_classes: that the network is told of.
      label_classes: that samples may be asked for, also where only a classifier guides to them.
      sampling_process: that the sampler runs in, the same unless ``sampling.process`` says another.
    """

    def __init__(self, config: ConfigDict, spec: Spec, companions: Companions = ALONE):
        self.spec, self._sampling = spec, config.sampling
        self.process, self.parameterisation = make_parameterisation(config)
        in_output = self.parameterisation.variance != "none"
        self.variance: ModelVariance = "learned" if in_output else config.parameterisation.variance
        self.num_classes = spec.num_classes if config.model.class_conditional else 0
        self.label_classes = self.num_classes or companions.num_classes
        self.self_condition = config.model.self_condition
        self.network: Network = make_network(
            UNet(
                out_channels=spec.image_shape[-1] * (2 if in_output else 1),
                num_classes=self.num_classes,
                **module_fields(config, UNet),
            ),
            jnp.zeros((1, *spec.image_shape)),
            jnp.zeros(1),
            {},
        )
        self.sampling_process = self.process
        if self._sampling.process:
            self.sampling_process = over_the_range_of(self.process, self._sampling.process)
        self._companions = companions

    @property
    def chain(self) -> Chain:
        """The process, for what only a T-step chain has.

        Raises:
          UserError: where it is one of continuous time.
        """
        if isinstance(self.process, Chain):
            return self.process
        raise UserError(
            "this model's process is no chain: it has no bound and no coding of T steps"
        )

    def denoiser(self, params: Any, clip: bool | None = None) -> Denoiser:
        """The network with these parameters, as likelihoods see it.

        ``clip`` the predicted x_0 to [-1, 1]: by default as ``sampling.clip`` says.
        """
        denoiser = NetworkDenoiser(params, self.network.apply, self.parameterisation)
        clip = self._sampling.clip if clip is None else clip
        return ClippedDenoiser(denoiser, self.process) if clip else denoiser

    def guided_denoiser(self, params: Any) -> Denoiser:
        """The network with these parameters and all that ``sampling`` puts around it."""
        sampling = self._sampling
        denoiser = self._guided(self.denoiser(params, clip=False))
        if sampling.dynamic_threshold:
            denoiser = ThresholdedDenoiser(denoiser, self.process, sampling.dynamic_threshold)
        elif sampling.clip:
            denoiser = ClippedDenoiser(denoiser, self.process)
        if self.sampling_process is self.process:
            return denoiser
        return InProcess(denoiser, self.process, self.sampling_process)

    def _guided(self, denoiser: Denoiser) -> Denoiser:
        sampling, guide = self._sampling, self._companions.guide
        scale = sampling.guidance_scale
        guidance: Guidance
        if sampling.guidance == "classifier":
            guidance = LikelihoodGuidance(denoiser, guide, self.process, scale)
        elif sampling.guidance == "autoguidance":
            guidance = AutoGuidance(denoiser, guide, scale)
        elif scale == 1:
            return denoiser
        else:
            negative = sampling.negative_class
            told = {} if negative is None else {"label": jnp.array([negative])}
            guidance = ClassifierFreeGuidance(denoiser, scale, told)
        if sampling.guidance_rescale:
            guidance = RescaledGuidance(guidance, self.process, sampling.guidance_rescale)
        if sampling.guidance_interval:
            return GuidanceInterval(guidance, self.process, *sampling.guidance_interval)
        return guidance

    def grid(self) -> Grid:
        """Where sampling goes, from noise to clean data."""
        sampling, process = self._sampling, self.sampling_process
        if sampling.times:
            return to_clean(process, np.array(sampling.times, float))
        num_steps = sampling.num_steps
        if isinstance(process, Chain):
            num_steps = num_steps or process.num_timesteps
        name = sampling.grid or usual_grid(sampling.sampler, process)
        return to_clean(process, GRIDS[name](process, num_steps))

    def sampler(self, grid: Grid | None = None) -> Sampler:
        """What ``sampling`` says, down its own grid or another."""
        sampling, grid = self._sampling, grid or self.grid()
        method = METHODS[sampling.sampler]
        options = {
            name: sampling[name] for name in method.options if sampling[name] not in (None, ())
        }
        if "variance" in method.options:
            options["variance"] = options.get("variance", self.variance)
            if options["variance"] == "optimal":
                assert self._companions.x0_error is not None
                options["variance"] = optimal_variance(grid, self._companions.x0_error)
        return method.make(grid, **options)


def make_time_sampler(config: ConfigDict, process: Process) -> TimeSampler:
    """How the times of training are drawn."""
    name, loss = config.loss.time_sampler, config.loss
    if isinstance(process, Chain):
        return TIME_SAMPLERS[name](process.num_timesteps)
    if name == "log_normal":
        return Continuous(LogNormalDensity(loss.time_mean, loss.time_std))
    if name == "logit_normal":
        return Continuous(LogitNormalDensity(loss.time_mean, loss.time_std))
    return Continuous(UniformDensity(*process.time_range), stratified=name == "stratified")
