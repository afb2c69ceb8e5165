"""The composed backbone: names of its parameters, modes, shapes of real ResNets at odd sizes, refusals."""

import copy
import math

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.export import scripting_with_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.modeling.backbone import FPN as StockFPN
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import ImageList
from torch import nn

from fpn_d2 import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.fast.apply import speed_up
from fpn_d2.fast.convolution import FastConvolution
from fpn_d2.modeling import FPN, NECK_REGISTRY, Neck

from .maps import Given


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
    assert twin.lateral_convs[-1] is twin.fpn_lateral2 is not backbone.fpn_lateral2
    with torch.no_grad():
        twin.fpn_lateral2.weight.zero_()
    assert backbone.fpn_lateral2.weight.abs().sum() > 0
    assert backbone.train().fpn_lateral2.norm.training and not backbone.eval().fpn_lateral2.norm.training
    assert backbone.double().fpn_output3.weight.dtype == torch.float64
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
    with pytest.raises(UserError, match=message):
        build_backbone(config(**{key.replace(".", "__"): value}))


class _Square(Backbone):
    """Stands for a ViT of Detectron2's main branch, which wants square images of a fixed side."""

    padding_constraints = {"square_size": 512}
    size_divisibility = 48

    def forward(self, x):
        return {"res5": torch.zeros(len(x), 8, *(-(-side // 32) for side in x.shape[-2:]))}

    def output_shape(self):
        return {"res5": ShapeSpec(channels=8, stride=32)}


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({"square_size": 512}, {"square_size": 512}),
        ({"square_size": 0, "size_divisibility": 16}, {"square_size": 0, "size_divisibility": 48}),
        ({"size_divisibility": 64}, {"size_divisibility": 64}),
    ],
)
def test_what_the_bottom_up_pathway_asks_of_images_is_passed_on(monkeypatch, asked, given):
    """Detectron2's main branch hands ``padding_constraints`` to ``ImageList.from_tensors``."""
    monkeypatch.setattr(_Square, "padding_constraints", asked)
    try:
        BACKBONE_REGISTRY._do_register("square", lambda cfg, input_shape: _Square())
        backbone = build_backbone(config(MODEL__FPN__BOTTOM_UP="square", MODEL__FPN__IN_FEATURES=["res5"]))
    finally:
        BACKBONE_REGISTRY._obj_map.pop("square")
    assert backbone.padding_constraints == given
    assert backbone.size_divisibility == 48
    assert asked is _Square.padding_constraints  # a copy


def test_auto_top_block():
    for name in ("RetinaNet", "FPNRetinaNet", "TorchvisionRetinaNet"):
        retina = config(MODEL__META_ARCHITECTURE=name)
        assert list(build_backbone(retina).output_shape())[-2:] == ["p6", "p7"]
    assert list(build_backbone(config()).output_shape())[-1] == "p6"


class OneMap(Neck):
    """With a parameter of its own, beside a child."""

    def __init__(self, bottom_up):
        super().__init__()
        self.conv = nn.Conv2d(512, 16, 1)
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        self.own(bottom_up, ["res5"], {"p5": ShapeSpec(channels=16, stride=32)})

    def fuse(self, features):
        return {"p5": self.scale * self.conv(features["res5"])}


def test_a_neck_of_your_own_is_found_by_name():
    try:
        NECK_REGISTRY._do_register("OneMap", lambda cfg, bottom_up: OneMap(bottom_up))
        backbone = build_backbone(config(MODEL__FPN__NECK="OneMap"))
    finally:
        NECK_REGISTRY._obj_map.pop("OneMap")
    assert backbone(torch.randn(1, 3, 64, 64))["p5"].shape == (1, 16, 2, 2)
    assert backbone.size_divisibility == 0 and backbone.in_features == ("res5",)
    names = list(backbone.state_dict())
    assert names[:3] == ["scale", "conv.weight", "conv.bias"] and names[3].startswith("bottom_up.")


def test_a_neck_without_its_bottom_up_pathway_is_told_how_to_own_it():
    try:
        NECK_REGISTRY._do_register("OneMap", lambda cfg, bottom_up: nn.Identity())
        with pytest.raises(UserError, match=r"OneMap has no bottom_up.*self.own\(bottom_up, in_features, outputs\)"):
            build_backbone(config(MODEL__FPN__NECK="OneMap"))
    finally:
        NECK_REGISTRY._obj_map.pop("OneMap")


class TwoSizes(OneMap):
    """Runs the bottom-up pathway twice, as a neck may."""

    def forward(self, x):
        once, mirrored = (self.fuse(self.bottom_up(images))["p5"] for images in (x, x.flip(3)))
        return {"p5": once + mirrored.flip(3)}


def test_a_neck_may_run_the_bottom_up_pathway_itself():
    bottom_up = build_backbone(config(MODEL__RESNETS__NORM="GN")).bottom_up
    backbone = TwoSizes(bottom_up).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        once, both = backbone.fuse(bottom_up(images))["p5"], backbone(images)["p5"]
        mirrored = backbone.fuse(bottom_up(images.flip(3)))["p5"]
        torch.testing.assert_close(both, once + mirrored.flip(3))
        assert not torch.allclose(both, once)


def test_a_child_that_is_replaced_is_run():
    backbone = build_backbone(config())
    x = torch.randn(1, 3, 64, 64)
    before = backbone(x)
    backbone.fpn_output2 = nn.Conv2d(32, 32, 3, padding=1)
    assert backbone.output_convs[-1] is backbone.fpn_output2
    after = backbone(x)
    assert not torch.equal(after["p2"], before["p2"]) and torch.equal(after["p3"], before["p3"])


def test_frozen_norms_of_the_neck_are_folded_too():
    backbone = build_backbone(config(MODEL__FPN__NORM="FrozenBN"))
    assert isinstance(backbone.fpn_output2, FastConvolution)


@pytest.mark.parametrize("last,warned", [("res5", False), ("res4", True)])
def test_maps_that_nobody_reads_are_told(caplog, last, warned):
    names = [name for name in ("res2", "res3", "res4", "res5") if name <= last]
    build_backbone(config(MODEL__FPN__IN_FEATURES=names))
    assert ("computes res5, which MODEL.FPN.IN_FEATURES does not name" in caplog.text) == warned


@pytest.mark.parametrize("neck", ["SimpleFeaturePyramid", "ImagePyramid", "BiFPN", "NASFPN"])
@pytest.mark.parametrize("key,value", [("OUT_FEATURES", ["p2"]), ("TOP_DOWN", False), ("LATERAL", False)])
def test_options_of_the_fpn_are_refused_by_other_necks(neck, key, value):
    with pytest.raises(UserError, match=f"MODEL.FPN.{key} is .*which the neck {neck} does not have"):
        build_backbone(config(**{"MODEL__FPN__NECK": neck, f"MODEL__FPN__{key}": value}))


def test_image_pyramid_has_no_top_block():
    with pytest.raises(UserError, match="TOP_BLOCK is 'maxpool'.*IMAGE_PYRAMID_LEVELS"):
        build_backbone(config(MODEL__FPN__NECK="ImagePyramid", MODEL__FPN__TOP_BLOCK="maxpool"))


def test_group_norm_of_other_channels_names_the_keys():
    with pytest.raises(UserError, match="MODEL.FPN.NORM.*'GN' does not go with 48 channels .MODEL.FPN.OUT_CHANNELS"):
        build_backbone(config(MODEL__FPN__NORM="GN", MODEL__FPN__OUT_CHANNELS=48))


# ---- What code round Detectron2 reads of its FPN ------------------------------------------------------------------


def exact_twins(retina=False, **options):
    """Detectron2's backbone and ours with the same weights, and images of sides that Detectron2's FPN takes."""
    name = "build_retinanet_resnet_fpn_backbone" if retina else "build_resnet_fpn_backbone"
    meta = "RetinaNet" if retina else "GeneralizedRCNN"
    cfg = config(MODEL__NUMERICS="exact", MODEL__META_ARCHITECTURE=meta, **options)
    if retina:
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    ours = build_backbone(cfg).eval()
    cfg.MODEL.BACKBONE.NAME = name
    stock = build_backbone(cfg).eval()
    stock.load_state_dict(ours.state_dict(), strict=True)
    return stock, ours, torch.randn(2, 3, 64, 96)


def assert_same_maps(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("retina", [False, True])
def test_is_detectron2s_fpn_to_whoever_asks(retina):
    stock, ours, _ = exact_twins(retina, MODEL__FPN__FUSE_TYPE="avg")
    assert isinstance(ours, StockFPN)
    told = ("in_features", "_out_features", "_out_feature_strides", "_out_feature_channels", "_fuse_type")
    for name in (*told, "size_divisibility", "_size_divisibility"):
        assert getattr(ours, name) == getattr(stock, name), name
        assert type(getattr(ours, name)) is type(getattr(stock, name)), name
    assert ours.output_shape() == stock.output_shape() and list(ours.output_shape()) == list(stock.output_shape())
    names = {id(module): name for name, module in [*stock.named_modules(), *ours.named_modules()]}
    for convs in ("lateral_convs", "output_convs"):
        assert [names[id(conv)] for conv in getattr(ours, convs)] == [names[id(conv)] for conv in getattr(stock, convs)]
    for name in ("in_feature", "num_levels"):
        assert getattr(ours.top_block, name) == getattr(stock.top_block, name)
    assert type(ours.top_block) is type(stock.top_block)


@pytest.mark.parametrize("retina", [False, True])
@pytest.mark.parametrize("fuse", ["sum", "avg"])
def test_detectron2s_forward_runs_on_ours(retina, fuse):
    stock, ours, images = exact_twins(retina, MODEL__FPN__FUSE_TYPE=fuse)
    with torch.no_grad():
        expected = stock(images)
        assert_same_maps(StockFPN.forward(ours, images), expected)
        assert_same_maps(ours(images), expected)


@pytest.mark.parametrize("top_block", ["none", "maxpool", "p6_p5", "p6p7_c5", "p6p7_p5", "p6p7_maxpool"])
def test_detectron2s_forward_runs_on_ours_with_any_top_block(top_block):
    ours = build_backbone(config(MODEL__NUMERICS="exact", MODEL__FPN__TOP_BLOCK=top_block)).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert_same_maps(StockFPN.forward(ours, images), ours(images))


@pytest.mark.parametrize("retina", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_scripting_gives_detectron2s_fpn(retina, whole):
    stock, ours, images = exact_twins(retina)
    names = list(ours.state_dict())
    model = nn.Sequential(ours).eval() if whole else ours
    scripted = scripting_with_instances(model, {})
    with torch.no_grad():
        assert_same_maps(scripted(images), stock(images))
        assert_same_maps(ours(images), stock(images))
    assert list(ours.state_dict()) == names


@pytest.mark.parametrize(
    "key,value",
    [("NECK", "PAFPN"), ("NECK", "BiFPN"), ("UPSAMPLE", "bilinear"), ("OUT_FEATURES", ["p2"]), ("LATERAL", False)],
)
def test_scripting_refuses_what_detectron2_does_not_have(key, value):
    backbone = build_backbone(config(**{f"MODEL__FPN__{key}": value})).eval()
    name = type(backbone).__name__.removeprefix("Fast")
    with pytest.raises(UserError, match=f"cannot compile the neck {name}.*trace the model instead"):
        scripting_with_instances(backbone, {})


@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize("overridden", ["fuse", "merge"])
def test_a_subclass_that_computes_something_else_is_not_scripted_as_the_fpn(overridden, numerics):
    class Other(FPN):
        pass

    setattr(Other, overridden, lambda self, *args: getattr(FPN, overridden)(self, *args))
    neck = Other(build_backbone(config()).bottom_up, in_features=["res4", "res5"]).eval()
    with pytest.raises(UserError, match="Other"):
        scripting_with_instances(speed_up(neck, numerics), {})


def test_bottom_up_pathway_comes_last_in_every_neck():
    """Optimizers number their state in this order, and Detectron2's FPN has it last."""
    cfg = config(MODEL__FPN__NECK="PAFPN")
    names = [name.split(".")[0] for name in build_backbone(cfg).state_dict()]
    first = names.index("bottom_up")
    assert set(names[first:]) == {"bottom_up"} and "pafpn_output5" in names[:first]


class Square(Given):
    padding_constraints = {"square_size": 1024, "size_divisibility": 16}
    size_divisibility = 16


def test_padding_that_the_bottom_up_pathway_asks_for():
    """``padding_constraints`` is read by Detectron2's main branch alone."""
    names = ["res2", "res3"]
    neck = FPN(Square(), in_features=names)
    assert neck.size_divisibility == 16
    assert neck.padding_constraints == {"square_size": 1024, "size_divisibility": 16}
    assert FPN(Square(), in_features=["res4", "res5"]).padding_constraints["size_divisibility"] == 32
    assert FPN(Given(), in_features=names).size_divisibility == 8
    assert FPN(Given(), in_features=names).padding_constraints == {}


@pytest.mark.parametrize(
    "key,names,message",
    [
        ("RPN", ["p2", "p7"], r"has p2, p3, p4, p5, p6, not the 'p7'.*set MODEL.FPN.TOP_BLOCK to p6p7_p5"),
        ("RPN", ["p1"], "not the 'p1'.*MODEL.FPN.IN_FEATURES"),
        ("ROI_HEADS", ["res4"], "not the 'res4'.*MODEL.ROI_HEADS.IN_FEATURES"),
    ],
)
def test_a_level_that_is_not_there_names_the_keys(key, names, message):
    """Asked by Detectron2's own builders, which would say no more than KeyError: 'p7'."""
    cfg = config(MODEL__ROI_HEADS__IN_FEATURES=["p2"], MODEL__RPN__IN_FEATURES=["p2"], MODEL__FPN__TOP_BLOCK="maxpool")
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.NAME = "StandardROIHeads", "FastRCNNConvFCHead"
    cfg.MODEL[key].IN_FEATURES = names
    with pytest.raises(UserError, match=message) as caught:
        build_model(cfg)
    assert isinstance(caught.value, KeyError) and not str(caught.value).startswith('"')


@pytest.mark.parametrize(
    "keys",
    [
        {"MODEL.BACKBONE.NAME": "build_fpn_backbone"},
        {"MODEL.ROI_HEADS.NAME": "FPNROIHeads"},
        {"MODEL.PROPOSAL_GENERATOR.NAME": "FPNRPN"},
        {"MODEL.META_ARCHITECTURE": "FPNRetinaNet"},
    ],
)
def test_a_configuration_without_our_keys_says_what_to_call(keys):
    """As from the model zoo: `model_zoo.get_config` knows nothing of ours."""
    zoo = "retinanet_R_50_FPN_1x" if "MODEL.META_ARCHITECTURE" in keys else "faster_rcnn_R_50_FPN_1x"
    cfg = model_zoo.get_config(f"COCO-Detection/{zoo}.yaml")
    cfg.merge_from_list([part for pair in keys.items() for part in pair])
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(UserError, match=r"lacks the keys of fpn_d2: call fpn_d2.add_fpn_d2_config\(cfg\) on it first"):
        build_model(cfg)
