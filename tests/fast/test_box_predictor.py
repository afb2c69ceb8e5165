"""The box predictor with fewer waits against Detectron2's: the same losses, gradients, log and detections."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fpn_d2.fast.box_predictor import FPNBoxPredictor
from fpn_d2.fast.selection import FiniteBoxes
from tests.batches import random_boxes
from tests.modeling.test_roi_heads import build

from .host_waits import DeviceTensor, back, counting

SIZES = [(60, 80), (50, 90), (70, 70)]
SIDES = pytest.mark.parametrize("put", [lambda x: x, DeviceTensor], ids=["cpu", "device"])


def predictors(**options):
    arguments = {
        "box2box_transform": Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        "num_classes": 4,
        "test_score_thresh": 0.2,
        "loss_weight": {"loss_box_reg": 0.7},
    }
    arguments |= options
    stock = FastRCNNOutputLayers(ShapeSpec(channels=8), **arguments)
    return stock, FPNBoxPredictor(ShapeSpec(channels=8), **arguments)


def proposals_of(counts, put=lambda x: x, labels=True, with_objects=True):
    generator = torch.Generator().manual_seed(0)
    proposals = []
    for n, (height, width) in zip(counts, SIZES, strict=False):
        image = Instances((height, width), proposal_boxes=Boxes(put(random_boxes(n, height, width, generator))))
        if labels:
            gt_classes = torch.randint(5, (n,), generator=generator)
            image.gt_classes = put(gt_classes if with_objects else torch.full((n,), 4))
            if with_objects:
                image.gt_boxes = Boxes(put(random_boxes(n, height, width, generator)))
        proposals.append(image)
    return proposals


def predictions_of(counts, columns=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(sum(counts), n, generator=generator) for n in (5, columns)]


def losses(predictor, predictions, proposals):
    predictions = [tensor.clone().requires_grad_() for tensor in predictions]
    with EventStorage() as storage:
        found = predictor.losses(predictions, proposals)
    gradients = torch.autograd.grad(sum(found.values()), predictions)
    return found, gradients, storage.latest()


@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("with_objects", [False, True])
def test_losses(kind, agnostic, with_objects):
    options = {"box_reg_loss_type": kind, "cls_agnostic_bbox_reg": agnostic, "smooth_l1_beta": 0.3}
    predictions = predictions_of((30, 20), 4 if agnostic else 16)
    expected, actual = (
        losses(predictor, predictions, proposals_of((30, 20), with_objects=with_objects))
        for predictor in predictors(**options)
    )
    assert list(actual[0]) == list(expected[0]) and actual[2] == expected[2]
    assert len(expected[2]) == (3 if with_objects else 1)
    assert all(torch.equal(actual[0][name], loss) for name, loss in expected[0].items())
    assert all(torch.equal(a, b) for a, b in zip(actual[1], expected[1], strict=True))
    assert (expected[0]["loss_box_reg"] > 0) == with_objects


@pytest.mark.parametrize("counts", [(0,), (0, 0), (0, 9)])
def test_losses_without_proposals(counts):
    expected, actual = (losses(predictor, predictions_of(counts), proposals_of(counts)) for predictor in predictors())
    assert actual[2] == expected[2] and all(torch.equal(actual[0][name], loss) for name, loss in expected[0].items())


def test_losses_wait_twice():
    stock, ours = predictors()
    counts = []
    for predictor in (stock, ours):
        with EventStorage(), counting() as host:
            predictor.losses([DeviceTensor(p) for p in predictions_of((30, 20))], proposals_of((30, 20), DeviceTensor))
        counts.append(host.waits.total())
    assert counts == [8, 2]


def test_box_loss_finds_the_objects_itself():
    stock, ours = predictors()
    image = proposals_of((30,))[0]
    arguments = (image.proposal_boxes.tensor, image.gt_boxes.tensor, predictions_of((30,))[1], image.gt_classes)
    assert torch.equal(ours.box_reg_loss(*arguments), stock.box_reg_loss(*arguments))


def test_sigmoid_losses_of_the_main_branch():
    try:
        stock, ours = predictors(use_sigmoid_ce=True)
    except TypeError:
        pytest.skip("this Detectron2 has no use_sigmoid_ce")
    expected, actual = (losses(p, predictions_of((30, 20)), proposals_of((30, 20))) for p in (stock, ours))
    assert all(torch.equal(actual[0][name], loss) for name, loss in expected[0].items())


def assert_same_detections(expected, actual):
    for a, b in zip(actual[0], expected[0], strict=True):
        assert a.image_size == b.image_size and list(a.get_fields()) == list(b.get_fields())
        for field, value in back(b).items():
            assert back(a)[field].dtype == value.dtype and torch.equal(back(a)[field], value), field
    assert all(torch.equal(back(a), back(b)) for a, b in zip(actual[1], expected[1], strict=True))


@SIDES
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"test_score_thresh": 1.0}, {"test_topk_per_image": -1}, {"test_topk_per_image": 3}]
)
@pytest.mark.parametrize("counts", [(40, 30, 20), (0, 30), (0, 0), (1,)])
def test_inference(counts, options, agnostic, put):
    stock, ours = predictors(cls_agnostic_bbox_reg=agnostic, **options)
    predictions = predictions_of(counts, 4 if agnostic else 16)
    expected = stock.inference(predictions, proposals_of(counts, labels=False))
    with counting() as host:
        actual = ours.inference([put(p) for p in predictions], proposals_of(counts, put, labels=False))
    assert_same_detections(expected, actual)
    assert host.waits.total() <= 1 + len(counts) and host.uploads.total() == 0
    found = sum(len(image) for image in expected[0])
    assert (found > 0) == (sum(counts) > 0 and options.get("test_score_thresh") != 1.0)


@SIDES
def test_a_score_equal_to_the_threshold_is_no_detection(put):
    """As Detectron2 has it. Four equal logits give probabilities of a quarter, to the bit."""
    for threshold, found in ((0.25, 0), (0.2499, 9)):
        stock, ours = predictors(num_classes=3, test_score_thresh=threshold, test_nms_thresh=1.0)
        predictions = [torch.zeros(3, 4), torch.zeros(3, 12)]
        expected = stock.inference(predictions, proposals_of((3,), labels=False))
        with counting():
            actual = ours.inference([put(p) for p in predictions], proposals_of((3,), put, labels=False))
        assert_same_detections(expected, actual)
        assert len(actual[0][0]) == found


@SIDES
def test_rows_that_are_not_finite_give_nothing(put):
    stock, ours = predictors()
    scores, deltas = predictions_of((40, 30))
    scores[3, 1], deltas[50, 7], deltas[60, 0], deltas[61, 0] = math.nan, math.nan, math.inf, -math.inf
    expected = stock.inference((scores, deltas), proposals_of((40, 30), labels=False))
    with counting():
        actual = ours.inference((put(scores), put(deltas)), proposals_of((40, 30), put, labels=False))
    rows = back(actual[1])
    # Detectron2 counts only rows that are finite, where its documentation says: all.
    left = [torch.tensor([i for i in range(n) if i not in out]) for n, out in ((40, {3}), (30, {10, 20, 21}))]
    assert_same_detections((expected[0], [kept[i] for kept, i in zip(left, expected[1], strict=True)]), actual)
    assert (
        len(rows[0])
        and len(rows[1])
        and torch.equal(
            back(actual[0])[1]["scores"], scores.softmax(1)[40 + rows[1], back(actual[0])[1]["pred_classes"]]
        )
    )
    assert all(isinstance(image.pred_boxes, FiniteBoxes) for image in actual[0])


def test_no_images():
    _, ours = predictors()
    assert ours.inference(predictions_of(()), []) == ([], [])


def test_it_takes_over_the_layers():
    stock, _ = predictors()
    ours = FPNBoxPredictor.taking_over(stock)
    assert type(ours) is FPNBoxPredictor and ours.cls_score is stock.cls_score
    assert list(ours.state_dict()) == list(stock.state_dict())

    class Another(FastRCNNOutputLayers):
        pass

    another = Another(ShapeSpec(channels=8), box2box_transform=stock.box2box_transform, num_classes=4)
    assert FPNBoxPredictor.taking_over(another) is another


@pytest.mark.parametrize("cascade", [False, True])
def test_heads_have_it_unless_exact(cascade):
    for numerics, kind in (("fast", FPNBoxPredictor), ("exact", FastRCNNOutputLayers)):
        heads = build("MODEL.NUMERICS", numerics, cascade=cascade)
        found = heads.box_predictor if cascade else [heads.box_predictor]
        assert {type(predictor) for predictor in found} == {kind}
        assert heads.exact == (numerics == "exact")
