"""The RoI heads: which poolers they hold, for which branches, and what they refuse."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, build_model
from detectron2.modeling.poolers import ROIPooler

from fpn_d2 import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import FPNCascadeROIHeads, FPNROIHeads, PyramidROIPooler
from tests.batches import random_batch, seed_everything

SHAPES = {f"p{k}": ShapeSpec(channels=16, stride=2**k) for k in (2, 3, 4, 5, 6)}


def config(*options, cascade=False):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = "GN"  # without weights to go with, FrozenBN lets the maps explode
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.NAME = "FPNCascadeROIHeads" if cascade else "FPNROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = cascade
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 32
    cfg.MODEL.ROI_MASK_HEAD.NAME, cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = "MaskRCNNConvUpsampleHead", 1
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [16]
    for head, resolution in ((cfg.MODEL.ROI_BOX_HEAD, 7), (cfg.MODEL.ROI_MASK_HEAD, 14)):
        head.POOLER_RESOLUTION = resolution
    cfg.merge_from_list(list(options))
    return cfg


def build(*options, cascade=False):
    cfg = config(*options, cascade=cascade)
    return ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)(cfg, SHAPES)


@pytest.mark.parametrize("cascade", [False, True])
def test_every_branch_gets_our_pooler_with_the_rule_of_the_config(cascade):
    heads = build(
        *["MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE", 100, "MODEL.ROI_LEVEL_ASSIGN.CANONICAL_LEVEL", 3],
        cascade=cascade,
    )
    assert isinstance(heads, FPNCascadeROIHeads if cascade else FPNROIHeads)
    poolers = {"box": heads.box_pooler, "mask": heads.mask_pooler, "keypoint": heads.keypoint_pooler}
    for branch, pooler in poolers.items():
        assert isinstance(pooler, PyramidROIPooler), branch
        assert pooler.levels == (2, 3, 4, 5)
        assert (pooler.assigner.canonical_box_size, pooler.assigner.canonical_level) == (100, 3)
        assert not list(pooler.parameters()) + list(pooler.buffers())
    assert [pooler.output_size[0] for pooler in poolers.values()] == [7, 14, 14]
    assert not [m for m in heads.modules() if type(m) is ROIPooler]


@pytest.mark.parametrize("cascade", [False, True])
def test_every_branch_pools_as_its_own_keys_say(cascade):
    keys = {"BOX": (6, 1, "ROIAlign"), "MASK": (12, 2, "ROIAlignV2"), "KEYPOINT": (10, 3, "ROIAlign")}
    opts = []
    for branch, values in keys.items():
        for key, value in zip(("RESOLUTION", "SAMPLING_RATIO", "TYPE"), values, strict=True):
            opts += [f"MODEL.ROI_{branch}_HEAD.POOLER_{key}", value]
    heads = build(*opts, cascade=cascade)
    for branch, (resolution, ratio, kind) in keys.items():
        pooler = getattr(heads, f"{branch.lower()}_pooler")
        assert tuple(pooler.output_size) == (resolution, resolution), branch
        for level in pooler.level_poolers:
            assert (level.sampling_ratio, level.aligned) == (ratio, kind == "ROIAlignV2"), branch


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("levels", [["p2"], ["p3", "p4"], ["p2", "p5"], ["p2", "p4", "p6"]])
def test_any_subset_of_levels_trains_and_infers(levels, cascade):
    cfg = config("MODEL.ROI_HEADS.IN_FEATURES", levels, cascade=cascade)
    seed_everything()
    model = build_model(cfg)
    assert model.roi_heads.box_in_features == model.roi_heads.mask_in_features == levels
    assert model.roi_heads.box_pooler.levels == tuple(int(name[1:]) for name in levels)
    losses = model(random_batch(cfg))
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        results = model.eval()(random_batch(cfg))
    assert {"pred_boxes", "pred_masks", "pred_keypoints"} <= set(results[0]["instances"].get_fields())


@pytest.mark.parametrize("cascade", [False, True])
def test_box_head_of_rois_that_are_not_square(cascade):
    cfg = config("MODEL.ROI_BOX_HEAD.POOLER_OUTPUT_SIZE", [5, 9], cascade=cascade)
    seed_everything()
    model = build_model(cfg)
    heads = model.roi_heads
    assert heads.box_pooler.output_size == (5, 9)
    assert heads.mask_pooler.output_size == (14, 14)
    first = heads.box_head[0] if cascade else heads.box_head
    assert first.fc1.in_features == 16 * 5 * 9
    losses = model(random_batch(cfg))
    assert all(torch.isfinite(value) for value in losses.values())


def test_output_size_that_no_head_can_take():
    with pytest.raises(UserError, match=r"expected \[height, width\]"):
        build("MODEL.ROI_BOX_HEAD.POOLER_OUTPUT_SIZE", [5, 9, 3])
    with pytest.raises(UserError, match="NUM_FC"):
        convs = ["MODEL.ROI_BOX_HEAD.NUM_FC", 0, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1]
        build("MODEL.ROI_BOX_HEAD.POOLER_OUTPUT_SIZE", [5, 9], *convs)


@pytest.mark.parametrize(
    "options,message",
    [
        (["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p7"]], r"\['p2', 'p7'\].*p2, p3, p4, p5, p6"),
        (["MODEL.ROI_HEADS.IN_FEATURES", []], "expected maps"),
        (
            ["MODEL.ROI_LEVEL_ASSIGN.NAME", "canonicle"],
            r"'canonicle' .did you mean canonical.*; known rules: .*all_max.*canonical, finest",
        ),
        (["MODEL.ROI_LEVEL_ASSIGN.NAME", "xyz"], "'xyz'; known rules: .*soft"),
        (["MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE", 0], "CANONICAL_BOX_SIZE.* is 0"),
    ],
)
def test_construction_refuses(options, message):
    with pytest.raises(UserError, match=message):
        build(*options)


def test_maps_of_different_channels_are_refused():
    shapes = SHAPES | {"p3": ShapeSpec(channels=8, stride=8)}
    with pytest.raises(UserError, match=r"\[16, 8, 16, 16\] channels"):
        FPNROIHeads(config(), shapes)
