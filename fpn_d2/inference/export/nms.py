"""Suppression by group, as a mask: what is kept has a fixed shape, whatever is kept.

Shape legend: B sets of boxes, C groups of each set (classes, or one), M boxes of a set.
    boxes   (B, M, 4), (x0, y0, x1, y1) in pixels
    scores  (B, C, M), of each box in each group; 0 or less: the box is not in the group
    kept    (B, C, M) bool
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import nms

Nms = Callable[[Tensor, Tensor, float], Tensor]


def nms_mask(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression within each group, in operations of PyTorch and torchvision alone.

    Groups are moved apart and all are suppressed at once, in float64: there the move costs no precision. Two boxes far
    from all others are always kept: torchvision tells the tracer that suppression keeps at least two, and what is
    compiled refuses images of which it keeps fewer.

    Args:
        boxes, scores: see the head of this file.
        iou_threshold: a box that overlaps a better one of its group by more than this is dropped.

    Returns:
        kept, see there.
    """
    flat = scores.flatten()
    entries = torch.nonzero(flat > 0)[:, 0]
    groups, members = entries // scores.shape[2], entries % scores.shape[2]
    own = boxes.double()[groups // scores.shape[1], members]
    apart = (boxes.max() - boxes.min() + 1).double()
    spare = boxes.min().double() - boxes.new_tensor([[2, 2, 1, 1], [4, 4, 3, 3]], dtype=torch.float64)
    own = torch.cat([own + (groups * apart)[:, None], spare])
    kept = nms(own, torch.cat([flat[entries], flat.new_ones(2)]).double(), iou_threshold)
    entries = torch.cat([entries, entries.new_full((2,), flat.shape[0])])  # behind the others, and cut off
    mask = flat.new_zeros(flat.shape[0] + 1, dtype=torch.bool)
    return mask.scatter(0, entries[kept], torch.ones_like(kept, dtype=torch.bool))[:-1].view_as(scores)


@torch.library.custom_op("fpn_d2::nms_mask", mutates_args=())
def nms_mask_as_one(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms_mask` as one operation of a graph, for which another format has its own."""
    return nms_mask(boxes, scores, iou_threshold)


@nms_mask_as_one.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
