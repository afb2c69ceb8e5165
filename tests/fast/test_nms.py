"""Compiled non-maximum suppression against torchvision's, box by box."""

import math

import pytest
import torch
from torchvision.ops import batched_nms as of_torchvision

from fpn_d2.fast import nms


@pytest.fixture(autouse=True)
def _needs_library():
    if nms.library() is None:
        pytest.skip("no C++ compiler on this machine: compiled non-maximum suppression is NOT tested")


def random_boxes(count, seed, *, on_grid=False, equal_scores=False, groups=5):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 400
    side = torch.rand(count, 2, generator=generator) ** 2 * 300
    boxes = torch.cat([corner, corner + side], dim=1)
    scores = torch.rand(count, generator=generator)
    if on_grid:  # overlaps that are equal to the threshold, boxes without area, the same box twice
        boxes = (boxes / 40).round() * 40
    if equal_scores:
        scores = (scores * 8).round() / 8
    return boxes, scores, torch.randint(0, groups, (count,), generator=generator)


def by_definition(boxes, scores, groups, threshold):
    """Take the best that is left, drop what overlaps it."""
    left = scores.sort(descending=True, stable=True).indices.tolist()
    kept = []
    while left:
        first, *left = left
        kept.append(first)
        left = [i for i in left if groups[i] != groups[first] or not overlap(boxes[i], boxes[first]) > threshold]
    return torch.tensor(kept, dtype=torch.int64)


def overlap(a, b):
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    return float(inner / union) if union else math.nan


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100, 999, 1000, 1001, 2500])
@pytest.mark.parametrize("on_grid", [False, True])
@pytest.mark.parametrize("equal_scores", [False, True])
def test_same_as_torchvision(count, on_grid, equal_scores):
    for seed, threshold in enumerate((0.7, 0.5, 0.0, 1 / 3, 1.0)):
        arguments = random_boxes(count, seed, on_grid=on_grid, equal_scores=equal_scores)
        expected = of_torchvision(*arguments, threshold)
        assert torch.equal(nms.batched_nms(*arguments, threshold), expected)
        for most in (0, 1, 40, count + 1):
            assert torch.equal(nms.batched_nms(*arguments, threshold, most), expected[:most])


def test_same_as_the_definition():
    boxes, scores, groups = random_boxes(60, 0)
    assert torch.equal(nms.batched_nms(boxes, scores, groups, 0.4), by_definition(boxes, scores, groups, 0.4))


@pytest.mark.parametrize("threshold", [0.7, 0.6, 0.55, 0.3])
def test_overlap_of_just_the_threshold(threshold):
    """It is kept: above the threshold is what goes. The nearest floats of these lie above or below them."""
    other = torch.tensor([0.0, 0.0, 100.0, 100 * threshold])
    boxes = torch.stack([torch.tensor([0.0, 0.0, 100.0, 100.0]), other])
    arguments = boxes, torch.tensor([1.0, 0.5]), torch.zeros(2, dtype=torch.int64)
    for change in (-1e-5, 0.0, 1e-5):
        boxes[1, 3] = 100 * threshold + change
        assert torch.equal(nms.batched_nms(*arguments, threshold), of_torchvision(*arguments, threshold))


def test_numbers_that_are_none():
    for count in (50, 1200):
        boxes, scores, groups = random_boxes(count, 3)
        boxes[7, 2], boxes[9, 0], boxes[11, 1] = math.nan, math.nan, math.inf
        if count > 1000:  # below, a NaN in the offsets makes all boxes NaN, in torchvision too
            assert torch.equal(nms.batched_nms(boxes, scores, groups, 0.3), of_torchvision(boxes, scores, groups, 0.3))
        assert len(nms.batched_nms(boxes, scores, groups, 0.3)) == len(of_torchvision(boxes, scores, groups, 0.3))


def test_nothing_and_other_types():
    empty = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert nms.batched_nms(*empty, 0.5).shape == (0,)
    boxes, scores, groups = random_boxes(300, 1)
    wide = boxes.double(), scores.double(), groups
    assert torch.equal(nms.batched_nms(*wide, 0.5), of_torchvision(*wide, 0.5))
    strided = boxes.T.contiguous().T, scores, groups.to(torch.int64)
    assert torch.equal(nms.batched_nms(*strided, 0.5), of_torchvision(boxes, scores, groups, 0.5))


def test_without_a_library(monkeypatch):
    arguments = (*random_boxes(1200, 2), 0.5)
    expected = nms.batched_nms(*arguments, most=30)
    monkeypatch.setattr(nms, "library", lambda: None)
    assert torch.equal(nms.batched_nms(*arguments, most=30), expected)


def test_as_many_groups_as_boxes():
    """Boxes meet those of their own group only; were all compared with all, this would take minutes."""
    count = 200_000
    boxes, scores, _ = random_boxes(count, 4)
    kept = nms.batched_nms(boxes, scores, torch.arange(count), 0.5)
    assert torch.equal(kept, scores.sort(descending=True).indices)
