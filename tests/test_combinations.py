"""Every neck with every bottom-up pathway and every RoI extractor: they learn, and what makes no sense is refused.

The default tests take a subset in which each component occurs; the slow ones take all combinations.
"""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.modeling import backbone as detectron2_backbones
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from fpn_d2 import add_fpn_d2_config
from fpn_d2.data.scenes import draw_scene
from fpn_d2.data.shapes import SHAPES
from fpn_d2.errors import UserError
from fpn_d2.modeling import NECK_REGISTRY, ROI_RULE_REGISTRY
from fpn_d2.modeling.bottom_up.names import known_bottom_ups

SIZE = 64
STEPS = 24
# Necks that make all levels from one map, and what small models of each need.
ONE_MAP = ("SimpleFeaturePyramid", "ImagePyramid")
NECKS = {
    "NASFPN": {"MODEL.FPN.REPEATS": 2, "MODEL.FPN.TOP_BLOCK": "maxpool"},
    "BiFPN": {"MODEL.FPN.REPEATS": 2},
    "SimpleFeaturePyramid": {"MODEL.FPN.NORM": "LN"},  # halves channels down to numbers that 32 groups do not divide
}
TINY_VIT = [["depth", 4], ["embed_dim", 64], ["num_heads", 2], ["img_size", SIZE]]
BOTTOM_UPS = {
    "build_resnet_backbone": {},
    "build_regnet_backbone": {"MODEL.REGNET.DEPTH": 13, "MODEL.REGNET.W_A": 36.44, "MODEL.REGNET.W_0": 24}
    | {"MODEL.REGNET.W_M": 2.49, "MODEL.REGNET.GROUP_WIDTH": 8, "MODEL.RESNETS.NORM": "BN"},
    "build_hybrid_resnet_vit_backbone": {"MODEL.HYBRID.CHANNELS": 64, "MODEL.HYBRID.DEPTH": 1},
    "build_timm_backbone": {"MODEL.TIMM.NAME": "convnext_atto", "MODEL.TIMM.OPTIONS": [["depths", [1, 1, 1, 1]]]},
    "build_vit_backbone": {"MODEL.TIMM.NAME": "vit_tiny_patch16_224", "MODEL.TIMM.OPTIONS": TINY_VIT},
    "build_d2_swin_backbone": {
        "MODEL.BOTTOM_UP.OPTIONS": [["depths", [1, 1, 2, 1]], ["embed_dim", 24], ["num_heads", [1, 2, 4, 8]]]
    },
    "build_d2_mvit_backbone": {
        "MODEL.BOTTOM_UP.OPTIONS": [["embed_dim", 16], ["depth", 5], ["last_block_indexes", [0, 1, 3, 4]]]
        + [["img_size", SIZE]]
    },
    "build_d2_vit_backbone": {"MODEL.BOTTOM_UP.OPTIONS": TINY_VIT},
}
PYRAMIDS = ("build_fpn_backbone", "build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")


def names(*registries) -> list[str]:
    return sorted({name for registry in registries for name, _ in registry})


def is_there(bottom_up: str) -> bool:
    """Whether what a bottom-up pathway needs is installed: Detectron2's main branch, or timm."""
    if bottom_up.startswith("build_d2_"):
        return hasattr(detectron2_backbones, "SwinTransformer")
    own = bottom_up.startswith(("build_resnet", "build_regnet"))
    return own or importlib.util.find_spec("timm") is not None


ALL_NECKS = names(NECK_REGISTRY)
ALL_BOTTOM_UPS = [name for name in sorted(known_bottom_ups()) if name not in PYRAMIDS and is_there(name)]
ALL_EXTRACTORS = names(ROI_RULE_REGISTRY)


def makes_sense(neck: str, bottom_up: str) -> bool:
    # Detectron2's plain ViT has one map. The image pyramid changes the size of the image, which it insists on.
    return bottom_up != "build_d2_vit_backbone" or neck == "SimpleFeaturePyramid"


COMBINATIONS = [
    (neck, bottom_up, extractor)
    for neck, bottom_up, extractor in itertools.product(ALL_NECKS, ALL_BOTTOM_UPS, ALL_EXTRACTORS)
    if makes_sense(neck, bottom_up)
]


def spanning(combinations: list[tuple]) -> list[tuple]:
    """A few of ``combinations`` in which every component occurs: each next one brings the most that is new."""
    missing = {part for combination in combinations for part in combination}
    chosen = []
    while missing:
        best = max(combinations, key=lambda combination: len(missing & {*combination}))
        chosen.append(best)
        missing -= {*best}
    return chosen


def config(neck="FPN", bottom_up="build_resnet_backbone", extractor="canonical", **options) -> CfgNode:
    """A small detector with group norm; ``options``: keys with __ for the dot."""
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    model = cfg.MODEL
    model.DEVICE, model.WEIGHTS = "cpu", ""
    model.BACKBONE.NAME, model.BACKBONE.FREEZE_AT = "build_fpn_backbone", 0
    model.RESNETS.DEPTH, model.RESNETS.RES2_OUT_CHANNELS, model.RESNETS.NORM = 18, 64, "GN"
    model.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    model.FPN.IN_FEATURES = ["res4"] if neck in ONE_MAP else ["res2", "res3", "res4", "res5"]
    model.FPN.NECK, model.FPN.BOTTOM_UP = neck, bottom_up
    model.FPN.IMAGE_PYRAMID_LEVELS = [2, 3, 4, 5]
    model.FPN.OUT_CHANNELS, model.FPN.NORM, model.FPN.TOP_BLOCK = 32, "GN", "none"
    if bottom_up == "build_vit_backbone" and neck not in ONE_MAP:
        model.VIT.OUT_BLOCKS = [1, 2, 3, 4]
    model.ROI_LEVEL_ASSIGN.NAME, model.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE = extractor, 32
    model.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64]]
    model.PIXEL_STD = [57.375, 57.120, 58.395]
    levels = ["p2", "p3", "p4", "p5"]
    model.RPN.IN_FEATURES = model.ROI_HEADS.IN_FEATURES = model.SEM_SEG_HEAD.IN_FEATURES = levels
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.PRE_NMS_TOPK_TEST = 60
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = 30
    model.ROI_HEADS.NAME, model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = "FPNROIHeads", 16
    model.ROI_HEADS.NUM_CLASSES = model.RETINANET.NUM_CLASSES = len(SHAPES)
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model.ROI_BOX_HEAD.NAME, model.ROI_BOX_HEAD.NUM_FC, model.ROI_BOX_HEAD.FC_DIM = "FastRCNNConvFCHead", 1, 64
    model.ROI_MASK_HEAD.NAME, model.ROI_MASK_HEAD.NUM_CONV = "MaskRCNNConvUpsampleHead", 1
    model.ROI_MASK_HEAD.CONV_DIM, model.ROI_MASK_HEAD.POOLER_RESOLUTION = 16, 8
    model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, model.ROI_KEYPOINT_HEAD.CONV_DIMS = 3, [16]
    model.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION = 8
    model.SEM_SEG_HEAD.NUM_CLASSES, model.SEM_SEG_HEAD.CONVS_DIM = len(SHAPES) + 1, 32
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    keys = BOTTOM_UPS.get(bottom_up, {}) | NECKS.get(neck, {}) | {k.replace("__", "."): v for k, v in options.items()}
    for key, value in keys.items():
        cfg.merge_from_list([key, value])
    return cfg


def scenes(images=2, seed=3) -> list[dict]:
    """A batch of scenes with boxes, masks, keypoints (corners and centre of a box) and stuff (the objects' classes)."""
    batch = []
    for i in range(images):
        rng = np.random.default_rng([seed, i])
        pixels, objects = draw_scene(rng, image_size=SIZE, min_size=12, max_size=50, objects=4, own_colour=1.0)
        masks = torch.from_numpy(np.stack([mask for _, mask in objects]))
        instances = Instances((SIZE, SIZE))
        instances.gt_masks = BitMasks(masks)
        instances.gt_boxes = boxes = instances.gt_masks.get_bounding_boxes()
        instances.gt_classes = torch.tensor([list(SHAPES).index(name) for name, _ in objects])
        points = torch.stack([boxes.tensor[:, :2], boxes.get_centers(), boxes.tensor[:, 2:] - 1], dim=1)
        instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((len(boxes), 3, 1), 2.0)], dim=2))
        stuff = torch.zeros(SIZE, SIZE, dtype=torch.long)
        for mask, c in zip(masks, instances.gt_classes.tolist(), strict=True):
            stuff[mask] = c + 1
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        batch.append({"image": image, "height": SIZE, "width": SIZE, "instances": instances, "sem_seg": stuff})
    return batch


def train(cfg: CfgNode, steps: int) -> tuple[torch.nn.Module, list[float]]:
    """Train on the same batch; returns the model and the sum of the losses in each step."""
    torch.manual_seed(1)
    model = build_model(cfg).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch, losses = scenes(), []
    with EventStorage():
        for _ in range(steps):
            loss = sum(model(batch).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            losses.append(float(loss.detach()))
    return model, losses


def check_learns(neck: str, bottom_up: str, extractor: str) -> None:
    cfg = config(neck, bottom_up, extractor)
    if neck == "ImagePyramid":  # p2 would be of the image at four times its size
        cfg.MODEL.FPN.IMAGE_PYRAMID_LEVELS, cfg.MODEL.ANCHOR_GENERATOR.SIZES = [3, 4, 5], [[16], [32], [64]]
        cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p3", "p4", "p5"]
    model, losses = train(cfg, STEPS)
    assert np.isfinite(losses).all()
    start, end = np.mean(losses[:4]), np.mean(losses[-4:])
    assert end < 0.75 * start, losses
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if neck in ONE_MAP:  # layers that lead to the other maps alone
        missing = [key for key in missing if not key.startswith("backbone.bottom_up.")]
    assert not missing, missing
    check_detects(model)


def check_detects(model) -> None:
    batch = [{key: item[key] for key in ("image", "height", "width")} for item in scenes()]
    with torch.no_grad():
        for result in model.eval()(batch):
            assert len(result["instances"]) > 0
            boxes = result["instances"].pred_boxes.tensor
            assert torch.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= SIZE).all()


def cases(combinations: list[tuple]) -> list:
    return [pytest.param(*c, id="-".join(c).replace("build_", "")) for c in combinations]


@pytest.mark.parametrize(("neck", "bottom_up", "extractor"), cases(spanning(COMBINATIONS)))
def test_each_component_learns(neck, bottom_up, extractor):
    check_learns(neck, bottom_up, extractor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("neck", "bottom_up", "extractor"), cases([c for c in COMBINATIONS if c not in spanning(COMBINATIONS)])
)
def test_all_combinations_learn(neck, bottom_up, extractor):
    check_learns(neck, bottom_up, extractor)


def test_the_subset_has_everything():
    chosen = spanning(COMBINATIONS)
    for index, everything in enumerate((ALL_NECKS, ALL_BOTTOM_UPS, ALL_EXTRACTORS)):
        assert {combination[index] for combination in chosen} == {*everything}
    assert len(chosen) <= max(len(ALL_NECKS), len(ALL_BOTTOM_UPS), len(ALL_EXTRACTORS)) + 2


def test_a_model_that_cannot_learn_is_noticed(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(AssertionError):
        check_learns("FPN", "build_resnet_backbone", "canonical")


@pytest.mark.parametrize("neck", ALL_NECKS)
def test_retinanet_with_every_neck(neck):
    """On P3 to P7, with the top block that "auto" stands for."""
    cfg = config(neck, MODEL__META_ARCHITECTURE="RetinaNet", MODEL__FPN__TOP_BLOCK="auto")
    if neck in ONE_MAP:
        cfg.MODEL.FPN.SIMPLE_PYRAMID_LEVELS, cfg.MODEL.FPN.IMAGE_PYRAMID_LEVELS = [3, 4, 5], [3, 4, 5, 6, 7]
    else:
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    model, losses = train(cfg, 2)
    assert list(model.backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"] == list(model.head_in_features)
    assert np.isfinite(losses).all() and losses[0] != losses[1]
    check_detects(model)


@pytest.mark.parametrize("neck", ALL_NECKS)
def test_panoptic_fpn_with_every_neck(neck):
    cfg = config(neck, MODEL__META_ARCHITECTURE="PanopticFPN", MODEL__MASK_ON=True)
    cfg.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = 1
    model, losses = train(cfg, 2)
    assert np.isfinite(losses).all() and losses[0] != losses[1]
    with torch.no_grad():
        for result in model.eval()(scenes()):
            segments, infos = result["panoptic_seg"]
            assert segments.shape == (SIZE, SIZE)
            assert {info["id"] for info in infos} >= set(segments.unique().tolist()) - {0}
            assert result["sem_seg"].shape == (len(SHAPES) + 1, SIZE, SIZE)


@pytest.mark.parametrize("neck", ALL_NECKS)
def test_augmentation_at_test_time_with_every_neck(neck):
    cfg = config(neck, TEST__AUG__ENABLED=True, TEST__AUG__MIN_SIZES=(48, 80), TEST__AUG__MAX_SIZE=100)
    model = GeneralizedRCNNWithTTA(cfg, build_model(cfg).eval())
    with torch.no_grad():
        results = model([{key: item[key] for key in ("image", "height", "width")} for item in scenes()])
    for result in results:
        boxes = result["instances"].pred_boxes
        assert len(boxes) > 0 and isinstance(boxes, Boxes) and torch.isfinite(boxes.tensor).all()


@pytest.mark.parametrize("extractor", ALL_EXTRACTORS)
@pytest.mark.parametrize("heads", ["FPNROIHeads", pytest.param("FPNCascadeROIHeads", marks=pytest.mark.slow)])
def test_masks_and_keypoints_with_every_extractor(extractor, heads):
    cfg = config(extractor=extractor, MODEL__MASK_ON=True, MODEL__KEYPOINT_ON=True, MODEL__ROI_HEADS__NAME=heads)
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = "Cascade" in heads
    model, losses = train(cfg, 2)
    assert np.isfinite(losses).all() and losses[0] != losses[1]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for result in model.eval()(scenes()):
            found = result["instances"]
            assert len(found) > 0
            assert found.pred_masks.shape == (len(found), SIZE, SIZE)
            assert found.pred_keypoints.shape == (len(found), 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # A plain ViT with one map under a neck that wants four.
        (
            {"bottom_up": "build_vit_backbone", "MODEL__VIT__OUT_BLOCKS": []},
            r"asks for res2, res3, res5.*res4 \(stride 16, 64 channels\)",
        ),
        # A neck that takes one map on four.
        (
            {"neck": "SimpleFeaturePyramid", "MODEL__FPN__IN_FEATURES": ["res2", "res3", "res4", "res5"]},
            r"names 4.*res2 \(stride 4, 64 channels\).*res5 \(stride 32, 512 channels\)",
        ),
        ({"neck": "ImagePyramid", "MODEL__FPN__IN_FEATURES": ["res6"]}, r"res6.*res5 \(stride 32, 512 channels\)"),
        # Strides that do not double.
        ({"MODEL__FPN__IN_FEATURES": ["res2", "res4"]}, r"strides \[4, 16\]"),
        # A graph for five levels on four.
        ({"neck": "NASFPN", "MODEL__FPN__TOP_BLOCK": "none"}, r"five levels|5 levels"),
        # Heads that ask for a level that the pyramid lacks.
        ({"MODEL__ROI_HEADS__IN_FEATURES": ["p3", "p9"]}, r"p3.*p9.*p2.*p5"),
        (
            {"MODEL__FPN__OUT_FEATURES": ["p2"], "MODEL__RPN__IN_FEATURES": ["p2"]}
            | {"MODEL__ANCHOR_GENERATOR__SIZES": [[8]]},
            r"IN_FEATURES is \['p2', 'p3', 'p4', 'p5'\].*gives: p2",
        ),
        ({"extractor": "cannonical"}, "did you mean canonical"),
        ({"neck": "FNP"}, "FNP.*known necks.*FPN"),
        ({"bottom_up": "build_resnet"}, "build_resnet_backbone"),
    ],
)
def test_what_makes_no_sense_is_refused_at_construction(options, message):
    if "vit" in options.get("bottom_up", "") and options["bottom_up"] not in ALL_BOTTOM_UPS:
        pytest.skip("needs timm")
    with pytest.raises(UserError, match=message):
        build_model(config(**options))
