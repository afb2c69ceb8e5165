"""3x3 convolution of maps in bfloat16 by minimal filtering with factors in it, against such filtering in float64.

That filtering is written from the definition of its matrices, with the same factors rounded, and is itself checked
against the convolution, with none rounded.
"""


import numpy as np
import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn

from fpn_d2.fast import cpu_maps, winograd
from fpn_d2.fast.apply import make_fast
from fpn_d2.fast.frozen import freeze_convolutions

from .test_winograd import assert_close, case, with_gradients

POINTS = [0, 181 / 256, -181 / 256, 181 / 128, -181 / 128]
# The error of an output's size: that of the factors, and a result's own, which is rounded to bfloat16.
FACTORS, RESULT = 0.02, 2**-8


@pytest.fixture(autouse=True)
def _needs_bfloat16(monkeypatch):
    monkeypatch.delenv(cpu_maps.VARIABLE, raising=False)
    if not winograd.OP.ask("winograd_has_bfloat16"):
        pytest.skip("no C++ compiler, or a processor that does not multiply bfloat16: filtering in it is NOT tested")


def matrices():
    """A^T (4, 6), G (6, 3) and B^T (6, 6) of F(4, 3): Lagrange's interpolation at POINTS and at infinity."""
    a, g, b = np.zeros((4, 6)), np.zeros((6, 3)), np.zeros((6, 6))
    for i, point in enumerate(POINTS):
        others = [other for other in POINTS if other != point]
        a[:, i] = [point**k for k in range(4)]
        g[i] = [point**k / np.prod([point - other for other in others]) for k in range(3)]
        b[i, :5] = np.poly(others)[::-1]
    a[3, 5] = g[5, 2] = 1
    b[5] = np.poly(POINTS)[::-1]
    return [torch.from_numpy(matrix) for matrix in (a, g, b)]


def to_bfloat16(x):
    return x.float().bfloat16().double()


def tiles_of(x, size):
    """(N, C, H, W) -> (tiles, C, size, size), four cells apart, over a map with zeros round it."""
    border = (size - 4) // 2
    height, width = (-(-length // 4) * 4 for length in x.shape[2:])
    x = nn.functional.pad(x, (border, border + width - x.shape[3], border, border + height - x.shape[2]))
    return x.unfold(2, size, 4).unfold(3, size, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def filtered(x, weight, bias, rounded):
    a, g, b = matrices()
    v = rounded(b @ tiles_of(x.double(), 6) @ b.T)
    u = rounded(g @ weight.double() @ g.T)
    y = a @ torch.einsum("tcij,ocij->toij", v, u) @ a.T
    images, _, height, width = x.shape
    down, across = -(-height // 4), -(-width // 4)
    y = y.view(images, down, across, len(weight), 4, 4).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(images, len(weight), 4 * down, 4 * across)[..., :height, :width] + bias.double()[:, None, None]


def filtered_gradient(x, gradient, rounded):
    a, g, b = matrices()
    v = rounded(b @ tiles_of(x.double(), 6) @ b.T)
    m = rounded(a.T @ tiles_of(gradient.double(), 4) @ a)
    return g.T @ torch.einsum("tcij,toij->ocij", v, m) @ g


SHAPES = [
    (1, 16, 16, 1, 1),
    (2, 16, 32, 3, 5),
    (3, 48, 80, 9, 12),  # an odd number of tiles; a whole panel of weights and a part of one
    (1, 32, 144, 13, 7),
    (1, 160, 64, 30, 41),  # several blocks of tiles
    (1, 160, 64, 101, 105),  # in the gradient of the weights too
]


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_same_filtering_in_float64(shape):
    x, weight, bias = case(*shape, dtype=torch.bfloat16)
    gradient = torch.randn(shape[0], shape[2], *shape[3:], generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = [tensor.double() for tensor in (x, weight, bias)]
    function = lambda x, w, b: nn.functional.conv2d(x, w, b, padding=1)  # noqa: E731
    plain, of_x, of_weight, _ = with_gradients(function, wide, gradient.double())
    turned, none = weight.flip(2, 3).transpose(0, 1), torch.zeros(shape[1])
    for rounded, one, other, third in (
        (lambda value: value, plain, of_x, of_weight),
        (to_bfloat16, *with_gradients(winograd.conv3x3, (x, weight, bias), gradient)[:3]),
    ):
        # Where a factor lies in the middle between two numbers, rounding in float32 and float64 may part.
        tolerance = 1e-12 if one.dtype == torch.float64 else 1.5 * RESULT
        assert_close(one, filtered(x, weight, bias, rounded), tolerance)
        assert_close(other, filtered(gradient, turned, none, rounded), tolerance)
        assert_close(third, filtered_gradient(x, gradient, rounded), tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_convolution(shape):
    tensors = case(*shape, dtype=torch.bfloat16)
    gradient = torch.randn(shape[0], shape[2], *shape[3:], generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = [tensor.double() for tensor in tensors]
    expected = with_gradients(lambda x, w, b: nn.functional.conv2d(x, w, b, padding=1), wide, gradient.double())
    for one, other in zip(with_gradients(winograd.conv3x3, tensors, gradient), expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one, other, FACTORS + RESULT)


def test_rounding_is_what_the_docs_say():
    x, weight, bias = case(1, 256, 64, 40, 40, dtype=torch.bfloat16)
    expected = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    error = (winograd.conv3x3(x, weight, bias) - expected).square().mean().sqrt()
    assert 0.004 < error / (expected - bias.double()[:, None, None]).square().mean().sqrt() < 0.014


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads):
    tensors = case(3, 32, 80, 50, 61, dtype=torch.bfloat16)
    gradient = torch.randn(3, 80, 50, 61)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            found.append(with_gradients(winograd.conv3x3, tensors, gradient))
    finally:
        torch.set_num_threads(before)
    for name, one, other in zip(("output", "input", "weight"), *found, strict=False):
        assert torch.equal(one, other), name


def test_nan_and_infinity_are_not_lost():
    x, weight, bias = case(1, 16, 16, 12, 12, dtype=torch.bfloat16)
    clean = winograd.conv3x3(x, weight, bias)
    x[0, 3, 5, 5] = float("inf")
    out = winograd.conv3x3(x, weight, bias)
    assert not out[0, :, 4:7, 4:7].isfinite().any()
    assert torch.equal(out[0, :, :, 8:], clean[0, :, :, 8:])


@torch.no_grad()
def test_one_layer_for_maps_of_both_types():
    """Weights are kept for each by themselves: a model in float32 may be called under autocast and without it."""
    net = make_fast(nn.Sequential(Conv2d(16, 32, 3, padding=1))).eval()
    freeze_convolutions(net)
    x = case(1, 16, 16, 40, 40)[0]
    expected = nn.functional.conv2d(x, net[0].weight, net[0].bias, padding=1).double()
    half = (x.bfloat16(), net[0].weight, net[0].bias)
    own = winograd.library().winograd_pays(True)  # PyTorch's where the processor multiplies matrices of bfloat16
    for _ in range(2):
        assert_close(net(x), expected, 5e-6)
        with torch.autocast("cpu", torch.bfloat16):
            low = net(x)
        assert low.dtype == torch.bfloat16
        assert_close(low, expected, FACTORS + RESULT)
        assert not own or torch.equal(low, winograd.conv3x3(*half))
    assert not own or {dtype for _, dtype in net[0]._kept} == {torch.bfloat16, torch.float32} and len(net[0]._kept) == 2


@pytest.mark.parametrize("flag", ["-mno-avx512bf16", "-mamx-bf16"])
def test_other_processors(flag, tmp_path, monkeypatch):
    """Those that multiply no bfloat16 take float32; to those that multiply matrices of it PyTorch's is left."""
    monkeypatch.setenv("FPN_D2_CACHE", str(tmp_path))
    monkeypatch.setattr(winograd.OP, "flags", (*winograd.OP.flags, flag))
    x, weight, bias = case(2, 32, 48, 41, 50, dtype=torch.bfloat16)
    here = winograd.library().winograd_pays(True)
    winograd.OP.forget()
    try:
        assert winograd.pays(x.float(), weight.float(), bias.float())
        assert winograd.pays(x, weight, bias) == (here and flag != "-mamx-bf16")
        if flag != "-mamx-bf16":
            gradient = torch.randn(2, 48, 41, 50).bfloat16()
            wide = [tensor.double() for tensor in (x, weight, bias)]
            plain = with_gradients(lambda x, w, b: nn.functional.conv2d(x, w, b, padding=1), wide, gradient.double())
            for one, other in zip(with_gradients(winograd.conv3x3, (x, weight, bias), gradient), plain, strict=True):
                assert_close(one, other, RESULT)
    finally:
        winograd.OP.forget()
