"""Detectors of torchvision's with random weights, and ours with the same weights converted: the same detections."""

import argparse
import copy
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from torch import nn
from torchvision.models import detection
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList as TorchvisionImages
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fpn_d2 import add_fpn_d2_config
from fpn_d2.checkpoint.torchvision import convert_torchvision
from fpn_d2.engine import ReportingCheckpointer

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
