"""Average recall of proposals, as table 1 of the FPN paper has it."""

import math
from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from .size_ap import range_names

_THRESHOLDS = torch.arange(0.5, 0.96, 0.05)


def average_recall(
    proposals: Sequence[Tensor], truth: Sequence[Tensor], limits: Sequence[int], edges: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Average recall over IoU 0.5 to 0.95 in steps of 0.05 (Hosang et al., PAMI 2016; COCO's AR).

    Each object is matched with one proposal at most: the pair with the highest IoU first, among those left.

    Args:
        proposals: for each image (N, 4) boxes x1, y1, x2, y2 in pixels of the image, the best first.
        truth: for each image the objects' boxes (M, 4) likewise.
        limits: numbers of proposals per image that count.
        edges: sizes in pixels that part the ranges, as in :func:`ap_by_size`; the size of a box is the square root of
            its area.

    Returns:
        {"AR@100": {"all": ..., "<16": ..., ...}, ...} in percent; nan for a range without objects.
    """
    names = ["all", *range_names(edges)]
    bounds = [0.0, *map(float, edges), math.inf]
    ranges = [(0.0, math.inf), *zip(bounds, bounds[1:], strict=False)]
    found: dict[str, dict[str, float]] = {}
    for limit in limits:
        overlaps: dict[str, list[Tensor]] = {name: [] for name in names}
        for boxes, objects in zip(proposals, truth, strict=True):
            sizes = Boxes(objects).area().sqrt()
            for name, (low, high) in zip(names, ranges, strict=True):
                wanted = objects[(sizes >= low) & (sizes < high)]
                overlaps[name].append(_best_overlaps(boxes[:limit], wanted))
        found[f"AR@{limit}"] = {name: _recall(torch.cat(values)) for name, values in overlaps.items()}
    return found


def _best_overlaps(boxes: Tensor, objects: Tensor) -> Tensor:
    """The IoU of each object (M, 4) with the proposal that is its own; 0 where none is left for it."""
    iou = pairwise_iou(Boxes(objects), Boxes(boxes))
    best = torch.zeros(len(objects))
    for _ in range(min(iou.shape)):
        index = int(iou.argmax())
        row, column = divmod(index, iou.shape[1])
        best[row] = iou[row, column]
        iou[row], iou[:, column] = -1.0, -1.0
    return best


def _recall(overlaps: Tensor) -> float:
    if not len(overlaps):
        return math.nan
    return 100 * float((overlaps[:, None] >= _THRESHOLDS).float().mean())
