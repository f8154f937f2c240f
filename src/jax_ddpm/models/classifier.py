"""An image classifier: the U-Net's way down, and a mean over pixels."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jax_ddpm.models.layers import (
    AttentionBlock,
    Dtype,
    GroupNorm,
    ResBlock,
    conv,
    dense,
    time_embedding,
)
from jax_ddpm.models.levels import (
    AttentionResolutions,
    BaseChannels,
    ChannelMultipliers,
    Dropout,
    NumGroups,
    NumResBlocks,
    Remat,
    check_groups,
    check_levels,
)
from jax_ddpm.models.remat import remat
from jax_ddpm.models.unet import UNet


class ResNet(nn.Module):
    """Features and class logits of an image (He et al. 2016, with pre-activation).

    Attributes:
      num_classes: the number of logits.
      base_channels, channel_multipliers, num_res_blocks, attention_resolutions, num_groups,
      dropout, dtype, remat: as in ``UNet``.
    """

    num_classes: int
    base_channels: BaseChannels = UNet.base_channels
    channel_multipliers: ChannelMultipliers = UNet.channel_multipliers
    num_res_blocks: NumResBlocks = UNet.num_res_blocks
    attention_resolutions: AttentionResolutions = UNet.attention_resolutions
    num_groups: NumGroups = UNet.num_groups
    dropout: Dropout = UNet.dropout
    dtype: Dtype = jnp.float32
    remat: Remat = UNet.remat

    def check(self, shape: tuple[int, ...] | None = None) -> None:
        """Raises Unfit where options contradict each other, or the shape of x."""
        check_groups(self.base_channels, self.channel_multipliers, self.num_groups)
        if shape is not None:
            check_levels(self.channel_multipliers, self.attention_resolutions, shape)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        dropout_keys: Any = None,
        time: Float[Array, " b"] | None = None,
    ) -> tuple[Float32[Array, "b features"], Float32[Array, "b classes"]]:
        """The features, as many as the last level is wide, and the logits, of x in [-1, 1].

        ``dropout_keys`` is one PRNG key per example in training, None otherwise. x with a ``time``
        is a noisy image of that time, and the network has parameters to embed it.
        """
        embedding = None
        if time is not None:
            embedding = time_embedding(time, self.base_channels, self.dtype)
            embedding = nn.swish(embedding).astype(self.dtype)
        res_block, attention = remat(ResBlock, self.remat), remat(AttentionBlock, self.remat)
        h = conv(self.base_channels, self.dtype, "conv_in")(x.astype(self.dtype))
        for level, multiplier in enumerate(self.channel_multipliers):
            if level > 0:
                h = conv(h.shape[-1], self.dtype, f"downsample{level - 1}", stride=2)(h)
            width = multiplier * self.base_channels
            for i in range(self.num_res_blocks):
                name = f"down{level}_{i}"
                block = res_block(
                    width, self.num_groups, self.dropout, self.dtype, name=f"{name}_res"
                )
                h = block(h, embedding, dropout_keys)
                if h.shape[1] in self.attention_resolutions:
                    h = attention(self.num_groups, self.dtype, name=f"{name}_attention")(h)
        h = nn.swish(GroupNorm(self.num_groups, name="norm_out")(h))
        features = h.mean(axis=(1, 2))
        return features, dense(self.num_classes, jnp.float32, "logits")(features)
