"""The FPN against a hand-written loop, with impulses that show each path, and its options."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fpn_d2.errors import UserError
from fpn_d2.fast.necks import add_nearest
from fpn_d2.modeling import FPN
from fpn_d2.modeling.necks.parts import fit

from .maps import CHANNELS, ODD_SIZES, Given, bottom_up_maps, pooled, repeated


def build(**options):
    torch.manual_seed(1)
    neck = FPN(Given(), **{"in_features": list(CHANNELS), "out_channels": 6} | options)
    for parameter in neck.parameters():  # biases start at zero, where a forgotten one would not show
        nn.init.normal_(parameter, std=0.3)
    return neck


def by_hand(neck, features, fuse="sum"):
    """The pyramid of figure 3, with up-sampling as an explicit loop over cells: cell i sees cell i // 2."""
    out, above = {}, None
    for level in (5, 4, 3, 2):
        lateral = getattr(neck, f"fpn_lateral{level}")
        merged = F.conv2d(features[f"res{level}"], lateral.weight, lateral.bias)
        if above is not None:
            for i in range(merged.shape[2]):
                for j in range(merged.shape[3]):
                    merged[:, :, i, j] += above[:, :, i // 2, j // 2]
            if fuse == "avg":
                merged = merged / 2
        output = getattr(neck, f"fpn_output{level}")
        out[f"p{level}"] = F.conv2d(merged, output.weight, output.bias, padding=1)
        above = merged
    out["p6"] = out["p5"][:, :, ::2, ::2]
    return {f"p{level}": out[f"p{level}"] for level in (2, 3, 4, 5, 6)}


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("fuse", ["sum", "avg"])
def test_equals_loop_at_any_size(size, fuse):
    neck = build(fuse_type=fuse)
    features = bottom_up_maps(size)
    with torch.no_grad():
        actual, expected = neck(features), by_hand(neck, features, fuse)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "deconv"])
@pytest.mark.parametrize("top_block", ["maxpool", "p6p7_c5", "p6p7_p5", "p6p7_maxpool", "none"])
def test_declared_shapes_are_real_at_odd_sizes(size, upsample, top_block):
    neck = build(upsample=upsample, top_block=top_block)
    outputs = neck(bottom_up_maps(size))
    assert list(outputs) == list(neck.output_shape())
    for name, shape in neck.output_shape().items():
        assert outputs[name].shape[1] == shape.channels == 6
        assert outputs[name].shape[2:] == tuple(math.ceil(side / shape.stride) for side in size)


@pytest.mark.parametrize(
    "in_features,top_block,levels",
    [
        (["res2", "res3", "res4", "res5"], "none", "p2 p3 p4 p5"),
        (["res3", "res4", "res5"], "none", "p3 p4 p5"),
        (["res2", "res3", "res4", "res5"], "maxpool", "p2 p3 p4 p5 p6"),
        (["res3", "res4", "res5"], "p6p7_c5", "p3 p4 p5 p6 p7"),
        (["res3", "res4", "res5"], "p6p7_p5", "p3 p4 p5 p6 p7"),
        (["res3", "res4", "res5"], "p6p7_maxpool", "p3 p4 p5 p6 p7"),
        (["res3", "res4"], "maxpool", "p3 p4 p5"),
        (["res4"], "none", "p4"),
    ],
)
def test_any_run_of_levels(in_features, top_block, levels):
    neck = build(in_features=in_features, top_block=top_block)
    outputs = neck(bottom_up_maps((70, 90), in_features))
    assert list(outputs) == levels.split()
    assert [s.stride for s in neck.output_shape().values()] == [2 ** int(name[1:]) for name in outputs]


def test_top_block_reads_c5_or_p5():
    features = bottom_up_maps((128, 128))
    for name, source, channels in [("p6p7_c5", "res5", 20), ("p6p7_p5", "p5", 6)]:
        neck = build(top_block=name)
        assert neck.top_block.p6.in_channels == channels
        with torch.no_grad():
            outputs = neck(features)
            p6 = neck.top_block.p6((features | outputs)[source])
            p7 = neck.top_block.p7(p6.relu())
        assert torch.equal(outputs["p6"], p6) and torch.equal(outputs["p7"], p7)


def test_p6p7_maxpool_pools_c5():
    neck, features = build(top_block="p6p7_maxpool"), bottom_up_maps((200, 168))
    conv = neck.top_block.p6
    with torch.no_grad():
        outputs = neck(features)
        p6 = pooled(F.conv2d(features["res5"], conv.weight, conv.bias), 3, 2, 1)
        torch.testing.assert_close(outputs["p6"], p6)
        torch.testing.assert_close(outputs["p7"], pooled(p6, 3, 2, 1))
    assert [module.norm is None for module in (conv, build(top_block="p6p7_maxpool", norm="BN").top_block.p6)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "deconv"])
@pytest.mark.parametrize("source", ["res2", "res3", "res4", "res5"])
def test_impulse_reaches_its_level_and_all_finer_ones(source, upsample):
    neck = build(upsample=upsample)
    features = bottom_up_maps((96, 96))
    with torch.no_grad():
        before = neck(features)
        features[source] = features[source].clone()
        features[source][0, 0, 1, 1] += 10
        changed = {name: (value != before[name]).any(dim=1) for name, value in neck(features).items()}
    own = int(source[3])
    for name, where in changed.items():
        level = int(name[1:])
        assert not where[1].any(), "an image sees another one"
        if level > own and not (level == 6 and own == 5):
            assert not where.any(), f"{source} reaches {name}"
        elif level <= own:
            assert where[0].any(), f"{source} does not reach {name}"
            # The 3x3 output convolution and, for bilinear, one cell of blur: nothing further away may change.
            cells = where[0].nonzero() * 2.0 ** (level - own)
            assert (cells >= -1.0).all() and (cells < 4.0).all()


@pytest.mark.parametrize("top_block", ["maxpool", "p6p7_c5", "p6p7_p5"])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "deconv"])
def test_gradient_of_the_finest_level_reaches_every_map(upsample, top_block):
    neck = build(upsample=upsample, top_block=top_block)
    features = {name: value.requires_grad_() for name, value in bottom_up_maps((65, 97)).items()}
    outputs = neck(features)
    grads = torch.autograd.grad(outputs["p2"].square().sum(), list(features.values()), retain_graph=True)
    assert all(grad.abs().sum() > 0 for grad in grads)
    sum(value.square().sum() for value in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in neck.parameters())


def test_gradcheck_float64():
    neck = build(in_features=["res4", "res5"], upsample="bilinear").double()
    features = bottom_up_maps((80, 48), ["res4", "res5"], images=1, dtype=torch.float64)
    inputs = [value.requires_grad_() for value in features.values()]
    assert torch.autograd.gradcheck(lambda *maps: tuple(neck(dict(zip(features, maps, strict=True))).values()), inputs)


def test_deconv_starts_as_nearest():
    features = bottom_up_maps((65, 97))
    necks = []
    for upsample in ("nearest", "deconv"):
        torch.manual_seed(0)
        necks.append(FPN(Given(), in_features=list(CHANNELS), out_channels=6, upsample=upsample))
    necks[1].load_state_dict(necks[0].state_dict(), strict=False)
    for a, b in zip(necks[0](features).values(), necks[1](features).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bilinear_keeps_a_constant_and_a_ramp():
    """Bilinear up-sampling by two puts fine cell i at coarse coordinate (i + 0.5) / 2 - 0.5, odd sizes included."""
    from fpn_d2.modeling.necks.upsample import Interpolate

    coarse = torch.arange(5.0).expand(1, 1, 5, 5)
    fine = Interpolate("bilinear")(coarse, (9, 9))[0, 0]
    expected = ((torch.arange(9) + 0.5) / 2 - 0.5).clamp(0, 4)
    torch.testing.assert_close(fine, expected.expand(9, 9))


def test_bottom_up_that_rounds_down_is_stretched():
    assert fit(torch.randn(1, 2, 6, 6), (7, 7), "nearest").shape == (1, 2, 7, 7)


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
def test_norm_and_bias(norm):
    neck = FPN(Given(), in_features=list(CHANNELS), out_channels=32, norm=norm)
    for module in (neck.fpn_lateral3, neck.fpn_output3):
        assert (module.bias is None) == bool(norm)
        assert (module.norm is None) == (not norm)
    assert neck(bottom_up_maps((64, 64)))["p2"].shape == (2, 32, 16, 16)


def test_convolutions_are_the_papers():
    neck = FPN(Given(), in_features=list(CHANNELS))
    assert neck.fpn_lateral2.kernel_size == (1, 1) and neck.fpn_output2.kernel_size == (3, 3)
    assert {s.channels for s in neck.output_shape().values()} == {256}
    assert neck.size_divisibility == 32


@pytest.mark.parametrize(
    "options,message",
    [
        ({"fuse_type": "max"}, "FUSE_TYPE.*'max'.*sum.*avg"),
        ({"upsample": "bicubic"}, "UPSAMPLE.*'bicubic'.*nearest, bilinear, deconv"),
        ({"top_block": "p6"}, "TOP_BLOCK.*'p6'.*maxpool, p6_p5, p6p7_c5, p6p7_p5, p6p7_maxpool, none"),
        ({"norm": "XN"}, "NORM.*'XN'.*expected GN"),
        ({"in_features": []}, "IN_FEATURES.*empty"),
        ({"in_features": ["res4", "res6"]}, r"asks for res6.*res5 \(stride 32, 20 channels\)"),
        ({"in_features": ["res2", "res4"]}, r"strides \[4, 16\]"),
        ({"in_features": ["res3", "res2"]}, r"strides \[8, 4\]"),
    ],
)
def test_construction_refuses(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


# ---- Ablations ------------------------------------------------------------------------------------------------------


def reach(neck):
    """``{map: outputs that change when one cell of the map does}``."""
    features = bottom_up_maps((96, 96))
    with torch.no_grad():
        before = neck(features)
        seen = {}
        for source in features:
            changed = dict(features)
            changed[source] = changed[source].clone()
            changed[source][:, :, 1, 1] += 10
            seen[source] = " ".join(name for name, x in neck(changed).items() if not torch.equal(x, before[name]))
    return seen


def children(neck):
    return sorted(name for name, module in neck.named_children() if list(module.parameters()))


ALL_TOP_DOWN = {"res2": "p2", "res3": "p2 p3", "res4": "p2 p3 p4", "res5": "p2 p3 p4 p5 p6"}


@pytest.mark.parametrize(
    "options,expected",
    [
        ({}, ALL_TOP_DOWN),
        ({"top_down": False}, {"res2": "p2", "res3": "p3", "res4": "p4", "res5": "p5 p6"}),
        ({"lateral": False}, {"res2": "", "res3": "", "res4": "", "res5": "p2 p3 p4 p5 p6"}),
        ({"out_features": ["p2"]}, {"res2": "p2", "res3": "p2", "res4": "p2", "res5": "p2"}),
        ({"out_features": ["p2"], "top_down": False}, {"res2": "p2", "res3": "", "res4": "", "res5": ""}),
        ({"out_features": ["p2"], "lateral": False}, {"res2": "", "res3": "", "res4": "", "res5": "p2"}),
        ({"out_features": ["p6", "p4"]}, {"res2": "", "res3": "", "res4": "p4", "res5": "p4 p6"}),
        ({"out_features": ["p6"], "top_block": "p6p7_c5"}, {"res2": "", "res3": "", "res4": "", "res5": "p6"}),
    ],
)
def test_impulse_shows_what_is_cut(options, expected):
    assert reach(build(**options)) == expected


LATERALS = [f"fpn_lateral{k}" for k in (2, 3, 4, 5)]
OUTPUTS = [f"fpn_output{k}" for k in (2, 3, 4, 5)]


@pytest.mark.parametrize(
    "options,expected",
    [
        ({}, LATERALS + OUTPUTS),
        ({"top_down": False}, LATERALS + OUTPUTS),
        ({"lateral": False}, LATERALS[-1:] + OUTPUTS),
        ({"out_features": ["p2"]}, LATERALS + OUTPUTS[:1]),
        ({"out_features": ["p2"], "top_down": False}, LATERALS[:1] + OUTPUTS[:1]),
        ({"out_features": ["p4"]}, LATERALS[2:] + OUTPUTS[2:3]),
        ({"out_features": ["p6"]}, LATERALS[3:] + OUTPUTS[3:]),  # every second cell of p5
        ({"out_features": ["p7"], "top_block": "p6p7_p5"}, LATERALS[3:] + OUTPUTS[3:] + ["top_block"]),
        ({"out_features": ["p7"], "top_block": "p6p7_c5"}, ["top_block"]),
        ({"out_features": ["p5"], "top_block": "p6p7_c5"}, LATERALS[3:] + OUTPUTS[3:]),
        ({"upsample": "deconv"}, LATERALS + OUTPUTS + ["fpn_upsample2", "fpn_upsample3", "fpn_upsample4"]),
        ({"upsample": "deconv", "top_down": False}, LATERALS + OUTPUTS),
        ({"upsample": "deconv", "out_features": ["p4"]}, LATERALS[2:] + OUTPUTS[2:3] + ["fpn_upsample4"]),
    ],
)
def test_what_is_cut_is_not_built(options, expected):
    neck = build(**options)
    assert children(neck) == sorted(expected)
    outputs = neck(bottom_up_maps((65, 97)))
    assert list(outputs) == list(neck.output_shape()) == sorted(options.get("out_features", outputs))
    sum(x.square().sum() for x in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in neck.parameters())


@pytest.mark.parametrize("top_block", ["p6p7_c5", "p6p7_p5", "p6p7_maxpool"])
def test_p6_alone_has_no_p7(top_block):
    neck = build(top_block=top_block, out_features=["p5", "p6"])
    assert [name for name, _ in neck.top_block.named_children()] == ["p6"]
    whole = build(top_block=top_block)
    whole.load_state_dict(neck.state_dict(), strict=False)
    features = bottom_up_maps((65, 97))
    assert torch.equal(neck(features)["p6"], whole(features)["p6"])


@pytest.mark.parametrize("options", [{}, {"top_down": False}, {"lateral": False}])
def test_ablation_equals_loop(options):
    neck, features = build(**options), bottom_up_maps((65, 97))
    fewer = build(**options, out_features=["p3", "p5"])
    fewer.load_state_dict({k: v for k, v in neck.state_dict().items() if k in fewer.state_dict()})
    with torch.no_grad():
        actual, chosen = neck(features), fewer(features)
        above = None
        for level in (5, 4, 3, 2):
            merged = 0
            if level == 5 or options.get("lateral", True):
                lateral = getattr(neck, f"fpn_lateral{level}")
                merged = F.conv2d(features[f"res{level}"], lateral.weight, lateral.bias)
            if above is not None and options.get("top_down", True):
                merged = merged + repeated(above, 2, features[f"res{level}"].shape[-2:])
            output = getattr(neck, f"fpn_output{level}")
            expected = F.conv2d(merged, output.weight, output.bias, padding=1)
            torch.testing.assert_close(actual[f"p{level}"], expected, rtol=1e-5, atol=1e-5)
            above = merged
    assert list(chosen) == ["p3", "p5"]
    assert all(torch.equal(chosen[name], actual[name]) for name in chosen)


def test_average_is_of_two_maps_only():
    """Without laterals there is nothing to average with: the up-sampled map is not halved."""
    features = bottom_up_maps((64, 64))
    necks = [build(lateral=False, fuse_type=fuse) for fuse in ("sum", "avg")]
    assert all(torch.equal(a, b) for a, b in zip(*(neck(features).values() for neck in necks), strict=True))


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"top_down": False, "lateral": False}, ValueError, "TOP_DOWN.*LATERAL.*both False"),
        ({"out_features": ["p2", "p7"]}, ValueError, "OUT_FEATURES.*asks for p7;.*has p2, p3, p4, p5, p6"),
        ({"out_features": ["res2"]}, ValueError, "OUT_FEATURES.*asks for res2"),
        ({"out_features": "p2"}, UserError, "OUT_FEATURES.*list of names"),
    ],
)
def test_ablation_refuses(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


@pytest.mark.parametrize("size", [(8, 12), (7, 12), (8, 11), (7, 11), (1, 1), (1, 6), (5, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_addition_in_place_is_that_of_the_up_sampled_map(size, layout):
    finer = torch.randn(2, 3, *size).contiguous(memory_format=layout)
    coarser = torch.randn(2, 3, *((side + 1) // 2 for side in size)).contiguous(memory_format=layout)
    expected = finer.clone()
    for i in range(size[0]):
        for j in range(size[1]):
            expected[:, :, i, j] += coarser[:, :, i // 2, j // 2]
    assert torch.equal(add_nearest(finer, coarser), expected)
    assert torch.equal(finer, expected)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_inference_and_training_give_the_same_bits(size):
    neck = build()
    features = bottom_up_maps(size)
    trained = neck(features)
    with torch.no_grad():
        inferred = neck(features)
    assert all(torch.equal(inferred[name], trained[name].detach()) for name in trained)
