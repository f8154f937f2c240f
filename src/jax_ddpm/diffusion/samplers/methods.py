"""Every sampling method by its name."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from jax_ddpm.diffusion.continuous import NoiseLevel
from jax_ddpm.diffusion.process import Process
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.ddim import ddim
from jax_ddpm.diffusion.samplers.dpmpp import dpmpp_2m
from jax_ddpm.diffusion.samplers.heun import heun
from jax_ddpm.diffusion.samplers.loop import Sampler
from jax_ddpm.diffusion.samplers.predictor_corrector import predictor_corrector
from jax_ddpm.diffusion.samplers.unipc import unipc


class Method(NamedTuple):
    """``make(grid, **options) → Sampler``, the options it takes, and the grid it is meant for."""

    make: Callable[..., Sampler]
    options: tuple[str, ...]
    grid: str = "uniform"


METHODS = {
    "ancestral": Method(ancestral, ("variance",)),
    "ddim": Method(ddim, ("eta",)),
    "euler": Method(ddim, ()),  # what DDIM without noise is called under EDM and flows
    "heun": Method(heun, ("churn", "churn_range", "churn_noise"), "karras"),
    "dpmpp_2m": Method(dpmpp_2m, (), "log_snr"),
    "dpmpp_2m_sde": Method(partial(dpmpp_2m, eta=1.0), ("eta",), "log_snr"),
    "unipc": Method(unipc, ("order",), "log_snr"),
    "predictor_corrector": Method(predictor_corrector, ("snr", "corrector_steps")),
}
OPTIONS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.options))


def usual_grid(method: str, process: Process) -> str:
    """The grid that a method is meant for, as far as the process has it.

    Evenly spaced σ visit hardly any low noise, so where σ is the time that is no one's grid; a
    process that ends without signal has no other.
    """
    if process.alpha(np.array(process.time_range))[1] == 0:
        return "uniform"
    if METHODS[method].grid == "uniform" and getattr(process, "schedule", None) == NoiseLevel():
        return "karras"
    return METHODS[method].grid
