"""Weights per level for the RPN's losses: Detectron2's own without them, a loop over single anchors with them."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import EventStorage, get_event_storage

from fpn_d2 import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import FPNRPN
from tests.batches import random_batch, seed_everything

LEVELS = (2, 3, 4, 5, 6)
NAMES = [f"p{k}" for k in LEVELS]


def config(name="FPNRPN", weights=(), numerics="fast"):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.NUMERICS = name, numerics
    cfg.MODEL.RPN.IN_FEATURES = NAMES
    cfg.MODEL.RPN.LEVEL_LOSS_WEIGHTS = list(weights)
    cfg.MODEL.RPN.BBOX_REG_LOSS_WEIGHT, cfg.MODEL.RPN.LOSS_WEIGHT = 0.7, 1.3
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 8000  # all anchors, so that each level has some
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    return cfg


def rpn(cfg):
    seed_everything()
    generator = build_proposal_generator(cfg, {f"p{k}": ShapeSpec(channels=6, stride=2**k) for k in LEVELS})
    for parameter in generator.parameters():  # a std of 0.01 leaves nothing to compare
        parameter.data = torch.randn(parameter.shape) * 0.1
    return generator.train()


def inputs(cfg):
    batch = random_batch(cfg)
    generator = torch.Generator().manual_seed(4)
    maps = {
        f"p{k}": torch.randn(2, 6, -(-96 // 2**k), -(-128 // 2**k), generator=generator).requires_grad_()
        for k in LEVELS
    }
    images = ImageList(torch.zeros(2, 3, 96, 128), [(96, 128), (80, 112)])
    targets = [item["instances"] for item in batch]
    targets[0].gt_boxes.tensor[0] = torch.tensor([36.0, 36.0, 44.5, 44.5])  # nearest to an anchor of the finest level
    return images, maps, targets


def run(cfg):
    """Losses, gradients of maps and parameters, and what was written down of the anchors."""
    module = rpn(cfg)
    images, maps, targets = inputs(cfg)
    seed_everything()
    with EventStorage() as storage:
        proposals, losses = module(images, maps, targets)
        histories = {name: [value for value, _ in storage.history(name).values()] for name in storage.histories()}
    sum(losses.values()).backward()
    gradients = [*(maps[name].grad for name in NAMES), *(p.grad for p in module.parameters())]
    return proposals, losses, gradients, histories


@pytest.mark.parametrize("weights", [(), (1,) * 5])
def test_without_weights_it_is_detectron2s_bit_for_bit(weights):
    stock, ours = run(config("RPN")), run(config(weights=weights, numerics="exact"))
    assert list(ours[1]) == list(stock[1])
    assert all(torch.equal(ours[1][name], stock[1][name]) and stock[1][name] > 0 for name in stock[1])
    assert all(torch.equal(a, b) for a, b in zip(ours[2], stock[2], strict=True))
    assert ours[3] == stock[3]
    for a, b in zip(ours[0], stock[0], strict=True):
        # Decoded after they are picked, so the last bits may differ, which can swap boxes far down the list.
        torch.testing.assert_close(a.proposal_boxes.tensor[:100], b.proposal_boxes.tensor[:100], rtol=1e-6, atol=1e-4)


def one_by_one(module, images, maps, targets, weights):
    """Both losses by the formulas, one sampled anchor after the other."""
    features = [maps[name] for name in NAMES]
    anchors = module.anchor_generator(features)
    labels, boxes = module.label_and_sample_anchors(anchors, targets)
    logits, deltas = module.rpn_head(features)
    classification = localization = 0.0
    for image in range(2):
        row = 0
        for level, weight in enumerate(weights):
            shapes = logits[level].shape
            for y in range(shapes[2]):
                for x in range(shapes[3]):
                    for a in range(shapes[1]):
                        label, (x0, y0, x1, y1) = (
                            int(labels[image][row]),
                            anchors[level].tensor[row - start(anchors, level)],
                        )
                        if label >= 0:
                            logit = logits[level][image, a, y, x]
                            classification += weight * torch.log1p(torch.exp(-logit if label else logit))
                        if label == 1:
                            gx0, gy0, gx1, gy1 = boxes[image][row].tolist()
                            wanted = [
                                ((gx0 + gx1) / 2 - (x0 + x1) / 2) / (x1 - x0),
                                ((gy0 + gy1) / 2 - (y0 + y1) / 2) / (y1 - y0),
                                math.log((gx1 - gx0) / (x1 - x0)),
                                math.log((gy1 - gy0) / (y1 - y0)),
                            ]
                            found = deltas[level][image, 4 * a : 4 * a + 4, y, x]
                            localization += weight * sum((f - w).abs() for f, w in zip(found, wanted, strict=True))
                        row += 1
    normaliser = module.batch_size_per_image * 2
    return classification / normaliser * 1.3, localization / normaliser * 0.7 * 1.3


def start(anchors, level):
    return sum(len(finer) for finer in anchors[:level])


@pytest.mark.parametrize("weights", [(1, 0, 0, 0, 0), (0.5, 2, 0, 3, 1)])
def test_one_anchor_after_the_other(weights):
    cfg = config(weights=weights)
    module = rpn(cfg)
    images, maps, targets = inputs(cfg)
    seed_everything()
    _, losses = module(images, maps, targets)
    seed_everything()
    classification, localization = one_by_one(module, images, maps, targets, weights)
    torch.testing.assert_close(losses["loss_rpn_cls"], classification, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss_rpn_loc"], localization, rtol=1e-4, atol=1e-6)
    assert localization > 0


@pytest.mark.parametrize("level", range(5))
def test_the_gradient_reaches_only_levels_with_a_weight(level):
    _, _, gradients, _ = run(config(weights=[float(i == level) for i in range(5)]))
    assert [bool(gradient.any()) for gradient in gradients[:5]] == [i == level for i in range(5)]


def test_weights_that_are_equal_scale_the_losses_and_leave_the_counts():
    stock, doubled = run(config("RPN")), run(config(weights=[2] * 5))
    for name, loss in stock[1].items():
        torch.testing.assert_close(doubled[1][name], 2 * loss)
    assert doubled[3].keys() == stock[3].keys() == {"rpn/num_pos_anchors", "rpn/num_neg_anchors"}
    for name, history in stock[3].items():
        assert doubled[3][name] == pytest.approx(history) and len(history) == 1, name


def test_no_storage_is_left_behind():
    with EventStorage() as storage:
        module, cfg = rpn(config(weights=[2, 1, 1, 1, 1])), config()
        module(*inputs(cfg))
        assert get_event_storage() is storage


def test_state_is_detectron2s():
    ours, stock = rpn(config(weights=[1, 2, 3, 4, 5])), rpn(config("RPN"))
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict(), strict=True)


def test_inference_needs_no_storage_and_no_labels():
    cfg = config(weights=[2, 1, 1, 1, 1])
    module = rpn(cfg).eval()
    images, maps, _ = inputs(cfg)
    proposals, losses = module(images, maps)
    assert losses == {} and len(proposals) == 2


@pytest.mark.parametrize("weights", [(1, 2), (1,) * 6])
def test_another_number_of_weights(weights):
    with pytest.raises(UserError, match=rf"LEVEL_LOSS_WEIGHTS\) has {len(weights)} values; expected one .* 5 maps"):
        rpn(config(weights=weights))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_are_none(weight):
    with pytest.raises(UserError, match="LEVEL_LOSS_WEIGHTS.*at least 0"):
        rpn(config(weights=[1, 1, weight, 1, 1]))


def test_plain_arguments():
    cfg = config()
    shapes = {f"p{k}": ShapeSpec(channels=6, stride=2**k) for k in LEVELS}
    arguments = FPNRPN.from_config(cfg, shapes) | {"level_loss_weights": (3, 1, 1, 1, 1)}
    assert FPNRPN(**arguments).level_loss_weights == [3, 1, 1, 1, 1]


def test_a_trace_works_on_fewer_anchors_than_it_was_made_with():
    cfg = config()
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 50
    module = rpn(cfg).eval()

    def select(boxes, deltas, logits):
        with torch.no_grad():
            return module.predict_proposals([Boxes(boxes)], [logits], [deltas], [(500, 500)])[0].proposal_boxes.tensor

    def arguments(anchors):
        corners = torch.rand(anchors, 2) * 400
        return torch.cat([corners, corners + 40], dim=1), torch.randn(1, anchors, 4) * 0.1, torch.randn(1, anchors)

    traced = torch.jit.trace(select, arguments(80), check_trace=False)
    assert 0 < len(traced(*arguments(80))) <= 50
    fewer = arguments(30)
    torch.testing.assert_close(traced(*fewer), select(*fewer))
