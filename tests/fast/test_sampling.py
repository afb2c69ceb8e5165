"""Matching and sampling of a whole batch against Detectron2's, image by image: the same labels, draws and log."""

import math

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from fpn_d2.fast.sampling import match, sample
from tests.batches import random_boxes, seed_everything
from tests.modeling.test_roi_heads import build

from .host_waits import DEVICE, DeviceTensor, back, counting

SIDES = pytest.mark.parametrize("put", [lambda x: x, DeviceTensor], ids=["cpu", "device"])
MATCHERS = {
    "RPN": Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
    "heads": Matcher([0.5], [0, 1]),
    "ignored": Matcher([0.2, 0.4, 0.6], [0, -1, 0, 1]),
    "low": Matcher([0.9], [-1, 1], allow_low_quality_matches=True),
}


def overlaps(kind):
    generator = torch.Generator().manual_seed(1)
    objects, others = (Boxes(random_boxes(n, 50, 60, generator)) for n in (6, 200))
    if kind == "objects among the candidates":
        others = Boxes.cat([objects, others, objects])  # ties, and thresholds of 1
    quality = pairwise_iou(objects, others)
    if kind == "an object that nothing overlaps":
        quality[2] = 0
    if kind == "exact thresholds":
        quality = quality.mul(10).round().div(10)
    return {"no objects": quality[:0], "no candidates": quality[:, :0]}.get(kind, quality)


KINDS = ["random", "objects among the candidates", "an object that nothing overlaps", "exact thresholds"]


@SIDES
@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize("kind", [*KINDS, "no objects", "no candidates"])
def test_match_is_detectron2s(kind, name, put):
    quality = overlaps(kind)
    expected = MATCHERS[name](quality)
    with counting() as host:
        actual = match(put(quality), MATCHERS[name])
    for a, b in zip(back(actual), expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert host.waits.total() == host.uploads.total() == 0


@SIDES
@pytest.mark.parametrize("background", [0, 5])
@pytest.mark.parametrize("size,fraction", [(20, 0.5), (1000, 0.25), (7, 0.0), (1, 1.0), (0, 0.5)])
def test_sample_draws_what_detectron2_draws(size, fraction, background, put):
    generator = torch.Generator().manual_seed(2)
    labels = [torch.randint(-1, 6, (n,), generator=generator) for n in (60, 200, 0)]
    labels += [torch.full((9,), background), torch.full((9,), -1), torch.full((9,), 3)]
    seed_everything()
    expected = [subsample_labels(image, size, fraction, background) for image in labels]
    after = torch.rand(1)
    seed_everything()
    with counting() as host:
        images = [put(image) for image in labels]
        drawn = sample(images, background=background, size=size, positive_fraction=fraction)
    assert torch.equal(torch.rand(1), after)  # no number more, no number less
    for actual, wanted in zip(back(drawn), expected, strict=True):
        assert torch.equal(actual[0], wanted[0]) and torch.equal(actual[1], wanted[1])
    assert host.waits.total() <= 1 and host.uploads.total() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("corner", range(4))
def test_overlaps_are_never_nan(corner, value):
    """What Detectron2's matcher asserts; ours does not look."""
    generator = torch.Generator().manual_seed(1)
    objects, others = (Boxes(random_boxes(n, 50, 60, generator)) for n in (6, 200))
    objects.tensor[2, corner] = value
    quality = pairwise_iou(objects, others)
    for actual, expected in zip(match(quality, MATCHERS["RPN"]), MATCHERS["RPN"](quality), strict=True):
        assert torch.equal(actual, expected)


def images(put, empty=()):
    generator = torch.Generator().manual_seed(3)
    proposals, targets = [], []
    for image, (height, width) in enumerate([(60, 80), (50, 90), (70, 70)]):
        n = 0 if image in empty else 4
        objects = random_boxes(4, height, width, generator)[:n]
        near = (objects.repeat(12, 1) + torch.randn(12 * n, 4, generator=generator)).clamp(min=0)
        boxes = torch.cat([near, random_boxes(80, height, width, generator)])
        target = Instances((height, width))
        target.gt_boxes = Boxes(put(objects))
        target.gt_classes = put(torch.randint(5, (4,), generator=generator)[:n])
        target.gt_extra = put(torch.arange(4)[:n] * 10)
        target.name = ["not to be passed on"] * n
        targets.append(target)
        proposal = Instances((height, width), proposal_boxes=Boxes(put(boxes)))
        proposal.objectness_logits = put(torch.randn(len(boxes), generator=generator))
        proposals.append(proposal)
    return proposals, targets


OPTIONS = {
    "default": ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32],
    "no ground truth appended": ["MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False],
    "ignored": ["MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.3, 0.6], "MODEL.ROI_HEADS.IOU_LABELS", [0, -1, 1]],
    "few": ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 3, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.9],
}


@SIDES
@pytest.mark.parametrize("empty", [(), (1,), (0, 1, 2)], ids=["objects in all", "none in one", "none in any"])
@pytest.mark.parametrize("name", OPTIONS)
def test_proposals_are_sampled_as_detectron2_does(name, empty, put):
    heads = build("MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", False, *OPTIONS[name])
    seed_everything()
    with EventStorage() as stock_storage:
        expected = StandardROIHeads.label_and_sample_proposals(heads, *images(lambda x: x, empty))
    seed_everything()
    with EventStorage() as storage, counting() as host:
        actual = heads.label_and_sample_proposals(*images(put, empty))
    assert storage.latest() == stock_storage.latest()
    for a, b in zip(actual, expected, strict=True):
        assert a.image_size == b.image_size and list(a.get_fields()) == list(b.get_fields())
        for field, value in back(b).items():
            assert torch.equal(back(a)[field], value), field
        assert len(a) > 0
    assert host.waits.total() <= 1 and host.uploads.total() == 0
    if not empty and name == "default":
        assert all((image.gt_classes == 5).any() or (image.gt_classes < 5).any() for image in expected)
        assert {"gt_extra", "gt_boxes"} <= set(expected[0].get_fields())


def test_no_proposals_and_no_objects():
    heads = build("MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", False)
    proposals, targets = images(lambda x: x, empty=(0, 1, 2))
    with EventStorage() as storage:
        sampled = heads.label_and_sample_proposals([image[:0] for image in proposals], targets)
    assert [len(image) for image in sampled] == [0, 0, 0]
    assert storage.latest()["roi_head/num_bg_samples"][0] == 0


def test_on_the_device_what_is_returned_stays_there():
    heads = build("MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", False)
    with EventStorage(), counting():
        sampled = heads.label_and_sample_proposals(*images(DeviceTensor))
        assert all(field.device == DEVICE for field in sampled[0].get_fields().values())
