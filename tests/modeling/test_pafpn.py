"""PAFPN against the recurrence of its paper, written out by hand, and against the FPN inside it."""

import pytest
import torch
import torch.nn.functional as F

from fpn_d2.errors import UserError
from fpn_d2.modeling import FPN
from fpn_d2.modeling.necks import PAFPN

from .maps import CHANNELS, ODD_SIZES, SHAPES, Given, bottom_up_maps, randomise, repeated


def build(neck=PAFPN, **options):
    return randomise(neck(Given(), **{"in_features": list(CHANNELS), "out_channels": 6} | options))


def convolved(state, name, x, padding, stride=1):
    """Convolution and, where its parameters are there, group norm with 32 groups, from a state dict alone."""
    x = F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=padding, stride=stride)
    if f"{name}.norm.weight" in state:
        x = F.group_norm(x, 32, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
    return x


def by_hand(state, features, fuse="sum"):
    """Section 3.1: N2 = P2; N_{k+1} = ReLU(conv(P_{k+1} + ReLU(conv/2(N_k)))); P6 is every second cell of N5."""
    p, above = {}, None
    for k in (5, 4, 3, 2):
        merged = convolved(state, f"fpn_lateral{k}", features[f"res{k}"], 0)
        if above is not None:
            merged = merged + repeated(above, 2, merged.shape[-2:])
            merged = merged / 2 if fuse == "avg" else merged
        p[k] = convolved(state, f"fpn_output{k}", merged, 1)
        above = merged
    n = {2: p[2]}
    for k in (2, 3, 4):
        down = convolved(state, f"pafpn_down{k}", n[k], 1, stride=2).clamp(min=0)
        n[k + 1] = convolved(state, f"pafpn_output{k + 1}", p[k + 1] + down, 1).clamp(min=0)
    return {f"p{k}": x for k, x in n.items()} | {"p6": n[5][:, :, ::2, ::2]}


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("options", [{}, {"fuse_type": "avg"}, {"norm": "GN", "out_channels": 32}])
def test_equals_loop_at_any_size(size, options):
    neck, features = build(**options).double(), bottom_up_maps(size, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = neck(features), by_hand(neck.state_dict(), features, options.get("fuse_type"))
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


def test_checkpoint_of_an_fpn_loads():
    fpn, neck = build(FPN), build()
    result = neck.load_state_dict(fpn.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert {key.rsplit(".", 1)[0] for key in result.missing_keys} == {
        *(f"pafpn_down{k}" for k in (2, 3, 4)),
        *(f"pafpn_output{k}" for k in (3, 4, 5)),
    }
    features = bottom_up_maps((65, 97))
    assert torch.equal(neck(features)["p2"], fpn(features)["p2"])


@pytest.mark.parametrize("top_block,source", [("p6p7_c5", "res5"), ("p6p7_p5", "p5"), ("p6p7_maxpool", "res5")])
def test_top_block_reads_c5_or_n5(top_block, source):
    neck, features = build(top_block=top_block), bottom_up_maps((130, 130))
    with torch.no_grad():
        outputs = neck(features)
        p6, p7 = neck.top_block((features | outputs)[source])
    assert torch.equal(outputs["p6"], p6) and torch.equal(outputs["p7"], p7)


def test_impulse_goes_up_again():
    """Down to the finest level by the FPN, and from there up: every map reaches every level."""
    neck, features = build(), bottom_up_maps((96, 96))
    with torch.no_grad():
        before = neck(features)
        for source in CHANNELS:
            moved = dict(features)
            moved[source] = moved[source].clone()
            moved[source][0] += 1
            for name, x in neck(moved).items():
                assert not torch.equal(x[0], before[name][0]), f"{source} does not reach {name}"
                assert torch.equal(x[1], before[name][1]), "an image sees another one"


@pytest.mark.parametrize("wanted", [["p2"], ["p4"], ["p3", "p5"], ["p6"]])
def test_path_ends_at_the_coarsest_level_that_is_wanted(wanted):
    whole, features = build(), bottom_up_maps((65, 97))
    neck = build(out_features=wanted)
    neck.load_state_dict({key: value for key, value in whole.state_dict().items() if key in neck.state_dict()})
    top = min(int(wanted[-1][1:]), 5)
    built = [name for name, _ in neck.named_children()]
    assert [name for name in built if "pafpn_output" in name] == [f"pafpn_output{k}" for k in range(3, top + 1)]
    assert [name for name in built if "fpn_output" in name and "pa" not in name] == [
        f"fpn_output{k}" for k in range(2, top + 1)
    ]
    outputs, all_outputs = neck(features), whole(features)
    assert list(outputs) == wanted
    assert all(torch.equal(outputs[name], all_outputs[name]) for name in wanted)
    sum(x.square().sum() for x in outputs.values()).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_gradcheck_float64():
    neck = build(in_features=["res4", "res5"], out_channels=3).double()
    features = bottom_up_maps((80, 48), ["res4", "res5"], images=1, dtype=torch.float64)
    inputs = [value.requires_grad_() for value in features.values()]
    assert torch.autograd.gradcheck(lambda *maps: tuple(neck(dict(zip(features, maps, strict=True))).values()), inputs)


def test_bottom_up_that_rounds_down():
    features = {name: torch.randn(1, CHANNELS[name], 75 // s.stride, 75 // s.stride) for name, s in SHAPES.items()}
    outputs = build(top_block="none")(features)
    assert [x.shape[-1] for x in outputs.values()] == [18, 9, 4, 2]


def test_options_of_the_fpn_are_checked():
    with pytest.raises(UserError, match="UPSAMPLE.*'cubic'"):
        build(upsample="cubic")
    with pytest.raises(UserError, match="both False"):
        build(top_down=False, lateral=False)
    assert build(upsample="deconv").fpn_upsample4.deconv.kernel_size == (2, 2)
