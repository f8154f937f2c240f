"""The DDPM objective: from a batch of images to a loss per example."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from jax_ddpm import factory
from jax_ddpm.conditions.condition import Conditions
from jax_ddpm.diffusion.denoiser import X0_ESTIMATE, Conditioning
from jax_ddpm.diffusion.family import Gaussian
from jax_ddpm.diffusion.likelihood import ModelVariance, bound_estimate
from jax_ddpm.diffusion.losses import weighted_error
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.process import expand
from jax_ddpm.diffusion.time_sampling import TimeSampler
from jax_ddpm.keys import StepKeys, Stream
from jax_ddpm.models.network import Read
from jax_ddpm.models.table import NETWORKS
from jax_ddpm.tasks import augmentation
from jax_ddpm.tasks.noising import by_quarter, noised
from jax_ddpm.tasks.objective import Metrics
from jax_ddpm.tasks.recipe import Recipe, one_network
from jax_ddpm.tasks.task import Task


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionObjective:
    """Denoising at random times (Ho et al. 2020, algorithm 1), for the parameters "network".

    It reads "codec", which makes x_0 of a batch.

    Attributes:
      apply: the network, ``(params, x, time, conditioning, dropout_keys) → output``.
      loss: "error", the weighted ε-error; "bound", T·L_t in bits/dim; "hybrid", the error plus
        ``bound_weight`` times the bound, which then trains the variance alone (Nichol & Dhariwal
        2021, eq. 16).
      num_levels: the levels of the data, for the bound's discrete decoder.
      self_condition: whether half of the examples get the network's first estimate of them (Chen et
        al. 2023, Analog bits, algorithm 1), and the others 0.
      conditions: what the network is told of a batch.
      augment: whether flips, dropout and drops of conditions happen: False when measuring.
    """

    apply: Callable
    parameterisation: Parameterisation
    variance: ModelVariance
    time_sampler: TimeSampler
    loss: str
    weighting: str
    bound_weight: float
    num_levels: int
    flip: bool
    conditions: Conditions
    self_condition: bool = False
    augment: bool = True

    def init(self) -> Any:
        """The extra state before the first step."""
        return self.time_sampler.init()

    def measuring(self) -> "DiffusionObjective":
        """The same without the randomness of training, with times spread evenly over a batch."""
        return dataclasses.replace(self, augment=False, time_sampler=self.time_sampler.measuring())

    def __call__(
        self,
        params: dict[str, Any],
        extra: Any,
        batch: dict[str, Array],
        keys: StepKeys,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, " batch"], Metrics, Any]:
        if self.flip and self.augment:
            flipped = augmentation.flip(keys.per_example(Stream.FLIP), batch["image"])
            batch = batch | {"image": flipped}  # also as conditions see it
        codec_keys = keys.per_example(Stream.CODEC) if self.augment else None
        x0 = params["codec"].encode(batch, codec_keys)
        family = Gaussian(self.parameterisation.process)
        drawn = noised(family, self.time_sampler, extra, x0, keys, step)
        t, importance, xt, eps = drawn
        dropout_keys = keys.per_example(Stream.DROPOUT) if self.augment else None

        def network(conditioning: Conditioning) -> Array:
            x, time = (
                self.parameterisation.network_input(xt, t),
                self.parameterisation.network_time(t),
            )
            return self.apply(params["network"], x, time, conditioning, dropout_keys)

        told = self.conditions
        conditioning = told.training(batch, keys) if self.augment else told.given(batch)
        if self.self_condition:
            first = self.parameterisation.to_prediction(network(conditioning), xt, t).x0
            conditioning[X0_ESTIMATE] = self._told(jax.lax.stop_gradient(first), keys)
        output = network(conditioning)
        loss = self._loss(output, x0, xt, eps, t)
        extra = self.time_sampler.update(extra, step, keys.gather(t), keys.gather(loss))
        return loss * importance, by_quarter("loss", loss, drawn, self.time_sampler), extra

    def _told(self, estimate: Array, keys: StepKeys) -> Array:
        """The estimate for half of the examples, 0 for the others; for all when measuring."""
        if not self.augment:
            return estimate
        told = jax.vmap(jax.random.bernoulli)(keys.per_example(Stream.SELF_CONDITION))
        return expand(told.astype(estimate.dtype), estimate) * estimate

    def _loss(self, output: Array, x0: Array, xt: Array, eps: Array, t: Array) -> Array:
        if self.loss == "bound":
            return self._bound(output, x0, xt, t)
        y, _ = self.parameterisation.split(output, t)
        target = self.parameterisation.regression_target(x0, eps, t)
        error = weighted_error(self.parameterisation, self.weighting, y, target, t)
        if self.loss == "error":
            return error
        mean, variance = jnp.split(output, 2, axis=-1)
        frozen_mean = jnp.concatenate([jax.lax.stop_gradient(mean), variance], axis=-1)
        return error + self.bound_weight * self._bound(frozen_mean, x0, xt, t)

    def _bound(self, output: Array, x0: Array, xt: Array, t: Array) -> Array:
        """T·L_t in bits/dim, whose mean over uniform t is the bound less L_T."""
        prediction = self.parameterisation.to_prediction(output, xt, t)
        return bound_estimate(
            self.parameterisation.process,
            prediction,
            x0,
            xt,
            t,
            self.variance,
            self.num_levels,
        )


def _recipe(config: ConfigDict, model: factory.Model, read: Read) -> Recipe:
    objective = DiffusionObjective(
        apply=model.network.apply,
        parameterisation=model.parameterisation,
        variance=model.variance,
        time_sampler=factory.make_time_sampler(config, model.process),
        loss=config.loss.kind,
        weighting=config.loss.weighting,
        bound_weight=config.loss.bound_weight,
        num_levels=model.spec.num_levels,
        flip=config.data.flip,
        conditions=model.conditions,
        self_condition=model.self_condition,
    )
    return one_network(config, model.network, model.codec, objective)


DIFFUSION = Task(factory.Model, _recipe, NETWORKS)
