"""Every sampling method by its name."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from jax_ddpm.diffusion.continuous import NoiseLevel, Shifted
from jax_ddpm.diffusion.process import Process
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.ddim import ddim
from jax_ddpm.diffusion.samplers.dpmpp import dpmpp_2m
from jax_ddpm.diffusion.samplers.grid import Grid
from jax_ddpm.diffusion.samplers.heun import heun
from jax_ddpm.diffusion.samplers.predictor_corrector import predictor_corrector
from jax_ddpm.diffusion.samplers.scan import Sampler
from jax_ddpm.diffusion.samplers.unipc import unipc
from jax_ddpm.options import Table


class Method(NamedTuple):
    """``make(grid, **options) → Sampler``, and the grid that it is meant for."""

    make: Callable[..., Sampler]
    grid: str = "uniform"


def euler(grid: Grid) -> Sampler:
    """DDIM without noise under the name that it has with EDM and flows."""
    return ddim(grid)


def dpmpp_2m_ode(grid: Grid) -> Sampler:
    """DPM-Solver++ 2M without noise, which has no options."""
    return dpmpp_2m(grid)


SAMPLERS = Table(
    ancestral=Method(ancestral),
    ddim=Method(ddim),
    euler=Method(euler),
    heun=Method(heun, "karras"),
    dpmpp_2m=Method(dpmpp_2m_ode, "log_snr"),
    dpmpp_2m_sde=Method(partial(dpmpp_2m, eta=1.0), "log_snr"),
    unipc=Method(unipc, "log_snr"),
    predictor_corrector=Method(predictor_corrector),
)


def usual_grid(name: str, process: Process) -> str:
    """The grid that a method is meant for, as far as the process has it.

    Evenly spaced σ visit hardly any low noise, so no method uses that grid where σ is the time. A
    process that ends without signal gets the uniform grid.
    """
    if process.alpha(np.array(process.time_range))[1] == 0:
        return "uniform"
    grid = SAMPLERS[name].grid
    schedule = getattr(process, "schedule", None)
    if isinstance(schedule, Shifted):
        schedule = schedule.schedule
    if grid == "uniform" and schedule == NoiseLevel():
        return "karras"
    return grid
