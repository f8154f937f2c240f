"""Classifiers of clean and of noisy images, and their objectives."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from jax_ddpm import factory
from jax_ddpm.codecs.codec import Codec
from jax_ddpm.data.source import Spec
from jax_ddpm.diffusion.family import Gaussian
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.time_sampling import TimeSampler
from jax_ddpm.factory import ALONE, Companions
from jax_ddpm.keys import StepKeys, Stream
from jax_ddpm.models.network import Network, Read
from jax_ddpm.models.table import CLASSIFIERS
from jax_ddpm.options import require
from jax_ddpm.tasks import augmentation
from jax_ddpm.tasks.noising import by_quarter, noised
from jax_ddpm.tasks.objective import Metrics
from jax_ddpm.tasks.recipe import Recipe, one_network
from jax_ddpm.tasks.task import Task


class ImageClassifier:
    """The network that classifies the data: ``x → (features, logits)``."""

    def __init__(self, config: ConfigDict, spec: Spec, companions: Companions = ALONE):
        require(
            config,
            "task",
            lambda _: spec.num_classes > 0,
            "diffusion: this data has no labels",
        )
        self.spec, self.num_classes = spec, spec.num_classes
        self.codec = factory.make_codec(config, spec, companions.read)
        self.network: Network = factory.make_network(
            factory.make_module(
                config, CLASSIFIERS, self.codec.shape, num_classes=spec.num_classes
            ),
            *self._example_inputs(),
        )

    def _example_inputs(self) -> tuple[Any, ...]:
        return (jnp.zeros((1, *self.codec.shape)),)


class NoisyImageClassifier(ImageClassifier):
    """The classifier of x_t, for guidance: ``(x_t, dropout_keys, time) → (features, logits)``."""

    def __init__(self, config: ConfigDict, spec: Spec, companions: Companions = ALONE):
        super().__init__(config, spec, companions)
        self.parameterisation = factory.make_parameterisation(config)
        self.process = self.parameterisation.process

    def _example_inputs(self) -> tuple[Any, ...]:
        return (*super()._example_inputs(), None, jnp.zeros(1))


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationObjective:
    """The cross-entropy -log p(label | x) in nats, for the parameters "network".

    It reads "codec", which makes x of a batch.

    Attributes:
      apply: the network, ``(params, x, dropout_keys) → (features, logits)``.
      flip, shift: whether to mirror images at random, and the most pixels to move them by.
      augment: whether flips, shifts and dropout happen: False when measuring.
    """

    apply: Callable
    flip: bool
    shift: int
    augment: bool = True

    def init(self) -> Any:
        """No extra state."""
        return ()

    def measuring(self) -> "ClassificationObjective":
        """The same with nothing random."""
        return dataclasses.replace(self, augment=False)

    def __call__(
        self,
        params: dict[str, Any],
        extra: Any,
        batch: dict[str, Array],
        keys: StepKeys,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, " batch"], Metrics, Any]:
        x = self._encode(params["codec"], batch, keys)
        _, logits = self.apply(params["network"], x, self._dropout_keys(keys))
        loss, correct = _judge(logits, batch["label"])
        return loss, {"accuracy": (correct, jnp.ones_like(correct))}, extra

    def _dropout_keys(self, keys: StepKeys) -> Any:
        return keys.per_example(Stream.DROPOUT) if self.augment else None

    def _encode(self, codec: Codec, batch: dict[str, Array], keys: StepKeys) -> Array:
        if not self.augment:
            return codec.encode(batch)
        flip_keys, shift_keys = jax.vmap(jax.random.split, out_axes=1)(
            keys.per_example(Stream.FLIP)
        )
        images = batch["image"]
        if self.flip:
            images = augmentation.flip(flip_keys, images)
        if self.shift:
            images = augmentation.shift(shift_keys, images, self.shift)
        return codec.encode(batch | {"image": images}, keys.per_example(Stream.CODEC))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class NoisyClassificationObjective(ClassificationObjective):
    """-log p(label | x_t) with x_t ~ q(x_t | x_0) at random times, for guidance.

    (Dhariwal & Nichol 2021, section 4.) Its least value grows with t: from that of clean images to
    that without any image.

    Attributes:
      apply: also takes ``time=``, ``[batch]``.
      parameterisation: that of the noise and of the network's input.
    """

    parameterisation: Parameterisation
    time_sampler: TimeSampler

    def init(self) -> Any:
        """The time sampler's state before the first step."""
        return self.time_sampler.init()

    def measuring(self) -> "NoisyClassificationObjective":
        """The same with only the noise random, at times spread evenly over a batch."""
        return dataclasses.replace(self, augment=False, time_sampler=self.time_sampler.measuring())

    def __call__(
        self,
        params: dict[str, Any],
        extra: Any,
        batch: dict[str, Array],
        keys: StepKeys,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, " batch"], Metrics, Any]:
        x0 = self._encode(params["codec"], batch, keys)
        family = Gaussian(self.parameterisation.process)
        drawn = noised(family, self.time_sampler, extra, x0, keys, step)
        t, importance, xt, _ = drawn
        _, logits = self.apply(
            params["network"],
            self.parameterisation.network_input(xt, t),
            self._dropout_keys(keys),
            time=self.parameterisation.network_time(t),
        )
        loss, correct = _judge(logits, batch["label"])
        extra = self.time_sampler.update(extra, step, keys.gather(t), keys.gather(loss))
        accuracy = {"accuracy": (correct * importance, importance)}
        metrics = accuracy | by_quarter("accuracy", correct, drawn, self.time_sampler)
        return loss * importance, metrics, extra


def _judge(
    logits: Float[Array, "batch classes"], label: Int[Array, " batch"]
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """-log p(label) in nats, and whether no class is likelier."""
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)
    return -log_likelihood[:, 0], logits.argmax(axis=1) == label


def _fields(config: ConfigDict, model: ImageClassifier) -> dict[str, Any]:
    return {
        "apply": model.network.apply,
        "flip": config.data.flip,
        "shift": config.data.shift,
    }


def _recipe(config: ConfigDict, model: ImageClassifier, read: Read) -> Recipe:
    objective = ClassificationObjective(**_fields(config, model))
    return one_network(config, model.network, model.codec, objective)


def _noisy_recipe(config: ConfigDict, model: NoisyImageClassifier, read: Read) -> Recipe:
    objective = NoisyClassificationObjective(
        **_fields(config, model),
        parameterisation=model.parameterisation,
        time_sampler=factory.make_time_sampler(config, model.process),
    )
    return one_network(config, model.network, model.codec, objective)


CLASSIFICATION = Task(ImageClassifier, _recipe, CLASSIFIERS)
NOISY_CLASSIFICATION = Task(NoisyImageClassifier, _noisy_recipe, CLASSIFIERS)
