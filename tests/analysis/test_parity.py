"""Parity: equal models are found equal, a change is found in the stage where it is made."""

import copy
import math

import pytest
import torch
from detectron2.structures import Boxes, Instances

from fpn_d2.analysis import parity
from fpn_d2.analysis.subjects import build_pair, random_batch, read_config

from .small_detectors import RETINANET, STOCK, STOCK_RETINANET, write


def pair_of(folder, *opts, stock=STOCK):
    path = write(folder / "small.yaml")
    configs = [(label, *read_config(path, [*opts, *more], "cpu")) for label, more in (("ours", []), ("zoo", stock))]
    return build_pair(tuple(configs), "")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return pair_of(tmp_path_factory.mktemp("parity"), "MODEL.MASK_ON", "True")


def compared(a, b, **tolerance):
    batch = random_batch(a.cfg, 2, (64, 80))
    stages = []
    for network in (a.network, b.network if hasattr(b, "network") else b):
        with parity.every_score_counts(network):
            stages.append(parity.capture(network, batch))
    return parity.summarise(parity.compare(*stages, parity.Tolerance(**tolerance)))


def test_ours_equals_stock_in_every_stage(pair):
    found = compared(*pair)
    assert list(found["stages"]) == ["input", "bottom-up", "pyramid", "proposals", "detections", "masks"]
    assert found["first_unequal"] is found["first_beyond"] is None
    assert all(
        stage == {"max_abs": 0, "max_rel": 0, "equal": True, "within": True} for stage in found["stages"].values()
    )
    items = [row["item"] for row in found["rows"] if row["stage"] in ("pyramid", "detections")]
    boxes_and_scores = [f"image {n} {what}" for n in range(2) for what in ("boxes", "scores")]
    assert items == ["p2", "p3", "p4", "p5", "p6", *boxes_and_scores]
    notes = [row["note"] for row in found["rows"] if row["item"] == "image 0 boxes"]
    assert notes == ["20 of 20 within 0.01", "10 of 10 within 0.01"]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("pixel_mean", "input"),
        ("backbone.bottom_up.res3.0.conv1.weight", "bottom-up"),
        ("backbone.fpn_output3.weight", "pyramid"),
        ("proposal_generator.rpn_head.anchor_deltas.bias", "proposals"),
        ("roi_heads.box_predictor.bbox_pred.bias", "detections"),
        ("roi_heads.mask_head.predictor.bias", "masks"),
    ],
)
def test_a_changed_weight_shows_in_its_stage(pair, name, stage):
    a, b = pair
    changed = copy.deepcopy(b.network)
    with torch.no_grad():
        dict([*changed.named_parameters(), *changed.named_buffers()])[name].add_(0.5)
    found = compared(a, changed)
    assert found["first_unequal"] == found["first_beyond"] == stage
    before = list(found["stages"])[: list(found["stages"]).index(stage)]
    assert all(found["stages"][name]["equal"] for name in before)
    assert found["stages"][stage]["max_abs"] > 0.01


def test_float_rounding_is_within_but_not_equal(pair):
    a, b = pair
    changed = copy.deepcopy(b.network)
    with torch.no_grad():
        changed.backbone.fpn_output2.weight.mul_(1 + 1e-6)
    found = compared(a, changed)
    assert found["first_unequal"] == "pyramid" and found["first_beyond"] is None
    assert 0 < found["stages"]["pyramid"]["max_rel"] < 1e-5
    assert compared(a, changed, relative=1e-9)["first_beyond"] == "pyramid"


def test_fast_numerics_are_within(tmp_path):
    found = compared(*pair_of(tmp_path, "MODEL.NUMERICS", "fast", "MODEL.RESNETS.NORM", "FrozenBN"))
    assert found["first_unequal"] == "bottom-up" and found["first_beyond"] is None


def test_nothing_is_left_behind(pair):
    network = pair[0].network
    threshold = network.roi_heads.box_predictor.test_score_thresh
    with pytest.raises(ZeroDivisionError), parity.every_score_counts(network):
        assert network.roi_heads.box_predictor.test_score_thresh == 0
        1 / 0  # noqa: B018
    assert network.roi_heads.box_predictor.test_score_thresh == threshold == 0.05
    with pytest.raises(KeyError):
        parity.capture(network, [{}])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_stage_is_kept_as_it_was():
    class InPlace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Identity()
            self.backbone.register_forward_hook(lambda module, args, x: {"p2": x})

        def forward(self, batch):
            self.backbone(batch[0])["p2"].zero_()
            return [{}]

    kept = parity.capture(InPlace(), [torch.ones(1, 2)])
    assert kept["bottom-up"]["p2"].tolist() == [[1, 1]]


def test_retinanet(tmp_path):
    a, b = pair_of(tmp_path, *RETINANET, stock=STOCK_RETINANET)
    found = compared(a, b)
    assert list(found["stages"]) == ["input", "bottom-up", "pyramid", "head", "detections"]
    assert found["first_unequal"] is None
    with torch.no_grad():
        b.network.head.bbox_pred.bias.add_(0.5)
    found = compared(a, b)
    assert found["first_beyond"] == "head"
    assert {row["item"] for row in found["rows"] if row["stage"] == "head" and not row["equal"]} == {
        "deltas 0",
        "deltas 1",
        "deltas 2",
    }


def test_proposal_network_and_another_kind_of_model(tmp_path):
    network, _ = pair_of(tmp_path, "MODEL.META_ARCHITECTURE", "ProposalNetwork")
    kept = parity.capture(network.network, random_batch(network.cfg, 1, (64, 64)))
    assert list(kept) == ["input", "bottom-up", "pyramid", "proposals"]
    found = parity.summarise(parity.compare(kept, {stage: kept[stage] for stage in ("input", "bottom-up")}))
    assert found["first_beyond"] == "pyramid"
    assert {row["note"] for row in found["rows"] if row["stage"] == "pyramid"} == {"only A has it"}


def detections(boxes, scores, classes):
    return Instances(
        (50, 50),
        pred_boxes=Boxes(torch.tensor(boxes).float().reshape(-1, 4)),
        scores=torch.tensor(scores).float(),
        pred_classes=torch.tensor(classes, dtype=torch.long),
    )


def rows_of(a, b):
    return parity.compare({"detections": {"image 0": a}}, {"detections": {"image 0": b}})


def test_swapped_neighbours_are_pairs():
    left, right = [0, 0, 10, 10], [20, 20, 40, 40]
    a = detections([left, right], [0.9, 0.89999], [1, 1])
    b = detections([right, left], [0.9, 0.89999], [1, 1])
    boxes, scores = rows_of(a, b)
    assert (boxes.equal, boxes.within, boxes.max_abs) == (False, True, 0)
    assert scores.within and scores.max_abs == pytest.approx(1e-5, rel=0.01)


def test_another_class_is_another_detection():
    a = detections([[0, 0, 10, 10]], [0.9], [1])
    boxes, _ = rows_of(a, detections([[0, 0, 10, 10]], [0.9], [2]))
    assert (boxes.equal, boxes.within, boxes.max_abs, boxes.note) == (False, False, None, "0 of 1 within 0.01")


def test_each_detection_is_one_partner_only():
    box = [0, 0, 10, 10]
    boxes, _ = rows_of(
        detections([box, box], [0.9, 0.9], [1, 1]), detections([box, [0, 0, 10, 12]], [0.9, 0.9], [1, 1])
    )
    assert boxes.max_abs == 2 and boxes.note == "1 of 2 within 0.01"


def test_another_number_is_not_within():
    box = [0, 0, 10, 10]
    boxes, _ = rows_of(detections([box], [0.9], [1]), detections([box, [1, 1, 9, 9]], [0.9, 0.8], [1, 1]))
    assert not boxes.within and boxes.note == "1 of 1 within 0.01; B has 2"
    boxes, _ = rows_of(detections([], [], []), detections([box], [0.9], [1]))
    assert not boxes.within and boxes.max_abs is None
    boxes, _ = rows_of(detections([], [], []), detections([], [], []))
    assert boxes.equal and boxes.within


def test_maps_that_cannot_be_compared():
    def row(a, b):
        return parity.compare({"pyramid": {"p2": a}}, {"pyramid": {"p2": b}})[0]

    other_shape = row(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 3))
    assert not other_shape.within and "(1, 2, 4, 3)" in other_shape.note and other_shape.max_abs is None
    broken = row(torch.ones(3), torch.tensor([1, math.nan, 1]))
    assert not broken.within and broken.note == "not all finite"
    summary = parity.summarise([row(torch.ones(3), torch.ones(3)), broken])
    assert math.isnan(summary["stages"]["pyramid"]["max_abs"]) and summary["first_beyond"] == "pyramid"
    assert row(torch.zeros(3), torch.full((3,), 1e-30)).max_rel == math.inf
    assert row(torch.tensor([1.0, 200.0]), torch.tensor([1.5, 200.0])).max_rel == 0.5 / 200
