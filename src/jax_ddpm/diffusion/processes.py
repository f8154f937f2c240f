"""Every noise process by its name."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from jax_ddpm.diffusion import schedules
from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import (
    ContinuousProcess,
    edm,
    rectified_flow,
    shifted,
    ve,
    vp_cosine,
    vp_linear,
    vp_sigmoid,
)
from jax_ddpm.diffusion.process import ALL_NOISE, Process

CONTINUOUS: dict[str, Callable[..., ContinuousProcess]] = {
    "vp_linear": vp_linear,
    "vp_cosine": vp_cosine,
    "vp_sigmoid": vp_sigmoid,
    "ve": ve,
    "edm": edm,
    "rectified_flow": rectified_flow,
}
PROCESSES = (*schedules.SCHEDULES, *CONTINUOUS)


def make_process(
    name: str,
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    shift: float = 1.0,
    zero_terminal_snr: bool = False,
) -> Process:
    """The process ``name``: a chain of that length under that schedule, or in continuous time.

    Args:
      beta_start, beta_end: of a chain, for T = 1000; of "vp_linear", whose β(t) is 1000 times that.
      sigma_min, sigma_max: of "ve" and "edm".
      shift: the factor on σ/α, see ``continuous.Shifted``.
      zero_terminal_snr: rescale a chain to end without signal.

    Raises:
      ValueError: for an unknown name, or where the numbers make no such process.
    """
    if name not in PROCESSES:
        raise ValueError(f"unknown process {name!r}; known: {', '.join(PROCESSES)}")
    if name not in CONTINUOUS:
        betas = schedules.make_betas(name, num_timesteps, beta_start, beta_end)
        if shift != 1:
            betas = schedules.shifted(betas, shift)
        return Chain(schedules.zero_terminal_snr(betas) if zero_terminal_snr else betas)
    if name == "vp_linear":
        if not (0 < beta_start < math.inf and 0 < beta_end < math.inf):
            raise ValueError(f"β from {beta_start} to {beta_end}: both must be positive and finite")
        process = vp_linear(1000 * beta_start, 1000 * beta_end)
    elif name in ("ve", "edm"):
        process = CONTINUOUS[name](sigma_min, sigma_max)
    else:
        process = CONTINUOUS[name]()
    return shifted(process, shift) if shift != 1 else process


def over_the_range_of(trained: Process, name: str) -> ContinuousProcess:
    """The continuous process ``name`` over the λ of another process, at the least ``ALL_NOISE``."""
    log_snr = np.maximum(trained.log_snr(np.array(trained.time_range)), ALL_NOISE)
    low, high = map(float, np.exp(-log_snr / 2))
    process = CONTINUOUS[name](low, high) if name in ("ve", "edm") else CONTINUOUS[name]()
    low, high = map(float, process.time(log_snr))
    return dataclasses.replace(process, time_range=(low, high))
