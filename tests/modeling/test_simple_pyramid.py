"""The simple feature pyramid against loops and, where there is one, Detectron2's own; its padding; its refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import backbone as detectron2_backbones
from detectron2.modeling import build_model
from detectron2.modeling.backbone import Backbone
from torch import nn

from fpn_d2 import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import SimpleFeaturePyramid, build_neck
from fpn_d2.modeling.necks.parts import ChannelLayerNorm, rescale_layers
from tests.batches import random_batch

from .maps import Given

C = 16
SHAPES = {"res4": ShapeSpec(channels=C, stride=16)}


class Patches(Backbone):
    """A stand-in for a plain ViT: one convolution over patches, of images padded to whole ones."""

    def __init__(self, patch=16):
        super().__init__()
        self.patch = patch
        self.conv = nn.Conv2d(3, C, patch, patch)

    def forward(self, x):
        height, width = x.shape[-2:]
        return {"res4": self.conv(F.pad(x, (0, -width % self.patch, 0, -height % self.patch)))}

    def output_shape(self):
        return {"res4": ShapeSpec(channels=C, stride=self.patch)}


def build(bottom_up=None, **options):
    torch.manual_seed(0)
    neck = SimpleFeaturePyramid(bottom_up or Patches(), **({"in_features": ["res4"], "out_channels": 6} | options))
    for parameter in neck.parameters():
        nn.init.normal_(parameter, std=0.5)
    return neck


def deconvolve(x, layer):
    n, _, height, width = x.shape
    out = torch.zeros(n, layer.weight.shape[1], 2 * height, 2 * width)
    for i in range(2 * height):
        for j in range(2 * width):
            out[:, :, i, j] = x[:, :, i // 2, j // 2] @ layer.weight[:, :, i % 2, j % 2] + layer.bias
    return out


def channel_norm(x, layer):
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def pool(x):
    """2x2 maxima, the last row and column alone where the number is odd."""
    rows, columns = (range(0, side, 2) for side in x.shape[-2:])
    return torch.stack([torch.stack([x[..., i : i + 2, j : j + 2].amax((2, 3)) for j in columns], 2) for i in rows], 2)


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 1)])
def test_equals_loops(size):
    neck = build()
    x = torch.randn(2, C, *size)
    with torch.no_grad():
        two = neck.simfp_2
        scaled = {
            2: deconvolve(F.gelu(channel_norm(deconvolve(x, two[0]), two[1])), two[3]),
            3: deconvolve(x, neck.simfp_3[0]),
            4: x,
            5: pool(x),
        }
        expected = {}
        for k, value in scaled.items():
            one, three = list(getattr(neck, f"simfp_{k}"))[-2:]
            assert one.bias is None and three.bias is None
            value = channel_norm(F.conv2d(value, one.weight), one.norm)
            expected[f"p{k}"] = channel_norm(F.conv2d(value, three.weight, padding=1), three.norm)
        expected["p6"] = expected["p5"][:, :, ::2, ::2]
        actual = neck.fuse({"res4": x})
    assert list(actual) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not hasattr(detectron2_backbones, "SimpleFeaturePyramid"), reason="only Detectron2's main has one")
def test_equals_detectron2s():
    """The same names and numbers, at sizes that Detectron2's takes; but its padding constraint does nothing."""
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool

    theirs = detectron2_backbones.SimpleFeaturePyramid(
        Patches(), "res4", 6, (4.0, 2.0, 1.0, 0.5), top_block=LastLevelMaxPool(), norm="LN"
    )
    ours = build(norm="LN")
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    state = {key.replace("net.", "bottom_up."): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected, actual = theirs(images), ours(images)
    assert list(expected) == list(actual)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5)
        assert ours.output_shape()[key] == theirs.output_shape()[key]


@pytest.mark.parametrize("size", [(64, 96), (75, 101), (17, 33), (5, 1)])
@pytest.mark.parametrize("top_block", ["maxpool", "p6p7_p5", "none"])
def test_declared_shapes_are_real_at_odd_sizes(size, top_block):
    backbone = build(top_block=top_block, norm="")
    maps = backbone(torch.randn(2, 3, *size))
    assert list(maps) == list(backbone.output_shape())
    for key, shape in backbone.output_shape().items():
        assert maps[key].shape == (2, shape.channels, *(math.ceil(side / shape.stride) for side in size))


def test_cells_stay_where_they_are_when_a_level_is_cut():
    backbone = build(norm="")
    image = torch.randn(1, 3, 70, 50)
    padded = torch.zeros(1, 3, 80, 64)
    padded[..., :70, :50] = image
    with torch.no_grad():
        for key, value in backbone(image).items():
            assert torch.equal(value, backbone(padded)[key][..., : value.shape[2], : value.shape[3]]), key


@pytest.mark.parametrize(
    "stride,levels,divisibility,names",
    [(16, [3, 4], 16, "p3 p4 p5"), (8, [2, 3, 4, 5], 32, "p2 p3 p4 p5 p6"), (32, [3, 4, 5, 6], 64, "p3 p4 p5 p6 p7")],
)
def test_other_levels_and_patches(stride, levels, divisibility, names):
    backbone = build(Patches(stride), levels=levels)
    assert backbone.size_divisibility == divisibility
    maps = backbone(torch.randn(1, 3, 128, 192))
    assert list(maps) == names.split()
    assert [value.shape[2] for value in maps.values()] == [128 >> int(name[1:]) for name in maps]


def config(**options):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_fpn_backbone", 0
    cfg.MODEL.FPN.BOTTOM_UP, cfg.MODEL.FPN.NECK = "build_vit_backbone", "SimpleFeaturePyramid"
    cfg.MODEL.TIMM.NAME = "vit_tiny_patch16_224"
    cfg.MODEL.TIMM.OPTIONS = [["depth", 1], ["embed_dim", 16], ["num_heads", 2], ["img_size", 64]]
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM = ["res4"], 8, "LN"
    for key, value in options.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def test_images_of_a_batch_are_padded_to_the_coarsest_stride():
    """What the misspelt key loses: a ViT alone would ask for 16, and a 48-pixel side has no whole cell of stride 32."""
    pytest.importorskip("timm")
    cfg = config(MODEL__RPN__IN_FEATURES=["p2", "p3", "p4", "p5", "p6"], MODEL__ROI_HEADS__IN_FEATURES=["p4"])
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.NAME = "FPNROIHeads", "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 1, 8, 7
    torch.manual_seed(0)
    model = build_model(cfg)
    batch = random_batch(cfg, sizes=((48, 80), (40, 48)))
    assert model.backbone.bottom_up.size_divisibility == 16
    assert model.preprocess_image(batch).tensor.shape == (2, 3, 64, 96)
    losses = model(batch)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())


def test_builder_reads_the_configuration():
    neck = build_neck(config(MODEL__FPN__SIMPLE_PYRAMID_LEVELS=[3, 4]), Given(SHAPES))
    assert list(neck.output_shape()) == ["p3", "p4", "p5"]
    assert isinstance(neck.simfp_4[0].norm, ChannelLayerNorm) and neck.simfp_4[0].out_channels == 8
    assert build_neck(config(MODEL__FPN__NORM=""), Given(SHAPES)).simfp_4[0].norm is None
    retina = build_neck(config(MODEL__META_ARCHITECTURE="RetinaNet"), Given(SHAPES))
    assert list(retina.output_shape())[-2:] == ["p6", "p7"] and retina.top_block.p6.in_channels == 8


def test_gradcheck_float64():
    neck = build(levels=[3, 4, 5]).double()
    x = torch.randn(1, C, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(neck.fuse({"res4": x}).values()), x)


def test_channel_layer_norm_keeps_half_precision_and_any_memory_layout():
    x = torch.randn(2, C, 3, 5)
    norm = ChannelLayerNorm(C)
    expected = norm(x)
    torch.testing.assert_close(norm(x.to(memory_format=torch.channels_last)), expected)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_channel_layer_norm_has_the_published_epsilon():
    """In front of maps that vary as little as this, an epsilon of 1e-5 would give 0.4 of it."""
    norm = ChannelLayerNorm(C).double()
    x = 1e-3 * torch.randn(1, C, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(norm(x), channel_norm(x, norm), rtol=1e-9, atol=0)


def test_rescaling_halves_channels_per_step():
    assert [rescale_layers(64, steps, "BN")[1] for steps in (-2, 0, 1, 3)] == [64, 64, 32, 8]
    layers, _ = rescale_layers(64, -2, "BN")
    assert nn.Sequential(*layers)(torch.zeros(1, 64, 9, 5)).shape == (1, 64, 3, 2)


RESNET = {f"res{k}": ShapeSpec(channels=2**k, stride=2**k) for k in (2, 3, 4, 5)}


@pytest.mark.parametrize(
    "shapes,options,message",
    [
        (
            RESNET,
            {"in_features": list(RESNET)},
            r"one bottom-up map.*names 4: res2, .*gives res2 \(stride 4, 4 channels\)",
        ),
        (RESNET, {"in_features": []}, "names 0: none"),
        (SHAPES, {"in_features": ["res5"]}, r"asks for res5.*gives res4 \(stride 16, 16 channels\)"),
        (SHAPES, {"levels": [2, 4]}, r"SIMPLE_PYRAMID_LEVELS.*\[2, 4\]; expected consecutive"),
        (SHAPES, {"levels": []}, "SIMPLE_PYRAMID_LEVELS"),
        (SHAPES, {"levels": [0, 1]}, "SIMPLE_PYRAMID_LEVELS"),
        (SHAPES, {"norm": "XN"}, "NORM.*'XN'"),
        (SHAPES, {"top_block": "p6p7_c5"}, "TOP_BLOCK.*'p6p7_c5', which reads C5"),
        (SHAPES, {"top_block": "p6"}, "TOP_BLOCK.*'p6'"),
        ({"res4": ShapeSpec(channels=6, stride=16)}, {}, "6 channels, which cannot be halved 2 times for p2"),
        (
            {"res4": ShapeSpec(channels=80, stride=16)},
            {"norm": "GN", "out_channels": 32},
            r"MODEL.FPN.NORM\) 'GN' does not go with the 40 channels between.*use LN",
        ),
    ],
)
def test_construction_refuses(shapes, options, message):
    with pytest.raises(UserError, match=message):
        build(Given(shapes), **options)


def test_sizes_of_padded_images_stay_open_in_an_export():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.neck = SimpleFeaturePyramid(Plain(), in_features=["res4"], out_channels=8)

        def forward(self, x):
            height, width = ((side + 31) // 32 * 32 for side in x.shape[-2:])
            return self.neck(F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])))

    class Plain(Patches):
        def forward(self, x):
            return {"res4": self.conv(x)}

    sides = {i: torch.export.Dim(name, min=65, max=4096) for i, name in ((2, "height"), (3, "width"))}
    module = Padded().eval()
    program = torch.export.export(module, (torch.randn(1, 3, 165, 333),), dynamic_shapes=(sides,)).module()
    x = torch.randn(1, 3, 200, 130)
    expected = module(x)
    for name, value in program(x).items():
        torch.testing.assert_close(value, expected[name])
