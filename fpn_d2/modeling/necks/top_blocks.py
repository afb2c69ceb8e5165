"""Coarser levels on top of a pyramid, each half the resolution of the one before.

As in Detectron2, a top block has ``num_levels``, how many it makes, and ``in_feature``, the name of the map that it
reads: a bottom-up map (``res5``), or the last map of the neck (``p5``).
"""

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from fpn_d2.errors import UserError

from .parts import xavier_conv

# Name of each top block: how many levels it adds.
TOP_BLOCKS = {"maxpool": 1, "p6_p5": 1, "p6p7_c5": 2, "p6p7_p5": 2, "p6p7_maxpool": 2, "none": 0}


class P6TopBlock(nn.Module):
    """One more level by a 3x3 stride-2 convolution: the first half of Detectron2's ``LastLevelP6P7``.

    Args:
        in_channels: channels of the map that it reads.
        out_channels: channels of the new map.
        in_feature: name of the map that it reads.
    """

    num_levels = 1

    def __init__(self, in_channels: int, out_channels: int, in_feature: str):
        super().__init__()
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        weight_init.c2_xavier_fill(self.p6)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return a map with half the resolution of ``x``, rounded up."""
        return [self.p6(x)]


class P6P7MaxPoolTopBlock(nn.Module):
    """Two more levels by 3x3 stride-2 max pooling of C5, which a 1x1 convolution has brought to d channels.

    So EfficientDet (Tan et al., CVPR 2020) makes P6 and P7; NAS-FPN pools too, with windows of 2x2.

    Args:
        in_channels: channels of C5.
        out_channels: d, channels of both new maps.
        in_feature: name of C5.
        norm: norm after the 1x1 convolution; empty: none.
        num_levels: 2, or 1 for P6 alone.
    """

    def __init__(self, in_channels: int, out_channels: int, in_feature: str, norm: str = "", num_levels: int = 2):
        super().__init__()
        self.in_feature = in_feature
        self.num_levels = num_levels
        self.p6 = xavier_conv(in_channels, out_channels, 1, norm)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return maps with a half and a quarter of the resolution of ``x``, rounded up."""
        maps = [self.p6(x)]
        for _ in range(self.num_levels):
            maps.append(F.max_pool2d(maps[-1], kernel_size=3, stride=2, padding=1))
        return maps[1:]


def num_top_levels(name: str) -> int:
    """Return the number of levels that the top block ``name`` adds.

    Raises:
        UserError: ``name`` is not one of ``TOP_BLOCKS``.
    """
    if name not in TOP_BLOCKS:
        raise UserError(f"top_block (MODEL.FPN.TOP_BLOCK) is {name!r}; expected one of {', '.join(TOP_BLOCKS)}")
    return TOP_BLOCKS[name]


def reads_bottom_up(name: str) -> bool:
    """Whether the top block ``name`` reads the last bottom-up map, C5, and not the last map of the neck."""
    return name in ("p6p7_c5", "p6p7_maxpool")


def build_top_block(
    name: str,
    in_feature: str,
    in_channels: int,
    last: int,
    out_channels: int,
    norm: str = "",
    num_levels: int | None = None,
) -> nn.Module | None:
    """Build the top block ``name`` on a neck whose coarsest level below it is ``last``.

    Args:
        name: a key of ``TOP_BLOCKS``.
        in_feature: name of the last bottom-up map.
        in_channels: its channels.
        last: the neck's coarsest level without the top block.
        out_channels: d, channels of the pyramid.
        norm: norm of "p6p7_maxpool"; the others have none, as published.
        num_levels: how many of its levels are wanted, from the finest on; None: all.

    Returns:
        A module that maps a tensor to a list of ``num_levels`` tensors; None if there is no level.

    Raises:
        UserError: ``name`` is not one of ``TOP_BLOCKS``.
    """
    levels = num_top_levels(name) if num_levels is None else num_levels
    if levels == 0:
        return None
    if not reads_bottom_up(name):
        in_feature, in_channels = f"p{last}", out_channels
    if name == "maxpool":
        block = LastLevelMaxPool()
        block.in_feature = in_feature  # p5 there, whatever the level
        return block
    if name == "p6p7_maxpool":
        return P6P7MaxPoolTopBlock(in_channels, out_channels, in_feature, norm, levels)
    return (P6TopBlock if levels == 1 else LastLevelP6P7)(in_channels, out_channels, in_feature)
