"""Pools each RoI from its pyramid level.

Shape legend: N images, L levels, M RoIs of all images together, C channels, (h, w) pooled cells.
    maps       L tensors (N, C, H_l, W_l), from high to low resolution
    box_lists  N Boxes, (x0, y0, x1, y1) in pixels of the network's input
    pooled     (M, C, h, w), RoIs in the order of the images
"""

import math
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor, nn

from .level_assign import LEVEL_ASSIGN_REGISTRY, CanonicalLevelAssigner, check_finite


class PyramidROIPooler(ROIPooler):
    """Detectron2's ``ROIPooler`` with an assigner of its own choice, any subset of levels and any output size.

    With the default assigner the result equals Detectron2's, bit for bit, wherever Detectron2's is defined.
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
            ValueError: an output size is not positive, a stride is not a power of 2, or they do not ascend.
        """
        size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f"output_size is {output_size!r}; expected a positive int or (height, width)")
        levels = [-math.log2(scale) for scale in scales]
        if not levels or any(level % 1 for level in levels) or levels != sorted(set(levels)):
            strides = [1 / scale for scale in scales]
            raise ValueError(f"the maps to pool from have strides {strides}; expected ascending powers of 2")
        # Detectron2's constructor takes levels without gaps only; its poolers are the same for each level alone.
        super().__init__(size, scales[:1], sampling_ratio, pooler_type)
        for scale in scales[1:]:
            self.level_poolers.extend(ROIPooler(size, [scale], sampling_ratio, pooler_type).level_poolers)
        self.levels = tuple(int(level) for level in levels)
        self.max_level = self.levels[-1]
        self.assigner = assigner(self.levels)

    def forward(self, x: Sequence[Tensor], box_lists: Sequence[Boxes]) -> Tensor:
        """Pool every RoI from its level.

        Args:
            x: the maps of each level, (N, C, H_l, W_l), from high to low resolution.
            box_lists: the boxes of each of the N images, in pixels of the network's input. Images without boxes and
                a batch without images are fine.

        Returns:
            (M, C, h, w) in the order of the boxes.

        Raises:
            ValueError: the number of maps or of images does not fit, or a box has a NaN or infinite coordinate.
        """
        if len(x) != len(self.levels):
            raise ValueError(f"got {len(x)} maps to pool from; this pooler was built for levels {self.levels}")
        if len(box_lists) != x[0].shape[0]:
            raise ValueError(f"got boxes of {len(box_lists)} images and maps of {x[0].shape[0]} images")
        if len(box_lists) == 0:
            return x[0].new_zeros((0, x[0].shape[1], *self.output_size))
        check_finite(box_lists)
        level_indices = self.assigner(box_lists)
        rois = convert_boxes_to_pooler_format(list(box_lists))
        if len(self.levels) == 1:
            return _pool(self.level_poolers[0], x[0], rois)
        pooled = x[0].new_zeros((rois.shape[0], x[0].shape[1], *self.output_size))
        for level_index, pooler in enumerate(self.level_poolers):
            rows = torch.nonzero(level_indices == level_index, as_tuple=True)[0]
            # index_put_ traces and differentiates; indexed assignment does not trace (pytorch issue 49852).
            pooled.index_put_((rows,), _pool(pooler, x[level_index], rois[rows]))
        return pooled


def _pool(pooler: nn.Module, level_map: Tensor, rois: Tensor) -> Tensor:
    """Pool maps of half precision in float32.

    Detectron2's operations bring the coordinates to the maps' type. In bfloat16 those between 256 and 512 then move by
    up to a pixel, and boxes are learned from features beside them.
    """
    if level_map.dtype in (torch.float16, torch.bfloat16):
        return pooler(level_map.float(), rois.float()).to(level_map.dtype)
    return pooler(level_map, rois)


def build_pooler(cfg: CfgNode, input_shape: dict[str, ShapeSpec], *, output_size, sampling_ratio, pooler_type):
    """Build a pooler over ``cfg.MODEL.ROI_HEADS.IN_FEATURES`` with the rule in ``cfg.MODEL.ROI_LEVEL_ASSIGN``.

    Args:
        cfg: the configuration.
        input_shape: channels and strides of the backbone's maps.
        output_size: as in :class:`PyramidROIPooler`, of the head that is served; so are the other two.
        sampling_ratio: see there.
        pooler_type: see there.

    Raises:
        ValueError: no such rule, or the backbone does not give the maps asked for.
    """
    assign = cfg.MODEL.ROI_LEVEL_ASSIGN
    if assign.NAME not in LEVEL_ASSIGN_REGISTRY:
        known = ", ".join(sorted(name for name, _ in LEVEL_ASSIGN_REGISTRY))
        raise ValueError(f"MODEL.ROI_LEVEL_ASSIGN.NAME is {assign.NAME!r}; known rules: {known}")
    rule = LEVEL_ASSIGN_REGISTRY.get(assign.NAME)
    return PyramidROIPooler(
        output_size=output_size,
        scales=[1.0 / input_shape[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES],
        sampling_ratio=sampling_ratio,
        pooler_type=pooler_type,
        assigner=lambda levels: rule(
            levels, canonical_box_size=assign.CANONICAL_BOX_SIZE, canonical_level=assign.CANONICAL_LEVEL
        ),
    )
