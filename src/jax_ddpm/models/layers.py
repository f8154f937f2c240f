"""The layers of the networks, with the initialisation of Ho et al. 2020.

Kernels are drawn uniformly with variance ``scale``/fan-average; layers that end a residual branch
take ``scale`` ≈ 0, so every block starts as the identity.

The computation of a layer is a jitted function: JAX traces and differentiates it once for all
layers of a shape, and a U-Net has several of each.
"""

import math
import zlib
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.models.convolution import convolve
from jax_ddpm.models.initialisers import fan_average_uniform, ones, zeros

Dtype = Any


def at_least_float32(dtype: Dtype) -> Dtype:
    """The dtype of statistics, embeddings and softmax, whose round-off matters."""
    return jnp.promote_types(dtype, jnp.float32)


def parameter(layer: nn.Module, name: str, shape: tuple[int, ...]) -> Array:
    """The layer's parameter of that name, drawn by its initialiser ``{name}_init``.

    Linen's own ``param`` traces the initialiser at every use to compare shapes, a good part of
    tracing a U-Net.

    Raises:
      ValueError: where the parameters given are those of another network.
    """
    if layer.is_initializing():
        return layer.param(name, getattr(layer, f"{name}_init"), shape)
    value: Any = layer.get_variable("params", name)
    found = getattr(value, "shape", None)
    if found != shape:
        raise ValueError(f"{'/'.join((*layer.path, name))} should have shape {shape}, not {found}")
    return value


class Conv(nn.Module):
    """A 3×3 convolution with SAME padding."""

    features: int
    dtype: Dtype
    stride: int = 1
    kernel_init: nn.initializers.Initializer = fan_average_uniform()
    bias_init: nn.initializers.Initializer = zeros

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        kernel = parameter(self, "kernel", (3, 3, x.shape[-1], self.features))
        bias = parameter(self, "bias", (self.features,))
        return _conv(x, kernel, bias, self.stride, self.dtype)


@partial(jax.jit, static_argnames=("stride", "dtype"))
def _conv(x: Array, kernel: Array, bias: Array, stride: int, dtype: Dtype) -> Array:
    y = convolve(x.astype(dtype), kernel.astype(dtype), stride)
    return y + bias.astype(dtype)[None, None, None]


def conv(features: int, dtype: Dtype, name: str, *, stride: int = 1, scale: float = 1.0) -> Conv:
    """A 3×3 convolution with SAME padding."""
    return Conv(features, dtype, stride, fan_average_uniform(scale), name=name)


class Dense(nn.Module):
    """A dense layer over channels: a 1×1 convolution where there are pixels."""

    features: int
    dtype: Dtype
    kernel_init: nn.initializers.Initializer = fan_average_uniform()
    bias_init: nn.initializers.Initializer = zeros

    @nn.compact
    def __call__(self, x: Float[Array, "*shape c"]) -> Float[Array, "*shape f"]:
        kernel = parameter(self, "kernel", (x.shape[-1], self.features))
        bias = parameter(self, "bias", (self.features,))
        return _dense(x, kernel, bias, self.dtype)


@partial(jax.jit, static_argnames="dtype")
def _dense(x: Array, kernel: Array, bias: Array, dtype: Dtype) -> Array:
    # All pixels are rows of one matrix: the kernel's gradient is one matrix product, for which XLA
    # copies no transpose.
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    y = rows @ kernel.astype(dtype) + bias.astype(dtype)[None]
    return y.reshape(*x.shape[:-1], -1)


def dense(features: int, dtype: Dtype, name: str, *, scale: float = 1.0) -> Dense:
    """A dense layer over channels: a 1×1 convolution where there are pixels."""
    return Dense(features, dtype, fan_average_uniform(scale), name=name)


def sinusoidal_embedding(
    time: Float[Array, " batch"], features: int, max_period: float = 10_000.0
) -> Float[Array, "batch features"]:
    """[sin(ω_i·t), cos(ω_i·t)], ω geometrically from 1 to 1/max_period (Vaswani et al. 2017).

    It is meant for times up to about 1000, and computed in float32.
    """
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = time.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def time_embedding(
    time: Float[Array, " batch"], base_channels: int, dtype: Dtype
) -> Float[Array, "batch features"]:
    """The time as ``4·base_channels`` features, for the blocks of the module that calls this."""
    width, dtype = 4 * base_channels, at_least_float32(dtype)
    h = sinusoidal_embedding(time, base_channels)
    h = nn.swish(dense(width, dtype, "time1")(h))
    return dense(width, dtype, "time2")(h)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) over ``[batch, height, width, channels]``.

    Moments are summed per channel, then folded into groups and applied as one multiply-add, which
    spares a CPU the five-axis view. Statistics are at least float32; ε is 1e-6.
    """

    num_groups: int
    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6
    scale_init: nn.initializers.Initializer = ones
    bias_init: nn.initializers.Initializer = zeros

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        scale = parameter(self, "scale", (channels,))
        bias = parameter(self, "bias", (channels,))
        return _group_norm(x, scale, bias, self.num_groups, self.epsilon, self.dtype)


@partial(jax.jit, static_argnames=("num_groups", "epsilon", "dtype"))
def _group_norm(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    num_groups: int,
    epsilon: float,
    dtype: Dtype,
) -> Float[Array, "b h w c"]:
    wide = x.astype(at_least_float32(x.dtype))
    mean, square = wide.mean(axis=(1, 2)), jnp.square(wide).mean(axis=(1, 2))
    gain, offset = _normaliser(mean, square, scale, bias, num_groups, epsilon)
    return (wide * gain[:, None, None] + offset[:, None, None]).astype(dtype)


@partial(jax.jit, static_argnames=("num_groups", "epsilon"))
def _normaliser(
    mean: Float[Array, "b c"],
    square: Float[Array, "b c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    num_groups: int,
    epsilon: float,
) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """The factor and the offset of each channel, from its moments over the pixels."""

    def group_mean(per_channel: Array) -> Array:
        groups = per_channel.reshape(len(per_channel), num_groups, -1)
        means = jnp.broadcast_to(groups.mean(axis=-1, keepdims=True), groups.shape)
        return means.reshape(per_channel.shape)

    mean, square = group_mean(mean), group_mean(square)
    variance = jnp.maximum(square - jnp.square(mean), 0)
    gain = scale[None] * jax.lax.rsqrt(variance + epsilon)
    return gain, bias[None] - mean * gain


class Dropout(nn.Module):
    """Dropout keyed per example, so that splitting a batch does not change the result.

    ``keys`` is one PRNG key per example, or None to leave x unchanged.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], keys: Any) -> Float[Array, "b ..."]:
        if self.rate == 0 or keys is None:
            return x
        layer = zlib.crc32("/".join(self.path).encode())  # Linen's make_rng takes one key only

        return _dropout(x, keys, jnp.uint32(layer), self.rate)


@partial(jax.jit, static_argnames="rate")
def _dropout(x: Array, keys: Any, layer: Array, rate: float) -> Array:
    def keep(key: Any) -> Array:
        # 16 random bits decide as well as 32; JAX draws at least 32 at a time.
        words = jax.random.bits(jax.random.fold_in(key, layer), ((x[0].size + 1) // 2,))
        bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
        return bits[: x[0].size].reshape(x.shape[1:]) >= round(2**16 * rate)

    return jnp.where(jax.vmap(keep)(keys), x / (1 - rate), jnp.zeros_like(x))


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
    """One-head self-attention over pixels with scale 1/√channels, softmax in at least float32."""

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
        h = _attend(query, key, value, self.dtype)
        h = dense(channels, self.dtype, "out", scale=0.0)(h)
        return x + h.reshape(x.shape)


@partial(jax.jit, static_argnames="dtype")
def _attend(
    query: Float[Array, "b q c"],
    key: Float[Array, "b k c"],
    value: Float[Array, "b k c"],
    dtype: Dtype,
) -> Float[Array, "b q c"]:
    wide = at_least_float32(dtype)
    logits = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=wide)
    logits /= math.sqrt(query.shape[-1])
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    h = jnp.einsum("bqk,bkc->bqc", weights.astype(dtype), value)
    # Dividing by the softmax's sum here spares a pass over all pairs of pixels.
    return (h / weights.sum(axis=-1, keepdims=True)).astype(dtype)


class UpsampleConv(nn.Module):
    """Each pixel twice in both directions, then a 3×3 convolution with SAME padding.

    A window of the doubled image covers only 2×2 pixels of x, different ones for even and for odd
    places. The layer is therefore four 2×2 convolutions of x, with 4/9 of the arithmetic, whose
    kernels are sums of the 3×3 kernel's taps (cf. the sub-pixel convolution of Shi et al. 2016).
    """

    features: int
    dtype: Dtype
    kernel_init: nn.initializers.Initializer = fan_average_uniform()
    bias_init: nn.initializers.Initializer = zeros

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w f"]:
        batch, height, width, channels = x.shape
        x = x.astype(self.dtype)
        kernel = parameter(self, "kernel", (3, 3, channels, self.features))
        bias = parameter(self, "bias", (self.features,))

        def quarter(kernel: Array, row: int, column: int) -> Array:
            """The pixels of even (0) or odd (1) rows and columns."""
            padding = ((1 - row, row), (1 - column, column))
            return convolve(x, kernel.astype(self.dtype), 1, padding)

        quarters = [
            jnp.stack([quarter(part, i, j) for j, part in enumerate(_merge_taps(rows, 1))], axis=3)
            for i, rows in enumerate(_merge_taps(kernel, 0))
        ]
        y = jnp.stack(quarters, axis=2).reshape(batch, 2 * height, 2 * width, self.features)
        return y + bias.astype(self.dtype)[None, None, None]


def _merge_taps(kernel: Array, axis: int) -> tuple[Array, Array]:
    """The taps of even and of odd outputs along one axis, where pairs of inputs are equal."""
    before, here, after = jnp.split(kernel, 3, axis)
    even = jnp.concatenate([before, here + after], axis)
    odd = jnp.concatenate([before + here, after], axis)
    return even, odd
