"""EfficientNet-Lite0, an ImageNet classifier whose pooled features serve image metrics.

This is EfficientNet-B0 (Tan & Le 2019) for small devices: without squeeze-and-excitation, with
ReLU6 in place of swish. Batch normalisation is folded into the weights, so it is for evaluation
only.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

# Number of blocks, kernel size, stride of the first block, expansion, channels out.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

# Metrics must not depend on an accelerator's faster, less precise products.
dense = functools.partial(nn.Dense, precision="highest")


class EfficientNetLite0(nn.Module):
    """The 1280 pooled features and 1000 ImageNet logits of images in 0…255.

    Images are ``resized`` to 224×224 and normalised to (x - 127)/128, as in the training of the
    published weights. All products are in full float32.
    """

    @nn.compact
    def __call__(
        self, images: UInt8[Array, "b h w c"] | Float32[Array, "b h w c"]
    ) -> tuple[Float32[Array, "b 1280"], Float32[Array, "b 1000"]]:
        """Features and logits of RGB or gray images."""
        x = (resized(images) - 127) / 128
        x = nn.Conv(32, (3, 3), strides=2, precision="highest", name="stem")(x)
        x = nn.relu6(x)
        blocks = [
            (features, expansion, kernel_size, stride if i == 0 else 1)
            for repeats, kernel_size, stride, expansion, features in STAGES
            for i in range(repeats)
        ]
        for i, block in enumerate(blocks):
            x = InvertedResidual(*block, name=f"block{i}")(x)
        x = nn.relu6(dense(1280, name="head")(x))
        features = x.mean(axis=(1, 2))
        return features, dense(1000, name="classifier")(features)


def resized(
    images: UInt8[Array, "b h w c"] | Float32[Array, "b h w c"],
) -> Float32[Array, "b 224 224 3"]:
    """Images of one or three channels at the network's size, part of every metric's protocol.

    The whole image is resized, not a crop, bilinearly with half-pixel centres, antialiased along an
    axis that shrinks, in float32 and without rounding to levels afterwards. Gray is repeated to
    three channels.
    """
    batch, _, _, channels = images.shape
    shape = (batch, 224, 224, channels)
    x = jax.image.resize(images.astype(jnp.float32), shape, "bilinear", antialias=True)
    return jnp.broadcast_to(x, (batch, 224, 224, 3))


class InvertedResidual(nn.Module):
    """Widens, filters each channel, narrows, and adds the input where it has the same shape.

    This is the block of MobileNetV2 (Sandler et al. 2018); its last layer is linear.
    """

    features: int
    expansion: int
    kernel_size: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        h = x
        if self.expansion > 1:
            h = nn.relu6(dense(self.expansion * x.shape[-1], name="expand")(h))
        h = nn.relu6(DepthwiseConv(self.kernel_size, self.stride, name="depthwise")(h))
        h = dense(self.features, name="project")(h)
        return x + h if h.shape == x.shape else h


class DepthwiseConv(nn.Module):
    """A convolution of each channel by itself, with SAME padding.

    It is a sum of shifted images, which XLA fuses into one loop; its grouped convolution is many
    times slower on a CPU.
    """

    kernel_size: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        size, stride, channels = self.kernel_size, self.stride, x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, 1, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        window, strides = (size, size), (stride, stride)
        rows, columns = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, "SAME")
        x = jnp.pad(x, ((0, 0), rows, columns, (0, 0)))
        height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
        return bias[None, None, None] + sum(
            x[:, i : i + height : stride, j : j + width : stride] * kernel[i, j, None, None]
            for i in range(size)
            for j in range(size)
        )
