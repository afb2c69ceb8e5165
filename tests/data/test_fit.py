import numpy as np
import pytest
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator
from detectron2.structures import Boxes, pairwise_iou
from torch import rand, tensor, zeros
from torch.profiler import profile

from fpn_d2.data import fit
from fpn_d2.data.fit import crowded_images, most_objects, number_of_anchors, unmatched_boxes

from .small_sets import config


def extents(*boxes, image=(100, 50)):
    return np.array([[*box, *image] for box in boxes], np.float32)


def anchored(tmp_path, **keys):
    cfg = config(tmp_path)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (100,), 1000
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64]]
    cfg.merge_from_list([part for key, value in keys.items() for part in (key.replace("__", "."), value)])
    return cfg


@pytest.mark.parametrize(
    ("box", "matched"),
    [
        ((16, 16), True),  # 32 x 32 after resizing by 2
        ((4, 4), False),
        ((4, 45), False),  # 8 x 90: too narrow for 1 : 2
        ((11, 23), True),
        ((90, 45), False),
    ],
)
def test_a_box_is_matched_by_the_shape_of_an_anchor(tmp_path, box, matched):
    assert (unmatched_boxes(anchored(tmp_path), extents(box)) == "") == matched
    anchors = [(s / r**0.5, s * r**0.5) for s in (32, 64) for r in (0.5, 1, 2)]
    centred = tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in [*anchors, (2 * box[0], 2 * box[1])]])
    assert (pairwise_iou(Boxes(centred[-1:]), Boxes(centred[:-1])).max() >= 0.3) == matched


def test_the_sizes_of_training_decide(tmp_path):
    cfg = anchored(tmp_path)
    small = extents((4, 4))
    cfg.INPUT.MIN_SIZE_TRAIN = (100, 400)
    assert not unmatched_boxes(cfg, small)
    cfg.INPUT.MAX_SIZE_TRAIN = 200
    assert "1 of 1 boxes (100.0 %)" in unmatched_boxes(cfg, small)
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)  # as they are
    assert unmatched_boxes(cfg, small) and not unmatched_boxes(cfg, extents((32, 32)))


def test_models_without_such_anchors_say_nothing(tmp_path):
    tiny = extents((1, 1))
    assert unmatched_boxes(anchored(tmp_path), tiny)
    assert unmatched_boxes(anchored(tmp_path, MODEL__META_ARCHITECTURE="RetinaNet"), tiny)
    for key, value in (
        ("MODEL__META_ARCHITECTURE", "SemanticSegmentor"),
        ("MODEL__PROPOSAL_GENERATOR__NAME", "PrecomputedProposals"),
        ("MODEL__ANCHOR_GENERATOR__NAME", "RotatedAnchorGenerator"),
    ):
        assert not unmatched_boxes(anchored(tmp_path, **{key: value}), tiny)
    assert not unmatched_boxes(anchored(tmp_path), np.zeros((0, 4)))


def test_many_boxes_are_compared_in_parts(tmp_path, monkeypatch):
    boxes = extents(*[(16, 16), (4, 4)] * 10)
    expected = unmatched_boxes(anchored(tmp_path), boxes)
    monkeypatch.setattr("fpn_d2.data.fit._AT_ONCE", 3)
    assert unmatched_boxes(anchored(tmp_path), boxes) == expected and expected.startswith("10 of 20 boxes (50.0 %)")


def test_images_with_more_objects_than_detections(tmp_path):
    cfg = config(tmp_path)
    assert not crowded_images(cfg, [100, 3]) and not crowded_images(cfg, [])
    assert crowded_images(cfg, [101, 3, 250]).startswith("2 of 3 images have more than TEST.DETECTIONS_PER_IMAGE 100")
    cfg.TEST.DETECTIONS_PER_IMAGE = -1  # no limit
    assert not crowded_images(cfg, [101])


def test_the_number_of_anchors_is_that_of_detectron2s_generator(tmp_path):
    cfg = config(tmp_path)
    cfg.MODEL.RPN.IN_FEATURES, cfg.MODEL.ANCHOR_GENERATOR.SIZES = ["p2", "p3", "p6"], [[8], [16], [32]]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96, 128), 192
    shapes = [ShapeSpec(channels=1, stride=2**k) for k in (2, 3, 6)]
    maps = [zeros(1, 1, 128 // s.stride, 192 // s.stride) for s in shapes]
    assert number_of_anchors(cfg, "RPN") == sum(map(len, build_anchor_generator(cfg, shapes)(maps)))
    cfg.MODEL.RPN.IN_FEATURES = ["a"]
    assert number_of_anchors(cfg, "RPN") == 0


def test_the_memory_bounds_the_objects_of_an_image(tmp_path, monkeypatch):
    cfg = config(tmp_path)
    cfg.MODEL.RPN.IN_FEATURES = ["p2"]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (400,), 800
    monkeypatch.setattr(fit, "_memory", lambda cfg: 2**30)
    anchors = number_of_anchors(cfg, "RPN")
    assert 0.99 < most_objects(cfg) * anchors * 24 / 2**29 <= 1
    cfg.INPUT.MIN_SIZE_TRAIN = (4,)  # few anchors: now it is the proposals, which the objects are among
    assert 0.99 < most_objects(cfg) ** 2 * 24 / 2**29 <= 1
    for chosen, most in ((7, 7), (-1, 0)):
        cfg.DATASETS.MAX_OBJECTS_PER_IMAGE = chosen
        assert most_objects(cfg) == most
    cfg.DATASETS.MAX_OBJECTS_PER_IMAGE = 0
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    assert most_objects(cfg) == 0


def test_matching_takes_the_bytes_that_are_reckoned_with():
    """What `pairwise_iou` has at once, seen by PyTorch's own book-keeping."""
    objects, anchors = Boxes(rand(300, 4).sort().values), Boxes(rand(5000, 4).sort().values)
    with profile(profile_memory=True) as seen:
        pairwise_iou(objects, anchors)
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert most == pytest.approx(300 * 5000 * fit._BYTES_OF_A_PAIR, rel=0.05)
