"""RoI -> pyramid level.

Naming: ``level`` is the absolute k, whose map has stride 2^k; ``level_index`` is the position of that level among the
levels that are pooled, 0 for the finest.
"""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from torch import Tensor

from fpn_d2.errors import UserError

# Detectron2 adds it inside the logarithm, which keeps a box without area from giving minus infinity.
EPSILON = 1e-8


def fractional_levels(areas: Tensor, canonical_box_size: float = 224, canonical_level: int = 4) -> Tensor:
    """k0 + log2(sqrt(area) / s0), neither rounded nor limited to the levels that exist.

    Args:
        areas: (M,) box areas in square pixels of the network's input, not negative. Half precision is computed in
            float32, because areas above 65504 do not fit into float16.
        canonical_box_size: s0, in pixels.
        canonical_level: k0.

    Returns:
        (M,) at least float32.
    """
    if areas.dtype in (torch.float16, torch.bfloat16):
        areas = areas.float()
    return canonical_level + torch.log2(torch.sqrt(areas) / canonical_box_size + EPSILON)


def canonical_levels(
    areas: Tensor, levels: Sequence[int], canonical_box_size: float = 224, canonical_level: int = 4
) -> Tensor:
    """Equation 1 of Lin et al., CVPR 2017: k = floor(k0 + log2(sqrt(area) / s0)), then the nearest pooled level.

    A k below the finest level becomes the finest and one above the coarsest the coarsest. Where ``levels`` has gaps,
    a k in a gap becomes the next finer level, which keeps the detail that the rule asks for.

    Args:
        areas: (M,) box areas in square pixels of the network's input, not negative, of any float type.
        levels: the levels that exist, ascending.
        canonical_box_size: s0, in pixels.
        canonical_level: k0.

    Returns:
        (M,) int64 level indices, positions in ``levels``.

    Example:
        >>> canonical_levels(torch.tensor([112.0**2, 224.0**2, 448.0**2]), levels=[2, 3, 4, 5])
        tensor([1, 2, 3])
    """
    k = torch.floor(fractional_levels(areas, canonical_box_size, canonical_level))
    k = torch.clamp(k, min=levels[0], max=levels[-1]).to(torch.int64)
    if levels[-1] - levels[0] + 1 == len(levels):
        return k - levels[0]
    return torch.searchsorted(torch.tensor(levels, device=k.device), k, right=True) - 1


def check_finite(box_lists: Sequence[Boxes]) -> None:
    """Raise for boxes that have no level.

    Raises:
        UserError: a coordinate is NaN or infinite; names the first such box by image and row.
    """
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        return
    # All at once first: on a GPU each look at the values waits for it.
    if not box_lists or torch.isfinite(torch.cat([boxes.tensor for boxes in box_lists])).all():
        return
    for image, boxes in enumerate(box_lists):
        finite = torch.isfinite(boxes.tensor).all(dim=1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise UserError(
                f"cannot assign a pyramid level to {int((~finite).sum())} of {len(boxes)} boxes of image {image} in "
                f"the batch: row {row} is {boxes.tensor[row].tolist()}, expected finite coordinates. If this comes up "
                "in training, the loss has usually diverged: lower SOLVER.BASE_LR, warm up longer or clip gradients"
            )


class CanonicalLevelAssigner:
    """The paper's rule; see :func:`canonical_levels`. Equal to Detectron2's own for every finite box.

    Equivalents elsewhere: torchvision's ``canonical_scale`` and ``canonical_level``; mmdetection's ``finest_scale`` is
    ``canonical_box_size`` brought to its finest level (224 at level 4 is 56 at level 2).
    """

    def __init__(self, levels: Sequence[int], canonical_box_size: float = 224, canonical_level: int = 4):
        """Check and keep the rule's numbers.

        Args:
            levels: the levels that are pooled, ascending, e.g. (2, 3, 4, 5).
            canonical_box_size: side in pixels of a box that belongs on ``canonical_level``.
            canonical_level: its level.

        Raises:
            UserError: no levels, levels not ascending, or a size that is not positive.
        """
        if not levels or list(levels) != sorted(set(levels)):
            raise UserError(f"levels are {list(levels)}; expected at least one, ascending, each once")
        if not canonical_box_size > 0:
            raise UserError(
                f"canonical_box_size (MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE) is {canonical_box_size}; expected "
                "a size in pixels greater than 0"
            )
        self.levels = tuple(levels)
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[int], channels: int) -> dict:
        """Read ``cfg.MODEL.ROI_LEVEL_ASSIGN``."""
        assign = cfg.MODEL.ROI_LEVEL_ASSIGN
        return {
            "levels": levels,
            "canonical_box_size": assign.CANONICAL_BOX_SIZE,
            "canonical_level": assign.CANONICAL_LEVEL,
        }

    def __call__(self, box_lists: Sequence[Boxes]) -> Tensor:
        """Assign the boxes of a batch.

        Args:
            box_lists: the boxes of each of N images, in pixels of the network's input.

        Returns:
            (M,) int64 level indices of all boxes, in the order of the images. A NaN has none: the pooler refuses it.
        """
        areas = [box_areas(boxes) for boxes in box_lists]
        if not areas:
            return torch.zeros(0, dtype=torch.int64)
        return canonical_levels(torch.cat(areas), self.levels, self.canonical_box_size, self.canonical_level)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(levels={self.levels}, canonical_box_size={self.canonical_box_size}, "
            f"canonical_level={self.canonical_level})"
        )


class FinestLevelAssigner:
    """Every RoI on the finest pooled level: one map has to serve objects of all sizes."""

    def __init__(self, levels: Sequence[int]):
        """Keep the levels that are pooled, ascending."""
        self.levels = tuple(levels)

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[int], channels: int) -> dict:
        """Read nothing."""
        return {"levels": levels}

    def __call__(self, box_lists: Sequence[Boxes]) -> Tensor:
        """Return (M,) zeros, int64: the level index of all boxes."""
        if len(box_lists) == 0:
            return torch.zeros(0, dtype=torch.int64)
        # Made from the boxes, so that a trace follows their number.
        return torch.zeros_like(torch.cat([boxes.tensor[:, 0] for boxes in box_lists]), dtype=torch.int64)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(levels={self.levels})"


def box_areas(boxes: Boxes) -> Tensor:
    """(M,) areas in at least float32; 0 for a box that is turned inside out, which then goes to the finest level."""
    if boxes.tensor.dtype in (torch.float16, torch.bfloat16):
        boxes = type(boxes)(boxes.tensor.float())
    return boxes.area().clamp(min=0)
