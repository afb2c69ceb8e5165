"""RoI extractors: what a head sees of a RoI when it is pooled from several levels at once.

An extractor is an ``nn.Module`` that is called with a function that pools from one level, and with the boxes:

    extractor(pool, box_lists) -> (M, out_channels, h, w)
    pool(level_index) -> (M, C, h, w)             all RoIs, from the map of that level
    pool(level_index, rows) -> (len(rows), C, h, w)   the RoIs ``rows`` (int64) only

M RoIs of all images together, L levels, C channels of a map, (h, w) pooled cells. What each costs, in pooled tensors
(M, C, h, w) of 4 bytes a number, where ``canonical`` pools one, keeps none and gives the head one:

    extractor                pools    kept until the backward pass    gives the head
    all_sum                  L        0                               1
    all_max                  L        2 L - 2                         1
    all_max, ADAPT_CONV      L        3 L - 2                         1
    all_concat               L        0                               L: its first layer has L times the weights
    groie                    L        2 L + 3 + h w / C               1
    soft                     1 to 2   0                               1
"""

from collections.abc import Callable, Sequence

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from torch import Tensor, nn

from fpn_d2.errors import UserError

from .level_assign import CanonicalLevelAssigner, box_areas, fractional_levels

Pool = Callable[..., Tensor]


class ROIExtractor(nn.Module):
    """Combines what is pooled of each RoI from the levels. Its parameters are trained and saved with the pooler."""

    def __init__(self, levels: Sequence[int], channels: int, out_channels: int | None = None):
        """Keep what every extractor needs.

        Args:
            levels: the absolute levels that are pooled, ascending, e.g. (2, 3, 4, 5).
            channels: C, of each map.
            out_channels: of what ``forward`` returns; None: C.

        Raises:
            UserError: no levels, levels not ascending, or no channels.
        """
        super().__init__()
        if not levels or list(levels) != sorted(set(levels)):
            raise UserError(f"levels are {list(levels)}; expected at least one, ascending, each once")
        if channels < 1:
            raise UserError(f"channels is {channels}; expected the channels of the maps, at least 1")
        self.levels = tuple(levels)
        self.channels = channels
        self.out_channels = channels if out_channels is None else out_channels

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[int], channels: int) -> dict:
        """Return the arguments of the constructor; override it where there are more."""
        return {"levels": levels, "channels": channels}

    def forward(self, pool: Pool, box_lists: Sequence[Boxes]) -> Tensor:
        """Return (M, out_channels, h, w), RoIs in the order of the images; see the head of this file."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")


class AllMax(ROIExtractor):
    """Adaptive feature pooling (Liu et al., PANet, CVPR 2018, section 3.2): all levels, element-wise maximum.

    In the paper the first layer of the head is applied to each level by itself, with parameters of its own, and the
    maximum is taken behind it: behind the first fully connected layer for boxes, behind the first convolution for
    masks. Here the heads are Detectron2's and stay as they are; the layer per level is one 3x3 convolution and ReLU
    on the pooled cells, in front of the head. That is the paper's layer for masks, with one more behind it, and a
    convolution in place of a fully connected layer for boxes.
    """

    def __init__(self, levels: Sequence[int], channels: int, *, adapt_conv: bool = True):
        """Build the layer of each level.

        Args:
            levels, channels: see :class:`ROIExtractor`.
            adapt_conv: whether each level has a convolution and ReLU before the maximum; without, there are no
                parameters.
        """
        super().__init__(levels, channels)
        self.adapt = nn.ModuleDict()
        if adapt_conv:
            for level in self.levels:
                self.adapt[f"p{level}"] = conv = nn.Conv2d(channels, channels, 3, padding=1)
                weight_init.c2_msra_fill(conv)

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[int], channels: int) -> dict:
        """Read ``cfg.MODEL.ROI_LEVEL_ASSIGN.ADAPT_CONV``."""
        return {"levels": levels, "channels": channels, "adapt_conv": cfg.MODEL.ROI_LEVEL_ASSIGN.ADAPT_CONV}

    def forward(self, pool: Pool, box_lists: Sequence[Boxes]) -> Tensor:
        """See :class:`ROIExtractor`."""
        largest = None
        for level_index, level in enumerate(self.levels):
            pooled = pool(level_index)
            if self.adapt:
                pooled = F.relu(self.adapt[f"p{level}"](pooled))
            largest = pooled if largest is None else torch.maximum(largest, pooled)
        return largest


class AllSum(ROIExtractor):
    """The sum over all levels, without parameters (Rossi et al., GRoIE, ICPR 2020, without its two modules)."""

    def __init__(self, levels: Sequence[int], channels: int):
        """See :class:`ROIExtractor`."""
        super().__init__(levels, channels)

    def forward(self, pool: Pool, box_lists: Sequence[Boxes]) -> Tensor:
        """See :class:`ROIExtractor`."""
        return sum((pool(i) for i in range(1, len(self.levels))), start=pool(0))


class AllConcat(ROIExtractor):
    """All levels behind each other, the finest first: L * C channels, for which the heads are built."""

    def __init__(self, levels: Sequence[int], channels: int):
        """See :class:`ROIExtractor`."""
        super().__init__(levels, channels, out_channels=len(levels) * channels)

    def forward(self, pool: Pool, box_lists: Sequence[Boxes]) -> Tensor:
        """See :class:`ROIExtractor`."""
        return torch.cat([pool(i) for i in range(len(self.levels))], dim=1)


class GRoIE(ROIExtractor):
    """Generic RoI extractor (Rossi et al., ICPR 2020): 5x5 convolution, sum over all levels, non-local block.

    One 5x5 convolution with ReLU, shared by the levels, is applied to what is pooled from each; the sum goes through a
    non-local block (:class:`NonLocal`), one of the post-processing modules that the paper compares. The configuration
    that its authors released has, in that place, the attention of query content and relative position with 6 heads
    (Zhu et al., ICCV 2019).
    """

    def __init__(self, levels: Sequence[int], channels: int):
        """See :class:`ROIExtractor`."""
        super().__init__(levels, channels)
        self.pre = nn.Conv2d(channels, channels, 5, padding=2)
        weight_init.c2_msra_fill(self.pre)
        self.post = NonLocal(channels)

    def forward(self, pool: Pool, box_lists: Sequence[Boxes]) -> Tensor:
        """See :class:`ROIExtractor`."""
        summed = sum((F.relu(self.pre(pool(i))) for i in range(1, len(self.levels))), start=F.relu(self.pre(pool(0))))
        return self.post(summed)


class NonLocal(nn.Module):
    """Non-local block with embedded Gaussian (Wang et al., CVPR 2018, equations 1, 4 and 6, figure 2).

    z = x + W y, where y of a cell is the mean of g over all cells of the same RoI, weighted by
    softmax(theta(cell) . phi(other)). The embeddings have half the channels. W starts at zero, so that the block
    starts as the identity.
    """

    def __init__(self, channels: int):
        """Build the four 1x1 convolutions for ``channels`` in and out."""
        super().__init__()
        inner = max(channels // 2, 1)
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        for conv in (self.theta, self.phi, self.g):
            weight_init.c2_xavier_fill(conv)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(M, C, h, w) -> (M, C, h, w)."""
        theta = self.theta(x).flatten(2)  # (M, C / 2, h w)
        phi = self.phi(x).flatten(2)
        g = self.g(x).flatten(2)
        weights = torch.bmm(theta.transpose(1, 2), phi).softmax(dim=2)  # (M, h w cells, h w others)
        y = torch.bmm(g, weights.transpose(1, 2)).reshape(x.shape[0], g.shape[1], x.shape[2], x.shape[3])
        return x + self.out(y)


class Soft(ROIExtractor):
    """Two neighbouring levels, weighted by the fractional part of k = k0 + log2(sqrt(area) / s0).

    The canonical rule without its floor: a RoI with k = 3.25 is 0.75 of level 3 and 0.25 of level 4, so that the result
    no longer jumps where a RoI passes 112, 224 or 448 pixels. Where k is a whole number of a level, or beyond the
    finest or coarsest, the result is that of ``canonical``. In a gap between levels the two round it share the weight.
    A RoI is pooled only from levels of which it has a part.
    """

    def __init__(
        self,
        levels: Sequence[int],
        channels: int,
        *,
        canonical_box_size: float = 224,
        canonical_level: int = 4,
    ):
        """Keep the rule's numbers.

        Args:
            levels, channels: see :class:`ROIExtractor`.
            canonical_box_size: s0, side in pixels of a box that belongs on ``canonical_level`` alone.
            canonical_level: k0.

        Raises:
            UserError: the size is not positive; see also :class:`ROIExtractor`.
        """
        super().__init__(levels, channels)
        if not canonical_box_size > 0:
            raise UserError(
                f"canonical_box_size (MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE) is {canonical_box_size}; expected "
                "a size in pixels greater than 0"
            )
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[int], channels: int) -> dict:
        """Read what the canonical rule reads."""
        return {"channels": channels} | CanonicalLevelAssigner.from_config(cfg, levels, channels)

    def weights(self, areas: Tensor) -> Tensor:
        """Part of each level in each RoI.

        Args:
            areas: (M,) in square pixels of the network's input, not negative.

        Returns:
            (M, L), at least float32; rows sum to 1, with one or two entries that are not 0.
        """
        k = fractional_levels(areas, self.canonical_box_size, self.canonical_level)
        k = k.clamp(self.levels[0], self.levels[-1])
        columns = []
        for i, level in enumerate(self.levels):
            column = torch.ones_like(k)
            if i > 0:  # rises from the next finer level on
                finer = self.levels[i - 1]
                column = torch.minimum(column, (k - finer) / (level - finer))
            if i < len(self.levels) - 1:  # falls towards the next coarser one
                coarser = self.levels[i + 1]
                column = torch.minimum(column, (coarser - k) / (coarser - level))
            columns.append(column.clamp(min=0))
        return torch.stack(columns, dim=1)

    def forward(self, pool: Pool, box_lists: Sequence[Boxes]) -> Tensor:
        """See :class:`ROIExtractor`."""
        with torch.no_grad():
            weights = self.weights(torch.cat([box_areas(boxes) for boxes in box_lists]))
        combined = None
        for level_index in range(len(self.levels)):
            rows = torch.nonzero(weights[:, level_index] > 0, as_tuple=True)[0]
            pooled = pool(level_index, rows)
            part = pooled * weights[rows, level_index].to(pooled.dtype)[:, None, None, None]
            if combined is None:
                combined = part.new_zeros((weights.shape[0], *part.shape[1:]))
            combined.index_put_((rows,), part, accumulate=True)  # index_add would keep `part` for the backward pass
        return combined
