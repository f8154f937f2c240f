"""Every sampling method by its name."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.ddim import ddim
from jax_ddpm.diffusion.samplers.dpmpp import dpmpp_2m
from jax_ddpm.diffusion.samplers.heun import heun
from jax_ddpm.diffusion.samplers.loop import Sampler
from jax_ddpm.diffusion.samplers.predictor_corrector import predictor_corrector
from jax_ddpm.diffusion.samplers.unipc import unipc


class Method(NamedTuple):
    """``make(grid, **options) → Sampler``, and the names of the options that it takes."""

    make: Callable[..., Sampler]
    options: tuple[str, ...]


METHODS = {
    "ancestral": Method(ancestral, ("variance",)),
    "ddim": Method(ddim, ("eta",)),
    "euler": Method(ddim, ()),  # what DDIM without noise is called under EDM and flows
    "heun": Method(heun, ("churn", "churn_range", "churn_noise")),
    "dpmpp_2m": Method(dpmpp_2m, ()),
    "dpmpp_2m_sde": Method(partial(dpmpp_2m, eta=1.0), ("eta",)),
    "unipc": Method(unipc, ("order",)),
    "predictor_corrector": Method(predictor_corrector, ("snr", "corrector_steps")),
}
OPTIONS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.options))
