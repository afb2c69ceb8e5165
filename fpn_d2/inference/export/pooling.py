"""RoIs of fixed number pooled from their levels, in operations that every export format has."""

import struct
from collections.abc import Callable, Sequence

import torch
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torchvision.ops import roi_align

from fpn_d2.modeling.level_assign import FinestLevelAssigner, canonical_levels
from fpn_d2.modeling.poolers import PyramidROIPooler

from .kinds import expect


class LevelPooling(nn.Module):
    """What a ``ROIPooler`` computes, with the level found by comparing areas with constants.

    A logarithm is rounded by each engine in its own way, and a box of exactly 112 or 224 pixels then changes its level
    from engine to engine; a comparison is the same everywhere.
    """

    def __init__(self, pooler: ROIPooler):
        """Take over the numbers of ``pooler``; it has no parameters.

        Raises:
            UserError: it pools in a way that cannot be exported.
        """
        super().__init__()
        rule = "of one level per box: MODEL.ROI_LEVEL_ASSIGN.NAME canonical or finest"
        expect("the RoI pooler", pooler, "ROIPooler", "PyramidROIPooler", why=rule)
        for level in pooler.level_poolers:
            expect("the RoI pooling", level, "ROIAlign", why="POOLER_TYPE ROIAlignV2 or ROIAlign")
        first = pooler.level_poolers[0]
        self.output_size = tuple(pooler.output_size)
        self.scales = [level.spatial_scale for level in pooler.level_poolers]
        self.sampling_ratio, self.aligned = first.sampling_ratio, first.aligned
        self.first_areas = _first_areas(pooler)

    def forward(self, maps: Sequence[Tensor], boxes: Tensor, images: Tensor) -> Tensor:
        """Pool ``boxes``, those of a level together.

        Args:
            maps: the maps of each level, (N, C, H_l, W_l).
            boxes: (M, 4) in pixels of the network's input.
            images: (M,) int64, the image of each box.

        Returns:
            (M, C, h, w), in the order of ``boxes``.
        """
        rois = torch.cat([images[:, None].to(boxes.dtype), boxes], dim=1)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        level = torch.zeros_like(images)
        for area in self.first_areas:
            level = level + (areas >= area).to(torch.int64)
        pooled, order = [], []
        for level_index, level_map in enumerate(maps):
            rows = torch.nonzero(level == level_index)[:, 0]
            some = roi_align(
                level_map, rois[rows], self.output_size, self.scales[level_index], self.sampling_ratio, self.aligned
            )
            pooled.append(some)
            order.append(rows)
        rows = torch.cat(order)
        places = torch.zeros_like(images).scatter(0, rows, torch.arange(rows.shape[0], device=rows.device))
        return torch.cat(pooled)[places]


def _first_areas(pooler: ROIPooler) -> list[float]:
    """The smallest area, as a float32, of each level but the finest; infinite where no box reaches the level."""
    if isinstance(pooler, PyramidROIPooler):
        rule, levels = pooler.assigner, pooler.levels
        expect("the level rule", rule, "CanonicalLevelAssigner", "FinestLevelAssigner")
        if isinstance(rule, FinestLevelAssigner):
            return [float("inf")] * (len(levels) - 1)
    else:
        rule, levels = pooler, range(pooler.min_level, pooler.max_level + 1)

    def level_of(area: float) -> int:
        found = canonical_levels(torch.tensor([area]), levels, rule.canonical_box_size, rule.canonical_level)
        return int(found)

    return [_smallest(lambda area, k=k: level_of(area) >= k) for k in range(1, len(levels))]


def _smallest(holds: Callable[[float], bool]) -> float:
    """The smallest float32 of at least 0 for which ``holds``, which then holds for all larger ones."""
    # Floats of one sign are ordered as their bits are.
    low, high = -1, struct.unpack("<i", struct.pack("<f", float("inf")))[0]
    while high - low > 1:
        middle = (low + high) // 2
        value = struct.unpack("<f", struct.pack("<i", middle))[0]
        low, high = (low, middle) if holds(value) else (middle, high)
    return struct.unpack("<f", struct.pack("<i", high))[0]
