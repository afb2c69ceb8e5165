"""Detectors of torchvision's with random weights, and ours with the same weights converted: the same detections."""

import argparse
import copy
import os
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from torch import nn
from torchvision.models import detection, resnet18
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList as TorchvisionImages
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fpn_d2 import add_fpn_d2_config
from fpn_d2.engine import ReportingCheckpointer, UserError
from fpn_d2.engine.torchvision_weights import convert_file, convert_torchvision, is_torchvision

CONFIGS = Path(__file__).resolve().parents[2]
KINDS = ["fasterrcnn", "fasterrcnn_v2", "maskrcnn", "maskrcnn_v2", "retinanet", "retinanet_v2"]
FEW = {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 40, "box_score_thresh": 0.1, "box_nms_thresh": 0.6}
FEW_HERE = [
    *["MODEL.RPN.PRE_NMS_TOPK_TEST", 60, "MODEL.RPN.POST_NMS_TOPK_TEST", 40],
    *["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.1, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.6],
    *["MODEL.RETINANET.TOPK_CANDIDATES_TEST", 50, "TEST.DETECTIONS_PER_IMAGE", 30],
]


def torchvision_model(kind, outputs=6, **options):
    """As torchvision builds the model for its published weights; its functions take frozen norms only with those."""
    torch.manual_seed(0)
    name, _, version = kind.partition("_")
    if version:
        build = getattr(detection, f"{name}_resnet50_fpn_v2")
        return build(weights=None, weights_backbone=None, num_classes=outputs, **options).eval()
    extra = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if name == "retinanet" else {}
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, **extra)
    build = {"fasterrcnn": detection.FasterRCNN, "maskrcnn": detection.MaskRCNN, "retinanet": detection.RetinaNet}[name]
    model = build(backbone, num_classes=outputs, **options).eval()
    overwrite_eps(model, 0.0)
    return model


@torch.no_grad()
def randomise(model, seed=0):
    """Random statistics of the norms, and outputs of a size that gives detections to compare."""
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d | nn.GroupNorm):
            # Variances so small that it matters what is added to them, in both kinds of norm.
            variance = torch.rand(module.bias.shape) * 2e-5 + 2e-5 if hasattr(module, "running_var") else None
            # The last norm of a block is weak, or the maps of fifty layers explode.
            module.weight.copy_((torch.rand(module.weight.shape) + 0.5) * (0.2 if name.endswith("bn3") else 1))
            module.bias.copy_(torch.randn(module.bias.shape) * 0.1)
            if variance is not None:
                module.weight.mul_(variance.sqrt())
                module.running_var.copy_(variance)
                module.running_mean.copy_(torch.randn(variance.shape) * 0.1)
        elif isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d) and module.bias is not None:
            module.bias.copy_(torch.randn(module.bias.shape) * 0.1)
        if ".conv.0.0" in name or ".conv.1.0" in name or "_head.conv." in name and hasattr(module, "in_channels"):
            nn.init.kaiming_normal_(module.weight)  # torchvision's start has a std of 0.01
    final = {"rpn.head.cls_logits": 2, "rpn.head.bbox_pred": 0.3, "box_predictor.cls_score": 1.5}
    final |= {
        "box_predictor.bbox_pred": 1,
        "mask_fcn_logits": 2,
        "head.cls_logits": 1.5,
        "regression_head.bbox_reg": 0.1,
    }
    for name, module in model.named_modules():
        if any(name.endswith(end) for end in final):
            scale = next(value for end, value in final.items() if name.endswith(end))
            # In RetinaNet few of the many anchors are objects.
            module.register_forward_hook(rescale_once(scale, -6 if name.endswith("head.cls_logits") else 0))
    image = images_of(96, 128, model)
    model([image / 255])
    if isinstance(model, detection.RetinaNet):
        # The output of the background, which no training ever asks for and no detection should come from.
        model.head.classification_head.cls_logits.bias.view(9, -1)[:, 0] -= 50


def rescale_once(scale, mean):
    """A hook that at its first call gives each output of a layer this mean, and all this deviation, by the weights."""
    done = []

    def hook(module, inputs, output):
        if done:
            return None
        done.append(True)
        means = output.mean(dim=[i for i in range(output.dim()) if i != 1])
        factor = scale / (output - means.reshape(-1, *[1] * (output.dim() - 2))).std()
        module.weight.mul_(factor)
        module.bias.copy_((module.bias - means) * factor + mean)
        return module(*inputs)

    return hook


def our_model(converted, known, options=()):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.merge_from_file(str(CONFIGS / known.config))
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list([*FEW_HERE, *known.options, *options])
    model = build_model(cfg).eval()
    if converted is not None:
        missing, unexpected = model.load_state_dict(converted, strict=False)
        assert not unexpected
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        assert set(missing) <= {"pixel_mean", "pixel_std"}
    return model


def images_of(height, width, model):
    """One image for both: theirs as it comes in, padded, and ours."""
    generator = torch.Generator().manual_seed(height)
    # Smooth, as an image is: white noise gives every place the same features.
    image = torch.rand(1, 3, height // 16 + 1, width // 16 + 1, generator=generator)
    image = nn.functional.interpolate(image, (height, width), mode="bilinear")[0]
    image = (image * 255).round()
    model.transform.min_size, model.transform.max_size = (min(height, width),), max(height, width)
    return image


@torch.no_grad()
def compare(theirs, ours, image):
    """Maps, then proposals, then detections, so that the first that differs shows where to look."""
    height, width = image.shape[-2:]
    seen = {}
    hooks = [
        # Copied, because the masks are pasted into the image in place.
        part.register_forward_hook(lambda module, inputs, output, key=key: seen.update({key: copy.deepcopy(output)}))
        for key, part in [
            *((f"their {name}", part) for name, part in theirs.named_children()),
            *((f"our {name}", part) for name, part in ours.named_children()),
        ]
    ]
    expected = theirs([image / 255])[0]
    found = ours([{"image": image, "height": height, "width": width}])[0]["instances"]
    for hook in hooks:
        hook.remove()
    assert seen["their transform"][0].image_sizes == [(height, width)]
    assert len(seen["their backbone"]) == len(seen["our backbone"]) == 5
    for one, other in zip(seen["their backbone"].values(), seen["our backbone"].values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3 * float(one.std()))
    if "their rpn" in seen:
        proposals = seen["their rpn"][0][0]
        assert len(proposals) > 20
        torch.testing.assert_close(
            seen["our proposal_generator"][0][0].proposal_boxes.tensor, proposals, rtol=1e-3, atol=0.02
        )
        if theirs.roi_heads.has_mask():
            # As the heads give them: the two paste masks into the image by different rules.
            masks = seen["their roi_heads"][0][0]["masks"]
            assert masks.shape == (len(expected["scores"]), 1, 28, 28) and masks.std() > 0.1
            torch.testing.assert_close(seen["our roi_heads"][0][0].pred_masks, masks, rtol=1e-3, atol=2e-3)
    return expected, found


def assert_same(expected, found, labels):
    # Detectron2 leaves out boxes that lie outside the image; torchvision's RetinaNet gives them without area.
    inside = ((expected["boxes"][:, 2:] - expected["boxes"][:, :2]) > 1e-3).all(dim=1)
    expected = {key: value[inside] for key, value in expected.items()}
    found = found[found.pred_boxes.nonempty(1e-3)]
    assert len(expected["scores"]) >= 5 and expected["scores"].std() > 0.01
    torch.testing.assert_close(found.scores, expected["scores"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.pred_boxes.tensor, expected["boxes"], rtol=1e-3, atol=0.05)
    assert [labels[i] for i in found.pred_classes.tolist()] == expected["labels"].tolist()


# The other kinds hold all parts of the two that are slow.
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] if kind in ("fasterrcnn", "maskrcnn_v2") else []) for kind in KINDS],
)
def test_same_detections(kind):
    options = {"box_detections_per_img": 30, **FEW}
    if kind.startswith("retinanet"):
        options = {"detections_per_img": 30, "topk_candidates": 50}
    theirs = torchvision_model(kind, **options)
    randomise(theirs)
    converted, known = convert_torchvision(theirs.state_dict())
    assert known.name == f"{kind.split('_')[0]}_resnet50_fpn" + ("_v2" if kind.endswith("v2") else "")
    assert known.classes == 5 and known.options[-1] == "5"
    ours = our_model(converted, known)
    for height, width in ((128, 192), (150, 210)):  # whole cells of P5, and neither side
        image = images_of(height, width, theirs)
        expected, found = compare(theirs, ours, image)
        assert_same(expected, found, labels=[1, 2, 3, 4, 5])
        assert len(set(expected["labels"].tolist())) > 1


@pytest.mark.parametrize("kind", ["fasterrcnn", "retinanet"])
def test_coco_models_keep_the_80_categories_that_exist(kind, tmp_path, caplog):
    options = (
        FEW | {"box_detections_per_img": 30}
        if kind == "fasterrcnn"
        else {"detections_per_img": 30, "topk_candidates": 50}
    )
    theirs = torchvision_model(kind, outputs=91, **options)
    randomise(theirs)
    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    with torch.no_grad():  # as training leaves the ids that stand for nothing
        if kind == "fasterrcnn":
            theirs.roi_heads.box_predictor.cls_score.bias[[i for i in range(1, 91) if i not in ids]] -= 50
            theirs.roi_heads.box_predictor.cls_score.weight *= 4  # over 90 classes the scores are low
        else:
            theirs.head.classification_head.cls_logits.bias.view(9, 91)[:, [i for i in range(91) if i not in ids]] -= 50
    torch.save({"model": theirs.state_dict(), "optimizer": {"state": {}}}, tmp_path / "tv.pth")
    _, known = convert_torchvision(theirs.state_dict())
    assert known.classes == 80 and known.options == ()
    ours = our_model(None, known)
    # MODEL.WEIGHTS may name torchvision's own file.
    caplog.set_level("INFO")
    ReportingCheckpointer(ours, partial_weights="refuse").load(str(tmp_path / "tv.pth"))
    assert f"torchvision's {kind}_resnet50_fpn: converted; its config is {known.config}" in caplog.text
    expected, found = compare(theirs, ours, images_of(128, 160, theirs))
    assert_same(expected, found, labels=ids)


# ---- Anchors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["faster_rcnn_R_50_FPN", "retinanet_R_50_FPN"])
@pytest.mark.parametrize("size", [(128, 192), (160, 224), (224, 96)])
def test_anchors_are_torchvisions(kind, size):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "configs" / "torchvision" / f"{kind}.yaml"))
    levels = (3, 4, 5, 6, 7) if "retina" in kind else (2, 3, 4, 5, 6)
    shapes = [argparse.Namespace(stride=2**k) for k in levels]
    maps = [torch.zeros(1, 1, -(-size[0] // 2**k), -(-size[1] // 2**k)) for k in levels]
    ours = build_anchor_generator(cfg, shapes)(maps)
    module = detection.retinanet if "retina" in kind else detection.faster_rcnn
    theirs = module._default_anchorgen()(TorchvisionImages(torch.zeros(1, 3, *size), [size]), maps)[0]
    assert [len(boxes) for boxes in ours] == [m.shape[2] * m.shape[3] * (9 if "retina" in kind else 3) for m in maps]
    by_level = theirs.split([len(boxes) for boxes in ours])
    for boxes, expected in zip(ours, by_level, strict=True):
        if "retina" in kind:  # their anchors of a cell are sizes of each shape, ours shapes of each size
            expected = expected.unflatten(0, (-1, 3, 3)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(boxes.tensor, expected)


# ---- Names and files -------------------------------------------------------------------------------------------------


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
