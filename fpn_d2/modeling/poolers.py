"""Pools each RoI from its pyramid level, or from several.

Shape legend: N images, L levels, M RoIs of all images together, C channels, (h, w) pooled cells.
    maps       L tensors (N, C, H_l, W_l), from high to low resolution
    box_lists  N Boxes, (x0, y0, x1, y1) in pixels of the network's input
    pooled     (M, C, h, w), RoIs in the order of the images
"""

import math
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign, ROIAlignRotated, ShapeSpec
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import RoIPool

from fpn_d2.errors import UserError, did_you_mean
from fpn_d2.fast.guard import of_class

from .extractors import ROIExtractor
from .level_assign import CanonicalLevelAssigner, check_finite
from .roi_rules import build_rule, combines_levels

# Detectron2's operations for the map of one level, by POOLER_TYPE: size of the output, scale of the map, samples.
_OPERATIONS = {
    "ROIAlignV2": lambda size, scale, samples: ROIAlign(size, scale, samples, aligned=True),
    "ROIAlign": lambda size, scale, samples: ROIAlign(size, scale, samples, aligned=False),
    "ROIPool": lambda size, scale, samples: RoIPool(size, scale),
    "ROIAlignRotated": lambda size, scale, samples: ROIAlignRotated(size, scale, samples),
}


class PyramidROIPooler(ROIPooler):
    """Detectron2's ``ROIPooler`` with an assigner of its own choice, any subset of levels and any output size.

    With the default assigner the result equals Detectron2's, to the bit, wherever Detectron2's is defined.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        assigner: Callable[[Sequence[int]], Callable[[list[Boxes]], Tensor]] = CanonicalLevelAssigner,
    ):
        """Build one RoI pooling operation per level.

        Args:
            output_size: (height, width) in cells of a pooled RoI, or one number for both.
            scales: 1 / stride of each level, descending; gaps between levels are allowed.
            sampling_ratio: samples per cell and axis of RoIAlign; 0: as many as the RoI has map cells.
            pooler_type: "ROIAlignV2", "ROIAlign", "ROIPool" or "ROIAlignRotated", as in Detectron2.
            assigner: called with the absolute levels, returns what maps the boxes of a batch to level indices.

        Raises:
            UserError: an output size is not positive, a stride is not a power of 2, or they do not ascend.
        """
        size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise UserError(f"output_size is {output_size!r}; expected a positive int or (height, width)")
        levels = [-math.log2(scale) for scale in scales]
        if not levels or any(level % 1 for level in levels) or levels != sorted(set(levels)):
            strides = [1 / scale for scale in scales]
            raise UserError(f"the maps to pool from have strides {strides}; expected ascending powers of 2")
        if pooler_type not in _OPERATIONS:
            raise UserError(
                f"POOLER_TYPE is {pooler_type!r}{did_you_mean(str(pooler_type), _OPERATIONS)}; expected one of "
                f"{', '.join(_OPERATIONS)}"
            )
        nn.Module.__init__(self)  # Detectron2's constructor takes levels without gaps only
        self.level_poolers = nn.ModuleList(_OPERATIONS[pooler_type](size, scale, sampling_ratio) for scale in scales)
        self.output_size = size
        self.levels = tuple(int(level) for level in levels)
        self.min_level, self.max_level = self.levels[0], self.levels[-1]
        self.assigner = assigner(self.levels)

    def forward(self, x: Sequence[Tensor], box_lists: Sequence[Boxes]) -> Tensor:
        """Pool every RoI from its level.

        Args:
            x: the maps of each level, (N, C, H_l, W_l), from high to low resolution.
            box_lists: the boxes of each of the N images, in pixels of the network's input. Images without boxes and
                a batch without images are fine.

        Returns:
            (M, out_channels, h, w) in the order of the boxes; out_channels is C, or what the extractor makes of it.

        Raises:
            ValueError: the number of maps or of images does not fit, or a box has a NaN or infinite coordinate.
        """
        if len(x) != len(self.levels):
            raise ValueError(f"got {len(x)} maps to pool from; this pooler was built for levels {self.levels}")
        if len(box_lists) != x[0].shape[0]:
            raise ValueError(f"got boxes of {len(box_lists)} images and maps of {x[0].shape[0]} images")
        if len(box_lists) == 0:
            return x[0].new_zeros((0, self._out_channels(x[0].shape[1]), *self.output_size))
        check_finite(box_lists)
        return self._extract(x, box_lists, convert_boxes_to_pooler_format(list(box_lists)))

    def _out_channels(self, channels: int) -> int:
        return channels

    def _extract(self, x: Sequence[Tensor], box_lists: Sequence[Boxes], rois: Tensor) -> Tensor:
        """Pool ``rois``, the boxes with the index of their image in front."""
        return self.pool_levels(x, rois, self.assigner(box_lists), self.level_poolers)

    def pool_levels(
        self, maps: Sequence[Tensor], rois: Tensor, level_indices: Tensor, poolers: Sequence[nn.Module]
    ) -> Tensor:
        """Pool each RoI from the map of its level, by Detectron2's operation for that level.

        Args:
            maps: L tensors (N, C, H_l, W_l).
            rois: (M, 5) image index, x0, y0, x1, y1.
            level_indices: (M,) int64, which of ``maps`` each RoI is pooled from.
            poolers: the operation of each map.

        Returns:
            (M, C, h, w).
        """
        if len(maps) == 1:
            return pool_level(poolers[0], maps[0], rois)
        pooled = maps[0].new_zeros((rois.shape[0], maps[0].shape[1], *self.output_size))
        for level_index, (level_map, pooler) in enumerate(zip(maps, poolers, strict=True)):
            rows = torch.nonzero(level_indices == level_index, as_tuple=True)[0]
            # index_put_ traces and differentiates; indexed assignment does not trace (pytorch issue 49852).
            pooled.index_put_((rows,), pool_level(pooler, level_map, rois[rows]))
        return pooled


    def __prepare_scriptable__(self) -> ROIPooler:
        """What ``torch.jit.script`` compiles: Detectron2's ``ROIPooler``, which pools the same.

        Raises:
            UserError: the rule is not Detectron2's, or there are gaps between the levels.
        """
        rule = self.assigner
        without_gaps = self.levels == tuple(range(self.min_level, self.max_level + 1))
        if type(rule) is not CanonicalLevelAssigner or not without_gaps:
            raise UserError(
                f"torch.jit.script cannot compile a {type(self).__name__} with {rule} over levels {self.levels}: only "
                "MODEL.ROI_LEVEL_ASSIGN.NAME canonical over levels without gaps. Trace or export the model instead"
            )
        stock = of_class(self, ROIPooler, "levels", "assigner")
        stock.canonical_box_size, stock.canonical_level = rule.canonical_box_size, rule.canonical_level
        return stock


class CombiningROIPooler(PyramidROIPooler):
    """Pools each RoI from several levels, which an extractor combines; the extractor's parameters are its own."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        extractor: Callable[[Sequence[int]], ROIExtractor],
    ):
        """Build one RoI pooling operation per level, and the extractor.

        Args:
            output_size, scales, sampling_ratio, pooler_type: see :class:`PyramidROIPooler`.
            extractor: called with the absolute levels, returns an extractor.

        Raises:
            UserError: see :class:`PyramidROIPooler`.
        """
        super().__init__(output_size, scales, sampling_ratio, pooler_type, assigner=lambda levels: None)
        self.extractor = extractor(self.levels)

    def _out_channels(self, channels: int) -> int:
        return self.extractor.out_channels

    def _extract(self, x: Sequence[Tensor], box_lists: Sequence[Boxes], rois: Tensor) -> Tensor:
        def pool(level_index: int, rows: Tensor | None = None) -> Tensor:
            some = rois if rows is None else rois[rows]
            first = torch.zeros_like(some[:, 0], dtype=torch.int64)
            return self.pool_levels([x[level_index]], some, first, [self.level_poolers[level_index]])

        return self.extractor(pool, box_lists)


def pool_level(pooler: nn.Module, level_map: Tensor, rois: Tensor) -> Tensor:
    """Pool ``rois`` from the map of one level by Detectron2's operation.

    Maps of half precision are pooled in float32. Detectron2's operations bring the coordinates to the maps' type; in
    bfloat16 those between 256 and 512 then move by up to a pixel, and boxes are learned from features beside them.

    Args:
        pooler: Detectron2's operation for this level.
        level_map: (N, C, H_l, W_l).
        rois: (M, 5): index of the image, then the box in pixels of the network's input.

    Returns:
        (M, C, h, w), of the map's type.
    """
    if level_map.dtype in (torch.float16, torch.bfloat16):
        return pooler(level_map.float(), rois.float()).to(level_map.dtype)
    return pooler(level_map, rois)


def build_pooler(
    cfg: CfgNode, input_shape: dict[str, ShapeSpec], *, output_size, sampling_ratio, pooler_type
) -> PyramidROIPooler:
    """Build a pooler over ``cfg.MODEL.ROI_HEADS.IN_FEATURES`` with the rule in ``cfg.MODEL.ROI_LEVEL_ASSIGN``.

    Args:
        cfg: the configuration.
        input_shape: channels and strides of the backbone's maps.
        output_size: as in :class:`PyramidROIPooler`, of the head that is served; so are the other two.
        sampling_ratio: see there.
        pooler_type: see there.

    Raises:
        UserError: no such rule, or the backbone does not give the maps asked for.
    """
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    pooler, rule = (CombiningROIPooler, "extractor") if combines_levels(cfg) else (PyramidROIPooler, "assigner")
    return pooler(
        output_size,
        scales=[1.0 / input_shape[name].stride for name in names],
        sampling_ratio=sampling_ratio,
        pooler_type=pooler_type,
        **{rule: lambda levels: build_rule(cfg, levels, input_shape[names[0]].channels)},
    )
