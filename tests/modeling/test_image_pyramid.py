"""The featurised image pyramid: each level is the bottom-up pathway on the image at another size."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import Backbone
from torch import nn

from fpn_d2 import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import ImagePyramid
from fpn_d2.modeling.necks.image_pyramid import resize

SHAPES = {"res4": ShapeSpec(channels=5, stride=16)}


class Patches(Backbone):
    """One convolution over patches of 16 x 16 pixels, of images padded to whole ones; remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 16, 16)
        self.seen = []

    def forward(self, x):
        height, width = x.shape[-2:]
        self.seen.append((height, width))
        return {"res4": self.conv(F.pad(x, (0, -width % 16, 0, -height % 16)))}

    def output_shape(self):
        return SHAPES


def build(**options):
    torch.manual_seed(0)
    backbone = ImagePyramid(Patches(), **({"in_features": ["res4"], "out_channels": 6} | options))
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone


def upscaled(image, factor):
    """Bilinear, with pixel centres at half-integers, as a loop over the pixels of the result."""
    height, width = image.shape[-2:]
    out = torch.zeros(*image.shape[:-2], height * factor, width * factor)
    for i in range(height * factor):
        for j in range(width * factor):
            y, x = (max((p + 0.5) / factor - 0.5, 0.0) for p in (i, j))
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = image[..., y0, x0] * (1 - (x - x0)) + image[..., y0, x1] * (x - x0)
            bottom = image[..., y1, x0] * (1 - (x - x0)) + image[..., y1, x1] * (x - x0)
            out[..., i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


def downscaled(image, factor):
    """A triangle as wide as two pixels of the result, centred on each, cut off at the border."""
    for dim in (-2, -1):
        image = image.movedim(dim, -1)
        side = image.shape[-1]
        columns = []
        for i in range(side // factor):
            distance = (torch.arange(side) + 0.5) / factor - (i + 0.5)
            weight = (1 - distance.abs()).clamp(min=0)
            columns.append((image * (weight / weight.sum())).sum(-1))
        image = torch.stack(columns, dim=-1).movedim(-1, dim)
    return image


def test_resizing_by_hand():
    image = torch.randn(1, 2, 8, 12)
    torch.testing.assert_close(resize(image, 1), upscaled(image, 2))
    torch.testing.assert_close(resize(image, 2), upscaled(image, 4))
    torch.testing.assert_close(resize(image, -1), downscaled(image, 2))
    torch.testing.assert_close(resize(image, -2), downscaled(image, 4))
    assert resize(image, 0) is image


def test_levels_by_hand():
    backbone = build(levels=[3, 4, 5])
    image = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        actual = backbone(image)
        for k, scaled in {
            3: upscaled(image, 2),
            4: F.pad(image, (0, 8, 0, 8)),
            5: downscaled(F.pad(image, (0, 8, 0, 24)), 2),
        }.items():
            x = backbone.bottom_up(scaled)["res4"]
            x = F.conv2d(x, backbone.pyramid_lateral.weight, backbone.pyramid_lateral.bias)
            x = F.conv2d(x, backbone.pyramid_output.weight, backbone.pyramid_output.bias, padding=1)
            torch.testing.assert_close(actual[f"p{k}"], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (75, 101), (17, 33), (5, 1)])
def test_declared_shapes_are_real_at_odd_sizes(size):
    backbone = build()
    maps = backbone(torch.randn(2, 3, *size))
    assert list(maps) == list(backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    for key, shape in backbone.output_shape().items():
        assert maps[key].shape == (2, 6, *(math.ceil(side / shape.stride) for side in size))
    for k, seen in zip((2, 3, 4, 5, 6), backbone.bottom_up.seen, strict=True):
        assert seen == tuple(16 * math.ceil(side / 2**k) for side in size)
    assert backbone.size_divisibility == 64


def test_a_level_sees_the_same_object_at_the_size_of_its_level():
    """An image twice as large has on p5 what the image itself has on p4: what the pyramid is for."""
    backbone = build(levels=[4, 5])
    image = torch.randn(1, 3, 64, 64)
    large = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    smooth = torch.full_like(image, 0.7)  # where no detail is lost, to the last bit
    with torch.no_grad():
        torch.testing.assert_close(backbone(smooth)["p4"], backbone(F.interpolate(smooth, scale_factor=2))["p5"])
        p4, p5, other = backbone(image)["p4"], backbone(large)["p5"], backbone(torch.randn_like(image))["p4"]
    assert (p4 - p5).norm() < 0.7 * (p4 - other).norm()


def test_one_set_of_weights_and_gradient_from_every_level():
    backbone = build()
    assert {name.split(".")[0] for name in backbone.state_dict()} == {"bottom_up", "pyramid_lateral", "pyramid_output"}
    maps = backbone(torch.randn(1, 3, 40, 40))
    for value in maps.values():
        grads = torch.autograd.grad(value.square().sum(), list(backbone.parameters()), retain_graph=True)
        assert all(grad.abs().sum() > 0 for grad in grads)


def test_fuse_takes_maps_that_are_there_already():
    backbone = build(levels=[3, 4])
    features = {"res3": torch.randn(1, 5, 8, 8), "res4": torch.randn(1, 5, 4, 4)}
    outputs = backbone.fuse(features)
    for k in (3, 4):
        expected = backbone.pyramid_output(backbone.pyramid_lateral(features[f"res{k}"]))
        assert torch.equal(outputs[f"p{k}"], expected)


def test_from_configuration_the_resnet_keeps_its_names():
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.NECK = "build_fpn_backbone", "ImagePyramid"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 18, 64, "GN"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3"]
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.IMAGE_PYRAMID_LEVELS = 32, "GN", [3, 4, 5]
    backbone = build_backbone(cfg)
    assert "bottom_up.res2.0.conv1.weight" in backbone.state_dict()
    assert isinstance(backbone.pyramid_output.norm, nn.GroupNorm)
    maps = backbone(torch.randn(1, 3, 75, 50))
    assert {name: tuple(value.shape[1:]) for name, value in maps.items()} == {
        "p3": (32, 10, 7),
        "p4": (32, 5, 4),
        "p5": (32, 3, 2),
    }


@pytest.mark.parametrize(
    "options,message",
    [
        ({"in_features": ["res4", "res5"]}, r"one bottom-up map.*names 2: res4, res5; .*gives res4 \(stride 16, 5 ch"),
        ({"in_features": ["res3"]}, "asks for res3"),
        ({"levels": [4, 3]}, r"IMAGE_PYRAMID_LEVELS.*\[4, 3\]"),
        ({"norm": "XN"}, "NORM.*'XN'"),
    ],
)
def test_construction_refuses(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)
