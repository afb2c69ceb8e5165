"""Gradients of depthwise convolution against the sum as it is written, in float64; timm's layers that use it."""

import pytest
import torch
from torch import nn

from fpn_d2.fast import cpu_maps, depthwise
from fpn_d2.fast.apply import make_fast
from fpn_d2.fast.frozen import FrozenConvolution, freeze_convolutions

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def _plain_switch(monkeypatch):
    monkeypatch.delenv(cpu_maps.VARIABLE, raising=False)


@pytest.fixture
def library():
    if depthwise.library() is None:
        pytest.skip("no C++ compiler on this machine: gradients of depthwise convolution are NOT tested")


def case(images, channels, height, width, kernel, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, height, width, generator=generator)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator)
    return x.to(dtype).contiguous(memory_format=torch.channels_last), weight.to(dtype), weight[:, 0, 0, 0].to(dtype)


def by_loops(gradient, x, weight, stride, padding):
    """out[y, x] = sum of input[y * stride + i - padding, ...] * weight[i, j]: what each product gives to both."""
    gradient, x, weight = gradient.double(), x.double(), weight.double()
    of_x, of_weight = torch.zeros_like(x), torch.zeros_like(weight)
    _, _, height, width = x.shape
    for y in range(gradient.shape[2]):
        for column in range(gradient.shape[3]):
            for i in range(weight.shape[2]):
                for j in range(weight.shape[3]):
                    at, left = y * stride + i - padding, column * stride + j - padding
                    if 0 <= at < height and 0 <= left < width:
                        of_x[:, :, at, left] += gradient[:, :, y, column] * weight[:, 0, i, j]
                        of_weight[:, 0, i, j] += (gradient[:, :, y, column] * x[:, :, at, left]).sum(0)
    return of_x, of_weight


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kernel", depthwise.KERNELS)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "padding"),
    [((1, 16, 7, 7), 0), ((2, 48, 8, 11), 1), ((1, 16, 13, 9), 3), ((3, 32, 7, 20), 2), ((1, 16, 9, 8), 8)],
)
def test_gradients(library, shape, padding, stride, kernel, dtype):
    x, weight, bias = case(*shape, kernel, dtype)
    geometry = ((stride, stride), (padding, padding), (1, 1), shape[1])
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    out = depthwise.convolve(*leaves, geometry)
    assert torch.equal(out, nn.functional.conv2d(x, weight, bias, *geometry))
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(out, leaves, gradient)
    expected = (*by_loops(gradient, x, weight, stride, padding), gradient.double().sum((0, 2, 3)))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, ROUNDING[dtype])


def test_gradients_of_float32_weights_are_not_rounded_to_the_maps_type(library):
    x, weight, bias = case(2, 16, 12, 11, 5)
    x, geometry = x.bfloat16(), ((1, 1), (2, 2), (1, 1), 16)
    leaves = [x, weight.requires_grad_(), bias.clone().requires_grad_()]
    out = depthwise.convolve(*leaves, geometry)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.autograd.grad(out, leaves[1:], gradient)
    expected = by_loops(gradient, x, weight.detach(), 1, 2)[1], gradient.double().sum((0, 2, 3))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_wanted(library, wanted):
    tensors = case(2, 16, 9, 10, 5)
    geometry = ((2, 2), (2, 2), (1, 1), 16)
    results = []
    for function in (depthwise.convolve, lambda x, w, b, g: nn.functional.conv2d(x, w, b, *g)):
        leaves = [tensor.clone().requires_grad_(wants) for tensor, wants in zip(tensors, wanted, strict=True)]
        function(*leaves, geometry).square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)
        results.append(leaves[wanted.index(True)].grad)
    assert_close(results[0], results[1].double(), 1e-5)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_threads(library, threads):
    x, weight, _ = case(3, 48, 17, 19, 5, torch.bfloat16)
    gradient = torch.randn_like(x)
    before = torch.get_num_threads()
    try:
        found = []
        for number in (1, threads):
            torch.set_num_threads(number)
            found.append(depthwise._gradients(gradient, x, weight, 1, 2, (True, True)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_second_derivative(library):
    x, weight, bias = (tensor.double().float().requires_grad_() for tensor in case(1, 16, 6, 7, 5))
    results = []
    for function in (depthwise.convolve, lambda x, w, b, g: nn.functional.conv2d(x, w, b, *g)):
        out = function(x, weight, bias, ((1, 1), (2, 2), (1, 1), 16))
        (of_x,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(of_x.square().sum(), (x, weight)))
    for one, other in zip(*results, strict=True):
        assert_close(one, other.double(), 1e-5)


def test_when_it_takes_over(library, monkeypatch):
    def pays(x, channels=16, kernel=5, stride=(1, 1), padding=(2, 2), dilation=(1, 1), groups=16):
        weight = torch.zeros(channels, channels // groups, kernel, kernel)
        return depthwise.pays(x, weight, None, (stride, padding, dilation, groups))

    x = case(1, 16, 9, 9, 5)[0]
    assert pays(x) and pays(x, kernel=7) and pays(x.bfloat16(), kernel=3)
    for other in (x.contiguous(), x.double(), x.to("meta"), x[:0]):
        assert not pays(other)
    assert not pays(x, kernel=3), "PyTorch's is the faster one"
    for key, value in {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 2), "kernel": 9, "channels": 32}.items():
        assert not pays(x, **{key: value}), key
    assert not pays(case(1, 24, 9, 9, 5)[0], channels=24, groups=24)
    assert not depthwise.pays(x, torch.zeros(16, 1, 3, 5), None, ((1, 1), (2, 2), (1, 1), 16))
    monkeypatch.setenv(cpu_maps.VARIABLE, "direct")
    assert not pays(x)


@pytest.mark.parametrize("size", [(9, 9), (10, 13), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_timms_padding_by_size(size, stride, dtype):
    """timm's ``Conv2dSame``: its own results and gradients, in training and with final weights."""
    kind = pytest.importorskip("timm.layers.conv2d_same").Conv2dSame
    torch.manual_seed(0)
    plain = kind(32, 32, 5, stride=stride, groups=32)
    fast = make_fast(kind(32, 32, 5, stride=stride, groups=32))
    fast.load_state_dict(plain.state_dict())
    assert type(fast) is not kind
    x = torch.randn(2, 32, *size)
    results = []
    for module in (plain, fast):
        seen = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = module(seen)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, (seen, *module.parameters()), gradient)))
    tolerance = ROUNDING[dtype or torch.float32]
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other.double(), 2 * tolerance)
    freeze_convolutions(fast)
    assert isinstance(fast, FrozenConvolution)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        assert_close(fast(x), results[0][0].double(), tolerance)


@pytest.mark.parametrize(
    "keys",
    [
        {"kernel_size": 1, "stride": 2},  # which reaches less than it steps: nothing is cut off
        {"kernel_size": (5, 3), "stride": (3, 1), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": 1},  # which timm does not look at
    ],
)
def test_timms_padding_of_other_shapes(keys):
    kind = pytest.importorskip("timm.layers.conv2d_same").Conv2dSame
    plain = kind(4, 8, **keys)
    fast = make_fast(kind(4, 8, **keys))
    fast.load_state_dict(plain.state_dict())
    for size in ((10, 12), (11, 7)):
        x = torch.randn(1, 4, *size)
        with torch.no_grad():
            assert_close(fast(x), plain(x).double(), 1e-5)


def test_a_step_of_a_timm_network(library, monkeypatch):
    """The gradients of a whole EfficientNet agree with PyTorch's, and they are computed here."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    x = torch.randn(1, 3, 96, 97)
    calls = []
    real = depthwise._gradients
    monkeypatch.setattr(depthwise, "_gradients", lambda *a: calls.append(a) or real(*a))
    results = []
    for make in (lambda module: module, make_fast):
        make(net)
        net.zero_grad()
        sum((out.square().mean() for out in net(x)), start=torch.zeros(())).backward()
        results.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert len(calls) == 9  # of its 16 depthwise layers those of 5 x 5
    for name, expected in results[0].items():
        assert_close(results[1][name], expected.double(), 1e-3)
