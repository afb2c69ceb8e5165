"""RoI poolers that pool from all levels in one operation."""

from collections.abc import Sequence

from detectron2.layers import ROIAlign
from detectron2.modeling import poolers as detectron2_poolers
from detectron2.structures import Boxes
from torch import Tensor, nn

from .guard import Fast, inherits, is_itself, is_watched, need_not_be_called
from .roi_align import pyramid_roi_align


class FastLevelPooler(Fast):
    """Any pooler of this package's, all rules and extractors included."""

    REPLACES = ("pool_levels",)

    def pool_levels(
        self, maps: Sequence[Tensor], rois: Tensor, level_indices: Tensor, poolers: Sequence[nn.Module]
    ) -> Tensor:
        """Pool each RoI from its level; see ``PyramidROIPooler.pool_levels``."""
        if not (is_itself(self) and can_pool(poolers)):
            return super().pool_levels(maps, rois, level_indices, poolers)
        return pool(maps, rois, level_indices, poolers)


class FastROIPooler(Fast):
    """Detectron2's own ``ROIPooler``."""

    REPLACES = ("forward",)

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pool every RoI from its level: L maps (N, C, H_l, W_l) and N lists of boxes -> (M, C, h, w)."""
        fits = is_itself(self) and len(x) == len(self.level_poolers) and len(box_lists) == len(x[0]) > 0
        if not (fits and can_pool(self.level_poolers) and all(type(boxes) is Boxes for boxes in box_lists)):
            return super().forward(x, box_lists)
        rois = detectron2_poolers.convert_boxes_to_pooler_format(box_lists)
        if len(x) == 1:
            level_indices = rois.new_zeros(len(rois)).long()
        else:
            level_indices = detectron2_poolers.assign_boxes_to_levels(
                box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
            )
        return pool(x, rois, level_indices, self.level_poolers)


def can_pool(poolers: Sequence[nn.Module]) -> bool:
    """Whether these are Detectron2's RoIAligns, alike but for their scales, and nobody watches them."""
    first = poolers[0]
    return not is_watched() and all(
        need_not_be_called(one, ROIAlign)
        and inherits(one, ROIAlign, "forward")
        and (one.output_size, one.sampling_ratio, one.aligned)
        == (first.output_size, first.sampling_ratio, first.aligned)
        for one in poolers
    )


def pool(maps: Sequence[Tensor], rois: Tensor, level_indices: Tensor, poolers: Sequence[ROIAlign]) -> Tensor:
    """:func:`pyramid_roi_align` with the settings of Detectron2's operations; (M, C, h, w)."""
    size = poolers[0].output_size
    return pyramid_roi_align(
        list(maps),
        rois,
        level_indices,
        [one.spatial_scale for one in poolers],
        (size, size) if isinstance(size, int) else tuple(size),
        poolers[0].sampling_ratio,
        poolers[0].aligned,
    )
