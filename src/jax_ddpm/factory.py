"""The one place where config and parts meet: explicit functions and dictionaries."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from jax_ddpm.config import validate_for_data
from jax_ddpm.data.digits import digits
from jax_ddpm.data.npz import npz
from jax_ddpm.data.source import Source, Spec
from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.denoiser import ClippedDenoiser, Denoiser, NetworkDenoiser
from jax_ddpm.diffusion.likelihood import ModelVariance
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.loop import Sampler
from jax_ddpm.diffusion.schedules import make_betas
from jax_ddpm.diffusion.time_sampling import TIME_SAMPLERS
from jax_ddpm.models.network import Network, make_network
from jax_ddpm.models.unet import UNet
from jax_ddpm.training.objective import DiffusionObjective
from jax_ddpm.training.state import Average, Phase, Recipe

SOURCES = {
    "digits": lambda data: digits(),
    "npz": lambda data: npz(data.path),
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


def make_recipe(config: ConfigDict, model: Model) -> Recipe:
    """DDPM training: one phase, the parameters "network" and their average of the same name."""
    objective = DiffusionObjective(
        apply=model.network.apply,
        chain=model.chain,
        parameterisation=model.parameterisation,
        variance=model.variance,
        time_sampler=TIME_SAMPLERS[config.loss.time_sampler](model.chain.num_timesteps),
        loss=config.loss.kind,
        weighting=config.loss.weighting,
        bound_weight=config.loss.bound_weight,
        num_levels=model.spec.num_levels,
        flip=config.data.flip,
        label_drop=config.training.label_drop if model.num_classes else None,
    )
    learning_rate = make_learning_rate(config)
    optimiser = optax.chain(
        optax.clip_by_global_norm(config.training.grad_clip),
        optax.adam(
            learning_rate,
            b1=config.training.adam_b1,
            b2=config.training.adam_b2,
            eps=config.training.adam_eps,
        ),
    )

    def ema_decay(step):
        # Early on, average over about the last tenth of the run instead of the random start.
        return jnp.minimum(config.training.ema_decay, (1 + step) / (10 + step))

    return Recipe(
        phases=(Phase(objective, ("network",), optimiser, learning_rate),),
        averages={"network": Average("network", ema_decay)},
        accumulate=config.training.accumulate,
    )


def make_learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up from 0, then constant or along a cosine to 0 at the last step."""
    peak, warmup = config.training.learning_rate, config.training.warmup_steps
    rest = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, max(1, config.training.num_steps - warmup)),
    }[config.training.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup])
