"""3x3 convolution by minimal filtering against the sum as it is written, in float64."""

import copy
import pickle

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from fpn_d2.analysis.measure.complexity import count_macs
from fpn_d2.errors import UserError
from fpn_d2.fast import cpu_maps, winograd
from fpn_d2.fast.apply import make_fast
from fpn_d2.fast.convolution import FastConvolution
from fpn_d2.fast.frozen import freeze_convolutions

ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def _needs_library(monkeypatch):
    monkeypatch.delenv(cpu_maps.VARIABLE, raising=False)
    if winograd.library() is None:
        pytest.skip("no C++ compiler on this machine, or no vectors: minimal filtering is NOT tested")


def case(images, channels, out_channels, height, width, dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels, height, width, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator) / (3 * channels**0.5)
    offset = torch.randn(out_channels, generator=generator) if bias else None
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return x, weight.to(dtype), None if offset is None else offset.to(dtype)


def by_loops(x, weight, bias):
    """The definition: for each output, the sum over channels and the nine neighbours; zero outside the map."""
    images, channels, height, width = x.shape
    out = torch.zeros(images, len(weight), height, width, dtype=torch.float64)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            for y in range(max(0, -dy), min(height, height - dy)):
                for column in range(max(0, -dx), min(width, width - dx)):
                    out[:, :, y, column] += (
                        x[:, :, y + dy, column + dx].double() @ weight[:, :, dy + 1, dx + 1].double().T
                    )
    return out if bias is None else out + bias.double()[:, None, None]


def with_gradients(function, tensors, gradient):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], gradient.to(out.dtype))]


def assert_close(actual, expected, tolerance):
    """Relative to the largest number: a sum's rounding error is of the size of its terms."""
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 16, 1, 1),
        (1, 16, 16, 4, 4),
        (2, 16, 32, 3, 5),
        (1, 32, 16, 13, 7),
        (3, 48, 80, 9, 12),  # 80 channels: a whole panel of weights and a part of one
        (2, 64, 144, 17, 6),
        (1, 160, 64, 30, 41),  # several blocks of tiles
        (1, 160, 64, 80, 81),  # in the gradient of the weights too
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(shape, dtype, bias, monkeypatch):
    """With factors in float32, which maps in bfloat16 have on most processors; else see test_winograd_bfloat16.py."""
    monkeypatch.setattr(winograd, "factor_dtype", lambda x: torch.float32)
    tensors = case(*shape, dtype=dtype, bias=bias)
    gradient = torch.randn(shape[0], shape[2], *shape[3:], generator=torch.Generator().manual_seed(1))
    actual = with_gradients(winograd.conv3x3, tensors, gradient)
    wide = [None if t is None else t.double() for t in tensors]
    expected = with_gradients(
        lambda x, w, b: nn.functional.conv2d(x, w, b, padding=1), wide, gradient.to(dtype).double()
    )
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, ROUNDING[dtype])


def test_values_against_the_definition():
    tensors = case(2, 16, 32, 6, 9)
    assert_close(winograd.conv3x3(*tensors), by_loops(*tensors), ROUNDING[torch.float32])


def test_rounding_is_what_the_source_says():
    """About five times that of the plain sum in float32, on rectified maps of many channels."""
    x, weight, bias = case(1, 256, 64, 40, 40)
    x = x.relu()
    expected = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    error = (winograd.conv3x3(x, weight, bias) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 2e-7 < error < 2e-6


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_threads(threads):
    tensors = case(2, 32, 80, 50, 61)
    gradient = torch.randn(2, 80, 50, 61)
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


def test_gradients_that_nobody_wants_and_layouts():
    x, weight, bias = case(1, 16, 16, 9, 9)
    weight.requires_grad_()
    out = winograd.conv3x3(x, weight, bias)
    assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
    gradient = torch.randn(1, 16, 9, 9)  # channels first
    (first,) = torch.autograd.grad(out, weight, gradient, retain_graph=True)
    (last,) = torch.autograd.grad(out, weight, gradient.contiguous(memory_format=torch.channels_last))
    assert torch.equal(first, last)
    transposed = weight.detach().permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    assert torch.equal(winograd.conv3x3(x, transposed, bias), out)


def test_nan_and_infinity_are_not_lost():
    x, weight, bias = case(1, 16, 16, 12, 12)
    clean = winograd.conv3x3(x, weight, bias)
    x[0, 3, 5, 5] = float("inf")
    out = winograd.conv3x3(x, weight, bias)
    assert not out[0, :, 4:7, 4:7].isfinite().any()
    assert torch.equal(out[0, :, :, 8:], clean[0, :, :, 8:])


def test_autocast():
    x, weight, bias = case(1, 16, 32, 40, 40)
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert winograd.pays(x, weight, bias) == bool(winograd.OP.ask("winograd_pays", True))
        out = winograd.conv3x3(x, weight, bias)
    assert out.dtype == torch.bfloat16
    of_x, of_weight = torch.autograd.grad(out.float().sum(), (x, weight))
    assert of_x.dtype == of_weight.dtype == torch.float32
    with torch.autocast("cpu", torch.float16):
        assert not winograd.pays(x, weight, bias)


def test_where_it_pays(monkeypatch):
    x, weight, bias = case(1, 16, 32, 40, 40)
    assert winograd.pays(x, weight, bias) and winograd.pays(x, weight, None)
    narrow = case(1, 24, 32, 40, 40)
    for inputs in (
        (x.contiguous(), weight, bias),
        (x[:, :, :8, :8].contiguous(memory_format=torch.channels_last), weight, bias),  # too small for the transform
        (x.double(), weight.double(), bias.double()),
        (x.bfloat16(), weight, bias),
        (x[:, :8].contiguous(memory_format=torch.channels_last), weight, bias),
        (x[0], weight, bias),
        narrow,
    ):
        assert not winograd.pays(*inputs)
    monkeypatch.setenv(cpu_maps.VARIABLE, "direct")
    assert not winograd.pays(x, weight, bias)
    monkeypatch.setenv(cpu_maps.VARIABLE, "quick")
    with pytest.raises(UserError, match="FPN_D2_CONV is 'quick'; expected one of auto, direct"):
        winograd.pays(x, weight, bias)


def layer(**kwargs):
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(32)
    for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(value, 0.5, 1.5)
    return Conv2d(16, 32, 3, padding=1, **({"bias": False, "norm": norm} | kwargs))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"norm": None, "bias": True},
        {"activation": nn.ReLU()},
        {"norm": nn.BatchNorm2d(32), "activation": nn.ReLU()},
        {"activation": torch.sigmoid},
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_layers(kwargs, grad):
    slow = nn.Sequential(layer(**kwargs)).eval()
    fast = make_fast(copy.deepcopy(slow))
    x = case(1, 16, 16, 33, 40)[0]
    with torch.set_grad_enabled(grad):
        out = fast(x)
        assert isinstance(fast[0], FastConvolution) and winograd.pays(x, fast[0].weight, None)
        torch.testing.assert_close(out, slow(x), rtol=1e-5, atol=1e-5)
        if fast[0].activation is None:
            nn.functional.relu_(out)  # as Detectron2's blocks do
    if grad:
        out.sum().backward()
        (slow(x).relu() if fast[0].activation is None else slow(x)).sum().backward()
        for one, other in zip(fast.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_a_convolution_of_pytorch():
    slow = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"))
    fast = make_fast(copy.deepcopy(slow))
    x = case(1, 16, 16, 33, 40)[0]
    torch.testing.assert_close(fast(x), slow(x), rtol=1e-5, atol=1e-5)
    assert [isinstance(module, FastConvolution) for module in fast] == [True, True]


def frozen():
    net = make_fast(nn.Sequential(layer()).eval())
    freeze_convolutions(net)
    return net


@torch.no_grad()
def test_frozen_weights_are_transformed_once(monkeypatch):
    net, x = frozen(), case(1, 16, 16, 40, 40)[0]
    packed, pack = [], winograd.pack
    monkeypatch.setattr(winograd, "pack", lambda *args: packed.append(1) or pack(*args))
    before = net(x)
    assert torch.equal(net(x), before) and len(packed) == 1 and "0.weight" not in net.state_dict()
    assert_close(before, make_fast(nn.Sequential(layer()).eval())(x).double(), ROUNDING[torch.float32])
    net[0].weight.mul_(2), net[0].bias.mul_(2)  # of all who write to it, those who can be heard are
    assert_close(net(x), 2 * before.double(), ROUNDING[torch.float32])
    net.bfloat16()
    assert_close(net(x.bfloat16()), 2 * before.double(), 0.02)


def test_copies_and_files_do_not_hold_transformed_weights():
    net, x = frozen(), case(1, 16, 16, 40, 40)[0]
    with torch.no_grad():
        expected = net(x)
    assert net[0]._kept
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not other[0]._kept and type(other[0]) is type(net[0])
        with torch.no_grad():
            assert torch.equal(other(x), expected)


def test_inference_mode():
    with torch.inference_mode():
        net = make_fast(nn.Sequential(layer(norm=None, bias=True))).eval()
        x = case(1, 16, 16, 40, 40)[0]
        first = net(x)
        net[0].weight.mul_(2), net[0].bias.mul_(2)
        torch.testing.assert_close(net(x), 2 * first)


def test_those_who_look_at_operations_see_a_convolution():
    net = make_fast(nn.Sequential(layer())).eval()
    x = case(1, 16, 16, 40, 40)[0]
    assert count_macs(lambda: net(x)) == 40 * 40 * 9 * 16 * 32
    with torch.no_grad():
        traced = torch.jit.trace(net, x)
    assert "_convolution" in str(traced.inlined_graph)
    jacobian = torch.func.jvp(net, (x,), (torch.ones_like(x),))[1]  # a second way to differentiate
    torch.testing.assert_close(jacobian, nn.functional.conv2d(torch.ones_like(x), *(_folded(net),), padding=1))


def _folded(net):
    norm = net[0].norm
    return net[0].weight * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]


def test_without_a_library(monkeypatch):
    x, weight, bias = case(1, 16, 32, 40, 40)
    monkeypatch.setattr(winograd, "library", lambda: None)
    assert not winograd.pays(x, weight, bias)


@pytest.mark.parametrize("flags,works", [(("-mno-avx512f",), True), (("-mno-avx",), False)])
def test_narrower_vectors(flags, works, tmp_path, monkeypatch):
    """Processors with AVX2 alone get another shape of the inner loop; older ones keep PyTorch's convolution."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("not an x86-64 processor with AVX2: its inner loop is NOT tested")
    monkeypatch.setenv("FPN_D2_CACHE", str(tmp_path))
    monkeypatch.setattr(winograd.OP, "flags", (*winograd.OP.flags, *flags))
    tensors = case(2, 32, 48, 21, 30)
    gradient = torch.randn(2, 48, 21, 30)
    expected = with_gradients(winograd.conv3x3, tensors, gradient)
    winograd.OP.forget()
    try:
        assert (winograd.library() is not None) == works
        if works:
            for one, other in zip(with_gradients(winograd.conv3x3, tensors, gradient), expected, strict=True):
                assert_close(one, other.double(), ROUNDING[torch.float32])
    finally:
        winograd.OP.forget()
    assert len(list(tmp_path.glob("winograd_cpu_*.so"))) == 1


def test_second_derivatives():
    x, weight, bias = case(1, 16, 16, 40, 40)
    found = []
    for function in (winograd.conv3x3, lambda *tensors: nn.functional.conv2d(*tensors, padding=1)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), bias]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)[0]
        found.append(torch.autograd.grad(first.square().sum(), leaves[1])[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3 * float(found[1].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_channels,channels", [(16, 48), (80, 16)])
def test_weights_in_every_layout_and_scaled(dtype, out_channels, channels):
    weight, scale = torch.randn(out_channels, channels, 3, 3), torch.randn(out_channels)
    expected = winograd.pack((weight.double() * scale.double()[:, None, None, None]).float(), dtype)
    laid_out = [
        weight,
        weight.contiguous(memory_format=torch.channels_last),
        weight.transpose(0, 1).contiguous().transpose(0, 1),
        weight.flip(2, 3).contiguous(memory_format=torch.channels_last).flip(2, 3),
        weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        torch.cat([weight, weight], dim=3)[..., :3],
    ]
    for one in laid_out:
        torch.testing.assert_close(winograd.pack(one, dtype, scale).float(), expected.float(), rtol=2e-2, atol=1e-5)
        assert torch.equal(winograd.pack(one, dtype), winograd.pack(weight, dtype))
