"""How often a forward makes the host wait for a GPU: Detectron2's and ours, with equal results.

What is counted, and how without a GPU, is in tests/modeling/host_waits.py.
"""

import detectron2.layers
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

import fpn_d2.modeling.poolers
from fpn_d2.fast.roi_align import pyramid_roi_align
from tests.batches import random_batch, random_boxes, seed_everything
from tests.modeling.test_roi_heads import config

from .host_waits import DEVICE, DeviceTensor, as_one_launch, back, counting, put_on_device

SIZES = [(96, 128), (80, 112), (64, 100)]
# Detectron2's main branch makes the two axes of the anchors of each of the five maps on the CPU, in either model.
ANCHORS = 10 if hasattr(detectron2.layers, "move_device_like") else 0


@pytest.fixture(autouse=True)
def pooling_on_a_gpu(monkeypatch):
    """On a GPU ours is one Triton launch; that its host code waits for nothing is tested below."""
    monkeypatch.setattr(fpn_d2.modeling.poolers, "pyramid_roi_align", as_one_launch(pyramid_roi_align))


def detector(stock, training, *options):
    cfg = config(
        *["MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", False, "MODEL.ROI_HEADS.NUM_CLASSES", 3],
        # Of every image some proposals are too small, as in practice after they are clipped.
        *["MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 16, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3],
        *["MODEL.PROPOSAL_GENERATOR.NAME", "RPN" if stock else "FPNRPN", *options],
    )
    if stock:
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_HEADS.NAME = "build_resnet_fpn_backbone", "StandardROIHeads"
    seed_everything()
    model = build_model(cfg).train(training)
    for layer in (model.proposal_generator.rpn_head.objectness_logits, model.proposal_generator.rpn_head.anchor_deltas):
        torch.nn.init.normal_(layer.weight, std=0.3)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    return cfg, put_on_device(model)


def batch_of(cfg, num_images):
    batch = random_batch(cfg, sizes=SIZES[:num_images])
    for item in batch:  # a Faster R-CNN's data have no others
        for name in ("gt_masks", "gt_keypoints"):
            item["instances"].remove(name)
    return batch


def forward(stock, training, num_images, *options):
    cfg, model = detector(stock, training, *options)
    batch = batch_of(cfg, num_images)
    seed_everything()
    with EventStorage() as storage, counting() as host:
        result = model(batch)
    return back(result), host, {name: value for name, (value, _) in storage.latest().items()}


@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_inference(num_images):
    expected, stock, _ = forward(True, False, num_images)
    actual, ours, _ = forward(False, False, num_images)
    assert stock.waits.total() == 5 + 17 * num_images, stock.waits
    assert ours.waits.total() <= 2 + 5 * num_images, ours.waits
    assert ours.uploads.total() - ANCHORS == num_images, ours.uploads  # the images themselves
    assert ours.uploads.total() < stock.uploads.total()
    for there, here in zip(expected, actual, strict=True):
        there, here = there["instances"], here["instances"]
        assert len(there["scores"]) == len(here["scores"]) > 0
        assert torch.equal(there["pred_classes"], here["pred_classes"])
        torch.testing.assert_close(here["scores"], there["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(here["pred_boxes"], there["pred_boxes"], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_training(num_images):
    expected, stock, stock_log = forward(True, True, num_images)
    actual, ours, our_log = forward(False, True, num_images)
    assert stock.waits.total() == 19 + 16 * num_images, stock.waits
    assert ours.waits.total() <= 7 + num_images <= 4 + 8 * num_images, ours.waits
    # The images, their boxes and their classes.
    assert ours.uploads.total() - ANCHORS == 3 * num_images, ours.uploads
    assert ours.uploads.total() < stock.uploads.total()
    assert expected.keys() == actual.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(actual[name], loss, rtol=1e-4, atol=1e-6, msg=name)
    assert list(our_log) == list(stock_log) and our_log == pytest.approx(stock_log)


def test_exact_is_as_it_was():
    _, host, _ = forward(False, True, 1, "MODEL.NUMERICS", "exact")
    assert host.waits.total() >= 19 + 16


def test_weights_per_level_wait_for_no_image():
    counts = []
    for num_images in (1, 2):
        _, host, _ = forward(False, True, num_images, "MODEL.RPN.LEVEL_LOSS_WEIGHTS", [1, 2, 1, 1, 1])
        counts.append(host.waits.total())
    assert counts[1] - counts[0] == 1


def test_tritons_host_code_waits_for_nothing(monkeypatch):
    pytest.importorskip("triton")
    from fpn_d2.fast.roi_align import triton_roi_align as triton_code

    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(grid)

    monkeypatch.setattr(triton_code, "_roi_align_kernel", Kernel())
    with counting() as host:
        maps = [DeviceTensor(torch.randn(2, 8, 16 // k, 16 // k)) for k in (1, 2)]
        rois = DeviceTensor(torch.tensor([[0.0, 1, 2, 9, 12], [1.0, 0, 0, 30, 40]]))
        levels = DeviceTensor(torch.tensor([0, 1]))
        pooled = triton_code.triton_roi_align(maps, rois, levels, [1 / 4, 1 / 8], (7, 7), 0, True, False)
    assert pooled.shape == (2, 8, 7, 7) and len(launches) == 1
    assert host.waits.total() == host.uploads.total() == 0, (host.waits, host.uploads)


@pytest.mark.parametrize(
    "waits,uploads,code",
    [
        (0, 0, lambda x: (x + 1).sum().sqrt()),
        (0, 0, lambda x: torch.zeros(3, device=x.device) + x[0, 0]),
        (0, 0, lambda x: x.sort(stable=True).indices[:2]),
        (0, 0, lambda x: x.__setitem__(x > 2, 0.0)),
        (0, 0, lambda x: x.repeat_interleave(DeviceTensor(torch.tensor([1, 2])), 0, output_size=3)),
        (1, 0, lambda x: x.sum().item()),
        (1, 0, lambda x: bool((x > 2).all())),
        (1, 0, lambda x: int(x[0, 0])),
        (1, 0, lambda x: x.tolist()),
        (1, 0, lambda x: x.cpu()),
        (1, 0, lambda x: x.nonzero()),
        (1, 0, lambda x: torch.where(x > 2)),
        (1, 0, lambda x: x[x > 2]),
        (2, 0, lambda x: x[x[:, 0] > 2, x[0] > 1]),
        (1, 0, lambda x: x.masked_select(x > 2)),
        (1, 0, lambda x: x.__setitem__(x > 2, torch.ones(3, device=x.device))),
        (1, 0, lambda x: x.unique()),
        (1, 0, lambda x: x.repeat_interleave(DeviceTensor(torch.tensor([1, 2])), 0)),
        (1, 0, lambda x: torch.equal(x, x + 1)),
        (0, 1, lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to(x)),
        (0, 1, lambda x: torch.as_tensor([1.0, 2.0], device=x.device)),
        (0, 1, lambda x: x.copy_(torch.zeros(2, 3))),
        (0, 1, lambda x: x[[1, 0]]),
    ],
)
def test_the_rule(waits, uploads, code):
    with counting() as host:
        code(DeviceTensor(torch.arange(6.0).view(2, 3)))
    assert (host.waits.total(), host.uploads.total()) == (waits, uploads), (host.waits, host.uploads)


def test_numbers_on_the_device_are_numbers():
    with counting():
        x = DeviceTensor(torch.arange(6.0).view(2, 3))
        assert x.device == DEVICE and (x > 1).device == DEVICE and x.cpu().device.type == "cpu"
        x[:, 1] += 10
        y = torch.cat([x.unsqueeze_(0), torch.ones(1, 2, 3, device=DEVICE)])
        boxes = Boxes(random_boxes(5, 50, 60, torch.Generator().manual_seed(0))).to(DEVICE)
        area = boxes.area()
    assert back(y).tolist() == [[[0, 11, 2], [3, 14, 5]], [[1] * 3] * 2]
    torch.testing.assert_close(back(area), Boxes(back(boxes)).area())
    with pytest.raises(RuntimeError, match="outside"):
        y + 1
