"""The network's input, and the meaning of its output.

Every Gaussian parameterisation regresses a combination y = a·x_0 + b·ε. Together with
x_t = α·x_0 + σ·ε this is a linear system in (x_0, ε) with determinant Δ = α·b - σ·a, so one pair of
formulas leads from any output to the hub (x_0, ε) and back:

    x_0 = (b·x_t - σ·y) / Δ        ε = (α·y - a·x_t) / Δ.

An error δ in ε at a given x_t is an error (Δ/α)·δ in y, which makes errors in different targets
comparable.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.process import Process, expand
from jax_ddpm.options import OneOf, Option, Unfit, check_options, positive


class Target(NamedTuple):
    """Coefficients of y = a·x_0 + b·ε and Δ = α·b - σ·a in closed form, free of cancellation."""

    a: Array
    b: Array
    delta: Array


class Prediction(NamedTuple):
    """The hub: a pair with x_t = α·x_0 + σ·ε, shaped like x_t.

    ``variance_fraction`` v of a model that learns its variance places log σ² between log β̃ (v = 0)
    and log β (v = 1) of the sampler's own step (Nichol & Dhariwal 2021, eq. 15).
    """

    x0: Float[Array, "batch *shape"]
    eps: Float[Array, "batch *shape"]
    variance_fraction: Float[Array, "batch *shape"] | None = None


def _eps(process: Process, t: Array) -> Target:
    alpha = process.alpha(t)
    return Target(a=jnp.zeros_like(t), b=jnp.ones_like(t), delta=alpha)


def _x0(process: Process, t: Array) -> Target:
    return Target(a=jnp.ones_like(t), b=jnp.zeros_like(t), delta=-process.sigma(t))


def _v(process: Process, t: Array) -> Target:
    """v = α·ε - σ·x_0 (Salimans & Ho 2022)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return Target(a=-sigma, b=alpha, delta=alpha**2 + sigma**2)


def _score(process: Process, t: Array) -> Target:
    """∇ log q(x_t) = -ε/σ (Song et al. 2021)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return Target(a=jnp.zeros_like(t), b=-1 / sigma, delta=-alpha / sigma)


def _velocity(process: Process, t: Array) -> Target:
    """u = ε - x_0, the constant velocity dx_t/dt of a rectified flow (Liu et al. 2023)."""
    ones = jnp.ones_like(t)
    return Target(a=-ones, b=ones, delta=process.alpha(t) + process.sigma(t))


def _edm(process: Process, t: Array, data_std: float) -> Target:
    """EDM's F: x̂_0 = c_skip·x_t/α + c_out·F (Karras et al. 2022, table 1 at σ/α).

    F has unit variance for data of variance data_std². It is -v for data_std = 1 and a process with
    α² + σ² = 1.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    std = marginal_std(process, t, data_std)
    return Target(a=sigma / (data_std * std), b=-alpha * data_std / std, delta=-std / data_std)


def marginal_std(process: Process, t: Array, data_std: float) -> Array:
    """The standard deviation of x_t, √(α²·data_std² + σ²)."""
    return jnp.hypot(process.alpha(t) * data_std, process.sigma(t))


def _posterior_mean(process: Process, t: Array) -> Target:
    """μ̃ of q(x_{t-1} | x_t, x_0) = c_0·x_0 + c_t·x_t, for the training chain only.

    Reading x_0 off μ̃ amplifies errors by 1/c_0, up to 7,800 under the linear schedule of T = 1000.
    """
    assert isinstance(process, Chain), "the posterior mean is a target of the T-step chain"
    alpha, sigma = process.alpha(t), process.sigma(t)
    coef_x0 = process.gather(process.posterior.coef_x0, t)
    coef_xt = process.gather(process.posterior.coef_xt, t)
    return Target(a=coef_x0 + coef_xt * alpha, b=coef_xt * sigma, delta=-sigma * coef_x0)


TARGETS: dict[str, Callable[..., Target]] = {
    "eps": _eps,
    "x0": _x0,
    "v": _v,
    "score": _score,
    "velocity": _velocity,
    "edm": _edm,
    "posterior_mean": _posterior_mean,
}

# Targets that say something of x_0 where α = 0.
WITHOUT_SIGNAL = ("x0", "v", "velocity", "edm")

# The network is told no lower λ: it would be -∞ where x_t is pure noise.
_LEAST_LOG_SNR = -20.0

VarianceOutput = Literal["none", "learned", "learned_range"]
Goal = Annotated[str, Option("What the network predicts.", OneOf(TARGETS))]
ConditionOn = Annotated[
    Literal["time", "log_snr"],
    Option("What the network is told of t.", OneOf(("time", "log_snr")), kind=str),
]
DataStd = Annotated[float, Option("Of the data, for edm and normalise_input.", positive)]
NormaliseInput = Annotated[bool, Option("x_t is divided by its standard deviation.")]


@dataclasses.dataclass(frozen=True, eq=False)
class Parameterisation:
    """The network's input and output, bound to the process of its training.

    Attributes:
      process: the noise process of training.
      target: a name in ``TARGETS``.
      time_scale: the network's time is ``time_scale·t``. 1000/T keeps a chain of any length, and
        1000 keeps times of at most 1, in the range that the sinusoidal embedding was made for.
      condition_on: "time", or "log_snr" for ``-time_scale·λ/8`` in place of t: time_scale times
        EDM's c_noise = ¼·log(σ/α). λ is held at -20 below that, where σ/α is 22,000.
      data_std: the data's standard deviation, for the target "edm" and for ``normalise_input``.
      normalise_input: divide x_t by its standard deviation: EDM's c_in, and Chen 2023's
        normalisation of scaled inputs.
      variance: "none", or the content of the second half of the output channels: the log-variance
        of the step t → t-1 ("learned", only for sampling that very chain: its fraction means little
        on longer steps), or the fraction v as (1 + output)/2 ("learned_range").
    """

    process: Process
    target: Goal = "eps"
    time_scale: float = 1.0
    condition_on: ConditionOn = "time"
    data_std: DataStd = 0.5
    normalise_input: NormaliseInput = False
    variance: VarianceOutput = "none"

    def __post_init__(self):
        """Raises Unfit where an option is out of range, or the process has no such thing."""
        check_options(self)
        of_chain = isinstance(self.process, Chain)
        if self.target == "posterior_mean" and not of_chain:
            raise Unfit("target", self.target, "another one: without a chain there is none")
        if self.variance != "none" and not of_chain:
            must_be = "fixedsmall or fixedlarge: without a chain there are no steps to learn it of"
            raise Unfit("variance", self.variance, must_be)

    def network_time(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """The time that conditions the network."""
        if self.condition_on == "log_snr":
            log_snr = jnp.maximum(self.process.log_snr(t), _LEAST_LOG_SNR)
            return log_snr * (-self.time_scale / 8)
        return t * self.time_scale

    def network_input(
        self, xt: Float[Array, "batch *shape"], t: Float[Array, "..."]
    ) -> Float[Array, "batch *shape"]:
        """The image that the network sees at (x_t, t)."""
        if not self.normalise_input:
            return xt
        return xt / expand(marginal_std(self.process, t, self.data_std), xt)

    def coefficients(self, t: Float[Array, "..."]) -> Target:
        """a, b and Δ of the target at t."""
        make = TARGETS[self.target]
        if self.target == "edm":
            make = partial(make, data_std=self.data_std)
        return make(self.process, t)

    def regression_target(
        self,
        x0: Float[Array, "batch *shape"],
        eps: Float[Array, "batch *shape"],
        t: Float[Array, " batch"],
    ) -> Float[Array, "batch *shape"]:
        """y = a·x_0 + b·ε, the regression target of the network's mean output."""
        target = self.coefficients(t)
        return expand(target.a, x0) * x0 + expand(target.b, x0) * eps

    def split(
        self, output: Float[Array, "batch *out"], t: Float[Array, "..."]
    ) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"] | None]:
        """The network's output as (mean output y, variance fraction or None)."""
        if self.variance == "none":
            return output, None
        y, raw = jnp.split(output, 2, axis=-1)
        if self.variance == "learned_range":
            return y, (raw + 1) / 2
        lowest, span = (expand(bound, y) for bound in learned_variance_bounds(self.process, t))
        # Both bounds are one where the chain has lost all signal: any finite fraction is right.
        return y, (raw - lowest) / jnp.maximum(span, 1e-30)

    def to_prediction(
        self,
        output: Float[Array, "batch *out"],
        xt: Float[Array, "batch *shape"],
        t: Float[Array, " batch"] | Float[Array, ""],
    ) -> Prediction:
        """The network's output at (x_t, t) as the hub pair."""
        y, fraction = self.split(output, t)
        alpha, sigma = expand(self.process.alpha(t), xt), expand(self.process.sigma(t), xt)
        a, b, delta = (expand(c, xt) for c in self.coefficients(t))
        return Prediction((b * xt - sigma * y) / delta, (alpha * y - a * xt) / delta, fraction)


def learned_variance_bounds(
    process: Process, t: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """log β̃_t (entry 1 at t = 0) and log β_t - log β̃_t, between which a variance is learned."""
    assert isinstance(process, Chain), "learned variances belong to the T-step chain"
    lowest = process.posterior_log_variance
    return process.gather(lowest, t), process.gather(np.log(process.betas) - lowest, t)
