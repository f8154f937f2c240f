"""The layers of the networks, with the initialisation of Ho et al. 2020.

Kernels are drawn uniformly with variance ``scale``/fan-average; layers that end a residual branch
take ``scale`` ≈ 0, so every block starts as the identity.
"""

import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.models.initialisers import fan_average_uniform, ones, zeros

Dtype = Any


def conv(features: int, dtype: Dtype, name: str, *, stride: int = 1, scale: float = 1.0) -> nn.Conv:
    """A 3×3 convolution with SAME padding."""
    kernel_init = fan_average_uniform(scale)
    return nn.Conv(
        features, (3, 3), stride, dtype=dtype, kernel_init=kernel_init, bias_init=zeros, name=name
    )


def dense(features: int, dtype: Dtype, name: str, *, scale: float = 1.0) -> nn.Dense:
    """A dense layer over channels: a 1×1 convolution where there are pixels."""
    kernel_init = fan_average_uniform(scale)
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, bias_init=zeros, name=name)


def sinusoidal_embedding(
    time: Float[Array, " batch"], features: int, max_period: float = 10_000.0
) -> Float[Array, "batch features"]:
    """[sin(ω_i·t), cos(ω_i·t)], ω from 1 to 1/max_period in a geometric row (Vaswani et al. 2017).

    Meant for times up to about 1000; computed in float32.
    """
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = time.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def time_embedding(
    time: Float[Array, " batch"], base_channels: int
) -> Float[Array, "batch features"]:
    """The time as ``4·base_channels`` features, for the blocks of the module that calls this."""
    width = 4 * base_channels
    h = sinusoidal_embedding(time, base_channels)
    h = nn.swish(dense(width, jnp.float32, "time1")(h))
    return dense(width, jnp.float32, "time2")(h)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) over ``[batch, height, width, channels]``.

    Moments are summed per channel, then folded into groups, and applied as one multiply-add, which
    spares a CPU the five-axis view. Statistics are float32; ε is 1e-6.
    """

    num_groups: int
    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6
    scale_init: nn.initializers.Initializer = ones
    bias_init: nn.initializers.Initializer = zeros

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, channels = x.shape[0], x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
        bias = self.param("bias", self.bias_init, (channels,), jnp.float32)

        def group_mean(per_channel: Array) -> Array:
            groups = per_channel.reshape(batch, self.num_groups, -1)
            mean = jnp.broadcast_to(groups.mean(axis=-1, keepdims=True), groups.shape)
            return mean.reshape(batch, channels)

        x32 = x.astype(jnp.float32)
        mean = group_mean(x32.mean(axis=(1, 2)))
        square = group_mean(jnp.square(x32).mean(axis=(1, 2)))
        variance = jnp.maximum(square - jnp.square(mean), 0)
        gain = scale[None] * jax.lax.rsqrt(variance + self.epsilon)
        offset = bias[None] - mean * gain
        return (x32 * gain[:, None, None] + offset[:, None, None]).astype(self.dtype)


class Dropout(nn.Module):
    """Dropout keyed per example, so that a batch can be split without changing the result.

    ``keys`` is one PRNG key per example, or None to leave x as it is.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], keys: Any) -> Float[Array, "b ..."]:
        if self.rate == 0 or keys is None:
            return x
        layer = zlib.crc32("/".join(self.path).encode())  # Linen's make_rng takes one key only

        def keep(key: Any) -> Array:
            return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(keep)(keys), x / (1 - self.rate), jnp.zeros_like(x))


class ResBlock(nn.Module):
    """norm-swish-conv, plus the embedding if any, norm-swish-dropout-conv, plus a shortcut."""

    features: int
    num_groups: int
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"] | None, dropout_keys: Any
    ) -> Float[Array, "b h w f"]:
        h = nn.swish(GroupNorm(self.num_groups, self.dtype, name="norm1")(x))
        h = conv(self.features, self.dtype, "conv1")(h)
        if embedding is not None:
            h += dense(self.features, self.dtype, "embedding")(embedding)[:, None, None, :]
        h = nn.swish(GroupNorm(self.num_groups, self.dtype, name="norm2")(h))
        h = Dropout(self.dropout)(h, dropout_keys)
        h = conv(self.features, self.dtype, "conv2", scale=0.0)(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, self.dtype, "shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """One-head self-attention over pixels with scale 1/√channels, softmax in float32."""

    num_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.num_groups, self.dtype, name="norm")(x)
        h = h.reshape(batch, height * width, channels)
        query = dense(channels, self.dtype, "query")(h)
        key = dense(channels, self.dtype, "key")(h)
        value = dense(channels, self.dtype, "value")(h)
        logits = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(channels), axis=-1).astype(self.dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, value)
        h = dense(channels, self.dtype, "out", scale=0.0)(h)
        return x + h.reshape(x.shape)


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Each pixel twice in both directions (its backward pass is a plain sum)."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
