"""Against ``DatasetMapper``'s own way: the same bits, box by box."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_d2.data.box_annotations import instances_of_boxes

HEIGHT, WIDTH = 30, 40
TRANSFORMS = {
    "nothing": [],
    "larger": [T.ResizeTransform(HEIGHT, WIDTH, 67, 91)],
    "larger and mirrored": [T.ResizeTransform(HEIGHT, WIDTH, 67, 91), T.HFlipTransform(91)],
    "smaller and upside down": [T.ResizeTransform(HEIGHT, WIDTH, 17, 23), T.VFlipTransform(17)],
    "part": [T.CropTransform(7, 5, 20, 11), T.ResizeTransform(11, 20, 33, 60), T.NoOpTransform()],
    "turned": [T.RotationTransform(HEIGHT, WIDTH, 17)],
    "extent": [T.ExtentTransform((3.5, 2.5, 33.5, 20.5), (50, 60))],
    "colours": [T.BlendTransform(0, 0.3, 0.8), T.HFlipTransform(WIDTH)],
}
XYXY, XYWH = BoxMode.XYXY_ABS, BoxMode.XYWH_ABS


def size_after(transforms):
    return transforms.apply_image(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).shape[:2]


def annotations_of(boxes, mode):
    return [{"bbox": box, "bbox_mode": mode, "category_id": i % 3, "iscrowd": 0} for i, box in enumerate(boxes)]


def check(annotations, transforms):
    size = size_after(transforms)
    before = copy.deepcopy(annotations)
    ours = instances_of_boxes(annotations, transforms, size)
    assert annotations == before
    record = {"annotations": copy.deepcopy(annotations)}
    DatasetMapper(is_train=True, augmentations=[], image_format="BGR")._transform_annotations(record, transforms, size)
    theirs = record["instances"]
    assert ours is not None
    assert ours.image_size == theirs.image_size and ours.get_fields().keys() == theirs.get_fields().keys()
    for name in ("gt_boxes", "gt_classes"):
        mine, other = ours.get(name), theirs.get(name)
        mine, other = (x.tensor if name == "gt_boxes" else x for x in (mine, other))
        assert mine.dtype == other.dtype and mine.shape == other.shape and torch.equal(mine, other)
    return ours


corner = st.one_of(st.floats(-9, 50), st.sampled_from([0.1, 0.3, 3.0, 33.3, 39.99, 40.0]))


@settings(max_examples=150, deadline=None)
@given(
    boxes=st.lists(st.tuples(corner, corner, st.floats(0, 40), st.floats(0, 40)), max_size=6),
    mode=st.sampled_from([XYXY, XYWH]),
    transforms=st.sampled_from(list(TRANSFORMS)),
)
def test_boxes_of_fractions(boxes, mode, transforms):
    if mode == XYXY:
        boxes = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    check(annotations_of(boxes, mode), T.TransformList(TRANSFORMS[transforms]))


@settings(max_examples=80, deadline=None)
@given(
    boxes=st.lists(st.tuples(*[st.integers(0, 20)] * 4), max_size=6),
    mode=st.sampled_from([XYXY, XYWH]),
    transforms=st.sampled_from(list(TRANSFORMS)),
)
def test_boxes_of_whole_numbers_which_detectron2_truncates(boxes, mode, transforms):
    if mode == XYXY:
        boxes = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    check(annotations_of(boxes, mode), T.TransformList(TRANSFORMS[transforms]))


def test_crowds_and_empty_boxes_are_left_out():
    annotations = annotations_of([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 9.0], [50.0, 1.0, 9.0, 9.0]], XYWH)
    annotations += [dict(annotations[0], iscrowd=1, category_id=9), {"bbox": [0.0] * 4, "iscrowd": 1}]
    del annotations[0]["iscrowd"]
    found = check([a for a in annotations if "bbox_mode" in a], T.TransformList([]))
    assert found.gt_classes.tolist() == [0] and found.gt_boxes.tensor.tolist() == [[1, 2, 4, 6]]
    assert instances_of_boxes(annotations, T.TransformList([]), (HEIGHT, WIDTH)).gt_classes.tolist() == [0]


def test_a_side_of_a_hundred_thousandth_is_empty():
    boxes = [[1.0, 1.0, 1.0 + side, 2.0] for side in (0.0, 9e-6, 9.5367431640625e-06, 1.1e-5, 2e-5)]
    boxes.append([30.0, 1.0, 30.0 + 1.04e-5, 2.0])  # 9.5e-6 in float32
    assert len(check(annotations_of(boxes, XYXY), T.TransformList([]))) == 2
    assert len(check(annotations_of([[y, x, Y, X] for x, y, X, Y in boxes], XYXY), T.TransformList([]))) == 2


@pytest.mark.parametrize("annotations", [[], [{"bbox": [0.0, 0.0, 9.0, 9.0], "bbox_mode": XYXY, "iscrowd": 1}]])
def test_without_objects(annotations):
    found = check(annotations, T.TransformList(TRANSFORMS["larger"]))
    assert len(found) == 0 and found.gt_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize(
    "annotations",
    [
        annotations_of([[1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4]], XYXY),
        annotations_of([[1, 2, 3, 4.0]], XYXY),
        annotations_of([[1.0, 2.0, 3.0, 4.0]], XYXY) + annotations_of([[1.0, 2.0, 3.0, 4.0]], XYWH),
        annotations_of([np.array([1.0, 2.0, 3.0, 4.0])], XYXY),
        annotations_of([[np.float64(1.0), 2.0, 3.0, 4.0]], XYXY),
        annotations_of([[9.0, 9.0, 4.0, 3.0, 30.0]], BoxMode.XYWHA_ABS),
        annotations_of([[0.1, 0.1, 0.4, 0.3]], BoxMode.XYXY_REL),
    ],
)
def test_boxes_that_are_not_alike_or_rare_take_detectron2s_way(annotations):
    assert instances_of_boxes(annotations, T.TransformList([]), (HEIGHT, WIDTH)) is None


def test_another_default_type_takes_detectron2s_way():
    torch.set_default_dtype(torch.float64)
    try:
        assert instances_of_boxes(annotations_of([[0.1, 0.2, 0.7, 0.4]], XYWH), T.TransformList([]), (9, 9)) is None
    finally:
        torch.set_default_dtype(torch.float32)
