"""NAS-FPN (Ghiasi et al., CVPR 2019, figure 6): the graph of seven merging cells that the search found.

Shape legend, for an image of H x W pixels in a batch of N:
    p{k}       input of level k: (N, d, ceil(H / 2^k), ceil(W / 2^k))
    p{k}_out   output of level k, as p{k}; input of level k for the next stage
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from fpn_d2.errors import UserError

from .build import NECK_REGISTRY
from .input_levels import GraphNeck, InputLevels
from .parts import fit, nearest, xavier_conv

NUM_LEVELS = 5


class Cell(NamedTuple):
    """A merging cell: its name and level, how it merges two maps, and what it adds to the result.

    "attention" takes the finer of its two maps first.

    The search leaves inputs that no cell uses; such a dangling input is added to the output of its level.
    """

    name: str
    level: int
    op: str
    inputs: tuple[str, str]
    dangling: tuple[str, ...] = ()


# As published, for P3 to P7, in the order of computation.
CELLS = (
    Cell("p4_1", 4, "attention", ("p4", "p6")),
    Cell("p4_2", 4, "sum", ("p4", "p4_1")),
    Cell("p3_out", 3, "sum", ("p3", "p4_2")),
    Cell("p4_out", 4, "sum", ("p4_2", "p3_out")),
    Cell("p5_out", 5, "attention", ("p3_out", "p4_out"), dangling=("p5",)),
    Cell("p7_out", 7, "attention", ("p4_2", "p5_out"), dangling=("p7",)),
    Cell("p6_out", 6, "attention", ("p5_out", "p7_out")),
)


def nasfpn_cells(min_level: int) -> tuple[Cell, ...]:
    """Return the published cells with the five levels from ``min_level`` on in the place of P3 to P7."""
    shift = min_level - 3

    def moved(name: str) -> str:
        level, _, rest = name[1:].partition("_")
        return f"p{int(level) + shift}" + (f"_{rest}" if rest else "")

    return tuple(
        Cell(moved(c.name), c.level + shift, c.op, tuple(map(moved, c.inputs)), tuple(map(moved, c.dangling)))
        for c in CELLS
    )


class Stage(nn.Module):
    """One pass through the graph; its children have the names of the cells: each ReLU, 3x3 convolution, norm."""

    def __init__(self, cells: Sequence[Cell], channels: int, norm: str):
        super().__init__()
        self.cells = tuple(cells)
        for cell in self.cells:
            self.add_module(cell.name, xavier_conv(channels, channels, 3, norm))

    def forward(self, inputs: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return the output of each level for ``inputs`` ``{k: (N, d, H_k, W_k)}``."""
        maps = {f"p{k}": x for k, x in inputs.items()}
        levels = {f"p{k}": k for k in inputs} | {cell.name: cell.level for cell in self.cells}
        for cell in self.cells:
            size = inputs[cell.level].shape[-2:]
            first, second = (_resize(maps[name], levels[name], cell.level, size) for name in cell.inputs)
            merged = first + second if cell.op == "sum" else attention(first, second)
            for name in cell.dangling:
                merged = merged + maps[name]
            maps[cell.name] = getattr(self, cell.name)(merged.relu())
        return {k: maps[f"p{k}_out"] for k in inputs}


def attention(finer: Tensor, coarser: Tensor) -> Tensor:
    """Add to ``coarser`` the map ``finer``, each channel weighted by the sigmoid of the coarser one's global maximum.

    Both are (N, d, H, W). The maximum is over the whole map, padding of the image included.
    """
    return coarser + coarser.amax(dim=(2, 3), keepdim=True).sigmoid() * finer


@NECK_REGISTRY.register()
class NASFPN(GraphNeck):
    """Stages of seven merging cells over five levels.

    Published for P3 to P7; any five levels that follow one another will do, e.g. P2 to P6 with the top block
    "maxpool". Maps are up-sampled by repeating cells and down-sampled by max pooling with windows of the stride, to
    the exact size of the target. The levels of the top block are inputs of the graph. Child modules are
    ``input_levels`` (with ``lateral{k}`` and ``top_block``) and ``nasfpn_stage{i}``.

    As in the authors' code, and unlike mmdetection's, global pooling is a maximum, and the coarser of two maps is
    pooled; mmdetection takes the mean of the finer one. Differs from the authors' code: a convolution before a norm
    has no bias, and the norms have PyTorch's epsilon and momentum.
    """

    default_repeats = 7

    @configurable
    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_features: Sequence[str],
        out_channels: int = 256,
        norm: str = "BN",
        top_block: str = "p6p7_maxpool",
        repeats: int = default_repeats,
    ):
        """Build the neck.

        Args:
            bottom_up: the bottom-up pathway.
            in_features: names of the maps to use, from high to low resolution; strides double.
            out_channels: d, the channels of every level; 256 or 384 in the paper.
            norm: a norm of :func:`detectron2.layers.get_norm` after each convolution; "BN" in the paper; empty: none.
            top_block: what makes the input levels above the last bottom-up map: "maxpool", "p6p7_c5", "p6p7_p5",
                "p6p7_maxpool" or "none".
            repeats: number of stages; 7 in the paper's best model.

        Raises:
            UserError: an option has no such value, a map is missing, strides do not double, or there are not five
                levels.
        """
        super().__init__(InputLevels(bottom_up.output_shape(), in_features, out_channels, norm, top_block), repeats)
        if len(self.levels) != NUM_LEVELS:
            names = ", ".join(f"p{k}" for k in self.levels)
            raise UserError(
                f"NASFPN is published for {NUM_LEVELS} levels, and in_features (MODEL.FPN.IN_FEATURES) "
                f"{list(in_features)} with the top_block (MODEL.FPN.TOP_BLOCK) {top_block} give {len(self.levels)}: "
                f"{names}; take res3 to res5 with p6p7_maxpool, or res2 to res5 with maxpool"
            )
        cells = nasfpn_cells(self.levels[0])
        for i in range(repeats):
            self.add_module(f"nasfpn_stage{i}", Stage(cells, out_channels, norm))
        self.own(bottom_up)

    def fuse(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``{"p3": (N, d, H/8, W/8), ...}``, from high to low resolution, for maps of any size."""
        maps = self.input_levels(features)
        for i in range(self.repeats):
            maps = getattr(self, f"nasfpn_stage{i}")(maps)
        return {f"p{k}": maps[k] for k in self.levels}


def _resize(x: Tensor, level: int, target: int, size: tuple[int, int]) -> Tensor:
    """Bring ``x`` of ``level`` to ``size``, that of the level ``target``."""
    if level > target:
        return nearest(x, 2 ** (level - target), size)
    if level < target:
        stride = 2 ** (target - level)
        return fit(F.max_pool2d(x, kernel_size=stride, stride=stride, ceil_mode=True), size, "nearest")
    return x
