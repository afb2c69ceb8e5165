"""How well anchors cover the boxes of a data set, and anchors that cover them better."""

from dataclasses import dataclass
from itertools import product

import numpy as np

_RATIOS_MOST, _RATIO_LEAST = 4.0, 0.25
_STEP = 2.0**0.25  # between the anchor sizes that are tried


@dataclass(frozen=True)
class Anchors:
    """Of each level, the finest first: stride, sizes (square roots of areas) and ratios (height / width)."""

    strides: tuple[int, ...]
    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...]

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """(A, 2) widths and heights of all anchors, and the level (place) of each."""
        shapes, levels = [], []
        for level, sizes in enumerate(self.sizes):
            for size, ratio in product(sizes, self.ratios):
                shapes.append((size / ratio**0.5, size * ratio**0.5))
                levels.append(level)
        return np.array(shapes), np.array(levels)


def best_ious(boxes: np.ndarray, anchors: Anchors, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The IoU of each box with the anchor that covers it best, and that anchor's level (place).

    Each shape is compared where it lies nearest: at the centre of the nearest cell of its level.

    Args:
        boxes: (N, 4) x1, y1, x2, y2 in pixels of the network's input.
        anchors: the anchors.
        offset: ``MODEL.ANCHOR_GENERATOR.OFFSET``: of the first anchor's centre, as a share of the stride.
    """
    shapes, levels = anchors.shapes()
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    best, where = np.zeros(len(boxes)), np.zeros(len(boxes), int)
    for shape, level in zip(shapes, levels, strict=True):
        stride = anchors.strides[level]
        nearest = (np.round(centre / stride - offset).clip(0) + offset) * stride
        low = np.maximum(boxes[:, :2], nearest - shape / 2)
        high = np.minimum(boxes[:, 2:], nearest + shape / 2)
        common = (high - low).clip(0).prod(1)
        iou = common / np.maximum(side.prod(1) + shape.prod() - common, 1e-12)
        better = iou > best
        best[better], where[better] = iou[better], level
    return best, where


def coverage(boxes: np.ndarray, anchors: Anchors, offset: float = 0.0) -> tuple[float, float]:
    """Shares of the boxes that some anchor overlaps by IoU 0.5 and by 0.7."""
    best, _ = best_ious(boxes, anchors, offset)
    return (float((best >= 0.5).mean()), float((best >= 0.7).mean())) if len(best) else (1.0, 1.0)


def propose(boxes: np.ndarray, anchors: Anchors) -> Anchors:
    """Anchors for these boxes: as many sizes for each level and as many ratios as there are; no random numbers.

    The ratios are those there are or quantiles of the boxes' own. The sizes grow by one factor from level to level, as
    strides do; the smallest of the finest level is one of a fine row of sizes. Of all these, the ones that cover the
    most boxes, by IoU 0.5 and 0.7 together.
    """
    side = boxes[:, 2:] - boxes[:, :2]
    kept = (side > 0).all(1)
    boxes, side = boxes[kept], side[kept]
    if not len(boxes):
        return anchors
    count = len(anchors.ratios)
    shares = (np.arange(count) + 0.5) / count
    found = np.quantile(np.log(side[:, 1] / side[:, 0]), shares)
    own = tuple(float(round(r, 2)) for r in np.exp(found).clip(_RATIO_LEAST, _RATIOS_MOST))
    per_level = max(len(sizes) for sizes in anchors.sizes)
    low, high = np.quantile(np.sqrt(side.prod(1)), [0.005, 0.5])
    best, result = -1.0, anchors
    first = low / 2
    while first <= max(high, low):
        sizes = tuple(
            tuple(float(round(first * 2.0 ** (level + i / per_level))) for i in range(per_level))
            for level in range(len(anchors.strides))
        )
        for ratios in (anchors.ratios, own):
            one = Anchors(anchors.strides, sizes, ratios)
            covered = sum(coverage(boxes, one))
            if covered > best:
                best, result = covered, one
        first *= _STEP
    return result
