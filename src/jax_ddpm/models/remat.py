"""Rematerialisation (Chen et al. 2016): computing again in the backward pass, to keep less.

Each block of a network keeps, beside its input,

- "elementwise": the results of convolutions and matrix products. Normalisation, swish, dropout and
  softmax are computed again, at a few per cent of the arithmetic.
- "blocks": nothing. Each block is computed twice.
"""

from typing import Any

import flax.linen as nn
from jax import lax

from jax_ddpm.models.convolution import convolve_p


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive in (convolve_p, lax.dot_general_p)


REMAT_POLICIES = {"elementwise": _is_product, "blocks": None}


def remat(module: type[nn.Module], policy: str) -> type[nn.Module]:
    """A block that keeps what the policy says; "": all that its derivatives need."""
    return nn.remat(module, policy=REMAT_POLICIES[policy]) if policy else module
