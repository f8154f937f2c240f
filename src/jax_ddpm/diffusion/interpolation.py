"""Interpolation of two images in the latent space x_t (Ho et al. 2020, figure 8)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.diffusion.denoiser import Conditioning, Denoiser
from jax_ddpm.diffusion.process import Process, corrupt, expand
from jax_ddpm.diffusion.samplers.scan import Sampler, sample


def interpolate(
    sampler: Sampler,
    denoiser: Denoiser,
    process: Process,
    pair: Float[Array, "2 *shape"],
    weights: Float[Array, " n"],
    key: Any,
    conditioning: Conditioning,
) -> Float[Array, "n *shape"]:
    """Decodes (1-w)·x_t + w·x'_t for each weight w, with x_t ~ q(· | x_0) and x'_t ~ q(· | x'_0).

    t is where the sampler starts. All weights share one draw of the encoding noise and one of the
    sampling noise, so only w varies along the row; w = 0 and w = 1 reconstruct the two images.
    Linear mixing shrinks the noise between them, as in the paper.
    """
    t = jnp.asarray(sampler.nodes.time[0], pair.dtype)
    encode_key, decode_key = jax.random.split(key)
    encoded, _ = corrupt(process, jax.random.split(encode_key), pair, t)
    w = expand(weights, pair)
    xt = (1 - w) * encoded[:1] + w * encoded[1:]
    keys = jnp.repeat(decode_key[None], weights.size, axis=0)
    x, _ = sample(sampler, denoiser, xt, keys, conditioning)
    return x
