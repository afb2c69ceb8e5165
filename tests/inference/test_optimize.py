"""Optimised models against the models that they were made from."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from torch import nn

import fpn_d2
from fpn_d2 import add_fpn_d2_config, optimize_for_inference
from fpn_d2.fast import onednn_conv, winograd
from fpn_d2.fast.frozen import FrozenConvolution
from fpn_d2.fast.guard import Fast
from fpn_d2.fast.poolers import FastROIPooler
from fpn_d2.fast.proposals import FastRPN
from tests.batches import random_batch, seed_everything

STOCK = {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone", "MODEL.ROI_HEADS.NAME": "StandardROIHeads"}
OURS = {"MODEL.BACKBONE.NAME": "build_fpn_backbone", "MODEL.ROI_HEADS.NAME": "FPNROIHeads"}
KINDS = {
    "stock": STOCK,
    "ours": OURS,
    "stock mask": STOCK | {"MODEL.MASK_ON": True},
    "keypoint": OURS | {"MODEL.KEYPOINT_ON": True},
    "cascade": OURS | {"MODEL.ROI_HEADS.NAME": "FPNCascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True},
    "stock cascade": STOCK
    | {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True},
    "panoptic": OURS | {"MODEL.META_ARCHITECTURE": "PanopticFPN", "MODEL.MASK_ON": True},
    "bifpn, soft": OURS | {"MODEL.FPN.NECK": "BiFPN", "MODEL.FPN.NORM": "BN", "MODEL.ROI_LEVEL_ASSIGN.NAME": "soft"},
    "all_max": OURS | {"MODEL.ROI_LEVEL_ASSIGN.NAME": "all_max", "MODEL.MASK_ON": True},
    "groie": OURS | {"MODEL.ROI_LEVEL_ASSIGN.NAME": "groie"},
    "image pyramid": OURS
    | {"MODEL.FPN.NECK": "ImagePyramid", "MODEL.FPN.IN_FEATURES": ["res4"]}
    | {"MODEL.RESNETS.OUT_FEATURES": ["res4"]},
    "c4": {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
        "MODEL.RESNETS.OUT_FEATURES": ["res4"],
        "MODEL.RPN.IN_FEATURES": ["res4"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
        "MODEL.MASK_ON": True,
    },
    "retinanet": {
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.RETINANET.NUM_CLASSES": 3,
    },
}


def config(kind):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.NUMERICS": "exact",
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.PIXEL_STD": [57.0, 57.0, 57.0],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [96], [128]],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 60,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 40,
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 50,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": 0.0,
        "TEST.DETECTIONS_PER_IMAGE": 15,
    } | KINDS[kind]
    cfg.merge_from_list([item for pair in options.items() for item in pair])
    return cfg


def trained_looking(kind):
    """A model with scores far enough apart that rounding cannot reorder them, and with norms that do something."""
    seed_everything()
    model = build_model(config(kind)).eval()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
    for name, parameter in model.named_parameters():
        if "_subnet." in name and parameter.dim() == 4:  # RetinaNet's, which start out with next to no output
            nn.init.kaiming_normal_(parameter)
        elif name.endswith("cls_score.weight") and parameter.dim() == 4:
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith(("cls_score.weight", "objectness_logits.weight")):
            nn.init.normal_(parameter, std=1.0)
    return model


def run(model, batch):
    with torch.no_grad():
        return model(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_same_detections_in_float32(kind):
    model = trained_looking(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = random_batch(config(kind))
    expected, actual = run(model, batch), run(optimize_for_inference(model), batch)
    for a, b in zip(actual, expected, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(a) == len(b) > 5
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=0.01)
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(a.pred_classes, b.pred_classes)
        if a.has("pred_masks"):
            assert (a.pred_masks != b.pred_masks).float().mean() < 1e-3
        if a.has("pred_keypoint_heatmaps"):
            torch.testing.assert_close(a.pred_keypoint_heatmaps, b.pred_keypoint_heatmaps, rtol=1e-3, atol=1e-4)
    if kind == "panoptic":
        for a, b in zip(actual, expected, strict=True):
            assert (a["panoptic_seg"][0] != b["panoptic_seg"][0]).float().mean() < 1e-2
    # The model that was given stays what it was.
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_runs_and_hands_out_float32(kind):
    model = trained_looking(kind)
    batch = random_batch(config(kind))
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    assert next(m for m in fast.backbone.modules() if isinstance(m, FrozenConvolution)).weight.dtype == torch.bfloat16
    full, half = run(optimize_for_inference(model), batch), run(fast, batch)
    for a, b in zip(half, full, strict=True):
        a, b = a["instances"], b["instances"]
        assert a.pred_boxes.tensor.dtype == a.scores.dtype == torch.float32
        assert len(a) > 5 and a.scores.isfinite().all()
        # The best detection is among those of full precision; 8 bits of mantissa leave it a pixel or two.
        distance = (b.pred_boxes.tensor - a.pred_boxes.tensor[:1]).abs().amax(dim=1).min()
        assert distance < 8, distance


def test_a_copy_of_lower_precision_can_be_copied_and_saved(tmp_path):
    fast = optimize_for_inference(trained_looking("stock"), dtype=torch.bfloat16)
    torch.save(fast, tmp_path / "fast.pth")
    batch = random_batch(config("stock"))
    expected = run(copy.deepcopy(fast), batch)[0]["instances"]
    loaded = run(torch.load(tmp_path / "fast.pth", weights_only=False), batch)[0]["instances"]
    assert len(expected) and torch.equal(loaded.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_what_was_changed_is_what_should_be():
    model = trained_looking("stock")
    fast = optimize_for_inference(model)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in fast.modules())
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, Fast) for module in model.modules())
    assert isinstance(fast.proposal_generator, FastRPN) and isinstance(fast.roi_heads.box_pooler, FastROIPooler)
    # Those that Detectron2's FPN runs, which it holds in lists beside its children.
    for conv in (*fast.backbone.lateral_convs, *fast.backbone.output_convs):
        assert isinstance(conv, FrozenConvolution) and not conv.weight.requires_grad
    assert not fast.training
    copy.deepcopy(fast)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_are_transformed_once_and_for_all(dtype, monkeypatch):
    if winograd.library() is None:
        pytest.skip("no C++ compiler on this machine, or no vectors: minimal filtering is NOT tested")
    fast = optimize_for_inference(trained_looking("stock"), dtype)
    assert len(fast.backbone.fpn_output2._kept) == 1
    monkeypatch.setattr(winograd, "pack", None)
    batch = random_batch(config("stock"))
    expected = run(fast, batch)[0]["instances"]
    monkeypatch.setattr(onednn_conv, "reorder", None)  # that waits for a map's size, and is done in the first call
    assert torch.equal(run(fast, batch)[0]["instances"].pred_boxes.tensor, expected.pred_boxes.tensor)


def test_hooks_that_were_there_are_called():
    model = trained_looking("stock")
    called = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: called.append(name))
    batch = random_batch(config("stock"))
    expected = run(model, batch)[0]["instances"]
    before = called.copy()
    called.clear()
    actual = run(optimize_for_inference(model), batch)[0]["instances"]
    torch.testing.assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=0.01)
    assert sorted(called) == sorted(before)


class OtherArchitecture(nn.Module):
    """As other projects have them: no GeneralizedRCNN, a head that nobody here knows."""

    def __init__(self, model):
        super().__init__()
        self.backbone = model.backbone
        self.odd_head = nn.Sequential(nn.Conv1d(32, 4, 1), nn.BatchNorm1d(4))

    def forward(self, images):
        return self.odd_head(self.backbone(images)["p3"].flatten(2))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_any_architecture_gets_the_parts_that_fit(dtype, caplog):
    model = OtherArchitecture(trained_looking("stock")).eval()
    images = torch.randn(1, 3, 64, 96)
    with caplog.at_level("INFO", "fpn_d2"):
        fast = optimize_for_inference(model, dtype)
    assert "nothing in odd_head (Sequential)" in caplog.text
    with torch.no_grad():
        expected, actual = model(images), fast(images)
    assert actual.dtype == torch.float32
    tolerance = 1e-4 if dtype is None else 0.05
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_keypoint_head_is_the_one_that_is_lowered():
    fast = optimize_for_inference(trained_looking("keypoint"), dtype=torch.bfloat16)
    assert isinstance(fast.roi_heads.keypoint_head, BaseKeypointRCNNHead)
    assert {p.dtype for p in fast.roi_heads.keypoint_head.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in fast.roi_heads.box_predictor.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "model,dtype,message",
    [
        (torch.zeros(2), None, "Tensor.*expected a model"),
        (None, None, "NoneType"),
    ],
)
def test_refuses_other_models(model, dtype, message):
    with pytest.raises(TypeError, match=message):
        fpn_d2.optimize_for_inference(model, dtype)


def test_refuses_other_types():
    with pytest.raises(TypeError, match="int8.*expected"):
        optimize_for_inference(trained_looking("stock"), torch.int8)
