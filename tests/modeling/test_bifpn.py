"""BiFPN: its node table against the published one, its maps against the paper's equations written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

from fpn_d2.config import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import build_neck
from fpn_d2.modeling.necks import BiFPN
from fpn_d2.modeling.necks.bifpn import Fusion, bifpn_nodes

from .maps import CHANNELS, ODD_SIZES, SHAPES, Given, bottom_up_maps, pooled, randomise, repeated


def build(**options):
    options = {"in_features": ["res3", "res4", "res5"], "out_channels": 6, "repeats": 2} | options
    return randomise(BiFPN(Given(), **options)).eval()


def test_node_table_of_efficientdet():
    """Figure 3(d): eight nodes for P3 to P7."""
    assert [tuple(node) for node in bifpn_nodes(3, 7)] == [
        ("p6_td", 6, ("p6", "p7")),
        ("p5_td", 5, ("p5", "p6_td")),
        ("p4_td", 4, ("p4", "p5_td")),
        ("p3_out", 3, ("p3", "p4_td")),
        ("p4_out", 4, ("p4", "p4_td", "p3_out")),
        ("p5_out", 5, ("p5", "p5_td", "p4_out")),
        ("p6_out", 6, ("p6", "p6_td", "p5_out")),
        ("p7_out", 7, ("p7", "p6_out")),
    ]


def test_node_table_of_two_and_three_levels():
    assert [tuple(node) for node in bifpn_nodes(4, 5)] == [
        ("p4_out", 4, ("p4", "p5")),
        ("p5_out", 5, ("p5", "p4_out")),
    ]
    assert [tuple(node) for node in bifpn_nodes(2, 4)] == [
        ("p3_td", 3, ("p3", "p4")),
        ("p2_out", 2, ("p2", "p3_td")),
        ("p3_out", 3, ("p3", "p3_td", "p2_out")),
        ("p4_out", 4, ("p4", "p3_out")),
    ]


@pytest.mark.parametrize("levels", range(2, 9))
def test_node_table_of_any_number_of_levels(levels):
    """A level inside has two nodes, an end one; every node is made before it is used; all are used or outputs."""
    nodes = bifpn_nodes(2, 1 + levels)
    assert len(nodes) == 2 * (levels - 1)
    known = {f"p{k}" for k in range(2, 2 + levels)}
    used = set()
    for node in nodes:
        assert set(node.inputs) <= known and node.name not in known
        assert all(abs(int(name[1]) - node.level) <= 1 for name in node.inputs)
        known.add(node.name)
        used |= set(node.inputs)
    assert known - used <= {f"p{k}_out" for k in range(2, 2 + levels)}


def by_hand(neck, features, first, last, fusion, separable):
    """Section 3.3 for levels ``first`` to ``last``, from the state dict alone; the norm is batch norm or none."""
    state = neck.state_dict()

    def convolved(name, x, **options):
        x = F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)
        if f"{name}.norm.weight" in state:
            names = ("running_mean", "running_var", "weight", "bias")
            mean, var, weight, bias = (state[f"{name}.norm.{key}"][None, :, None, None] for key in names)
            x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        return x

    def node(name, maps):
        n = len(maps)
        if fusion == "sum":
            weights = [1.0] * n
        elif fusion == "softmax":
            exp = state[f"{name}.fusion.weight"].exp()
            weights = [exp[i] / exp.sum() for i in range(n)]
        else:
            positive = [max(float(w), 0.0) for w in state[f"{name}.fusion.weight"]]
            weights = [w / (1e-4 + sum(positive)) for w in positive]
        x = sum(w * m for w, m in zip(weights, maps, strict=True))
        x = x / (1 + (-x).exp())
        if separable:
            x = F.conv2d(x, state[f"{name}.depthwise.weight"], padding=1, groups=x.shape[1])
            return convolved(f"{name}.conv", x)
        return convolved(f"{name}.conv", x, padding=1)

    bottom_up = sorted(int(name[3:]) for name in features)
    entry = {k: convolved(f"input_levels.lateral{k}", features[f"res{k}"]) for k in bottom_up}
    skip = {k: convolved(f"bifpn_skip{k}", features[f"res{k}"]) for k in bottom_up[1:]}
    if last == bottom_up[-1] + 2:
        x = convolved("input_levels.top_block.p6", features[f"res{bottom_up[-1]}"])
        entry[last - 1] = skip[last - 1] = pooled(x, 3, 2, 1)
        entry[last] = skip[last] = pooled(entry[last - 1], 3, 2, 1)
    elif last == bottom_up[-1] + 1:
        entry[last] = skip[last] = entry[last - 1][:, :, ::2, ::2]
    for layer in range(neck.repeats):
        prefix = f"bifpn_layer{layer}."
        td, out = {last: entry[last]}, {}
        for k in range(last - 1, first, -1):
            td[k] = node(f"{prefix}p{k}_td", [entry[k], repeated(td[k + 1], 2, entry[k].shape[-2:])])
        finest = [entry[first], repeated(td[first + 1], 2, entry[first].shape[-2:])]
        out[first] = node(f"{prefix}p{first}_out", finest)
        for k in range(first + 1, last):
            out[k] = node(f"{prefix}p{k}_out", [skip[k], td[k], pooled(out[k - 1], 3, 2, 1)])
        out[last] = node(f"{prefix}p{last}_out", [skip[last], pooled(out[last - 1], 3, 2, 1)])
        entry = skip = out
    return {f"p{k}": entry[k] for k in range(first, last + 1)}


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize(
    "fusion,separable,norm", [("fast", True, "BN"), ("fast", False, ""), ("softmax", True, ""), ("sum", True, "")]
)
@pytest.mark.parametrize(
    "names,top_block,last",
    [(["res3", "res4", "res5"], "p6p7_maxpool", 7), (["res2", "res3", "res4", "res5"], "maxpool", 6)],
)
def test_equals_equations_at_any_size(size, fusion, separable, norm, names, top_block, last):
    neck = build(in_features=names, top_block=top_block, fusion=fusion, separable_conv=separable, norm=norm).double()
    features = bottom_up_maps(size, names, dtype=torch.float64)
    with torch.no_grad():
        actual = neck(features)
        expected = by_hand(neck, features, int(names[0][3:]), last, fusion, separable)
    assert list(actual) == list(expected) == list(neck.output_shape())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


@pytest.mark.parametrize("names", [["res4", "res5"], ["res3", "res4", "res5"]])
def test_without_a_top_block(names):
    neck = build(in_features=names, top_block="none", repeats=1).double()
    features = bottom_up_maps((65, 97), names, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = neck(features), by_hand(neck, features, int(names[0][3:]), 5, "fast", True)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


@pytest.mark.parametrize("top_block", ["p6p7_c5", "p6p7_p5"])
def test_top_block_makes_inputs(top_block):
    neck = build(top_block=top_block)
    features = bottom_up_maps((200, 168), ["res3", "res4", "res5"])
    with torch.no_grad():
        c5 = features["res5"]
        p6, p7 = neck.input_levels.top_block(c5 if top_block == "p6p7_c5" else neck.input_levels.lateral5(c5))
        levels = neck.input_levels(features)
    assert list(levels) == [3, 4, 5, 6, 7]
    assert torch.equal(levels[6], p6) and torch.equal(levels[7], p7)


def test_learned_fusion_is_the_equation():
    fusion = Fusion(3, "fast")
    with torch.no_grad():
        fusion.weight.copy_(torch.tensor([2.0, -1.0, 1.0]))
    maps = [torch.full((1, 1, 1, 1), value) for value in (3.0, 100.0, 6.0)]
    torch.testing.assert_close(fusion(maps).item(), (2 * 3.0 + 1 * 6.0) / (3 + 1e-4))
    softmax = Fusion(3, "softmax")
    softmax.load_state_dict(fusion.state_dict())
    shares = [math.exp(w) for w in (2.0, -1.0, 1.0)]
    expected = sum(share * x.item() for share, x in zip(shares, maps, strict=True)) / sum(shares)
    torch.testing.assert_close(softmax(maps).item(), expected)


def test_fusion_starts_as_the_mean():
    maps = list(torch.randn(3, 2, 4, 5, 6))
    for kind, expected in [("fast", sum(maps) / 3.0001), ("softmax", sum(maps) / 3), ("sum", sum(maps))]:
        torch.testing.assert_close(Fusion(3, kind)(maps), expected)
    assert not list(Fusion(3, "sum").parameters())


@pytest.mark.parametrize("fusion", ["fast", "softmax", "sum"])
def test_fusion_stays_in_half_precision(fusion):
    maps = list(torch.randn(2, 2, 4, 5, 6, dtype=torch.bfloat16))
    assert Fusion(2, fusion)(maps).dtype == torch.bfloat16


def test_every_map_reaches_every_level():
    neck, features = build(repeats=1, fusion="sum"), bottom_up_maps((96, 96), ["res3", "res4", "res5"])
    for source in features:
        moved = dict(features)
        moved[source] = moved[source].clone()
        moved[source][0, :, 1, 1] += 10
        with torch.no_grad():
            for (name, a), b in zip(neck(moved).items(), neck(features).values(), strict=True):
                assert not torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]), f"{source} -> {name}"


def test_gradcheck_float64():
    neck = build(in_features=["res4", "res5"], top_block="none", repeats=1, out_channels=3, fusion="softmax").double()
    features = bottom_up_maps((80, 48), ["res4", "res5"], images=1, dtype=torch.float64)
    inputs = [value.requires_grad_() for value in features.values()]
    assert torch.autograd.gradcheck(lambda *maps: tuple(neck(dict(zip(features, maps, strict=True))).values()), inputs)


def test_bottom_up_that_rounds_down():
    shapes = {name: SHAPES[name] for name in ("res3", "res4", "res5")}
    features = {name: torch.randn(1, CHANNELS[name], 150 // s.stride, 150 // s.stride) for name, s in shapes.items()}
    outputs = build(top_block="maxpool")(features)
    assert [x.shape[-1] for x in outputs.values()] == [18, 9, 4, 2]


def test_size_of_efficientdet_d0():
    """64 channels, P3 to P7, three layers on EfficientNet-B0's 40, 112 and 320 channels."""
    channels = {"res3": 40, "res4": 112, "res5": 320}
    shapes = {name: ShapeSpec(channels=c, stride=SHAPES[name].stride) for name, c in channels.items()}
    neck = BiFPN(Given(shapes), in_features=list(channels), out_channels=64)
    # Eight nodes a layer, five with two inputs and three with three: convolution and norm, and the fusion weights.
    nodes = 3 * 8 * (9 * 64 + 64 * 64 + 2 * 64)
    fusions = 3 * (2 * 5 + 3 * 3)
    # 1x1 convolutions: P3 once, P4 twice, P5 twice and once more for P6.
    laterals = 64 * (40 + 2 * 112 + 3 * 320) + 6 * 2 * 64
    assert sum(p.numel() for p in neck.parameters()) == nodes + fusions + laterals


@pytest.mark.parametrize(
    "options,message",
    [
        ({"fusion": "mean"}, "FUSION.*'mean'.*fast, softmax, sum"),
        ({"repeats": 0}, "REPEATS.*is 0"),
        ({"top_block": "p6"}, "TOP_BLOCK.*'p6'"),
        ({"norm": "XN"}, "NORM.*'XN'"),
        ({"in_features": ["res5"], "top_block": "none"}, "only level 5.*at least two"),
        ({"in_features": ["res3", "res5"]}, r"strides \[8, 32\]"),
    ],
)
def test_construction_refuses(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


@pytest.mark.parametrize(
    "key,value",
    [("UPSAMPLE", "bilinear"), ("FUSE_TYPE", "avg"), ("TOP_DOWN", False), ("LATERAL", False), ("OUT_FEATURES", ["p3"])],
)
@pytest.mark.parametrize("neck", ["BiFPN", "NASFPN"])
def test_options_that_only_the_fpn_has_are_refused(neck, key, value):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.FPN.IN_FEATURES = list(CHANNELS)
    cfg.MODEL.FPN.NECK, cfg.MODEL.FPN.OUT_CHANNELS = neck, 8
    build_neck(cfg, Given())
    cfg.MODEL.FPN[key] = value
    with pytest.raises(UserError, match=rf"MODEL.FPN.{key} is .*neck {neck} does not have"):
        build_neck(cfg, Given())
