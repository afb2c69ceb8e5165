"""A whole small detector: order of images, batches, zero proposals, and that it can learn one batch by heart."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import pairwise_iou

from tests.batches import random_batch, seed_everything
from tests.modeling.test_roi_heads import config


def small_config(*options):
    return config("MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", False, "MODEL.ROI_HEADS.NUM_CLASSES", 3, *options)


@pytest.fixture(scope="module")
def model():
    seed_everything()
    model = build_model(small_config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)).eval()
    # Spread the scores: with the initial weights they are all but equal, and rounding alone would order them.
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    torch.nn.init.normal_(model.proposal_generator.rpn_head.objectness_logits.weight, std=1.0)
    return model


def detections(model, batch):
    with torch.no_grad():
        return [result["instances"] for result in model(batch)]


def assert_same(a, b, **tolerance):
    assert len(a) == len(b) > 0
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, **tolerance)
    torch.testing.assert_close(a.scores, b.scores, **tolerance)
    assert torch.equal(a.pred_classes, b.pred_classes)


def test_permuted_images_give_permuted_detections(model):
    batch = random_batch(small_config(), sizes=[(96, 128), (96, 128), (64, 64)])
    there = detections(model, batch)
    back = detections(model, [batch[2], batch[0], batch[1]])
    for a, b in zip([there[2], there[0], there[1]], back, strict=True):
        assert_same(a, b, rtol=1e-4, atol=1e-3)
    assert not torch.equal(there[0].pred_boxes.tensor[:5], there[1].pred_boxes.tensor[:5])


def test_an_image_alone_equals_the_image_in_a_batch_of_its_size(model):
    batch = random_batch(small_config(), sizes=[(96, 128), (96, 128)])
    for image, together in zip(batch, detections(model, batch), strict=True):
        assert_same(together, detections(model, [image])[0], rtol=1e-4, atol=1e-3)


def test_no_proposals_at_all():
    seed_everything()
    model = build_model(small_config("MODEL.RPN.POST_NMS_TOPK_TEST", 0)).eval()
    results = detections(model, random_batch(small_config()))
    assert [len(instances) for instances in results] == [0, 0]


def test_image_without_objects_trains():
    cfg = small_config()
    seed_everything()
    model = build_model(cfg)
    batch = random_batch(cfg)
    batch[1]["instances"] = batch[1]["instances"][:0]
    losses = model(batch)
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize("upsample,fuse", [("nearest", "sum"), ("deconv", "avg")])
def test_learns_one_batch_by_heart(upsample, fuse):
    cfg = small_config(
        *["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.PIXEL_STD", [57.0, 57.0, 57.0]],
        *["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.FPN.NORM", "GN", "MODEL.FPN.UPSAMPLE", upsample],
        *["MODEL.FPN.FUSE_TYPE", fuse, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64],
        *["MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [96], [128]]],
    )
    seed_everything()
    model = build_model(cfg)
    batch = random_batch(cfg, boxes_per_image=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for step in range(60):
        seed_everything(step)
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert sum(totals[-5:]) < 0.35 * sum(totals[:5])
    found = detections(model.eval(), batch)
    for image, instances in zip(batch, found, strict=True):
        ious = pairwise_iou(image["instances"].gt_boxes, instances.pred_boxes)
        same_class = image["instances"].gt_classes[:, None] == instances.pred_classes[None]
        assert ((ious * same_class).max(dim=1).values > 0.5).all()
