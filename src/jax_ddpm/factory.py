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
from jax_ddpm.diffusion.likelihood import ModelVariance
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.loop import Sampler
from jax_ddpm.diffusion.schedules import make_betas
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
                base_channels=config.model.base_channels,
                channel_multipliers=config.model.channel_multipliers,
                num_res_blocks=config.model.num_res_blocks,
                attention_resolutions=config.model.attention_resolutions,
                num_groups=config.model.num_groups,
                dropout=config.model.dropout,
                num_classes=self.num_classes,
                dtype=jnp.dtype(config.model.dtype),
                remat=config.model.remat,
            ),
            spec.image_shape,
        )
        self._clip = config.sampling.clip

    def denoiser(self, params: Any) -> Denoiser:
        """The network with these parameters, as samplers see it."""
        denoiser = NetworkDenoiser(params, self.network.apply, self.parameterisation)
        return ClippedDenoiser(denoiser, self.chain) if self._clip else denoiser

    def sampler(self) -> Sampler:
        """Ancestral sampling down the whole chain."""
        times = np.arange(self.chain.num_timesteps - 1, -1, -1, dtype=np.float64)
        return ancestral(self.chain, times, self.variance)
