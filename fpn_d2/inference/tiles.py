"""Large images in overlapping tiles, and the detections of the tiles put together.

A border cuts objects, and each of its two tiles then reports what it sees. Non-maximum suppression by IoU alone keeps
both: half an object overlaps the whole one by half. Here two detections are compared *within what both tiles see*,
where they are alike if they are one object, and the one that no border cut is kept. An object that every tile cuts,
because it is larger than the overlap, comes out as the union of its parts.

All boxes are x1, y1, x2, y2 in pixels of the whole image.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fpn_d2.errors import UserError

# A box that ends nearer to a border than this share of its side, or this many pixels, counts as cut by it: the edges of
# objects that are seen in part are predicted no better than that.
_CUT_SHARE, _CUT_PIXELS = 0.1, 2.0
_ROWS = 512  # of the comparison of all with all, at a time


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
        size: height and width of a tile, in pixels of the image.
        overlap: share of a tile that its neighbours see too, at least.
        whole: whether the image is looked at as a whole too, for objects larger than the overlap.
    """

    size: int
    overlap: float = 0.2
    whole: bool = True

    def __post_init__(self):
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 16:
            raise UserError(f"the size of a tile is {self.size!r}; expected a whole number of pixels, 16 or more")
        if not 0.0 <= self.overlap < 0.9:
            raise UserError(f"the overlap of tiles is {self.overlap:g}; expected a share from 0 to less than 0.9")

    @property
    def seen_whole(self) -> float:
        """Side in pixels up to which every object lies whole in one of the tiles."""
        return self.size * self.overlap

    def frames(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """The tiles of an image, row by row, each x1, y1, x2, y2; the image itself if it is no larger than a tile.

        They are spread evenly and all of one size, so that they make batches; along a side of the image that is
        shorter than a tile, they are as long as it.
        """
        rows, columns = self._starts(height), self._starts(width)
        return [(x, y, min(x + self.size, width), min(y + self.size, height)) for y in rows for x in columns]

    def _starts(self, length: int) -> list[int]:
        if length <= self.size:
            return [0]
        step = max(1.0, self.size * (1.0 - self.overlap))
        count = math.ceil((length - self.size) / step) + 1
        return np.linspace(0, length - self.size, count).round().astype(int).tolist()


def cut_by_border(boxes: Tensor, frames: Tensor, height: int, width: int) -> Tensor:
    """Which boxes end at a border of their tile that is no border of the image.

    Args:
        boxes: (N, 4).
        frames: (N, 4), the tile of each box.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        (N,) bool.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    near = (boxes - frames).abs() <= (_CUT_SHARE * sides).clamp(min=_CUT_PIXELS)
    return (near & (frames != frames.new_tensor([0, 0, width, height]))).any(1)


def merge(
    boxes: Tensor, scores: Tensor, classes: Tensor, tiles: Tensor, frames: Tensor, size: tuple[int, int], iou: float
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Put the detections of the tiles of one image together.

    Two detections from different tiles are of one object if they overlap by ``iou`` within what both tiles see, and if
    each that should be cut, because the other one reaches beyond its tile, is. Of those, the ones that no border cuts
    are kept by descending score, as in non-maximum suppression, and drop the others of their class, and cut ones of
    another class with a lower score. Cut ones that are left are parts: those of one object give their union, with the
    best score among them.

    Args:
        boxes: (N, 4).
        scores: (N,).
        classes: (N,), int64.
        tiles: (N,), int64: the row in ``frames`` that a detection comes from.
        frames: (T, 4), the tiles.
        size: height and width of the image.
        iou: from which on two detections are of one object, above 0.

    Returns:
        (M, 4) boxes, (M,) scores, and for each the rows of ``boxes`` that it is made of, the best first; by descending
        score.
    """
    if not len(boxes):
        return boxes, scores, []
    own = frames[tiles]
    cut = cut_by_border(boxes, own, *size)
    alike = _alike(boxes, tiles, own, cut, iou)
    best_first = torch.argsort(scores, descending=True, stable=True).tolist()
    is_cut, score, kind = cut.tolist(), scores.tolist(), classes.tolist()
    gone: set[int] = set()
    groups: list[list[int]] = []
    for i in best_first:
        if is_cut[i] or i in gone:
            continue
        groups.append([i])
        gone.update(j for j in alike[i] if kind[j] == kind[i] or (is_cut[j] and score[j] <= score[i]))
    taken: set[int] = set()
    for i in best_first:
        if not is_cut[i] or i in gone or i in taken:
            continue
        group, ahead = [], [i]
        taken.add(i)
        while ahead:
            part = ahead.pop(0)
            group.append(part)
            more = [j for j in alike[part] if is_cut[j] and kind[j] == kind[i] and j not in gone and j not in taken]
            taken.update(more)
            ahead += more
        groups.append(sorted(group, key=lambda j: -score[j]))
    groups.sort(key=lambda group: -score[group[0]])
    merged = torch.stack([torch.cat([boxes[g, :2].amin(0), boxes[g, 2:].amax(0)]) for g in groups])
    return merged, scores[[g[0] for g in groups]], groups


def _alike(boxes: Tensor, tiles: Tensor, own: Tensor, cut: Tensor, iou: float) -> list[list[int]]:
    """For each detection those of other tiles that are of the same object."""
    found: list[list[int]] = [[] for _ in range(len(boxes))]
    tolerance = (_CUT_SHARE * (boxes[:, 2:] - boxes[:, :2])).clamp(min=_CUT_PIXELS)
    for start in range(0, len(boxes), _ROWS):
        rows = slice(start, start + _ROWS)
        low = torch.maximum(own[rows, None, :2], own[None, :, :2])
        high = torch.minimum(own[rows, None, 2:], own[None, :, 2:])
        first_low, first_high = torch.maximum(boxes[rows, None, :2], low), torch.minimum(boxes[rows, None, 2:], high)
        other_low, other_high = torch.maximum(boxes[None, :, :2], low), torch.minimum(boxes[None, :, 2:], high)
        common = (torch.minimum(first_high, other_high) - torch.maximum(first_low, other_low)).clamp(min=0).prod(2)
        area = (first_high - first_low).clamp(min=0).prod(2) + (other_high - other_low).clamp(min=0).prod(2)
        match = (common > 0) & (common >= iou * (area - common)) & (tiles[rows, None] != tiles[None])
        match &= cut[None] | ~_reaches_beyond(boxes[rows, None], own[None], tolerance[rows, None])
        match &= cut[rows, None] | ~_reaches_beyond(boxes[None], own[rows, None], tolerance[None])
        for row, column in match.nonzero().tolist():
            found[start + row].append(column)
    return found


def _reaches_beyond(boxes: Tensor, frames: Tensor, tolerance: Tensor) -> Tensor:
    """Whether boxes end outside of tiles, by more than the edges of a box are uncertain."""
    beyond = torch.maximum(frames[..., :2] - boxes[..., :2], boxes[..., 2:] - frames[..., 2:])
    return (beyond > tolerance).any(-1)
