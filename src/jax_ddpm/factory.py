"""From config to parts: the one place where they meet."""

import inspect
import operator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_ddpm.codecs.codec import Codec
from jax_ddpm.codecs.table import CODECS
from jax_ddpm.conditions.condition import UNCONDITIONAL, Conditions
from jax_ddpm.conditions.label import Label
from jax_ddpm.conditions.table import CONDITIONS
from jax_ddpm.data.source import Source, Spec
from jax_ddpm.data.table import SOURCES
from jax_ddpm.diffusion import processes, time_densities
from jax_ddpm.diffusion.chain import chain_of
from jax_ddpm.diffusion.denoiser import Denoiser, InProcess, NetworkDenoiser
from jax_ddpm.diffusion.family import Gaussian
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
from jax_ddpm.diffusion.samplers.grid import GRIDS, Grid, to_clean
from jax_ddpm.diffusion.samplers.scan import Sampler
from jax_ddpm.diffusion.samplers.table import usual_grid
from jax_ddpm.diffusion.thresholding import ClippedDenoiser, ThresholdedDenoiser
from jax_ddpm.diffusion.time_sampling import TimeSampler
from jax_ddpm.models.network import Network, Read, make_network, reads_nothing
from jax_ddpm.models.table import NETWORKS
from jax_ddpm.options import OneOf, Table, naming, require, taken


def make_source(config: ConfigDict) -> Source:
    """The data set of a config."""
    row = SOURCES[config.data.source]
    with naming("data"):
        return row(**taken(row, config.data))


def make_codec(config: ConfigDict, spec: Spec, read: Read = reads_nothing) -> Codec:
    """What images of such data are diffused as; ``read`` gives the networks of other runs."""
    row = CODECS[config.model.codec]
    with naming("model"):
        codec = row(spec, read, **taken(row, config.model))
    batch = {name: jax.ShapeDtypeStruct((1, *f.shape), f.dtype) for name, f in spec.fields.items()}
    made = jax.eval_shape(codec.encode, batch).shape
    require(
        config,
        "model.codec",
        lambda _: made == (1, *codec.shape),
        f"one whose encode gives its shape {codec.shape}, not {made[1:]}",
    )
    return codec


def codec_record(config: ConfigDict, codec: Codec) -> dict[str, Any]:
    """What identifies a codec: its name, its options and its parameters, as JSON."""
    name = config.model.codec
    return {"name": name} | taken(CODECS[name], config.model) | dict(codec.record)


def make_conditions(config: ConfigDict, spec: Spec) -> Conditions:
    """What the network is told of such data, besides x_t and t."""
    found = (row(config, spec) for row in CONDITIONS.of(config.modules).values())
    return Conditions(tuple(condition for condition in found if condition is not None))


def make_process(config: ConfigDict) -> Process:
    """The noise process of training."""
    with naming("process"):
        return processes.make_process(**config.process)


def make_parameterisation(config: ConfigDict) -> Parameterisation:
    """The meaning of the network's input and output, in the process of training."""
    fields, process = config.parameterisation, make_process(config)
    learned = fields.variance in ("learned", "learned_range")
    with naming("parameterisation", f"process.name={config.process.name}"):
        return Parameterisation(
            process,
            time_scale=1000 / (process.num_timesteps or 1),
            variance=fields.variance if learned else "none",
            **taken(Parameterisation, fields),
        )


def make_module(
    config: ConfigDict,
    networks: Table,
    shape: tuple[int, ...] | None = None,
    conditions: Conditions = UNCONDITIONAL,
    **given: Any,
) -> nn.Module:
    """The network of ``config.model``, from a table whose first row is the default.

    ``given`` holds what the model passes to a network that has attributes of these names.

    Raises:
      UserError: where the table has no such network, or it does not fit the options, the
        conditions or the shape of x.
    """
    name = config.model.name or next(iter(networks))
    require(config, "model.name", lambda _: name in networks, f"{OneOf(networks).must_be} here")
    row, model = networks[name], config.model
    attributes = inspect.signature(row).parameters
    for field, attribute in (("class_conditional", "num_classes"), ("self_condition",) * 2):
        if attribute not in attributes:
            must_be = f"False: the network {name} is not told of it"
            require(config, f"model.{field}", operator.not_, must_be)
    lacking = ", ".join(conditions.attributes.keys() - attributes)
    must_be = f"a network with the attributes {lacking}, for what it is told"
    require(config, "model.name", lambda _: not lacking, must_be)
    given |= {"self_condition": model.self_condition, "dtype": jnp.dtype(model.dtype)}
    given |= conditions.attributes
    known = {key: value for key, value in given.items() if key in attributes}
    with naming("model"):
        module = row(**known, **taken(row, model))
        if check := getattr(module, "check", None):
            check(shape)
    return module


class Companions(NamedTuple):
    """What a model needs beside its own parameters.

    Attributes:
      read: gives the frozen networks of other runs, for a codec.
      guide: a worse denoiser for autoguidance, or log p(label | x_t) for classifier guidance.
      class_names: the classes of that classifier.
      x0_error: the statistic of the optimal variance.
      record: the guide's identity, as JSON.
    """

    read: Read = reads_nothing
    guide: Any = None
    class_names: tuple[str, ...] = ()
    x0_error: X0Error | None = None
    record: dict[str, Any] = {}  # noqa: RUF012


ALONE = Companions()


class Model:
    """What training and sampling share: the process, the network and the meaning of its output.

    Attributes:
      process, parameterisation, network: those of training.
      codec: what images are diffused as.
      conditions: what the network is told.
      family: the noise of training, with the reverse that the bound measures.
      sampling_process: the sampler's process, the trained one unless ``sampling.process`` is set.
      sampling_conditions: what samples can be asked for: also a class that only a classifier knows.
    """

    def __init__(self, config: ConfigDict, spec: Spec, companions: Companions = ALONE):
        self.spec, self._sampling = spec, config.sampling
        self.codec = make_codec(config, spec, companions.read)
        require(
            config,
            "sampling.dynamic_threshold",
            lambda value: not value or self.codec.bounded,
            f"0: model.codec={config.model.codec} has no bounds to keep x_0 within",
        )
        self.conditions = self.sampling_conditions = make_conditions(config, spec)
        guidable = config.sampling.guidance != "classifier_free" or bool(self.conditions.guided)
        require(
            config,
            "sampling.guidance_scale",
            lambda value: value == 1 or guidable,
            "1: guidance needs a class-conditional model trained with training.label_drop > 0",
        )
        if companions.class_names and "label" not in self.conditions.names:
            guided = (*self.conditions.parts, Label(companions.class_names))
            self.sampling_conditions = Conditions(guided)
        self.parameterisation = make_parameterisation(config)
        self.process = self.parameterisation.process
        in_output = self.parameterisation.variance != "none"
        variance: ModelVariance = "learned" if in_output else config.parameterisation.variance
        self.family = Gaussian(self.process, variance, spec.num_levels)
        self.self_condition = config.model.self_condition
        shape = self.codec.shape
        channels = shape[-1]
        module = make_module(
            config,
            NETWORKS,
            shape,
            self.conditions,
            out_channels=2 * channels if in_output else channels,
        )
        self.network: Network = make_network(module, jnp.zeros((1, *shape)), jnp.zeros(1), {})
        self.sampling_process = make_sampling_process(config, self.process)
        self._companions = companions

    @property
    def variance(self) -> ModelVariance:
        """That of the reverse steps."""
        return self.family.variance

    @property
    def chain(self) -> Process:
        """The process, for what only a T-step chain has.

        Raises:
          UserError: where the process has continuous time.
        """
        return chain_of(self.process)

    def denoiser(self, params: Any, clip: bool | None = None) -> Denoiser:
        """The network with these parameters, as likelihoods see it.

        ``clip`` limits the predicted x_0 to [-1, 1]; its default is ``sampling.clip``, as far as
        the codec is bounded.
        """
        denoiser = NetworkDenoiser(params, self.network.apply, self.parameterisation)
        clip = self._clips if clip is None else clip
        return ClippedDenoiser(denoiser, self.process) if clip else denoiser

    @property
    def _clips(self) -> bool:
        return self._sampling.clip and self.codec.bounded

    def guided_denoiser(self, params: Any) -> Denoiser:
        """The network with these parameters and all that ``sampling`` puts around it."""
        sampling = self._sampling
        denoiser = self._guided(self.denoiser(params, clip=False))
        if sampling.dynamic_threshold:
            denoiser = ThresholdedDenoiser(denoiser, self.process, sampling.dynamic_threshold)
        elif self._clips:
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
            told = self.conditions
            guidance = ClassifierFreeGuidance(denoiser, scale, told.guided, told.negative())
        if sampling.guidance_rescale:
            guidance = RescaledGuidance(guidance, self.process, sampling.guidance_rescale)
        if sampling.guidance_interval:
            return GuidanceInterval(guidance, self.process, *sampling.guidance_interval)
        return guidance

    def grid(self) -> Grid:
        """Where sampling goes, from noise to clean data."""
        return make_grid(self._sampling, self.sampling_process)

    def sampler(self, grid: Grid | None = None) -> Sampler:
        """The sampler of ``sampling``, down its own grid or another."""
        grid, statistic = grid or self.grid(), self._companions.x0_error
        optimal = statistic and optimal_variance(grid, statistic, visible=self.codec.bounded)
        return make_sampler(self._sampling, self.family, grid, optimal)


def make_sampling_process(config: ConfigDict, trained: Process) -> Process:
    """The process to sample in, the trained one unless ``sampling.process`` is set."""
    name = config.sampling.process
    return processes.over_the_range_of(trained, name) if name else trained


def make_grid(sampling: ConfigDict, process: Process) -> Grid:
    """The grid of the section ``sampling``, from noise to clean data."""
    with naming("sampling"):
        if sampling.times:
            return to_clean(process, np.array(sampling.times, float))
        name = sampling.grid or usual_grid(sampling.sampler, process)
        return to_clean(process, GRIDS[name](process, sampling.num_steps or process.num_timesteps))


def make_sampler(
    sampling: ConfigDict, family: Gaussian, grid: Grid, optimal: np.ndarray | None
) -> Sampler:
    """The family's sampler down a grid, with its own variance or the ``optimal`` one."""
    row = family.samplers[sampling.sampler]
    given = taken(row, sampling)
    options: dict[str, Any] = {k: v for k, v in given.items() if v not in (None, ())}
    if "variance" in given:
        options = {"variance": family.variance} | options
        if options["variance"] == "optimal":
            assert optimal is not None
            options["variance"] = optimal
    with naming("sampling"):
        return row.make(grid, **options)


def make_time_sampler(config: ConfigDict, process: Process) -> TimeSampler:
    """How the times of training are drawn."""
    loss = config.loss
    return time_densities.make_time_sampler(
        process, loss.time_sampler, loss.time_mean, loss.time_std
    )
