"""From config to objective and optimiser."""

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.process import Process
from jax_ddpm.diffusion.time_densities import (
    Continuous,
    LogitNormalDensity,
    LogNormalDensity,
    UniformDensity,
)
from jax_ddpm.diffusion.time_sampling import TIME_SAMPLERS, TimeSampler
from jax_ddpm.factory import Classifier, Model, NoisyClassifier
from jax_ddpm.tasks.adam import clipped_adam
from jax_ddpm.tasks.classification import (
    ClassificationObjective,
    NoisyClassificationObjective,
)
from jax_ddpm.tasks.diffusion import DiffusionObjective
from jax_ddpm.training.state import Average, Objective, Phase, Recipe


def make_objective(
    config: ConfigDict, model: Model | Classifier
) -> DiffusionObjective | ClassificationObjective:
    """What training minimises."""
    if isinstance(model, Classifier):
        fields = dict(
            apply=model.network.apply,
            num_levels=model.spec.num_levels,
            flip=config.data.flip,
            shift=config.data.shift,
        )
        if not isinstance(model, NoisyClassifier):
            return ClassificationObjective(**fields)
        return NoisyClassificationObjective(
            **fields,
            parameterisation=model.parameterisation,
            time_sampler=make_time_sampler(config, model.process),
        )
    return DiffusionObjective(
        apply=model.network.apply,
        parameterisation=model.parameterisation,
        variance=model.variance,
        time_sampler=make_time_sampler(config, model.process),
        loss=config.loss.kind,
        weighting=config.loss.weighting,
        bound_weight=config.loss.bound_weight,
        num_levels=model.spec.num_levels,
        flip=config.data.flip,
        label_drop=config.training.label_drop if model.num_classes else None,
        self_condition=model.self_condition,
    )


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


def make_recipe(config: ConfigDict, objective: Objective) -> Recipe:
    """One phase, the parameters "network" and their average of the same name."""
    learning_rate = make_learning_rate(config)
    training = config.training
    optimiser = clipped_adam(
        learning_rate, training.adam_b1, training.adam_b2, training.adam_eps, training.grad_clip
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
