"""Torchvision's weights: the names that files have, and files that are something else."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import detection, resnet18

from fpn_d2.checkpoint.torchvision import convert_file, convert_torchvision, is_torchvision
from fpn_d2.engine import ReportingCheckpointer, UserError

from .test_torchvision import torchvision_model


def small_weights(kind, outputs=6):
    """A state dictionary with all names of a kind and few channels: what names are turned into needs no more."""
    with torch.device("meta"):
        model = torchvision_model(kind, outputs) if kind.endswith("v2") else None
        if model is None:
            name = kind.split("_")[0]
            build = getattr(detection, f"{name}_resnet50_fpn")
            model = build(weights=None, weights_backbone=None, num_classes=outputs)
    generator = torch.Generator().manual_seed(1)
    heads = ("cls_score", "bbox_pred", "mask_fcn_logits", "cls_logits", "bbox_reg")
    weights = {}
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked") and not kind.endswith("v2"):
            continue
        shape = [n if i == 0 and any(head in name for head in heads) else min(n, 2) for i, n in enumerate(value.shape)]
        weights[name] = torch.rand(shape, generator=generator) + 0.5
    return weights


def in_old_names(weights):
    """As torchvision before 0.13 named them."""
    old = {}
    for name, value in weights.items():
        parts = name.split(".")
        if "fpn" in parts and "blocks" in parts[2] and parts[2] != "extra_blocks":
            del parts[4]
        elif name.startswith("rpn.head.conv"):
            del parts[3:5]
        elif name.startswith("head.") and parts[2] == "conv":
            parts[3:5] = [str(2 * int(parts[3]))]
        elif name.startswith("roi_heads.mask_head"):
            parts[2:4] = [f"mask_fcn{int(parts[2]) + 1}"]
        old[".".join(parts)] = value
    return old


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn", "retinanet"])
def test_names_of_old_files_and_of_distributed_training(kind):
    weights = small_weights(kind)
    expected, known = convert_torchvision(weights)
    old = in_old_names(weights)
    assert set(old) != set(weights) and len(old) == len(weights)
    for same in (old, {f"module.{name}": value for name, value in weights.items()}):
        assert is_torchvision(same)
        actual, also_known = convert_torchvision(same)
        assert also_known == known and list(actual) == list(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_what_the_norms_of_the_resnet_add_to_variances():
    name = "backbone.body.bn1.running_var"
    ours = "backbone.bottom_up.stem.conv1.norm.running_var"

    def change(weights, **options):
        return float((convert_torchvision(weights, **options)[0][ours] - weights[name]).double().mean())

    weights = small_weights("fasterrcnn")
    weights[name] = weights[name].double()
    assert change(weights) == pytest.approx(-1e-5)  # published: nothing, and Detectron2 adds 1e-5
    assert change(weights, batch_norm_eps=1e-5) == 0
    assert change(weights | {"backbone.body.bn1.num_batches_tracked": torch.tensor(3)}) == 0  # trained with BN
    newer = small_weights("fasterrcnn_v2")
    assert change(newer | {name: newer[name].double()}) == 0


def test_classes():
    weights = small_weights("fasterrcnn", 91)
    _, known = convert_torchvision(weights)
    assert (known.classes, known.options) == (80, ())
    converted, known = convert_torchvision(weights, all_classes=True)
    assert (known.classes, known.options) == (90, ("MODEL.ROI_HEADS.NUM_CLASSES", "90"))
    scores = weights["roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(converted["roi_heads.box_predictor.cls_score.bias"], torch.cat([scores[1:], scores[:1]]))
    assert torch.equal(
        converted["roi_heads.box_predictor.bbox_pred.bias"], weights["roi_heads.box_predictor.bbox_pred.bias"][4:]
    )
    _, known = convert_torchvision(small_weights("retinanet", 4))
    assert known.options == ("MODEL.RETINANET.NUM_CLASSES", "3")


def test_another_depth_is_told():
    weights = small_weights("fasterrcnn")
    deeper = dict(weights)
    for name, value in weights.items():
        if name.startswith("backbone.body.layer3.5."):
            deeper |= {name.replace("layer3.5", f"layer3.{i}"): value for i in range(6, 23)}
    assert convert_torchvision(deeper)[1].options[:2] == ("MODEL.RESNETS.DEPTH", "101")
    with pytest.raises(UserError, match=r"\[4, 7, 3\] blocks .*no ResNet"):
        convert_torchvision({name: value for name, value in deeper.items() if not _layer3_beyond(name, 7)})


def _layer3_beyond(name, blocks):
    return name.startswith("backbone.body.layer3.") and int(name.split(".")[3]) >= blocks


def wrong_weights():
    with torch.device("meta"):
        classifier = resnet18(weights=None).state_dict()
        fcos = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4).state_dict()
        keypoints = detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        mobile = detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None).state_dict()
    extra = small_weights("fasterrcnn") | {"roi_heads.box_head.fc8.weight": torch.zeros(2)}
    anchors = small_weights("retinanet")
    anchors["head.classification_head.cls_logits.bias"] = torch.zeros(6 * 4)
    return [
        (classifier, "image classifier"),
        (fcos, "heads are not known"),
        (keypoints, "Keypoint R-CNN"),
        (mobile, "no ResNet"),
        (extra, "1 tensors that it has not: roi_heads.box_head.fc8.weight"),
        (anchors, "24 outputs does not have 9 anchors"),
        ({"backbone.bottom_up.stem.conv1.weight": torch.zeros(2)}, "Detectron2's names already"),
        ({"a": torch.zeros(2)}, "1 tensors, such as a"),
        ({}, "0 tensors"),
    ]


def test_other_weights_are_refused():
    for weights, message in wrong_weights():
        with pytest.raises(UserError, match=message):
            convert_torchvision(weights)
        assert not weights or is_torchvision(weights) == any(name.startswith("backbone.body") for name in weights)


def test_a_file_that_the_checkpointer_cannot_convert_is_named(tmp_path):
    weights = small_weights("fasterrcnn") | {"roi_heads.keypoint_head.0.weight": torch.zeros(2)}
    torch.save(weights, tmp_path / "tv.pth")
    with pytest.raises(UserError, match="tv.pth: .*Keypoint R-CNN"):
        ReportingCheckpointer(nn.Linear(2, 2)).load(str(tmp_path / "tv.pth"))


def test_files(tmp_path):
    weights, source, target = small_weights("maskrcnn_v2"), tmp_path / "in.pth", tmp_path / "out.pth"
    for content in (weights, {"model": weights, "args": argparse.Namespace(lr=0.02), "epoch": 3}):
        torch.save(content, source)
        known = convert_file(str(source), str(target))
        assert known.config == "configs/torchvision/mask_rcnn_R_50_FPN_v2.yaml"
        loaded = torch.load(target, weights_only=True)
        expected, _ = convert_torchvision(weights)
        assert all(torch.equal(loaded["model"][name], expected[name]) for name in expected)
        assert sorted(os.listdir(tmp_path)) == ["in.pth", "out.pth"]


def test_files_that_are_something_else(tmp_path, monkeypatch):
    source, target = tmp_path / "in.pth", tmp_path / "out.pth"
    cases = [
        ("no weight file", None),
        ("cannot be read", b"<html>"),
        ("no dictionary", [1, 2]),
        ("1 tensors", {"a": 1.0}),
    ]
    for message, content in cases:
        if isinstance(content, bytes):
            source.write_bytes(content)
        elif content is not None:
            content = (
                {name: torch.tensor(value) for name, value in content.items()} if isinstance(content, dict) else content
            )
            torch.save(content, source)
        with pytest.raises(UserError, match=message):
            convert_file(str(source), str(target))
    with pytest.raises(UserError, match="ends in .pth"):
        convert_file(str(source), str(tmp_path / "out.pkl"))
    torch.save(small_weights("fasterrcnn"), source)

    def half(data, file):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        convert_file(str(source), str(target))
    assert os.listdir(tmp_path) == ["in.pth"]
