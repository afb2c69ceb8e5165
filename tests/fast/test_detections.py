"""Selection of detections against Detectron2's own: the same bits."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import fast_rcnn
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.structures import Boxes, Instances

from fpn_d2.fast import detections
from fpn_d2.fast.apply import make_fast


def outputs(rows=300, classes=7, per_class=True, ties=False):
    corners = torch.rand(rows, classes if per_class else 1, 2) * 150 - 20
    boxes = torch.cat([corners, corners + torch.rand_like(corners) * 60], dim=2).flatten(1)
    logits = torch.randn(rows, classes + 1) * 2
    return boxes, (logits.round() if ties else logits).softmax(dim=1)


@pytest.mark.parametrize("most", [-1, 0, 5, 100])
@pytest.mark.parametrize("kind", [{}, {"per_class": False}, {"ties": True}, {"rows": 0}, {"rows": 1}, {"classes": 1}])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_same_bits_as_detectron2(most, kind, threshold):
    boxes, scores = outputs(**kind)
    same(boxes, scores, threshold, most)


def same(boxes, scores, threshold, most):
    size = (100, 90)
    expected, rows = fast_rcnn_inference([boxes.clone()], [scores], [size], threshold, 0.5, most)
    found, own_rows = detections.select_detections(boxes, scores, size, threshold, 0.5, most)
    assert found.image_size == size
    assert torch.equal(found.pred_boxes.tensor, expected[0].pred_boxes.tensor)
    assert torch.equal(found.scores, expected[0].scores)
    assert torch.equal(found.pred_classes, expected[0].pred_classes)
    assert torch.equal(own_rows, rows[0])


def test_rows_that_are_not_finite_are_left_out_as_there():
    boxes, scores = outputs()
    boxes[3, 2], boxes[150, 0], scores[20, 1] = float("nan"), float("inf"), float("nan")
    same(boxes, scores, 0.05, 50)


def predictor(fast=True):
    layers = FastRCNNOutputLayers(
        ShapeSpec(channels=16),
        box2box_transform=Box2BoxTransform((10, 10, 5, 5)),
        num_classes=7,
        test_topk_per_image=20,
    )
    return make_fast(layers) if fast else layers


def proposals(*counts):
    images = []
    for count in counts:
        corners = torch.rand(count, 2) * 60
        images.append(Instances((100, 90), proposal_boxes=Boxes(torch.cat([corners, corners + 30], dim=1))))
    return images


def test_a_predictor_selects_here(monkeypatch):
    layers, images = predictor(), proposals(40, 0, 30)
    assert type(layers).__mro__[1] is detections.FastBoxPredictor
    predictions = torch.randn(70, 8), torch.randn(70, 28) * 0.1
    expected = predictor(fast=False)
    expected.load_state_dict(layers.state_dict())
    calls = []
    select = detections.select_detections
    monkeypatch.setattr(detections, "select_detections", lambda *a: calls.append(a) or select(*a))
    found, rows = layers.inference(predictions, images)
    wanted, wanted_rows = expected.inference(predictions, images)
    assert len(calls) == 3 and len(found[0]) == 20 and len(found[1]) == 0
    for a, b, c, d in zip(found, wanted, rows, wanted_rows, strict=True):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor) and torch.equal(c, d)


@pytest.mark.parametrize("name", ["fast_rcnn_inference", "fast_rcnn_inference_single_image", "batched_nms"])
def test_functions_that_somebody_exchanged_run(name, monkeypatch):
    original, calls = getattr(fast_rcnn, name), []
    monkeypatch.setattr(fast_rcnn, name, lambda *a, **k: calls.append(name) or original(*a, **k))
    predictor().inference((torch.randn(40, 8), torch.randn(40, 28)), proposals(40))
    assert calls
