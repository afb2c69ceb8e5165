"""NAS-FPN: its graph against the published one, its maps against the seven cells written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from fpn_d2.errors import UserError
from fpn_d2.modeling.necks import NASFPN
from fpn_d2.modeling.necks.nasfpn import CELLS, attention, nasfpn_cells

from .maps import CHANNELS, ODD_SIZES, SHAPES, Given, bottom_up_maps, pooled, randomise, repeated


def build(**options):
    options = {"in_features": ["res3", "res4", "res5"], "out_channels": 6, "repeats": 2} | options
    return randomise(NASFPN(Given(), **options)).eval()


def test_graph_is_the_published_one():
    """The published form: level, operation, offsets of the two inputs (0 to 4 are P3 to P7, then the cells), output."""
    published = [
        (4, "attention", (1, 3), False),
        (4, "sum", (1, 5), False),
        (3, "sum", (0, 6), True),
        (4, "sum", (6, 7), True),
        (5, "attention", (7, 8), True),
        (7, "attention", (6, 9), True),
        (6, "attention", (9, 10), True),
    ]
    names = [f"p{k}" for k in range(3, 8)] + [cell.name for cell in CELLS]
    own = [
        (cell.level, cell.op, tuple(names.index(name) for name in cell.inputs), cell.name.endswith("_out"))
        for cell in CELLS
    ]
    assert own == published


def test_dangling_inputs_follow_from_the_graph():
    """What no cell has used when the output of its level is made is added to it."""
    levels = {f"p{k}": k for k in range(3, 8)}
    used = set()
    for cell in CELLS:
        used |= set(cell.inputs)
        dangling = {name for name, level in levels.items() if level == cell.level and name not in used}
        assert set(cell.dangling) == (dangling if cell.name.endswith("_out") else set())
        used |= dangling if cell.name.endswith("_out") else set()
        levels[cell.name] = cell.level


def test_graph_moves_to_other_levels():
    moved = nasfpn_cells(2)
    assert nasfpn_cells(3) == CELLS
    assert tuple(moved[0]) == ("p3_1", 3, "attention", ("p3", "p5"), ())
    assert tuple(moved[5]) == ("p6_out", 6, "attention", ("p3_2", "p4_out"), ("p6",))
    assert nasfpn_cells(10)[4].inputs == ("p10_out", "p11_out")


def by_hand(neck, features, first):
    """Figure 6, line by line; level ``first`` is the paper's P3."""
    state = neck.state_dict()

    def convolved(name, x, **options):
        x = F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)
        if f"{name}.norm.weight" in state:
            names = ("running_mean", "running_var", "weight", "bias")
            mean, var, weight, bias = (state[f"{name}.norm.{key}"][None, :, None, None] for key in names)
            x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        return x

    def gp(high, low):
        gate = torch.stack([torch.stack([channel.max() for channel in image]) for image in high])
        return high + low * (1 / (1 + (-gate).exp()))[:, :, None, None]

    bottom_up = sorted(int(name[3:]) for name in features)
    p = [convolved(f"input_levels.lateral{k}", features[f"res{k}"]) for k in bottom_up]
    if len(p) == 3:
        p6 = pooled(convolved("input_levels.top_block.p6", features["res5"]), 3, 2, 1)
        p += [p6, pooled(p6, 3, 2, 1)]
    else:
        p.append(p[-1][:, :, ::2, ::2])
    p3, p4, p5, p6, p7 = p
    size3, size4, size6 = (x.shape[-2:] for x in (p3, p4, p6))
    for stage in range(neck.repeats):

        def out(name, x, stage=stage):
            level = int(name[1]) + first - 3
            return convolved(f"nasfpn_stage{stage}.p{level}{name[2:]}", x.clamp(min=0), padding=1)

        p4_1 = out("p4_1", gp(repeated(p6, 4, size4), p4))
        p4_2 = out("p4_2", p4 + p4_1)
        p3_out = out("p3_out", p3 + repeated(p4_2, 2, size3))
        p4_out = out("p4_out", p4_2 + pooled(p3_out, 2, 2, 0))
        p5_out = out("p5_out", gp(pooled(p4_out, 2, 2, 0), pooled(p3_out, 4, 4, 0)) + p5)
        p7_out = out("p7_out", gp(pooled(p5_out, 4, 4, 0), pooled(p4_2, 8, 8, 0)) + p7)
        p6_out = out("p6_out", gp(repeated(p7_out, 2, size6), pooled(p5_out, 2, 2, 0)))
        p3, p4, p5, p6, p7 = p3_out, p4_out, p5_out, p6_out, p7_out
    return {f"p{first + i}": x for i, x in enumerate((p3, p4, p5, p6, p7))}


@pytest.mark.parametrize("size", [*ODD_SIZES, (200, 333)])
@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize(
    "names,top_block", [(["res3", "res4", "res5"], "p6p7_maxpool"), (["res2", "res3", "res4", "res5"], "maxpool")]
)
def test_equals_figure_6_at_any_size(size, norm, names, top_block):
    neck = build(in_features=names, top_block=top_block, norm=norm).double()
    features = bottom_up_maps(size, names, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = neck(features), by_hand(neck, features, int(names[0][3:]))
    assert list(actual) == list(expected) == list(neck.output_shape())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


def test_attention_is_weighted_by_the_coarser_maximum():
    finer, coarser = torch.randn(2, 2, 3, 4, 5)
    result = attention(finer, coarser)
    for image in range(2):
        for channel in range(3):
            gate = torch.sigmoid(coarser[image, channel].max())
            torch.testing.assert_close(result[image, channel], coarser[image, channel] + gate * finer[image, channel])


@pytest.mark.parametrize("top_block", ["p6p7_c5", "p6p7_p5"])
def test_top_block_makes_inputs(top_block):
    neck = build(top_block=top_block)
    outputs = neck(bottom_up_maps((130, 130), ["res3", "res4", "res5"]))
    assert {name: x.shape[-1] for name, x in outputs.items()} == {"p3": 17, "p4": 9, "p5": 5, "p6": 3, "p7": 2}
    sum(x.square().sum() for x in outputs.values()).backward()
    assert all(p.grad is not None for p in neck.input_levels.top_block.parameters())


def test_gradcheck_float64():
    """At a size where no two cells of a pooling window are close to each other."""
    neck = build(repeats=1, out_channels=2, norm="").double()
    features = bottom_up_maps((40, 24), ["res3", "res4", "res5"], images=1, dtype=torch.float64)
    inputs = [value.requires_grad_() for value in features.values()]
    assert torch.autograd.gradcheck(lambda *maps: tuple(neck(dict(zip(features, maps, strict=True))).values()), inputs)


def test_bottom_up_that_rounds_down():
    names = ["res3", "res4", "res5"]
    features = {name: torch.randn(1, CHANNELS[name], *[300 // SHAPES[name].stride] * 2) for name in names}
    assert [x.shape[-1] for x in build()(features).values()] == [37, 18, 9, 5, 3]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"top_block": "maxpool"}, "published for 5 levels.*give 4: p3, p4, p5, p6; take"),
        ({"in_features": list(CHANNELS)}, "published for 5 levels.*give 6: p2, p3, p4, p5, p6, p7"),
        ({"repeats": -1}, "REPEATS.*is -1"),
        ({"norm": "XN"}, "NORM.*'XN'"),
    ],
)
def test_construction_refuses(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)
