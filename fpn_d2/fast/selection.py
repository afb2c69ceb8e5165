"""Selections whose size depends on values, made so that the host seldom waits for a GPU.

On a GPU every result whose size depends on values, as that of ``nonzero`` or of a boolean mask as an index, makes the
host wait until all that is queued has run. :func:`find` waits once for any number of masks, because the sizes of all
travel together. On a CPU nothing is waited for, and the direct ways are the fastest: there they are used.
"""

from collections.abc import Sequence

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import nms

from .nms import batched_nms as nms_on_cpu

# Up to this many coordinates recent torchvision separates classes by offsets on a GPU, as is done here.
_MOST_COORDINATES = 100_000


def find(masks: Sequence[Tensor], numbers: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[int]]:
    """Return where masks are True, and some numbers; on a GPU the host waits once for all of it.

    Args:
        masks: boolean tensors of any shapes, on one device.
        numbers: integer tensors of one element, on the same device.

    Returns:
        For each mask the (n,) int64 positions in it, flattened, ascending. The numbers.

    Example:
        >>> find([torch.tensor([False, True, True])], [torch.tensor(7)])
        ([tensor([1, 2])], [7])
    """
    if all(mask.device.type == "cpu" for mask in masks):
        return [mask.flatten().nonzero()[:, 0] for mask in masks], [int(number) for number in numbers]
    known = torch.stack([*(mask.sum() for mask in masks), *numbers]).tolist()
    # A stable sort keeps the order of positions, and its size is known.
    orders = [mask.flatten().to(torch.uint8).sort(descending=True, stable=True).indices for mask in masks]
    found = [order[:count] for order, count in zip(orders, known, strict=False)]
    return found, known[len(masks) :]


def nms_by_class(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, most: int | None = None) -> Tensor:
    """Detectron2's ``batched_nms``, without its copy of a constant to the GPU, for which the host would wait as well.

    On a CPU it is the compiled one of this package, with the same result.

    Args:
        boxes: (R, 4) x0, y0, x1, y1 in pixels, not negative.
        scores: (R,).
        classes: (R,) int64; boxes of different classes do not suppress each other.
        threshold: overlap above which the box with the lower score is dropped.
        most: return the best so many; None: all.

    Returns:
        (K,) int64 rows that are kept, by descending score.
    """
    boxes = boxes.float()
    if boxes.device.type == "cpu":
        return nms_on_cpu(boxes, scores, classes, threshold, most)
    if not 0 < boxes.numel() <= _MOST_COORDINATES:
        return batched_nms(boxes, scores, classes, threshold)[:most]
    offsets = classes.to(boxes) * (boxes.max() + 1)
    return nms(boxes + offsets[:, None], scores, threshold)[:most]


def clip_boxes(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Return (..., 4) boxes with x limited to [0, width] and y to [0, height]; a NaN stays one."""
    height, width = image_size
    x0, y0, x1, y1 = boxes.unbind(-1)
    sides = (x0.clamp(0, width), y0.clamp(0, height), x1.clamp(0, width), y1.clamp(0, height))
    return torch.stack(sides, dim=-1)


class FiniteBoxes(Boxes):
    """``Boxes`` that are known to be finite: ``clip`` does not look, and so wait, whether they are.

    What is picked out of them, by an index or a mask, is plain ``Boxes`` again.
    """

    def clip(self, box_size: tuple[int, int]) -> None:
        """Limit x to [0, width] and y to [0, height], in place.

        Args:
            box_size: (height, width).
        """
        self.tensor = clip_boxes(self.tensor, box_size)
