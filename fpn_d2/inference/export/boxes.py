"""Anchors, selection and decoding in tensors of fixed shape: what is missing is padding, told by its score.

Shape legend: N images, k boxes of each; a score of minus infinity is padding.
"""

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor, nn

from fpn_d2.modeling.anchors import TorchvisionAnchorGenerator

from .kinds import expect

NOTHING = float("-inf")


class Anchors(nn.Module):
    """Anchors by their number, worked out when asked for: no format needs to hold those of every size of image."""

    def __init__(self, generator: nn.Module):
        """Take over the numbers of ``generator``.

        Raises:
            UserError: it lays anchors out in a way of its own.
        """
        super().__init__()
        expect("the anchor generator", generator, "DefaultAnchorGenerator", "TorchvisionAnchorGenerator")
        self.strides, self.offset = list(generator.strides), generator.offset
        self.of_padded_side = isinstance(generator, TorchvisionAnchorGenerator)
        for level, cells in enumerate(generator.cell_anchors):
            self.register_buffer(f"cells{level}", cells.detach().clone())

    def forward(self, level: int, numbers: Tensor, maps: list[Tensor]) -> Tensor:
        """Return (N, k, 4) anchors of a level.

        Args:
            level: position of the level in ``maps``.
            numbers: (N, k) int64, counted row by row, the anchors of a cell together.
            maps: of each level, (N, C, H_l, W_l).
        """
        cells = getattr(self, f"cells{level}")
        stride = self.strides[level]
        rows, columns = maps[level].shape[-2:]
        step_y = step_x = stride
        if self.of_padded_side:
            step_y, step_x = (
                finest * self.strides[0] // own for finest, own in zip(maps[0].shape[-2:], (rows, columns), strict=True)
            )
        cell = torch.div(numbers, cells.shape[0], rounding_mode="floor")
        row = torch.div(cell, columns, rounding_mode="floor")
        y, x = row * step_y, (cell - row * columns) * step_x
        shifts = torch.stack([x, y, x, y], dim=-1).to(cells.dtype) + self.offset * stride
        return shifts + cells[numbers - cell * cells.shape[0]]


def highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest of each row of (N, A), highest first, and their numbers; padded where A is less than k."""
    values, numbers = F.pad(scores, (0, k), value=NOTHING).topk(k, dim=1)
    return values, numbers.clamp(max=scores.shape[1] - 1)


def rows_of(values: Tensor, numbers: Tensor) -> Tensor:
    """Rows ``numbers`` (N, k) of ``values`` (N, A, d), of each image by itself: (N, k, d)."""
    return values.gather(1, numbers[..., None].expand(-1, -1, values.shape[2]))


def by_anchor(level_map: Tensor, size: int) -> Tensor:
    """(N, A * size, H, W) -> (N, H * W * A, size), which is the order of the anchors."""
    n, channels, height, width = level_map.shape
    split = level_map.view(n, channels // size, size, height, width)
    return split.permute(0, 3, 4, 1, 2).reshape(n, height * width * (channels // size), size)


def decode(transform: Box2BoxTransform, deltas: Tensor, boxes: Tensor) -> Tensor:
    """(N, k, d * 4) deltas for (N, k, 4) boxes -> (N, k, d * 4) boxes in pixels."""
    return transform.apply_deltas(deltas.flatten(0, 1), boxes.flatten(0, 1)).view(deltas.shape)


def clip(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Bring (N, k, 4) boxes inside images of ``image_sizes`` (N, 2): height, width."""
    limits = torch.stack([image_sizes[:, 1], image_sizes[:, 0]] * 2, dim=1).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits[:, None])


def larger_than(boxes: Tensor, side: float) -> Tensor:
    """Whether both sides are longer than ``side`` pixels: (..., 4) -> (...)."""
    return ((boxes[..., 2] - boxes[..., 0]) > side) & ((boxes[..., 3] - boxes[..., 1]) > side)
