"""Continuous-time processes: a schedule t ↔ λ times a scaling λ → (α, σ).

The log signal-to-noise ratio λ decides what is lost at t; the scaling only decides the units in
which x_t is written (Kingma et al. 2021, section 5.1; Karras et al. 2022, appendix B). A model of
one process can therefore be sampled under another through λ, see ``denoiser.InProcess``.

    variance preserving   α² + σ² = 1   (Song et al. 2021)
    variance exploding    α = 1         (Song & Ermon 2019; Karras et al. 2022)
    flow                  α + σ = 1     (Lipman et al. 2023; Liu et al. 2023)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from jax_ddpm.diffusion.process import Times, sqrt_sigmoid


@runtime_checkable
class Schedule(Protocol):
    """λ(t) and its inverse, elementwise in the array type and dtype of the argument."""

    def log_snr(self, t: Times) -> Times:
        """λ(t), falling."""
        ...

    def time(self, log_snr: Times) -> Times:
        """t(λ)."""
        ...


@dataclasses.dataclass(frozen=True)
class LinearBeta:
    """β(t) = beta_min + t·(beta_max - beta_min) on [0, 1] (Song et al. 2021, appendix C).

    B(t) = ∫β = t·beta_min + ½t²·(beta_max - beta_min) gives ᾱ = exp(-B) and λ = -log(exp(B) - 1).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_snr(self, t: Times) -> Times:
        xp = t.__array_namespace__()
        integral = t * self.beta_min + t**2 * ((self.beta_max - self.beta_min) / 2)
        return -xp.log(xp.expm1(integral))

    def time(self, log_snr: Times) -> Times:
        xp = log_snr.__array_namespace__()
        integral = xp.logaddexp(-log_snr, xp.zeros_like(log_snr))
        slope = self.beta_max - self.beta_min
        # This form of the quadratic's root has no difference that cancels near t = 0.
        root = xp.sqrt(self.beta_min**2 + 2 * slope * integral)
        return 2 * integral / (self.beta_min + root)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """α = cos(πt/2) under variance preservation: λ = -2·log tan(πt/2) (Nichol & Dhariwal 2021)."""

    def log_snr(self, t: Times) -> Times:
        xp = t.__array_namespace__()
        # cos(πt/2) is written as sin(π(1-t)/2), which keeps its digits near t = 1.
        return 2 * xp.log(xp.sin((1 - t) * (math.pi / 2)) / xp.sin(t * (math.pi / 2)))

    def time(self, log_snr: Times) -> Times:
        xp = log_snr.__array_namespace__()
        return xp.atan(xp.exp(-log_snr / 2)) * (2 / math.pi)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """ᾱ along a logistic function, rescaled to fall from 1 to 0 (Jabri et al. 2023; Chen 2023).

    ᾱ(t) = (s(end/τ) - s((start + t·(end - start))/τ)) / (s(end/τ) - s(start/τ)), s the logistic.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    # A difference of logistics s(x) - s(y) is proportional to sinh((x-y)/2)/(cosh(x/2)·cosh(y/2)),
    # which keeps its digits at both ends. This gives ᾱ/(1-ᾱ) = ρ·cosh(start/2τ)/cosh(end/2τ) with
    # h = (end-start)/(2τ) and ρ = sinh((1-t)·h)/sinh(t·h).

    @property
    def _half(self) -> float:
        return (self.end - self.start) / (2 * self.tau)

    @property
    def _log_scale(self) -> float:
        low, high = self.start / (2 * self.tau), self.end / (2 * self.tau)
        return math.log(math.cosh(low) / math.cosh(high))

    def log_snr(self, t: Times) -> Times:
        xp = t.__array_namespace__()
        return xp.log(xp.sinh((1 - t) * self._half) / xp.sinh(t * self._half)) + self._log_scale

    def time(self, log_snr: Times) -> Times:
        xp = log_snr.__array_namespace__()
        ratio = xp.exp(log_snr - self._log_scale)
        # exp(2th) - 1, from exp(2th) = (ρ + exp h)/(ρ + exp(-h)).
        rise = 2 * math.sinh(self._half) / (ratio + math.exp(-self._half))
        return xp.log1p(rise) / (2 * self._half)


@dataclasses.dataclass(frozen=True)
class LinearLogSnr:
    """λ falling linearly over [0, 1] (Kingma et al. 2021): σ/α is a geometric sequence."""

    log_snr_min: float
    log_snr_max: float

    def log_snr(self, t: Times) -> Times:
        return self.log_snr_max + t * (self.log_snr_min - self.log_snr_max)

    def time(self, log_snr: Times) -> Times:
        return (log_snr - self.log_snr_max) / (self.log_snr_min - self.log_snr_max)


@dataclasses.dataclass(frozen=True)
class NoiseLevel:
    """The noise level σ/α as the time: λ = -2·log t (Karras et al. 2022)."""

    def log_snr(self, t: Times) -> Times:
        return -2 * t.__array_namespace__().log(t)

    def time(self, log_snr: Times) -> Times:
        return log_snr.__array_namespace__().exp(-log_snr / 2)


@dataclasses.dataclass(frozen=True)
class Straight:
    """σ/α = t/(1-t): under flow scaling x_t moves at constant speed from x_0 to ε."""

    def log_snr(self, t: Times) -> Times:
        xp = t.__array_namespace__()
        with np.errstate(divide="ignore"):  # λ = -∞ at t = 1, where no x_0 is left
            return 2 * (xp.log1p(-t) - xp.log(t))

    def time(self, log_snr: Times) -> Times:
        xp = log_snr.__array_namespace__()
        return xp.exp(-xp.logaddexp(log_snr / 2, xp.zeros_like(log_snr)))


@dataclasses.dataclass(frozen=True)
class Shifted:
    """σ/α multiplied by ``factor``: λ - 2·log(factor).

    A factor of resolution/64 makes a schedule for 64² destroy larger images as much (Hoogeboom et
    al. 2023). It maps t → factor·t/(1 + (factor-1)·t) on ``Straight`` (Esser et al. 2024).
    Diffusing b·x_0 in place of x_0 (Chen 2023) is a factor of 1/b.
    """

    schedule: Schedule
    factor: float

    def log_snr(self, t: Times) -> Times:
        return self.schedule.log_snr(t) - 2 * math.log(self.factor)

    def time(self, log_snr: Times) -> Times:
        return self.schedule.time(log_snr + 2 * math.log(self.factor))


def _variance_preserving(log_snr: Times) -> tuple[Times, Times]:
    return sqrt_sigmoid(log_snr), sqrt_sigmoid(-log_snr)


def _variance_exploding(log_snr: Times) -> tuple[Times, Times]:
    xp = log_snr.__array_namespace__()
    return xp.ones_like(log_snr), xp.exp(-log_snr / 2)


def _flow(log_snr: Times) -> tuple[Times, Times]:
    return sqrt_sigmoid(log_snr / 2) ** 2, sqrt_sigmoid(-log_snr / 2) ** 2


SCALINGS: dict[str, Callable] = {
    "variance_preserving": _variance_preserving,
    "variance_exploding": _variance_exploding,
    "flow": _flow,
}


@dataclasses.dataclass(frozen=True)
class ContinuousProcess:
    """A schedule under a scaling (a ``Process``).

    Attributes:
      schedule: t ↔ λ.
      scaling: a name in ``SCALINGS``.
      time_range: the least and the most noisy time that training draws and sampling visits.
    """

    schedule: Schedule
    scaling: str
    time_range: tuple[float, float]
    num_timesteps = 0

    def alpha(self, t: Times) -> Times:
        return SCALINGS[self.scaling](self.log_snr(t))[0]

    def sigma(self, t: Times) -> Times:
        return SCALINGS[self.scaling](self.log_snr(t))[1]

    def log_snr(self, t: Times) -> Times:
        return self.schedule.log_snr(t)

    def time(self, log_snr: Times) -> Times:
        return self.schedule.time(log_snr)

    def prior_std(self, t: float) -> float:
        """1 under variance preservation, else σ(t)."""
        if self.scaling == "variance_preserving":
            return 1.0
        return float(self.sigma(np.array([t]))[0])


# A schedule that reaches infinity is followed to this |λ| (Hoogeboom et al. 2023).
_LOG_SNR_END = 15.0


def _between(schedule: Schedule, log_snr_min: float, log_snr_max: float) -> tuple[float, float]:
    low, high = schedule.time(np.array([log_snr_max, log_snr_min]))
    return float(low), float(high)


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> ContinuousProcess:
    """The continuous limit of the DDPM chain (Song et al. 2021), t from 1e-5 as in their code."""
    return ContinuousProcess(LinearBeta(beta_min, beta_max), "variance_preserving", (1e-5, 1.0))


def vp_cosine() -> ContinuousProcess:
    """The cosine schedule for λ in [-15, 15]."""
    times = _between(Cosine(), -_LOG_SNR_END, _LOG_SNR_END)
    return ContinuousProcess(Cosine(), "variance_preserving", times)


def vp_sigmoid(start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> ContinuousProcess:
    """The sigmoid schedule for λ in [-15, 15]."""
    schedule = Sigmoid(start, end, tau)
    times = _between(schedule, -_LOG_SNR_END, _LOG_SNR_END)
    return ContinuousProcess(schedule, "variance_preserving", times)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> ContinuousProcess:
    """σ = sigma_min·(sigma_max/sigma_min)^t (Song et al. 2021); 50 is their value for CIFAR-10."""
    schedule = LinearLogSnr(-2 * math.log(sigma_max), -2 * math.log(sigma_min))
    return ContinuousProcess(schedule, "variance_exploding", (0.0, 1.0))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> ContinuousProcess:
    """The process whose time is σ (Karras et al. 2022)."""
    return ContinuousProcess(NoiseLevel(), "variance_exploding", (sigma_min, sigma_max))


def rectified_flow() -> ContinuousProcess:
    """x_t = (1-t)·x_0 + t·ε (Liu et al. 2023; Lipman et al. 2023), up to t = 1, without signal."""
    return ContinuousProcess(Straight(), "flow", (1e-5, 1.0))


def shifted(process: ContinuousProcess, factor: float) -> ContinuousProcess:
    """The process with σ/α multiplied by ``factor`` at every t; see ``Shifted``."""
    return dataclasses.replace(process, schedule=Shifted(process.schedule, factor))
