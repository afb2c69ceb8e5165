# ruff: noqa: B905
"""Masks and keypoints out of the maps that a detector gives of each box; needs numpy alone."""

import numpy as np


def pasted(masks, boxes, width, height):
    """(R, 28, 28) probabilities in the cells of (R, 4) boxes -> (R, height, width) bool: 0.5 or more at the pixel."""
    found = np.zeros((len(masks), height, width), bool)
    for own, mask, (x0, y0, x1, y1) in zip(found, masks, boxes):
        left, top = int(max(x0 - 1, 0)), int(max(y0 - 1, 0))
        right, bottom = int(min(x1 + 2, width)), int(min(y1 + 2, height))
        rows = weights((np.arange(top, bottom) + 0.5 - y0) / (y1 - y0), len(mask), linear)
        columns = weights((np.arange(left, right) + 0.5 - x0) / (x1 - x0), len(mask), linear)
        own[top:bottom, left:right] = rows @ mask @ columns.T >= 0.5
    return found


def keypoints_of(maps, boxes):
    """(R, K, 56, 56) logits in the cells of (R, 4) boxes -> (R, K, 3): x, y of the highest, and its score.

    The highest is looked for in steps of a pixel; the score is its share of the cells' probability.
    """
    found = np.zeros((*maps.shape[:2], 3), np.float32)
    for own, logits, (x0, y0, x1, y1) in zip(found, maps, boxes):
        width, height = max(x1 - x0, 1), max(y1 - y0, 1)
        w, h = int(np.ceil(width)), int(np.ceil(height))
        rows = weights((np.arange(h) + 0.5) / h, logits.shape[1], cubic)
        columns = weights((np.arange(w) + 0.5) / w, logits.shape[2], cubic)
        fine = rows @ logits @ columns.T
        place = fine.reshape(len(fine), -1).argmax(1)
        own[:, 0] = x0 + (place % w + 0.5) * width / w
        own[:, 1] = y0 + (place // w + 0.5) * height / h
        own[:, 2] = 1 / np.exp(logits - fine.max((1, 2), keepdims=True)).sum((1, 2))
    return found


def weights(places, cells, kernel):
    """(P,) places, from 0 to 1 along the box -> (P, cells): the weight of each cell's value at each place."""
    return kernel(np.abs(places[:, None] * cells - np.arange(-2, cells + 2) - 0.5)).astype(np.float32)


def linear(away):
    """Outside the box is nothing."""
    return np.maximum(0, 1 - away)[:, 2:-2]


def cubic(away):
    """Outside the box the cells at its border go on."""
    near, far = (1.25 * away - 2.25) * away**2 + 1, ((-0.75 * away + 3.75) * away - 6) * away + 3
    found = np.where(away <= 1, near, np.where(away < 2, far, 0))
    found[:, 2] += found[:, :2].sum(1)
    found[:, -3] += found[:, -2:].sum(1)
    return found[:, 2:-2]
