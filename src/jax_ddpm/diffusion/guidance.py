"""Guidance: denoisers made of denoisers.

Every ``scale`` extrapolates from a guide, at 0, through the guided model, at 1, and beyond it:

    ε̃ = ε_guide + scale·(ε - ε_guide).

The unconditional model as a guide makes scale 0 unconditional and scale 1 conditional (the w of Ho
& Salimans 2022 is scale - 1). The difference in classifier guidance is -σ·∇_x log p(c | x_t). The
guided score at other scales is that of p(x_t)·p(c | x_t)^scale at every t, but no process noises
one of these into the next: samples are not from p(x_0)·p(c | x_0)^scale.

x_0 moves along with ε everywhere, so that both still agree with x_t. A learned variance is that of
the guided model.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.diffusion.denoiser import Conditioning
from jax_ddpm.diffusion.parameterisation import Parameterisation, Prediction
from jax_ddpm.diffusion.process import Process, expand, noise_between
from jax_ddpm.options import Option, between, check_options

Phi = Annotated[float, Option("φ of Lin et al. 2024: 0 leaves the contrast.", between(0, 1))]


@runtime_checkable
class Guidance(Protocol):
    """A denoiser that guides another one."""

    @property
    def denoiser(self) -> Any:
        """The guided model."""
        ...

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction: ...

    def guided_and_plain(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> tuple[Prediction, Prediction]:
        """The prediction, and the prediction of ``denoiser`` without guidance."""
        ...


def extrapolate(guide: Prediction, model: Prediction, scale: float) -> Prediction:
    """guide + scale·(model - guide), in x_0 and in ε."""

    def along(start: Array, end: Array) -> Array:
        return start + scale * (end - start)

    return model._replace(x0=along(guide.x0, model.x0), eps=along(guide.eps, model.eps))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFreeGuidance:
    """The model given c, guided by itself without c (Ho & Salimans 2022).

    Scale 0 is exactly the unconditional model and scale 1 exactly the conditional one, in one pass
    of the network; any other scale takes one pass of twice the batch. The conditioning must hold no
    drop masks: they mark what each half of the batch goes without.

    Attributes:
      guided: the names that make up c; model and guide share all other conditioning.
      negative: what the guide is told in place of c, ``[batch, …]`` or ``[1, …]``; the names in
        ``guided`` that it lacks are dropped.
    """

    denoiser: Any
    scale: float = dataclasses.field(metadata={"static": True})
    guided: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    negative: Conditioning = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        if self.scale == 0:
            return self.denoiser(xt, t, self._of_guide(conditioning, len(xt)))
        return self.guided_and_plain(xt, t, conditioning)[0]

    def guided_and_plain(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> tuple[Prediction, Prediction]:
        """The prediction, and the conditional prediction."""
        if self.scale == 1:
            conditional = self.denoiser(xt, t, conditioning)
            return conditional, conditional
        size = len(xt)
        halves = conditioning, self._of_guide(conditioning, size)
        # Each half borrows from the other what it lacks, and a mask drops it.
        both = jax.tree.map(
            lambda *parts: jnp.concatenate(parts), halves[1] | halves[0], halves[0] | halves[1]
        )
        drop = {
            f"{name}_drop": jnp.repeat(jnp.array([name not in half for half in halves]), size)
            for name in both
            if name in self.guided
        }
        predicted = self.denoiser(
            jnp.concatenate([xt, xt]), jnp.concatenate([t, t]) if t.ndim else t, both | drop
        )
        conditional = jax.tree.map(lambda x: x[:size], predicted)
        guide = jax.tree.map(lambda x: x[size:], predicted)
        return extrapolate(guide, conditional, self.scale), conditional

    def _of_guide(self, conditioning: Conditioning, size: int) -> Conditioning:
        shared = {name: x for name, x in conditioning.items() if name not in self.guided}
        return shared | jax.tree.map(
            lambda x: jnp.broadcast_to(x, (size, *x.shape[1:])), self.negative
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AutoGuidance:
    """A model guided by a worse version of itself: smaller, or trained less (Karras et al. 2024).

    Scale 0 is exactly the guide and scale 1 exactly the model, in one pass of it; any other scale
    takes one pass of each. Both get the same conditioning.
    """

    denoiser: Any
    guide: Any
    scale: float = dataclasses.field(metadata={"static": True})

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        if self.scale == 0:
            return self.guide(xt, t, conditioning)
        return self.guided_and_plain(xt, t, conditioning)[0]

    def guided_and_plain(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> tuple[Prediction, Prediction]:
        """The prediction, and the better model's prediction."""
        model = self.denoiser(xt, t, conditioning)
        if self.scale == 1:
            return model, model
        return extrapolate(self.guide(xt, t, conditioning), model, self.scale), model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LikelihoodGuidance:
    """ε̃ = ε - scale·σ·∇_x log p(c | x_t) (Dhariwal & Nichol 2021, algorithm 2).

    Scale 1 is the model of p(x_0 | c) by Bayes' rule, if both parts are exact. Scale 0 is exactly
    the model, and costs no more. x_t at α = 0 holds no x_0 to infer c from: nothing is moved.

    Attributes:
      log_likelihood: a pytree ``(x_t, t, conditioning) → [batch]`` in nats, up to a constant:
        ``NoisyClassifier``, or any other likelihood of what is wanted.
    """

    denoiser: Any
    log_likelihood: Any
    process: Process = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        return self.guided_and_plain(xt, t, conditioning)[0]

    def guided_and_plain(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> tuple[Prediction, Prediction]:
        """The prediction, and the model's own prediction without the likelihood."""
        plain = self.denoiser(xt, t, conditioning)
        if self.scale == 0:
            return plain, plain
        gradient = jax.grad(lambda x: jnp.sum(self.log_likelihood(x, t, conditioning)))(xt)
        alpha, sigma = expand(self.process.alpha(t), xt), expand(self.process.sigma(t), xt)
        shift = jnp.where(alpha > 0, self.scale * sigma / alpha, 0) * gradient
        return plain._replace(x0=plain.x0 + sigma * shift, eps=plain.eps - alpha * shift), plain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisyClassifier:
    """log p(label | x_t) in nats, from a classifier trained on noisy images.

    Attributes:
      params, apply: ``apply(params, x, time=time)`` gives features and logits, time ``[batch]``.
      parameterisation: that of its training; it makes the network's input.
    """

    params: Any
    apply: Callable = dataclasses.field(metadata={"static": True})
    parameterisation: Parameterisation = dataclasses.field(metadata={"static": True})

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Float[Array, " batch"]:
        """``conditioning`` holds the int ``[batch]`` ``label``."""
        times = jnp.broadcast_to(t, xt.shape[:1])
        x, time = (
            self.parameterisation.network_input(xt, times),
            self.parameterisation.network_time(times),
        )
        _, logits = self.apply(self.params, x, time=time)
        label = conditioning["label"][:, None]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), label, axis=1)[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RescaledGuidance:
    """Guidance with its x_0 times φ·std(x_0)/std(x̃_0) + 1 - φ (Lin et al. 2024, eqs. 14-16).

    x̃_0 is the guided prediction and x_0 the one without guidance, each with its standard deviation
    over all pixels and channels of an example. Guidance raises the deviation, which overexposes
    images. x_0 is rescaled, whatever the network predicts; ε follows.

    Raises:
      ValueError: where φ is outside [0, 1].
    """

    guidance: Any
    process: Process = dataclasses.field(metadata={"static": True})
    phi: Phi = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def denoiser(self) -> Any:
        """The guided model."""
        return self.guidance.denoiser

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        if self.phi == 0:
            return self.guidance(xt, t, conditioning)
        return self.guided_and_plain(xt, t, conditioning)[0]

    def guided_and_plain(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> tuple[Prediction, Prediction]:
        """The prediction, and the prediction without guidance."""
        guided, plain = self.guidance.guided_and_plain(xt, t, conditioning)

        def std(x0: Array) -> Array:
            return jnp.std(x0, axis=tuple(range(1, x0.ndim)), keepdims=True)

        of_guided = std(guided.x0)
        ratio = jnp.where(of_guided > 0, std(plain.x0) / of_guided, 1)  # flat images have none
        x0 = guided.x0 * (self.phi * ratio + (1 - self.phi))
        return guided._replace(x0=x0, eps=noise_between(self.process, x0, xt, t)), plain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuidanceInterval:
    """Guidance at noise levels low < σ/α ≤ high, none elsewhere (Kynkäänniemi et al. 2024).

    The guided model alone serves elsewhere and costs one pass: one t for the whole batch, as in
    samplers, takes a branch. A t per example computes both.

    Raises:
      ValueError: unless 0 ≤ low < high.
    """

    guidance: Any
    process: Process = dataclasses.field(metadata={"static": True})
    low: float = dataclasses.field(metadata={"static": True})
    high: float = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"the interval ({self.low}, {self.high}] must have 0 ≤ low < high")

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        noise_level = self.process.sigma(t) / self.process.alpha(t)

        def within(noise_level: Array) -> Array:
            return (self.low < noise_level) & (noise_level <= self.high)

        if t.ndim == 0:
            return jax.lax.cond(
                within(noise_level),
                lambda: self.guidance(xt, t, conditioning),
                lambda: self.guidance.denoiser(xt, t, conditioning),
            )
        inside = within(expand(noise_level, xt))
        both = self.guidance.guided_and_plain(xt, t, conditioning)
        return jax.tree.map(partial(jnp.where, inside), *both)
