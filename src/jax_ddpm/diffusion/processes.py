"""Every noise process by its name."""

import dataclasses
import math
from functools import partial
from typing import Annotated, Any

import numpy as np

from jax_ddpm.diffusion import continuous, schedules
from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import ContinuousProcess
from jax_ddpm.diffusion.process import ALL_NOISE, Process
from jax_ddpm.options import (
    Option,
    Table,
    Unfit,
    between,
    checked,
    of,
    positive,
    positive_and_finite,
    taken,
)

NumTimesteps = Annotated[int, Option("Steps T of a chain.", between(2, 10**6))]
BetaStart = Annotated[float, Option("β of the first step, meant for T = 1000: scaled by 1000/T.")]
BetaEnd = Annotated[float, Option("β of the last step, likewise.")]
ZeroTerminalSnr = Annotated[bool, Option("The chain is rescaled to end without signal.")]
SigmaMin = Annotated[float, Option("σ at the clean end.", positive)]
SigmaMax = Annotated[float, Option("σ at the noisy end.", positive_and_finite)]
Shift = Annotated[
    float, Option("Factor on σ/α, for resolutions above the schedule's.", positive_and_finite)
]


@checked
def chain(
    schedule: str,
    num_timesteps: NumTimesteps = 1000,
    beta_start: BetaStart = 1e-4,
    beta_end: BetaEnd = 0.02,
    zero_terminal_snr: ZeroTerminalSnr = False,
    shift: Shift = 1.0,
) -> Chain:
    """The T-step chain of DDPM under one of ``SCHEDULES``.

    Raises:
      ValueError: for an unknown schedule, or where the numbers give no β in (0, 1].
    """
    betas = schedules.make_betas(schedule, num_timesteps, beta_start, beta_end)
    if shift != 1:
        betas = schedules.shifted(betas, shift)
    return Chain(schedules.zero_terminal_snr(betas) if zero_terminal_snr else betas)


def vp_linear(
    beta_start: BetaStart = 1e-4, beta_end: BetaEnd = 0.02, shift: Shift = 1.0
) -> ContinuousProcess:
    """The limit of the linear chain: β(t) is 1000 times the β of its steps."""
    if not (0 < beta_start < math.inf and 0 < beta_end < math.inf):
        raise ValueError(f"β from {beta_start} to {beta_end}: both must be positive and finite")
    return _shifted(continuous.vp_linear(1000 * beta_start, 1000 * beta_end), shift)


def vp_cosine(shift: Shift = 1.0) -> ContinuousProcess:
    """See ``continuous.vp_cosine``."""
    return _shifted(continuous.vp_cosine(), shift)


def vp_sigmoid(shift: Shift = 1.0) -> ContinuousProcess:
    """See ``continuous.vp_sigmoid``."""
    return _shifted(continuous.vp_sigmoid(), shift)


def ve(
    sigma_min: SigmaMin = 0.002, sigma_max: SigmaMax = 80.0, shift: Shift = 1.0
) -> ContinuousProcess:
    """See ``continuous.ve``; over EDM's range by default."""
    return _shifted(continuous.ve(*_rising(sigma_min, sigma_max)), shift)


def edm(
    sigma_min: SigmaMin = 0.002, sigma_max: SigmaMax = 80.0, shift: Shift = 1.0
) -> ContinuousProcess:
    """See ``continuous.edm``."""
    return _shifted(continuous.edm(*_rising(sigma_min, sigma_max)), shift)


def rectified_flow(shift: Shift = 1.0) -> ContinuousProcess:
    """See ``continuous.rectified_flow``."""
    return _shifted(continuous.rectified_flow(), shift)


def _rising(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    if not sigma_min < sigma_max:
        raise Unfit("sigma_max", sigma_max, "above sigma_min, and finite")
    return sigma_min, sigma_max


def _shifted(process: ContinuousProcess, factor: float) -> ContinuousProcess:
    return continuous.shifted(process, factor) if factor != 1 else process


CONTINUOUS = Table(
    vp_linear=checked(vp_linear),
    vp_cosine=checked(vp_cosine),
    vp_sigmoid=checked(vp_sigmoid),
    ve=checked(ve),
    edm=checked(edm),
    rectified_flow=checked(rectified_flow),
)
PROCESSES = Table({name: partial(chain, name) for name in schedules.SCHEDULES} | CONTINUOUS)


def make_process(name: str, **options: Any) -> Process:
    """The process ``name``, made with those options that it takes.

    Raises:
      ValueError: for an unknown name, or where the numbers give no such process.
    """
    if name not in PROCESSES:
        raise ValueError(f"unknown process {name!r}; known: {', '.join(PROCESSES)}")
    row = PROCESSES[name]
    return row(**taken(row, options))


def over_the_range_of(trained: Process, name: str) -> ContinuousProcess:
    """The continuous process ``name`` over the λ of another process, cut off at ``ALL_NOISE``."""
    log_snr = np.maximum(trained.log_snr(np.array(trained.time_range)), ALL_NOISE)
    low, high = map(float, np.exp(-log_snr / 2))
    row = CONTINUOUS[name]
    process = row(sigma_min=low, sigma_max=high) if "sigma_min" in of(row) else row()
    low, high = map(float, process.time(log_snr))
    return dataclasses.replace(process, time_range=(low, high))
