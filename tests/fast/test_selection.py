"""Selections with one wait, on a CPU and on the pretended device of host_waits.py, against the direct ways."""

import math

import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances

from fpn_d2.fast.selection import FiniteBoxes, clip_boxes, find, nms_by_class
from tests.batches import random_boxes

from .host_waits import DEVICE, DeviceTensor, back, counting

SIDES = pytest.mark.parametrize("put", [lambda x: x, DeviceTensor], ids=["cpu", "device"])


@SIDES
def test_find_is_nonzero(put):
    masks = [torch.rand(5, 7) > 0.5, torch.zeros(4, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)]
    masks.append(torch.zeros(0, 3, dtype=torch.bool))
    with counting() as host:
        found, numbers = find([put(mask) for mask in masks], [put(torch.tensor(7)), put(torch.tensor(-2))])
    assert numbers == [7, -2] and len(found) == len(masks)
    for rows, mask in zip(back(found), masks, strict=True):
        assert rows.dtype == torch.int64
        assert torch.equal(rows, mask.flatten().nonzero()[:, 0])
    assert host.waits.total() <= 1 and host.uploads.total() == 0


@SIDES
def test_nms_is_batched_nms(put):
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(300, 60, 80, generator)
    scores, classes = torch.rand(300, generator=generator), torch.randint(4, (300,), generator=generator)
    expected = batched_nms(boxes, scores, classes, 0.5)
    with counting() as host:
        keep = nms_by_class(put(boxes), put(scores), put(classes), 0.5)
        few = nms_by_class(put(boxes), put(scores), put(classes), 0.5, most=7)
        none = nms_by_class(put(boxes[:0]), put(scores[:0]), put(classes[:0]), 0.5)
    assert torch.equal(back(keep), expected) and 20 < len(expected) < 280
    assert torch.equal(back(few), expected[:7])
    assert none.shape == (0,) and none.dtype == torch.int64
    assert host.uploads.total() == 0 and host.waits.total() <= 2


def test_clip_is_that_of_boxes():
    boxes = torch.randn(50, 4) * 100
    expected, ours = Boxes(boxes.clone()), FiniteBoxes(boxes.clone())
    expected.clip((60, 40))
    ours.clip((60, 40))
    assert torch.equal(ours.tensor, expected.tensor) and torch.equal(clip_boxes(boxes, (60, 40)), expected.tensor)
    batch = clip_boxes(boxes.view(2, 25, 4), (60, 40))
    assert torch.equal(batch.view(-1, 4), expected.tensor)
    assert clip_boxes(torch.full((1, 4), math.nan), (60, 40)).isnan().all()


def test_finite_boxes_wait_for_nothing_and_become_boxes():
    with counting() as host:
        boxes = FiniteBoxes(torch.randn(5, 4) * 100).to(DEVICE)
        boxes = FiniteBoxes(boxes.tensor)
        boxes.clip((60, 40))
    assert host.waits.total() == 0
    instances = Instances((60, 40), pred_boxes=FiniteBoxes(torch.rand(5, 4)))
    assert type(instances[torch.tensor([True, False, True, True, False])].pred_boxes) is Boxes
