"""The U-Net of Ho et al. 2020 (appendix B): 35,746,307 parameters for CIFAR-10."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.models.initialisers import normal
from jax_ddpm.models.layers import (
    AttentionBlock,
    Dtype,
    GroupNorm,
    ResBlock,
    UpsampleConv,
    at_least_float32,
    conv,
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


class UNet(nn.Module):
    """Predicts one output per pixel and channel from a noisy image and its time.

    Attributes:
      out_channels: the image's channels; twice as many to predict a variance as well.
      base_channels: width of the first level.
      channel_multipliers: width of each level over ``base_channels``; each level below the first
        halves height and width, which must divide.
      num_res_blocks: residual blocks per level going down (one more going up).
      attention_resolutions: heights of the feature maps that are followed by attention.
      num_groups: groups of GroupNorm; must divide every level's width.
      dropout: rate inside residual blocks.
      num_classes: more than 0 embeds labels, and a null label for "unconditional".
      self_condition: x comes with an earlier estimate of the clean image in channels of its own.
      dtype: of computation; parameters, time embedding, statistics, softmax and output have at
        least float32.
      remat: a policy of ``remat.py`` for computing again in the backward pass; "": nothing.
    """

    out_channels: int
    base_channels: BaseChannels = 128
    channel_multipliers: ChannelMultipliers = (1, 2, 2, 2)
    num_res_blocks: NumResBlocks = 2
    attention_resolutions: AttentionResolutions = (16,)
    num_groups: NumGroups = 32
    dropout: Dropout = 0.1
    num_classes: int = 0
    self_condition: bool = False
    dtype: Dtype = jnp.float32
    remat: Remat = ""

    def check(self, shape: tuple[int, ...] | None = None) -> None:
        """Raises Unfit where options contradict each other, or the shape of x."""
        check_groups(self.base_channels, self.channel_multipliers, self.num_groups)
        if shape is not None:
            check_levels(self.channel_multipliers, self.attention_resolutions, shape)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        conditioning: dict[str, Array],
        dropout_keys: Any = None,
    ) -> Float[Array, "b h w out"]:
        """The network's output in at least float32.

        ``conditioning`` may hold ``label`` (int ``[b]``) and ``label_drop`` (bool ``[b]``, true
        where the null label replaces it; the null label is everywhere without ``label``), and under
        ``self_condition`` ``x0_estimate`` shaped like x (0 without it). ``dropout_keys`` is one
        PRNG key per example in training, None otherwise.
        """
        res_block, attention = remat(ResBlock, self.remat), remat(AttentionBlock, self.remat)
        embedding = nn.swish(self._embedding(time, conditioning)).astype(self.dtype)

        def block(h: Array, level: int, name: str) -> Array:
            width = self.base_channels * self.channel_multipliers[level]
            h = res_block(width, self.num_groups, self.dropout, self.dtype, name=f"{name}_res")(
                h, embedding, dropout_keys
            )
            if h.shape[1] in self.attention_resolutions:
                h = attention(self.num_groups, self.dtype, name=f"{name}_attention")(h)
            return h

        if self.self_condition:
            estimate = conditioning.get("x0_estimate", jnp.zeros_like(x))
            x = jnp.concatenate([x, estimate], axis=-1)
        levels = range(len(self.channel_multipliers))
        h = conv(self.base_channels, self.dtype, "conv_in")(x.astype(self.dtype))
        skips = [h]
        for level in levels:
            for i in range(self.num_res_blocks):
                h = block(h, level, f"down{level}_{i}")
                skips.append(h)
            if level != levels[-1]:
                h = conv(h.shape[-1], self.dtype, f"downsample{level}", stride=2)(h)
                skips.append(h)

        width = h.shape[-1]
        middle = (width, self.num_groups, self.dropout, self.dtype)
        h = res_block(*middle, name="middle_res0")(h, embedding, dropout_keys)
        h = attention(self.num_groups, self.dtype, name="middle_attention")(h)
        h = res_block(*middle, name="middle_res1")(h, embedding, dropout_keys)

        for level in reversed(levels):
            for i in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up{level}_{i}")
            if level != 0:
                h = UpsampleConv(h.shape[-1], self.dtype, name=f"upsample{level}")(h)

        h = nn.swish(GroupNorm(self.num_groups, self.dtype, name="norm_out")(h))
        h = conv(self.out_channels, self.dtype, "conv_out", scale=0.0)(h)
        return h.astype(at_least_float32(self.dtype))

    def _embedding(self, time: Array, conditioning: dict[str, Array]) -> Array:
        h = time_embedding(time, self.base_channels, self.dtype)
        if not self.num_classes:
            return h
        null = jnp.full(time.shape, self.num_classes, jnp.int32)
        label = conditioning.get("label", null)
        if "label_drop" in conditioning:
            label = jnp.where(conditioning["label_drop"], null, label)
        table = nn.Embed(self.num_classes + 1, h.shape[-1], embedding_init=normal, name="label")
        return h + table(label)
