"""Coarser levels on top of a pyramid, each half the resolution of the one before."""

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from .conv import xavier_conv

# Name of each top block: how many levels it adds.
TOP_BLOCKS = {"maxpool": 1, "p6p7_c5": 2, "p6p7_p5": 2, "p6p7_maxpool": 2, "none": 0}


class MaxPoolTopBlock(nn.Module):
    """One more level: every second cell of the coarsest output (Lin et al., CVPR 2017, footnote 2).

    Has no parameters. The map (N, C, H, W) becomes (N, C, ceil(H/2), ceil(W/2)).
    """

    num_levels = 1

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the one coarser map of ``x``."""
        return [F.max_pool2d(x, kernel_size=1, stride=2, padding=0)]


class P6P7TopBlock(nn.Module):
    """Two more levels by 3x3 stride-2 convolutions, with a ReLU between them (Lin et al., ICCV 2017, RetinaNet).

    Args:
        in_channels: channels of the map that it is applied to.
        out_channels: channels of both new maps.
        num_levels: 2, or 1 for P6 alone.
    """

    def __init__(self, in_channels: int, out_channels: int, num_levels: int = 2):
        super().__init__()
        self.num_levels = num_levels
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        if num_levels == 2:
            self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        for module in self.children():
            weight_init.c2_xavier_fill(module)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return maps with a half and a quarter of the resolution of ``x``, rounded up."""
        p6 = self.p6(x)
        return [p6, self.p7(F.relu(p6))] if self.num_levels == 2 else [p6]


class P6P7MaxPoolTopBlock(nn.Module):
    """Two more levels by 3x3 stride-2 max pooling of C5, which a 1x1 convolution has brought to d channels.

    So EfficientDet (Tan et al., CVPR 2020) makes P6 and P7; NAS-FPN pools too, with windows of 2x2.

    Args:
        in_channels: channels of C5.
        out_channels: d, channels of both new maps.
        norm: norm after the 1x1 convolution; empty: none.
        num_levels: 2, or 1 for P6 alone.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str = "", num_levels: int = 2):
        super().__init__()
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
        ValueError: ``name`` is not one of ``TOP_BLOCKS``.
    """
    if name not in TOP_BLOCKS:
        raise ValueError(f"top_block (MODEL.FPN.TOP_BLOCK) is {name!r}; expected one of {', '.join(TOP_BLOCKS)}")
    return TOP_BLOCKS[name]


def reads_bottom_up(name: str) -> bool:
    """Whether the top block ``name`` reads the last bottom-up map, C5, and not the last map of the neck."""
    return name in ("p6p7_c5", "p6p7_maxpool")


def build_top_block(
    name: str, in_channels: int, out_channels: int, norm: str = "", num_levels: int | None = None
) -> nn.Module | None:
    """Build the top block ``name`` for a coarsest bottom-up map of ``in_channels``.

    Args:
        name: a key of ``TOP_BLOCKS``.
        in_channels: channels of the last bottom-up map.
        out_channels: d, channels of the pyramid.
        norm: norm of "p6p7_maxpool"; the others have none, as published.
        num_levels: how many of its levels are wanted, from the finest on; None: all.

    Returns:
        A module that maps a tensor to a list of ``num_levels`` tensors; None if there is no level.

    Raises:
        ValueError: ``name`` is not one of ``TOP_BLOCKS``.
    """
    levels = num_top_levels(name) if num_levels is None else num_levels
    if levels == 0:
        return None
    if name == "maxpool":
        return MaxPoolTopBlock()
    if name == "p6p7_maxpool":
        return P6P7MaxPoolTopBlock(in_channels, out_channels, norm, levels)
    return P6P7TopBlock(in_channels if reads_bottom_up(name) else out_channels, out_channels, levels)


def top_block_of(cfg: CfgNode) -> str:
    """Read ``cfg.MODEL.FPN.TOP_BLOCK``; "auto" is p6p7_c5 for RetinaNet and maxpool for all others."""
    name = cfg.MODEL.FPN.TOP_BLOCK
    if name != "auto":
        return name
    return "p6p7_c5" if cfg.MODEL.META_ARCHITECTURE.endswith("RetinaNet") else "maxpool"
