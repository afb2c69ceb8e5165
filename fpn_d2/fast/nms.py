"""Non-maximum suppression: torchvision's result, sooner on a CPU."""

import torch
from torch import Tensor
from torchvision.ops import boxes as torchvision_boxes

from fpn_d2.native.op import Op, problem

# Up to this many coordinates, torchvision moves the groups apart instead of looking at one after the other.
_MOVED_APART = 4000


def _trial() -> str:
    boxes = torch.arange(400.0).view(-1, 4).mul(37).remainder(60)
    boxes[:, 2:] += boxes[:, :2]
    expected = torchvision_boxes.nms(boxes, torch.arange(100.0, 0, -1), 0.3)
    return "" if torch.equal(_best(boxes, None, 0.3, 100), expected) else "other boxes than torchvision's are kept"


OP = Op(
    "nms",
    "nms_cpu.cpp",
    flags=("-O2", "-ffp-contract=off"),
    does="Non-maximum suppression",
    otherwise="in torchvision",
    problem=problem("count most", "boxes groups kept", doubles="threshold"),
    functions=("nms_float32",),
    trial=_trial,
)
library = OP.library


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, most: int | None = None) -> Tensor:
    """Return which boxes are kept: ``torchvision.ops.batched_nms``, to the bit.

    Args:
        boxes: (M, 4) x0, y0, x1, y1.
        scores: (M,).
        groups: (M,) int64; a box suppresses others of its own group only: its class or its level.
        threshold: overlap (intersection over union) above which the box of the lower score goes.
        most: return the best so many of them; None: all.

    Returns:
        (K,) int64, best first.
    """
    usable = boxes.device.type == "cpu" and boxes.dtype == torch.float32 and len(boxes) > 0
    if not usable or torch.jit.is_tracing() or library() is None:
        return torchvision_boxes.batched_nms(boxes, scores, groups, threshold)[:most]
    order = scores.sort(stable=True, descending=True).indices
    if boxes.numel() <= _MOVED_APART:  # the same rounding as there
        moved = boxes + (groups.to(boxes) * (boxes.max() + torch.tensor(1).to(boxes)))[:, None]
        return order[_best(moved[order], None, threshold, len(boxes) if most is None else most)]
    order = order[groups[order].sort(stable=True).indices]
    kept = order[_best(boxes[order], groups[order], threshold, len(boxes))].sort().values
    # The same order of equal scores as there.
    return kept[scores[kept].sort(descending=True).indices][:most]


def _best(boxes: Tensor, groups: Tensor | None, threshold: float, most: int) -> Tensor:
    """Indices of the boxes (M, 4) that are kept; those of a group lie behind each other, best first."""
    boxes, groups = boxes.contiguous(), None if groups is None else groups.contiguous()
    kept = torch.empty(len(boxes), dtype=torch.int64)
    tensors = {"boxes": boxes, "groups": groups, "kept": kept}
    return kept[: OP.run("nms_float32", count=len(boxes), most=most, threshold=threshold, **tensors)]
