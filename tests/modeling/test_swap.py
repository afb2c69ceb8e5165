"""From stock configurations to ours: the names that are set, top blocks found out, no branch dropped."""

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.modeling.backbone import FPN as StockFPN
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

import fpn_d2
from fpn_d2.errors import UserError
from fpn_d2.modeling.swap import STOCK_PYRAMIDS

from .test_backbone import assert_same_maps

NAMES = {"stage2": 4, "stage3": 8, "stage4": 16, "stage5": 32}


class SmallPathway(Backbone):
    """Maps called as VoVNet's."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleDict({name: nn.Conv2d(3, 8, stride, stride) for name, stride in NAMES.items()})

    def forward(self, x):
        return {name: stage(x) for name, stage in self.stages.items()}

    def output_shape(self):
        return {name: ShapeSpec(channels=8, stride=stride) for name, stride in NAMES.items()}


class LastLevelP6(nn.Module):
    """AdelaiDet's name for one level."""

    num_levels, in_feature = 1, "p5"

    def __init__(self):
        super().__init__()
        self.p6 = nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x):
        return [self.p6(x)]


def stock_fpn(top_block):
    """A builder of a whole pyramid, as other projects have them."""

    def build(cfg, input_shape):
        return StockFPN(SmallPathway(), cfg.MODEL.FPN.IN_FEATURES, 8, top_block=top_block())

    return build


@pytest.fixture
def project(monkeypatch):
    """Registers builders for one test."""

    def register(**builders):
        for name, build in builders.items():
            monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, name, build)

    return register


def stock_config(name, maps=("stage3", "stage4", "stage5"), **sections):
    """A configuration of a project that knows nothing of fpn_d2."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME = "cpu", name
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = list(maps), 8
    for section, values in sections.items():
        cfg.MODEL[section] = CfgNode(values)
    return cfg


CASES = {
    "build_vovnet_fpn_backbone": (LastLevelMaxPool, {}, "maxpool"),
    "build_fcos_vovnet_fpn_backbone": (
        lambda: LastLevelP6P7(8, 8, "p5"),
        {"FCOS": {"TOP_LEVELS": 2}},
        "p6p7_p5",
    ),
    "build_fcos_mobilenetv2_fpn_backbone": (LastLevelP6, {"FCOS": {"TOP_LEVELS": 1}}, "p6_p5"),
    "build_fcos_dla_fpn_backbone": (lambda: None, {"FCOS": {"TOP_LEVELS": 0}}, "none"),
    "build_retinanet_dla_fpn_backbone": (lambda: LastLevelP6P7(8, 8, "stage5"), {}, "p6p7_c5"),
    "build_p35_timm_fpn_backbone": (lambda: None, {}, "none"),
    "build_dla_fpn5_backbone": (lambda: LastLevelP6P7(8, 8, "stage5"), {}, "p6p7_c5"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_swapped_pyramid_is_the_stock_one(name, project):
    """The same names, and the same maps to the last bit, for builders of whole pyramids that other projects have."""
    top_block, sections, expected = CASES[name]
    pathway = STOCK_PYRAMIDS[name].bottom_up
    project(**{pathway: lambda cfg, shape: SmallPathway()} | {name: stock_fpn(top_block)})
    cfg = stock_config(name, **sections)
    stock = build_backbone(cfg).eval()
    fpn_d2.swap(cfg)
    assert cfg.MODEL.FPN.TOP_BLOCK == expected
    cfg.MODEL.NUMERICS = "exact"
    ours = build_backbone(cfg).eval()
    assert isinstance(ours, fpn_d2.modeling.FPN) and isinstance(ours.bottom_up, SmallPathway)
    ours.load_state_dict(stock.state_dict(), strict=True)
    images = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        assert_same_maps(ours(images), stock(images))


@pytest.mark.parametrize(
    "name,more,bottom_up,top_block",
    [
        ("build_resnet_fpn_backbone", {}, "build_resnet_backbone", "maxpool"),
        ("build_retinanet_resnet_fpn_backbone", {}, "build_resnet_backbone", "p6p7_c5"),
        ("build_p67_resnet_fpn_backbone", {}, "build_resnet_backbone", "p6p7_p5"),
        ("build_p67_timm_fpn_backbone", {}, "build_timm_backbone", "p6p7_p5"),
        ("build_fcos_resnet_fpn_backbone", {"FCOS": {"TOP_LEVELS": 2}}, "build_resnet_backbone", "p6p7_p5"),
        (
            "build_fcos_resnet_fpn_backbone",
            {"FCOS": {"TOP_LEVELS": 1}, "MOBILENET": True},
            "build_mnv2_backbone",
            "p6_p5",
        ),
    ],
)
def test_names_that_are_set(name, more, bottom_up, top_block):
    mobile = more.pop("MOBILENET", False)
    cfg = stock_config(name, **more)
    if mobile:
        cfg.MODEL.MOBILENET = True
    fpn_d2.swap(cfg)
    once = cfg.dump()
    assert (cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.BOTTOM_UP) == ("build_fpn_backbone", bottom_up)
    assert cfg.MODEL.FPN.TOP_BLOCK == top_block
    fpn_d2.swap(cfg)
    assert cfg.dump() == once


@pytest.mark.parametrize(
    "heads,expected",
    [
        ("StandardROIHeads", "FPNROIHeads"),
        ("CascadeROIHeads", "FPNCascadeROIHeads"),
        ("DensePoseROIHeads", "DensePoseROIHeads"),
        ("PointRendROIHeads", "PointRendROIHeads"),
    ],
)
def test_stock_heads_are_swapped_and_others_kept(heads, expected):
    cfg = stock_config("build_resnet_fpn_backbone")
    cfg.MODEL.ROI_HEADS.NAME = heads
    cfg.MODEL.DENSEPOSE_ON = heads == "DensePoseROIHeads"
    fpn_d2.swap(cfg)
    assert cfg.MODEL.ROI_HEADS.NAME == expected and cfg.MODEL.PROPOSAL_GENERATOR.NAME == "FPNRPN"


def test_generators_and_detectors():
    cfg = stock_config("build_retinanet_resnet_fpn_backbone")
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RetinaNet", "CenterNet"
    fpn_d2.swap(cfg)
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PROPOSAL_GENERATOR.NAME) == ("FPNRetinaNet", "CenterNet")


def test_heads_of_the_same_name_in_another_registry_are_kept():
    """few-shot-object-detection has StandardROIHeads of its own, told by a key that Detectron2's do not have."""
    cfg = stock_config("build_resnet_fpn_backbone")
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.OUTPUT_LAYER = "StandardROIHeads", "FastRCNNOutputLayers"
    fpn_d2.swap(cfg)
    assert cfg.MODEL.ROI_HEADS.NAME == "StandardROIHeads"


@pytest.mark.parametrize(
    "name,sections,message",
    [
        ("build_resnet_backbone", {}, "build_resnet_backbone, no feature pyramid.*MODEL.FPN.BOTTOM_UP.*TOP_BLOCK"),
        ("build_p67_resnet_fpn_backbon", {}, "did you mean build_p67_resnet_fpn_backbone"),
        ("build_fcos_resnet_bifpn_backbone", {}, "BiFPN whose parameters.*MODEL.FPN.NECK to BiFPN"),
        ("build_fcos_vovnet_fpn_backbone", {"FCOS": {"TOP_LEVELS": 3}}, "FCOS.TOP_LEVELS is 3; expected 0, 1 or 2"),
        ("build_fcos_vovnet_fpn_backbone", {}, "FCOS.TOP_LEVELS is None"),
    ],
)
def test_what_is_not_known_is_refused_and_left_as_it_was(name, sections, message):
    cfg = stock_config(name, **sections)
    before = cfg.dump()
    with pytest.raises(UserError, match=message):
        fpn_d2.swap(cfg)
    assert cfg.dump() == before


def test_a_frozen_configuration_is_told_to_thaw():
    cfg = stock_config("build_resnet_fpn_backbone")
    cfg.freeze()
    with pytest.raises(UserError, match="defrost"):
        fpn_d2.swap(cfg)


@pytest.mark.parametrize("heads", ["FPNROIHeads", "FPNCascadeROIHeads"])
def test_heads_that_would_drop_a_branch_are_refused(heads):
    cfg = stock_config("build_resnet_fpn_backbone", ("res2", "res3", "res4", "res5"))
    fpn_d2.swap(cfg)
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2"]
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.DENSEPOSE_ON = heads, True
    with pytest.raises(UserError, match=f"MODEL.DENSEPOSE_ON is True.*{heads}.*DensePoseROIHeads"):
        build_model(cfg)


# ---- MODEL.FPN.TOP_BLOCK auto -------------------------------------------------------------------------------------

P3_TO_P7 = ["p3", "p4", "p5", "p6", "p7"]


def levels_of(project, top_block="auto", maps=("stage3", "stage4", "stage5"), meta=None, generator=None, **sections):
    project(build_small=lambda cfg, shape: SmallPathway())
    cfg = stock_config("build_fpn_backbone", maps)
    fpn_d2.add_fpn_d2_config(cfg)
    cfg.MODEL.FPN.BOTTOM_UP, cfg.MODEL.FPN.TOP_BLOCK = "build_small", top_block
    cfg.MODEL.META_ARCHITECTURE = meta or cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = generator or cfg.MODEL.PROPOSAL_GENERATOR.NAME
    for section, values in sections.items():
        cfg.MODEL[section] = CfgNode({**cfg.MODEL.get(section, {}), **values})
    backbone = build_backbone(cfg)
    top = backbone.top_block
    return " ".join(backbone.output_shape()), "" if top is None else f"{type(top).__name__} {top.in_feature}"


@pytest.mark.parametrize(
    "options,levels,top",
    [
        ({}, "p3 p4 p5 p6", "LastLevelMaxPool p5"),
        ({"RPN": {"IN_FEATURES": ["p3", "p6"]}}, "p3 p4 p5 p6", "LastLevelMaxPool p5"),
        ({"meta": "RetinaNet"}, "p3 p4 p5 p6 p7", "LastLevelP6P7 stage5"),
        ({"generator": "FCOS", "FCOS": {"IN_FEATURES": P3_TO_P7}}, "p3 p4 p5 p6 p7", "LastLevelP6P7 p5"),
        ({"generator": "FCOS", "FCOS": {"IN_FEATURES": P3_TO_P7[:4]}}, "p3 p4 p5 p6", "P6TopBlock p5"),
        ({"generator": "CenterNet", "CENTERNET": {"IN_FEATURES": P3_TO_P7[:3]}}, "p3 p4 p5", ""),
        ({"meta": "CenterNetDetector", "CENTERNET": {"IN_FEATURES": P3_TO_P7}}, "p3 p4 p5 p6 p7", "LastLevelP6P7 p5"),
        ({"meta": "TensorMask", "TENSOR_MASK": {"IN_FEATURES": P3_TO_P7}}, "p3 p4 p5 p6 p7", "LastLevelP6P7 stage5"),
        # Sections that nobody uses: every AdelaiDet configuration has one for FCOS.
        ({"FCOS": {"IN_FEATURES": P3_TO_P7}}, "p3 p4 p5 p6", "LastLevelMaxPool p5"),
        ({"meta": "SOLOv2", "SOLOV2": {"INSTANCE_IN_FEATURES": ["p5", "p6"]}}, "p3 p4 p5 p6", "LastLevelMaxPool p5"),
        (
            {"maps": ["stage2", "stage3", "stage4"], "RPN": {"IN_FEATURES": ["p5"]}},
            "p2 p3 p4 p5",
            "LastLevelMaxPool p4",
        ),
    ],
)
def test_auto_is_what_the_detector_reads(project, options, levels, top):
    assert levels_of(project, **options) == (levels, top)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"RPN": {"IN_FEATURES": ["p3", "p7"]}}, "MODEL.RPN asks for p7, 2 levels above p5"),
        ({"meta": "MyDetector", "MY_DETECTOR": {"HEAD": {"IN_FEATURES": P3_TO_P7}}}, "MODEL.MYDETECTOR asks for p7"),
        ({"meta": "RetinaNet", "generator": "FCOS", "FCOS": {"IN_FEATURES": P3_TO_P7}}, "made in two ways"),
        ({"generator": "FCOS", "FCOS": {"IN_FEATURES": ["p8"]}}, "MODEL.FCOS asks for p8, 3 levels"),
    ],
)
def test_auto_that_cannot_be_told_names_the_keys(project, options, message):
    with pytest.raises(UserError, match=f"{message}.*MODEL.FPN.TOP_BLOCK to p6p7_p5.*p6p7_c5.*MODEL.FPN.BOTTOM_UP"):
        levels_of(project, **options)
    options.pop("FCOS", None)
    assert levels_of(project, "p6p7_p5", **options) == ("p3 p4 p5 p6 p7", "LastLevelP6P7 p5")


@pytest.mark.parametrize("name,builder", [("stage3", "build_vovnet"), ("dla3", "build_dla"), ("layer1", "Detic")])
def test_maps_of_another_pathway_name_its_builder(name, builder):
    cfg = stock_config("build_fpn_backbone", [name])
    fpn_d2.add_fpn_d2_config(cfg)
    with pytest.raises(UserError, match=f"asks for {name}.*MODEL.FPN.BOTTOM_UP to its builder, .*{builder}"):
        build_backbone(cfg)


def test_get_cfg_is_detectron2s_with_our_keys():
    cfg = get_cfg()
    fpn_d2.add_fpn_d2_config(cfg)
    assert fpn_d2.get_cfg().dump() == cfg.dump() and "NECK" not in get_cfg().MODEL.FPN


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("BACKBONE.ANTI_ALIAS", True, "build_resnet_lpf_backbone"),
        ("RESNETS.DEFORM_INTERVAL", 3, "build_resnet_interval_backbone"),
        ("RESNETS.DEFORM_INTERVAL", 1, "build_resnet_backbone"),
        ("MOBILENET", True, "build_mnv2_backbone"),
        ("MOBILENET", False, "build_resnet_backbone"),
    ],
)
def test_the_bottom_up_of_adelaidet_follows_its_keys(key, value, expected):
    cfg = fpn_d2.get_cfg()
    node = cfg.MODEL
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    cfg.MODEL.FCOS = CfgNode({"TOP_LEVELS": 2})
    cfg.MODEL.BACKBONE.NAME = "build_fcos_resnet_fpn_backbone"
    fpn_d2.swap(cfg)
    assert (cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.BOTTOM_UP) == ("build_fpn_backbone", expected)
