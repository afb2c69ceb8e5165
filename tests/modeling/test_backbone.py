"""The composed backbone: names of its parameters, modes, shapes of real ResNets at odd sizes, refusals."""

import copy
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import FPN as StockFPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import ImageList
from torch import nn

from fpn_d2 import add_fpn_d2_config
from fpn_d2.fast.convolution import FastConv2d
from fpn_d2.modeling import NECK_REGISTRY, Neck, PyramidBackbone


def config(depth=18, **options):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    for key, value in options.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.mark.parametrize(
    "depth,groups,channels",
    [
        (18, 1, [64, 128, 256, 512]),
        (34, 1, [64, 128, 256, 512]),
        (50, 1, [256, 512, 1024, 2048]),
        (50, 32, [256, 512, 1024, 2048]),
        pytest.param(101, 1, [256, 512, 1024, 2048], marks=pytest.mark.slow),
        pytest.param(152, 1, [256, 512, 1024, 2048], marks=pytest.mark.slow),
        pytest.param(101, 32, [256, 512, 1024, 2048], marks=pytest.mark.slow),
    ],
)
def test_resnets_at_an_odd_size(depth, groups, channels):
    cfg = config(depth, MODEL__RESNETS__NUM_GROUPS=groups, MODEL__RESNETS__WIDTH_PER_GROUP=8 if groups > 1 else 64)
    backbone = build_backbone(cfg).eval()
    assert [s.channels for s in backbone.bottom_up.output_shape().values()] == channels
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 75, 101))
    assert list(maps) == list(backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    for name, shape in backbone.output_shape().items():
        expected = (1, shape.channels, math.ceil(75 / shape.stride), math.ceil(101 / shape.stride))
        assert maps[name].shape == expected


def test_sizes_of_the_papers_example():
    """A 600 x 900 image: P2-P5 are 150x225, 75x113, 38x57, 19x29."""
    backbone = build_backbone(config()).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 600, 900))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(150, 225), (75, 113), (38, 57), (19, 29), (10, 15)]


def stock_twin(cfg):
    from detectron2.modeling.backbone import build_resnet_backbone

    bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    return StockFPN(bottom_up, cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS, top_block=LastLevelMaxPool())


def test_names_order_and_initial_weights_are_detectron2s():
    cfg = config()
    torch.manual_seed(5)
    stock = stock_twin(cfg)
    torch.manual_seed(5)
    ours = build_backbone(cfg)
    assert [n for n, _ in stock.named_parameters()] == [n for n, _ in ours.named_parameters()]
    assert list(stock.state_dict()) == list(ours.state_dict())
    assert {n for n, _ in stock.named_modules()} - {"top_block"} <= {n for n, _ in ours.named_modules()}
    for a, b in zip(stock.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_copy_mode_and_device_move_the_neck_along():
    backbone = build_backbone(config(MODEL__FPN__NORM="BN"))
    twin = copy.deepcopy(backbone)
    assert twin.neck is not backbone.neck
    assert twin.neck.fpn_lateral2 is twin.fpn_lateral2
    with torch.no_grad():
        twin.fpn_lateral2.weight.zero_()
    assert backbone.fpn_lateral2.weight.abs().sum() > 0
    assert backbone.train().neck.training and not backbone.eval().neck.training
    assert not backbone.fpn_lateral2.norm.training
    assert backbone.double().neck.fpn_output3.weight.dtype == torch.float64
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.equal(twin.eval().double()(x)["p2"], backbone(x)["p2"])


def test_an_image_does_not_see_the_rest_of_its_batch():
    """Padded as ``ImageList`` pads, an image has the same maps alone and beside a larger one."""
    backbone = build_backbone(config()).eval()
    small, large = torch.randn(3, 70, 90), torch.randn(3, 128, 128)
    batch = ImageList.from_tensors([small, large], backbone.size_divisibility).tensor
    alone = torch.zeros(1, 3, 128, 128)
    alone[0, :, :70, :90] = small
    with torch.no_grad():
        together, single = backbone(batch), backbone(alone)
    for name in single:
        torch.testing.assert_close(together[name][:1], single[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("MODEL.FPN.BOTTOM_UP", "build_resnet", "BOTTOM_UP is 'build_resnet'.*build_resnet_backbone"),
        ("MODEL.FPN.BOTTOM_UP", "build_fpn_backbone", "expected a registered bottom-up pathway"),
        ("MODEL.FPN.NECK", "FPM", "NECK is 'FPM'.*known necks: .*FPN"),
        ("MODEL.RESNETS.OUT_FEATURES", ["res4"], "asks for res2, res3, res5.*OUT_FEATURES"),
    ],
)
def test_builder_refuses(key, value, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(config(**{key.replace(".", "__"): value}))


def test_auto_top_block():
    for name in ("RetinaNet", "FPNRetinaNet", "TorchvisionRetinaNet"):
        retina = config(MODEL__META_ARCHITECTURE=name)
        assert list(build_backbone(retina).output_shape())[-2:] == ["p6", "p7"]
    assert list(build_backbone(config()).output_shape())[-1] == "p6"


class OneMap(Neck):
    def __init__(self, child_name="conv", own_parameter=False):
        super().__init__()
        self.add_module(child_name, nn.Conv2d(512, 16, 1))
        if own_parameter:
            self.scale = nn.Parameter(torch.ones(1))

    def forward(self, features):
        return {"p5": self.conv(features["res5"])}

    def output_shape(self):
        return {"p5": ShapeSpec(channels=16, stride=32)}


def test_a_neck_of_your_own_is_found_by_name():
    try:
        NECK_REGISTRY._do_register("OneMap", lambda cfg, input_shape: OneMap())
        backbone = build_backbone(config(MODEL__FPN__NECK="OneMap"))
    finally:
        NECK_REGISTRY._obj_map.pop("OneMap")
    assert backbone(torch.randn(1, 3, 64, 64))["p5"].shape == (1, 16, 2, 2)
    assert backbone.size_divisibility == 0
    assert "conv.weight" in backbone.state_dict()


@pytest.mark.parametrize(
    "options,message", [({"own_parameter": True}, "holds scale"), ({"child_name": "bottom_up"}, "taken")]
)
def test_neck_that_would_lose_parameters_is_refused(options, message):
    bottom_up = build_backbone(config()).bottom_up
    with pytest.raises(ValueError, match=message):
        PyramidBackbone(bottom_up, OneMap(**options))


class TwoSizes(OneMap):
    """Runs the bottom-up pathway twice, as a neck may."""

    def pyramid(self, bottom_up, images):
        return {"p5": self(bottom_up(images))["p5"] + self(bottom_up(images.flip(3)))["p5"].flip(3)}


def test_a_neck_may_run_the_bottom_up_pathway_itself():
    bottom_up = build_backbone(config(MODEL__RESNETS__NORM="GN")).bottom_up
    backbone = PyramidBackbone(bottom_up, TwoSizes()).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        once, both = backbone.neck(bottom_up(images))["p5"], backbone(images)["p5"]
        mirrored = backbone.neck(bottom_up(images.flip(3)))["p5"]
        torch.testing.assert_close(both, once + mirrored.flip(3))
        assert not torch.allclose(both, once)


def test_a_child_that_is_replaced_is_replaced_in_the_neck():
    backbone = build_backbone(config())
    x = torch.randn(1, 3, 64, 64)
    before = backbone(x)
    backbone.fpn_output2 = nn.Conv2d(32, 32, 3, padding=1)
    assert backbone.neck.fpn_output2 is backbone.fpn_output2
    after = backbone(x)
    assert not torch.equal(after["p2"], before["p2"]) and torch.equal(after["p3"], before["p3"])


def test_frozen_norms_of_the_neck_are_folded_too():
    backbone = build_backbone(config(MODEL__FPN__NORM="FrozenBN"))
    assert type(backbone.neck.fpn_output2) is type(backbone.fpn_output2) is FastConv2d


@pytest.mark.parametrize("last,warned", [("res5", False), ("res4", True)])
def test_maps_that_nobody_reads_are_told(caplog, last, warned):
    names = [name for name in ("res2", "res3", "res4", "res5") if name <= last]
    build_backbone(config(MODEL__FPN__IN_FEATURES=names))
    assert ("computes res5, which MODEL.FPN.IN_FEATURES does not name" in caplog.text) == warned


@pytest.mark.parametrize("neck", ["SimpleFeaturePyramid", "ImagePyramid", "BiFPN", "NASFPN"])
@pytest.mark.parametrize("key,value", [("OUT_FEATURES", ["p2"]), ("TOP_DOWN", False), ("LATERAL", False)])
def test_options_of_the_fpn_are_refused_by_other_necks(neck, key, value):
    with pytest.raises(ValueError, match=f"MODEL.FPN.{key} is .*which the neck {neck} does not have"):
        build_backbone(config(**{"MODEL__FPN__NECK": neck, f"MODEL__FPN__{key}": value}))


def test_image_pyramid_has_no_top_block():
    with pytest.raises(ValueError, match="TOP_BLOCK is 'maxpool'.*IMAGE_PYRAMID_LEVELS"):
        build_backbone(config(MODEL__FPN__NECK="ImagePyramid", MODEL__FPN__TOP_BLOCK="maxpool"))


def test_group_norm_of_other_channels_names_the_keys():
    with pytest.raises(ValueError, match="MODEL.FPN.NORM.*'GN' does not go with 48 channels .MODEL.FPN.OUT_CHANNELS"):
        build_backbone(config(MODEL__FPN__NORM="GN", MODEL__FPN__OUT_CHANNELS=48))
