"""The options of networks that halve their images level by level, and their checks."""

from typing import Annotated

from jax_ddpm.models.remat import REMAT_POLICIES
from jax_ddpm.options import (
    OneOf,
    Option,
    Unfit,
    Where,
    between,
    fraction,
    is_a,
    positive,
)

BaseChannels = Annotated[int, Option("Width of the first level.", between(4, 2**14))]
ChannelMultipliers = Annotated[
    tuple[int, ...],
    Option(
        "Width of each level over base_channels; each below the first is half as high and wide.",
        Where(
            lambda value: len(value) > 0 and all(is_a(m, int) and 0 < m <= 64 for m in value),
            "whole numbers from 1 to 64, one per level",
        ),
    ),
]
NumResBlocks = Annotated[int, Option("Residual blocks per level.", between(1, 100))]
AttentionResolutions = Annotated[
    tuple[int, ...],
    Option(
        "Heights of the feature maps that attention follows.",
        Where(lambda value: all(is_a(height, int) for height in value), "whole numbers, or ()"),
    ),
]
NumGroups = Annotated[int, Option("Groups of GroupNorm.", positive)]
Dropout = Annotated[float, Option("Rate inside residual blocks.", fraction)]
Remat = Annotated[
    str,
    Option(
        "What is computed again to save memory: elementwise | blocks.",
        OneOf(REMAT_POLICIES, also=("",)),
        free=True,
    ),
]


def check_groups(base_channels: int, channel_multipliers: tuple[int, ...], num_groups: int) -> None:
    """Raises Unfit where the groups do not divide every level's width."""
    widths = [base_channels * multiplier for multiplier in channel_multipliers]
    if any(width % num_groups for width in widths):
        raise Unfit("num_groups", num_groups, f"a divisor of every level's width {widths}")


def check_levels(
    channel_multipliers: tuple[int, ...],
    attention_resolutions: tuple[int, ...],
    shape: tuple[int, ...],
) -> None:
    """Raises ValueError where x cannot be halved so often, or no level has a given height."""
    if len(shape) != 3:
        raise ValueError(f"this network takes images [height, width, channels]; x is {list(shape)}")
    height, width, _ = shape
    levels = len(channel_multipliers)
    factor = 2 ** (levels - 1)
    if height % factor or width % factor:
        raise Unfit(
            "channel_multipliers",
            channel_multipliers,
            f"fewer than {levels} levels: {height}×{width} images cannot be halved {levels - 1} "
            "times",
        )
    heights = tuple(height >> level for level in range(levels))
    if not set(attention_resolutions) <= set(heights):
        raise Unfit(
            "attention_resolutions",
            attention_resolutions,
            f"among the heights of the feature maps, {heights}",
        )
