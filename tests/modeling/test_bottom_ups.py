"""What every bottom-up pathway promises, under a neck that fits it: a new one is tested as soon as it is listed here.

The first test makes sure that none is forgotten.
"""

import copy
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import backbone as detectron2_backbones
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from torch import nn

from fpn_d2 import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling.bottom_up.names import known_bottom_ups

ON_MAIN = pytest.mark.skipif(
    not hasattr(detectron2_backbones, "SwinTransformer"), reason="only Detectron2's main branch has it"
)
VIT = [["depth", 4], ["embed_dim", 32], ["num_heads", 2], ["img_size", 64]]
SWIN = [["depths", [1, 1, 2, 1]], ["embed_dim", 12], ["num_heads", [1, 1, 2, 2]]]
TIMM, VIT_TINY, OPTIONS = "MODEL.TIMM.NAME", "vit_tiny_patch16_224", "MODEL.TIMM.OPTIONS"
SINGLE = ["MODEL.FPN.IN_FEATURES", ["res4"]]
REGNET = ["MODEL.REGNET.DEPTH", 13, "MODEL.REGNET.W_A", 36.44, "MODEL.REGNET.W_0", 24, "MODEL.REGNET.W_M", 2.49]
REGNET += ["MODEL.REGNET.GROUP_WIDTH", 8]  # RegNetX-200MF
# Name: its builder and keys; the neck is FPN on res2 to res5 unless the keys say otherwise.
PATHWAYS = {
    "resnet": ["build_resnet_backbone"],
    "regnet-x": ["build_regnet_backbone", *REGNET],
    "regnet-y": ["build_regnet_backbone", *REGNET, "MODEL.REGNET.SE_RATIO", 0.25],
    "timm-resnet": ["build_timm_backbone", TIMM, "resnet18"],
    "timm-convnext": ["build_timm_backbone", TIMM, "convnext_atto", OPTIONS, [["depths", [1, 1, 1, 1]]]],
    "timm-swin": ["build_timm_backbone", TIMM, "swin_tiny_patch4_window7_224", OPTIONS, SWIN],
    "timm-swin-v2": ["build_timm_backbone", TIMM, "swinv2_tiny_window8_256", OPTIONS, SWIN],
    "timm-mobilenet": ["build_timm_backbone", TIMM, "mobilenetv4_conv_small"],
    "timm-hrnet": ["build_timm_backbone", TIMM, "hrnet_w18_small"],
    "vit-depth": ["build_vit_backbone", TIMM, VIT_TINY, OPTIONS, VIT, "MODEL.VIT.OUT_BLOCKS", [1, 2, 3, 4]],
    "vit-simple": [
        "build_vit_backbone",
        TIMM,
        VIT_TINY,
        OPTIONS,
        VIT,
        "MODEL.FPN.NECK",
        "SimpleFeaturePyramid",
        *SINGLE,
    ],
    "hybrid": ["build_hybrid_resnet_vit_backbone", "MODEL.HYBRID.CHANNELS", 32, "MODEL.HYBRID.DEPTH", 1],
    "image-pyramid": ["build_resnet_backbone", "MODEL.FPN.NECK", "ImagePyramid", *SINGLE, "MODEL.RESNETS.OUT_FEATURES"]
    + [["res4"], "MODEL.FPN.IMAGE_PYRAMID_LEVELS", [3, 4, 5, 6]],
    "d2-swin": ["build_d2_swin_backbone", "MODEL.BOTTOM_UP.OPTIONS", [*SWIN, ["drop_path_rate", 0.0]]],
    "d2-mvit": ["build_d2_mvit_backbone", "MODEL.BOTTOM_UP.OPTIONS"]
    + [[["embed_dim", 8], ["depth", 5], ["last_block_indexes", [0, 1, 3, 4]], ["img_size", 64]]],
    "d2-vit": ["build_d2_vit_backbone", "MODEL.FPN.NECK", "SimpleFeaturePyramid", *SINGLE, "MODEL.BOTTOM_UP.OPTIONS"]
    + [[["embed_dim", 32], ["depth", 2], ["num_heads", 2], ["img_size", 64]]],
}
# Pathways that only take images padded as size_divisibility says; the others take any.
PADDED = {"d2-vit", "d2-mvit"}
BUILT_WITHOUT_TIMM = ("resnet", "regnet", "image", "d2")


def cases():
    return [pytest.param(name, marks=ON_MAIN if name.startswith("d2") else ()) for name in PATHWAYS]


def config(name=None, options=()):
    if name and not name.startswith(BUILT_WITHOUT_TIMM):
        pytest.importorskip("timm")
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_fpn_backbone", 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 18, 64, "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    if name:
        builder, *keys = PATHWAYS[name]
        cfg.merge_from_list(["MODEL.FPN.BOTTOM_UP", builder, *keys])
    cfg.merge_from_list(list(options))
    return cfg


def build(name, **options):
    torch.manual_seed(0)
    return build_backbone(config(name, **options))


def test_every_builder_is_tested_here():
    builders = {builder for builder, *_ in PATHWAYS.values()}
    # Two of Detectron2's make whole pyramids.
    whole = {"build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"}
    of_tests = {"build_tiny_backbone"}  # tests/tiny.py, where it has been imported
    assert set(known_bottom_ups()) - of_tests == builders | whole


@pytest.mark.parametrize("name", cases())
def test_declared_shapes_are_real(name):
    """At odd sizes; at padded ones where Detectron2's own class takes no others."""
    backbone = build(name).eval()
    for size in [(75, 101), (33, 62)]:
        if name in PADDED:
            size = tuple(math.ceil(side / 32) * 32 for side in size)
        with torch.no_grad():
            images = torch.randn(2, 3, *size)
            maps, bottom_up = backbone(images), backbone.bottom_up(images)
        for found, declared in ((maps, backbone.output_shape()), (bottom_up, backbone.bottom_up.output_shape())):
            assert list(found) == list(declared)
            for key, shape in declared.items():
                expected = (2, shape.channels, *(math.ceil(side / shape.stride) for side in size))
                assert found[key].shape == expected, (key, found[key].shape, expected)
                assert torch.isfinite(found[key]).all()


@pytest.mark.parametrize("name", cases())
def test_gradient_reaches_every_parameter(name):
    backbone = build(name).train()
    for parameter in backbone.parameters():  # what starts at zero hides what is behind it
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    maps = backbone(torch.randn(2, 3, 64, 96))
    weighted = [(value * torch.randn_like(value)).sum() for value in maps.values()]
    sum(weighted).backward()
    unused = [key for key, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unused


@pytest.mark.parametrize("name", cases())
def test_state_goes_out_and_in_and_holds_no_batch(name):
    """A saved state makes another model give the same maps; images seen leave no trace in evaluation mode."""
    backbone, other = build(name).eval(), build_backbone(config(name)).eval()
    other.load_state_dict(copy.deepcopy(backbone.state_dict()), strict=True)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        first = backbone(images)
        backbone(torch.randn(1, 3, 96, 64))
        second, third = backbone(images), other(images)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        assert torch.equal(value, third[key]), key
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", cases())
def test_images_of_a_batch_do_not_see_each_other(name):
    backbone = build(name).double().eval()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        together, single = backbone(images), backbone(images[1:])
    for key, value in single.items():
        torch.testing.assert_close(together[key][1:], value)
        assert not torch.allclose(together[key][:1], value)


# ---- What does not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,options,message",
    [
        (
            "vit-simple",
            ["MODEL.FPN.NECK", "FPN", "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]],
            r"asks for res2, res3, res5, .*gives res4 \(stride 16, 32 channels\)",
        ),
        (
            "resnet",
            ["MODEL.FPN.NECK", "SimpleFeaturePyramid"],
            r"Pyramid takes one .*names 4: res2, .*res2 \(stride 4, 64 channels\), .*res5 \(stride 32, 512",
        ),
        (
            "timm-resnet",
            ["MODEL.TIMM.OUT_FEATURES", ["res4"]],
            r"asks for res2, .*gives res4 \(stride 16, 256 channels\)",
        ),
        ("regnet-x", ["MODEL.REGNET.OUT_FEATURES", ["s1"]], "REGNET.OUT_FEATURES.*expected some of res2"),
        ("regnet-x", ["MODEL.REGNET.W_0", 95], "there is no RegNet of MODEL.REGNET.*95"),
    ],
)
def test_nonsense_fails_at_construction(name, options, message):
    with pytest.raises(UserError, match=message):
        build(name, options=options)


@pytest.mark.skipif(hasattr(detectron2_backbones, "SwinTransformer"), reason="this Detectron2 has them")
@pytest.mark.parametrize("name", ["d2-swin", "d2-mvit", "d2-vit"])
def test_what_this_detectron2_lacks_is_said(name):
    with pytest.raises(UserError, match=f"{PATHWAYS[name][0]} needs the .* of Detectron2's main branch"):
        build(name)


@ON_MAIN
def test_options_and_freezing_of_those_on_main():
    with pytest.raises(UserError, match="BOTTOM_UP.OPTIONS .*'width': 3.* do not fit Detectron2's SwinTransformer"):
        build("d2-swin", options=["MODEL.BOTTOM_UP.OPTIONS", [["width", 3]]])
    for name in ("d2-mvit", "d2-vit"):
        with pytest.raises(UserError, match="FREEZE_AT is 2.*set it to 0"):
            build(name, options=["MODEL.BACKBONE.FREEZE_AT", 2])
    swin = build("d2-swin", options=["MODEL.BACKBONE.FREEZE_AT", 2]).bottom_up
    frozen = {key for key, p in swin.named_parameters() if not p.requires_grad}
    assert frozen == {key for key, _ in swin.named_parameters() if key.startswith(("patch_embed", "layers.0."))}


# ---- RegNet -----------------------------------------------------------------------------------------------------


def test_regnet_is_detectron2s():
    """The stages of RegNetX-4GF as published, Detectron2's parameter names and maps, and its freezing."""
    from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem

    cfg = config(options=["MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.RESNETS.NORM", "FrozenBN"])
    ours = BACKBONE_REGISTRY.get("fpn_d2.build_regnet_backbone")(cfg, ShapeSpec(channels=3)).eval()
    assert [shape.channels for shape in ours.output_shape().values()] == [80, 240, 560, 1360]
    assert [len(list(getattr(ours, f"s{i}").children())) for i in (1, 2, 3, 4)] == [2, 5, 14, 2]
    theirs = RegNet(
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        depth=23,
        w_a=38.65,
        w_0=96,
        w_m=2.43,
        group_width=40,
        norm="FrozenBN",
        out_features=["s1", "s2", "s3", "s4"],
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, expected = ours(images), theirs(images)
    assert list(maps) == ["res2", "res3", "res4", "res5"]
    for value, own in zip(expected.values(), maps.values(), strict=True):
        assert torch.equal(value, own)
    frozen = {key.split(".")[0] for key, p in ours.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "s1"}


def test_regnet_builder_reads_every_key():
    keys = {"DEPTH": 6, "W_A": 24.0, "W_0": 24, "W_M": 2.5, "GROUP_WIDTH": 8, "SE_RATIO": 0.25, "STEM_WIDTH": 16}
    options = [word for key, value in keys.items() for word in (f"MODEL.REGNET.{key}", value)]
    cfg = config(options=[*options, "MODEL.REGNET.OUT_FEATURES", ["res3", "res2"]])
    regnet = BACKBONE_REGISTRY.get("fpn_d2.build_regnet_backbone")(cfg, ShapeSpec(channels=3))
    assert list(regnet.output_shape()) == ["res2", "res3"]
    assert [(shape.channels, shape.stride) for shape in regnet.output_shape().values()] == [(24, 4), (64, 8)]
    assert regnet.stem.out_channels == 16 and regnet.s1.b1.f.se is not None and regnet.s2.b1.f.b.groups == 8
