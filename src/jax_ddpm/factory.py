"""From config to parts: explicit functions and dictionaries, the one place where they meet."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_ddpm.config import validate_for_data
from jax_ddpm.data.cifar10 import cifar10
from jax_ddpm.data.digits import digits
from jax_ddpm.data.folder import folder
from jax_ddpm.data.idx import idx
from jax_ddpm.data.npz import npz
from jax_ddpm.data.source import Source, Spec
from jax_ddpm.data.tfds import tfds
from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.denoiser import ClippedDenoiser, Denoiser, NetworkDenoiser
from jax_ddpm.diffusion.guidance import ClassifierFreeGuidance
from jax_ddpm.diffusion.likelihood import ModelVariance
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.loop import Sampler
from jax_ddpm.diffusion.schedules import make_betas
from jax_ddpm.models.classifier import ResNet
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


def _module_fields(config: ConfigDict) -> dict[str, Any]:
    """The section ``model`` as the networks take it."""
    fields = config.model.to_dict() | {"dtype": jnp.dtype(config.model.dtype)}
    return {name: value for name, value in fields.items() if name != "class_conditional"}


class Model:
    """What training and sampling share: the process, the network and what its output means."""

    def __init__(self, config: ConfigDict, spec: Spec):
        variance = config.parameterisation.variance
        in_output = variance in ("learned", "learned_range")
        self.spec = spec
        self.chain = Chain(make_betas(**config.process))
        self.parameterisation = Parameterisation(
            self.chain,
            config.parameterisation.target,
            time_scale=1000 / self.chain.num_timesteps,
            variance=variance if in_output else "none",
        )
        self.variance: ModelVariance = "learned" if in_output else variance
        self.num_classes = spec.num_classes if config.model.class_conditional else 0
        self.network: Network = make_network(
            UNet(
                out_channels=spec.image_shape[-1] * (2 if in_output else 1),
                num_classes=self.num_classes,
                **_module_fields(config),
            ),
            jnp.zeros((1, *spec.image_shape)),
            jnp.zeros(1),
            {},
        )
        self._clip = config.sampling.clip
        self._num_steps = config.sampling.num_steps or self.chain.num_timesteps
        self.guidance_scale = config.sampling.guidance_scale

    def denoiser(self, params: Any, guidance_scale: float = 1.0) -> Denoiser:
        """The network with these parameters, as likelihoods and samplers see it."""
        denoiser: Denoiser = NetworkDenoiser(params, self.network.apply, self.parameterisation)
        if guidance_scale != 1:
            denoiser = ClassifierFreeGuidance(denoiser, guidance_scale)
        return ClippedDenoiser(denoiser, self.chain) if self._clip else denoiser

    def sampler(self) -> Sampler:
        """Ancestral sampling down the chain, or ``sampling.num_steps`` of its steps."""
        last = self.chain.num_timesteps - 1
        times = np.round(np.linspace(last, 0, self._num_steps))
        return ancestral(self.chain, times, self.variance)


class Classifier:
    """The network that tells the classes of the data apart: ``x → (features, logits)``."""

    def __init__(self, config: ConfigDict, spec: Spec):
        self.spec, self.num_classes = spec, spec.num_classes
        self.network: Network = make_network(
            ResNet(num_classes=spec.num_classes, **_module_fields(config)),
            jnp.zeros((1, *spec.image_shape)),
        )


def make_model(config: ConfigDict, spec: Spec) -> Model | Classifier:
    """What ``config.task`` trains."""
    models: dict[str, type[Model | Classifier]] = {
        "diffusion": Model,
        "classification": Classifier,
    }
    return models[config.task](config, spec)
