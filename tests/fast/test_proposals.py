"""Selection before decoding against Detectron2's own RPN, which decodes every anchor: the same bits."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes

from fpn_d2.fast.proposals import select_proposals, top_scores

TRANSFORM = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))


def outputs(images=2, sizes=(300, 80, 20), ties=False):
    corners = [torch.rand(n, 2) * 90 for n in sizes]
    anchors = [Boxes(torch.cat([c, c + 5 + torch.rand(len(c), 2) * 30], dim=1)) for c in corners]
    logits = [torch.randn(images, n) for n in sizes]
    if ties:
        logits = [level.mul(2).round() for level in logits]
    return anchors, logits, [torch.randn(images, n, 4) * 0.2 for n in sizes]


def decode_all_then_select(anchors, logits, deltas, image_sizes, **options):
    boxes = [
        torch.stack([TRANSFORM.apply_deltas(image, a.tensor) for image in d])
        for a, d in zip(anchors, deltas, strict=True)
    ]
    return find_top_rpn_proposals(boxes, logits, image_sizes, **options)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pre,post", [(50, 30), (1000, 1000), (1, 1), (50, 0)])
@pytest.mark.parametrize("min_size", [0.0, 12.0, 1000.0])
def test_same_bits_as_detectron2(training, pre, post, min_size):
    options = dict(nms_thresh=0.5, pre_nms_topk=pre, post_nms_topk=post, min_box_size=min_size, training=training)
    sizes = [(100, 90), (70, 100)]
    batch = outputs()
    expected = decode_all_then_select(*batch, sizes, **options)
    actual = select_proposals(*batch, sizes, box2box_transform=TRANSFORM, **options)
    assert min_size < 1000 or not any(len(image) for image in expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.image_size == b.image_size
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)


@pytest.mark.parametrize("k", [1, 7, 99, 100, 500])
def test_top_scores_are_those_of_a_stable_sort(k):
    for logits in (torch.randn(3, 100), torch.randn(3, 100).round(), torch.zeros(3, 100)):
        values, index = logits.sort(dim=1, descending=True, stable=True)
        top, picked = top_scores(logits, k)
        assert torch.equal(top, values[:, :k]) and torch.equal(picked, index[:, :k])


def test_nan_comes_first_as_in_a_sort_and_stops_training():
    logits = torch.randn(1, 100)
    logits[0, 40] = float("nan")
    top, picked = top_scores(logits, 5)
    assert picked[0, 0] == 40 and top[0, 0].isnan()
    logits[0] = float("nan")
    assert top_scores(logits, 5)[1].shape == (1, 5)

    anchors, logits, deltas = outputs(images=1)
    logits[0][0, 3] = float("nan")
    options = dict(nms_thresh=0.5, pre_nms_topk=10, post_nms_topk=10, min_box_size=0.0, box2box_transform=TRANSFORM)
    with pytest.raises(FloatingPointError, match="diverged"):
        select_proposals(anchors, logits, deltas, [(100, 100)], training=True, **options)
    kept = select_proposals(anchors, logits, deltas, [(100, 100)], training=False, **options)[0]
    assert len(kept) > 0 and kept.objectness_logits.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spoil", ["score", "box", "all scores of an image"])
def test_what_is_not_finite_is_left_out(value, spoil):
    options = dict(nms_thresh=0.5, pre_nms_topk=50, post_nms_topk=40, min_box_size=0.0)
    anchors, logits, deltas = outputs()
    if spoil == "score":
        logits[1][1, :7] = value
    elif spoil == "box":
        deltas[0][0, :200, 0], deltas[2][1, :, 1] = value, value
    else:
        for level in logits:
            level[0] = value
    sizes = [(100, 90), (70, 100)]
    expected = decode_all_then_select(anchors, logits, deltas, sizes, training=False, **options)
    actual = select_proposals(anchors, logits, deltas, sizes, box2box_transform=TRANSFORM, training=False, **options)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)
    assert (len(actual[0]) == 0) == (spoil == "all scores of an image") and len(actual[1]) > 0
