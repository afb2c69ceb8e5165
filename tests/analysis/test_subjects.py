"""The random images that models are compared and timed on: what is on them lies in them."""

import pytest
import torch

from fpn_d2.analysis.subjects import random_batch, read_config

from .small_detectors import write

HEIGHT, WIDTH = 40, 200  # far from square, so that one taken for the other shows


@pytest.fixture(params=["polygon", "bitmask"])
def cfg(tmp_path, request):
    opts = ["MODEL.MASK_ON", "True", "MODEL.KEYPOINT_ON", "True", "INPUT.MASK_FORMAT", request.param]
    return read_config(write(tmp_path / "small.yaml"), opts, "cpu")[1]


def test_what_is_on_the_images_lies_in_them(cfg):
    batch = random_batch(cfg, 3, (HEIGHT, WIDTH))
    assert len(batch) == 3
    for item in batch:
        assert item["image"].shape == (3, HEIGHT, WIDTH) and item["image"].dtype == torch.uint8
        assert (item["height"], item["width"]) == (HEIGHT, WIDTH)
        assert item["sem_seg"].shape == (HEIGHT, WIDTH)
        assert item["sem_seg"].max() == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES - 1
        objects, proposals = item["instances"], item["proposals"]
        assert objects.image_size == proposals.image_size == (HEIGHT, WIDTH)
        assert (len(objects), len(proposals)) == (8, 1000)
        assert objects.gt_classes.min() >= 0 and objects.gt_classes.max() < cfg.MODEL.ROI_HEADS.NUM_CLASSES
        extent = torch.tensor([WIDTH, HEIGHT])
        for boxes in (objects.gt_boxes.tensor, proposals.proposal_boxes.tensor):
            assert (boxes >= 0).all() and (boxes[:, 2:] <= extent).all()
            # Both sides have the same share of the image's, from an eighth to all of it.
            share = (boxes[:, 2:] - boxes[:, :2]) / extent
            torch.testing.assert_close(share[:, 0], share[:, 1])
            assert (share >= 1 / 8 - 1e-5).all() and (share <= 1 + 1e-5).all()
        assert share.min() < 0.13 and share.max() > 0.95
        assert proposals.objectness_logits.diff().lt(0).all()  # best first, as an RPN gives them
        # Masks cover their boxes, keypoints lie in them.
        around = objects.gt_masks.get_bounding_boxes().tensor
        torch.testing.assert_close(around, objects.gt_boxes.tensor, rtol=0, atol=1.0)
        x, y, visible = objects.gt_keypoints.tensor.unbind(2)
        x0, y0, x1, y1 = objects.gt_boxes.tensor[:, :, None].unbind(1)
        assert ((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).all() and (visible == 2).all()
        assert x.shape == (8, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)


def test_the_same_seed_gives_the_same_images(cfg):
    first, again, other = (random_batch(cfg, 2, (HEIGHT, WIDTH), seed) for seed in (1, 1, 2))
    assert torch.equal(first[1]["image"], again[1]["image"]) and not torch.equal(first[1]["image"], other[1]["image"])
    assert not torch.equal(first[0]["image"], first[1]["image"])


def test_classes_of_a_retinanet_are_its_own(tmp_path):
    opts = ["MODEL.META_ARCHITECTURE", "FPNRetinaNet", "MODEL.RETINANET.NUM_CLASSES", "2"]
    cfg = read_config(write(tmp_path / "small.yaml"), opts, "cpu")[1]
    classes = torch.cat([item["instances"].gt_classes for item in random_batch(cfg, 8, (HEIGHT, WIDTH))])
    assert set(classes.tolist()) == {0, 1}
