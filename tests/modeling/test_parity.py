"""Every FPN config of Detectron2's model zoo, stock against ours with only the two names swapped: the same bits.

The list is the zoo's own, read from the installed Detectron2. Configs whose stock model this machine cannot run
(deformable convolutions without the compiled extension) are skipped, with Detectron2's own reason.
"""

import pathlib

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.projects import point_rend
from detectron2.structures import ImageList

from fpn_d2 import add_fpn_d2_config
from tests.batches import random_batch, seed_everything

ZOO = pathlib.Path(model_zoo.__file__).parent / "configs"
BACKBONES = ("build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")
HEADS = {"StandardROIHeads": "FPNROIHeads", "CascadeROIHeads": "FPNCascadeROIHeads"}

# One of each kind; the others differ from these in depth, schedule or number of classes.
QUICK = {
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-Detection/rpn_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml",
    "Misc/semantic_R_50_FPN_1x.yaml",
}


def load(name):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    if "point_rend" in name:
        point_rend.add_pointrend_config(cfg)
    cfg.merge_from_file(str(ZOO / name), allow_unsafe=True)  # the zoo writes tuples as !!python/object/apply
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.NUMERICS = "exact"
    # Random weights give low scores; keep some detections, so that there is something to compare.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    return cfg


def zoo():
    """Names of the zoo's configs with an FPN, marked slow where they are not one of QUICK."""
    names = []
    for path in sorted(ZOO.rglob("*.yaml")):
        name = str(path.relative_to(ZOO))
        if "Base" not in name and load(name).MODEL.BACKBONE.NAME in BACKBONES:
            names.append(pytest.param(name, id=name, marks=[] if name in QUICK else pytest.mark.slow))
    return names


def swapped(cfg):
    cfg = cfg.clone()
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    cfg.MODEL.ROI_HEADS.NAME = HEADS.get(cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.NAME)
    return cfg


def flat(value, path=""):
    """Yield (path, tensor or plain value) of nested lists, dictionaries and Instances."""
    if hasattr(value, "get_fields"):
        value = value.get_fields()
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from flat(item, f"{path}/{i}")
    else:
        yield path, getattr(value, "tensor", value)


def run(model, cfg):
    """Everything that a user can see of a model: maps, proposals, detections, losses and gradients."""
    seen = {}
    model.eval()
    with torch.no_grad():
        batch = random_batch(cfg)
        # As ``preprocess_image``, which not every meta-architecture of every version has.
        images = [(item["image"] - model.pixel_mean) / model.pixel_std for item in batch]
        images = ImageList.from_tensors(images, model.backbone.size_divisibility)
        seen["maps"] = maps = model.backbone(images.tensor)
        if getattr(model, "proposal_generator", None) is not None:
            seen["proposals"] = model.proposal_generator(images, maps, None)[0]
        seen["outputs"] = model(batch)
    model.train()
    seed_everything()
    # TorchScript (RetinaNet's focal loss) rewrites a function after its first calls, so that its bits depend on how
    # often it has run.
    with torch.jit.optimized_execution(False):
        losses = model(random_batch(cfg))
        sum(losses.values()).backward()
    seen["losses"] = losses
    seen["gradients"] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return dict(flat(seen))


@pytest.mark.parametrize("name", zoo())
def test_same_bits(name):
    cfg = load(name)
    seed_everything()
    stock = build_model(cfg)
    weights = {key: value.clone() for key, value in stock.state_dict().items()}  # training moves running statistics
    try:
        expected = run(stock, cfg)
    except RuntimeError as error:
        if "compiled extension" not in str(error):
            raise
        pytest.skip(f"stock Detectron2 cannot run it here: {error}")
    seed_everything()
    ours = build_model(swapped(cfg))
    assert type(ours.backbone).__name__ == "FPN"
    assert list(ours.state_dict()) == list(weights)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, weights[key]), f"the same seed gives other initial weights in {key}"
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(weights, strict=True)
    actual = run(ours, cfg)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[key], value), f"{key} differs by {(actual[key] - value).abs().max()}"
        else:
            assert actual[key] == value, key
    assert any(key.startswith("/gradients") and "fpn_lateral" in key for key in expected)
    assert any(key.startswith("/maps") for key in expected)


def test_the_list_is_the_zoos():
    names = {param.values[0] for param in zoo()}
    assert QUICK <= names
    assert len(names) > 25
