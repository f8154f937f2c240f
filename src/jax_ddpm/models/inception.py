"""The Inception network of December 2015, whose features the Fréchet Inception Distance compares.

The architecture is that of Szegedy et al. 2016 (arXiv 1512.00567) with the batch norms folded into
the convolutions. The published graph departs from the paper in two ways that FID depends on:
averages do not count the padding, and the last block takes a maximum instead of an average.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

_RESOLUTION = 299
_ONE_PIXEL = ((0, 0), (1, 1), (1, 1), (0, 0))


class InceptionV3(nn.Module):
    """Features and logits as pytorch-fid computes them, in float32.

    Modules are named as in PyTorch's network. The caller chooses the precision of products; FID
    requires ``jax.default_matmul_precision("highest")``.
    """

    @nn.compact
    def __call__(
        self, images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b 2048"], Float[Array, "b 1008"]]:
        """The features, and the logits without the classifier's bias.

        ``images`` are in 0…255, gray (c = 1) or RGB, of any size: they are resized to 299×299. The
        logits are those of the Inception score, whose original code leaves the bias out, as
        torch-fidelity's ``logits_unbiased`` does.
        """
        x = resize_bilinear(images.astype(jnp.float32), _RESOLUTION) * (2 / 255) - 1
        x = jnp.broadcast_to(x, (*x.shape[:-1], 3))
        x = nn.relu(nn.Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x))
        x = _crop(_conv(x, "Conv2d_2a_3x3", 32, 3, 3))
        x = _conv(x, "Conv2d_2b_3x3", 64, 3, 3)
        x = max_pool(x, stride=2)
        x = _conv(x, "Conv2d_3b_1x1", 80)
        x = _crop(_conv(x, "Conv2d_4a_3x3", 192, 3, 3))
        x = max_pool(x, stride=2)
        x = BlockA(32, name="Mixed_5b")(x)
        x = BlockA(64, name="Mixed_5c")(x)
        x = BlockA(64, name="Mixed_5d")(x)
        x = BlockB(name="Mixed_6a")(x)
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(average_pool, name="Mixed_7b")(x)
        x = BlockE(max_pool, name="Mixed_7c")(x)
        features = x.mean(axis=(1, 2))
        return features, nn.Dense(1008, use_bias=False, name="fc")(features)


class BlockA(nn.Module):
    """35×35 pixels."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        return _join(
            _conv(x, "branch1x1", 64),
            _chain(x, "branch5x5", (48,), (64, 5, 5)),
            _chain(x, "branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3)),
            _conv(average_pool(x), "branch_pool", self.pool_features),
        )


class BlockB(nn.Module):
    """Reduces 35×35 to 17×17 pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        return _join(
            _conv(x, "branch3x3", 384, 3, 3, stride=2),
            _chain(x, "branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3, 2)),
            max_pool(x, stride=2),
        )


class BlockC(nn.Module):
    """17×17 pixels; 7×7 kernels are factored into rows and columns."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        row, column = (self.width, 1, 7), (self.width, 7, 1)
        return _join(
            _conv(x, "branch1x1", 192),
            _chain(x, "branch7x7", (self.width,), row, (192, 7, 1)),
            _chain(x, "branch7x7dbl", (self.width,), column, row, column, (192, 1, 7)),
            _conv(average_pool(x), "branch_pool", 192),
        )


class BlockD(nn.Module):
    """Reduces 17×17 to 8×8 pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        return _join(
            _chain(x, "branch3x3", (192,), (320, 3, 3, 2)),
            _chain(x, "branch7x7x3", (192,), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)),
            max_pool(x, stride=2),
        )


class BlockE(nn.Module):
    """8×8 pixels; two branches fork into rows and columns."""

    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        single = _conv(x, "branch3x3_1", 384)
        double = _chain(x, "branch3x3dbl", (448,), (384, 3, 3))
        return _join(
            _conv(x, "branch1x1", 320),
            _conv(single, "branch3x3_2a", 384, 1, 3),
            _conv(single, "branch3x3_2b", 384, 3, 1),
            _conv(double, "branch3x3dbl_3a", 384, 1, 3),
            _conv(double, "branch3x3dbl_3b", 384, 3, 1),
            _conv(self.pool(x), "branch_pool", 192),
        )


class StridedConv(nn.Module):
    """A convolution without padding, as the sum over the kernel's places of one product each.

    XLA takes half the time of a strided convolution for it on a CPU, if there are many channels.
    """

    features: int
    size: tuple[int, int]
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        shape = (*self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        height, width = (n - k + 1 for n, k in zip(x.shape[1:3], self.size, strict=True))
        return bias.reshape(1, 1, 1, -1) + sum(
            x[:, i : i + height : self.stride, j : j + width : self.stride] @ kernel[i, j]
            for i, j in np.ndindex(self.size)
        )


def _conv(
    x: Array, name: str, features: int, height: int = 1, width: int = 1, stride: int = 1
) -> Array:
    """A convolution and ReLU, padded to the same size with stride 1, not padded otherwise.

    A 1×1 convolution is a product over channels, which XLA computes faster on a CPU.
    """
    if height == width == 1:
        return nn.relu(nn.Dense(features, name=name)(x))
    if stride == 1:
        return nn.relu(nn.Conv(features, (height, width), name=name)(x))
    return nn.relu(StridedConv(features, (height, width), stride, name=name)(x))


def _chain(x: Array, name: str, *layers: tuple[int, ...]) -> Array:
    """Convolutions in a row; each layer is (features, height, width, stride)."""
    for i, layer in enumerate(layers, start=1):
        x = _conv(x, f"{name}_{i}", *layer)
    return x


def _crop(x: Array) -> Array:
    """The result of an unpadded 3×3 convolution, which XLA would compute slowly on a CPU."""
    return x[:, 1:-1, 1:-1]


def _join(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


def max_pool(x: Float[Array, "b h w c"], stride: int = 1) -> Float[Array, "b h2 w2 c"]:
    """Maxima of 3×3 windows, around each pixel with stride 1, inside the image with stride 2."""
    if stride == 1:
        x = jnp.pad(x, _ONE_PIXEL, constant_values=-jnp.inf)
    return _slide(jnp.maximum, x, stride)


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Means of the pixels that the 3×3 window around each pixel has inside the image."""
    count = jnp.pad(jnp.ones_like(x[:1, :, :, :1]), _ONE_PIXEL)
    return _slide(jnp.add, jnp.pad(x, _ONE_PIXEL)) / _slide(jnp.add, count)


def _slide(combine: Callable[[Array, Array], Array], x: Array, stride: int = 1) -> Array:
    """Each 3×3 window combined, axis by axis; ``reduce_window`` runs on one core of a CPU."""
    for axis in (1, 2):
        stop = x.shape[axis] - 2
        shifted = (jax.lax.slice_in_dim(x, i, stop + i, stride, axis) for i in range(3))
        x = functools.reduce(combine, shifted)
    return x


def resize_bilinear(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b size size c"]:
    """Interpolates between the two nearest pixels of each axis, even where images shrink.

    Pixel i of n lies at (i + ½)/n; the outermost pixels' values continue beyond them. This is
    PyTorch's ``interpolate`` with ``align_corners=False`` and without antialiasing.
    """

    def weights(length: int) -> Array:
        position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        distance = np.abs(position[:, None] - np.arange(length))
        return jnp.asarray(np.maximum(1 - distance, 0), jnp.float32)

    rows, columns = weights(x.shape[1]), weights(x.shape[2])
    return jnp.einsum("yh,bhwc,xw->byxc", rows, x, columns, precision="highest")
