"""Coarser levels on top of a pyramid, each half the resolution of the one before."""

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from torch import Tensor, nn

TOP_BLOCKS = ("maxpool", "p6p7_c5", "p6p7_p5", "none")


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
    """

    num_levels = 2

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        for module in (self.p6, self.p7):
            weight_init.c2_xavier_fill(module)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return two maps with a half and a quarter of the resolution of ``x``, rounded up."""
        p6 = self.p6(x)
        return [p6, self.p7(F.relu(p6))]


def build_top_block(name: str, in_channels: int, out_channels: int) -> nn.Module | None:
    """Build the top block ``name`` for a coarsest bottom-up map of ``in_channels``.

    Returns:
        A module with ``num_levels`` that maps a tensor to a list of tensors; None for "none".

    Raises:
        ValueError: ``name`` is not one of ``TOP_BLOCKS``.
    """
    if name not in TOP_BLOCKS:
        raise ValueError(f"top_block (MODEL.FPN.TOP_BLOCK) is {name!r}; expected one of {', '.join(TOP_BLOCKS)}")
    if name == "none":
        return None
    if name == "maxpool":
        return MaxPoolTopBlock()
    return P6P7TopBlock(in_channels if name == "p6p7_c5" else out_channels, out_channels)
