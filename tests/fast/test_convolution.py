"""Convolutions with a frozen norm folded in and residual blocks, against the operations one after the other."""

import copy
import pickle

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn

from fpn_d2.analysis.measure.complexity import count_macs
from fpn_d2.fast import group_norm, onednn_conv, winograd
from fpn_d2.fast.apply import make_fast
from fpn_d2.fast.convolution import FastConvolution
from fpn_d2.fast.frozen import FrozenConvolution, freeze_convolutions


def conv(norm="FrozenBN", bias=False, activation=None, dtype=torch.float64):
    torch.manual_seed(0)
    module = Conv2d(5, 6, 3, stride=2, padding=1, bias=bias, norm=get_norm(norm, 6), activation=activation)
    if module.norm is not None:
        for name, value in module.norm.state_dict().items():
            if value.is_floating_point():
                nn.init.uniform_(value, 0.5, 2.0) if name != "bias" else nn.init.normal_(value)
    return module.to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, nn.ReLU()])
def test_equals_convolution_then_norm_with_gradients(bias, activation):
    net = nn.Sequential(conv(bias=bias, activation=activation))
    folded = make_fast(copy.deepcopy(net))
    assert isinstance(folded[0], FastConvolution) and type(net[0]) is Conv2d
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64)
    results = []
    for module in (net, folded):
        image = x.clone().requires_grad_()
        out = module(image)
        out.square().sum().backward()
        results.append([out.detach(), image.grad, *[p.grad for p in module.parameters()]])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_names_weights_and_training_of_the_weights_stay():
    net = nn.Sequential(conv(), nn.Sequential(conv("BN"), conv("")))
    folded = make_fast(copy.deepcopy(net))
    assert list(folded.state_dict()) == list(net.state_dict())
    assert all(isinstance(module, FastConvolution) for module in folded[1])
    with torch.no_grad():
        folded[0].weight.mul_(2)  # what is folded follows the weights
    x = torch.randn(1, 5, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(folded[0](x), folded[0].norm(nn.Conv2d.forward(folded[0], x)))
    pickle.loads(pickle.dumps(folded))


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_for_good(norm, bias):
    net = nn.Sequential(conv(norm, bias)).eval()
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64)
    expected = net(x)
    fused = make_fast(copy.deepcopy(net))
    freeze_convolutions(fused)
    freeze_convolutions(fused)  # once is enough
    assert fused[0].norm is None and type(fused[0]).__mro__[1] is FrozenConvolution
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)


def test_a_norm_that_somebody_watches_is_not_folded():
    net = make_fast(nn.Sequential(conv()).eval())
    seen = []
    net[0].norm.register_forward_hook(lambda *args: seen.append(1))
    freeze_convolutions(net)
    net(torch.randn(2, 5, 9, 11, dtype=torch.float64))
    assert seen == [1]


def test_batch_norm_without_affine_parameters_and_group_norm():
    net = nn.Sequential(Conv2d(5, 6, 1, norm=nn.BatchNorm2d(6, affine=False)), Conv2d(6, 6, 1, norm=nn.GroupNorm(2, 6)))
    net[0].norm.running_mean.normal_()
    net[0].norm.running_var.uniform_(0.5, 2)
    net = net.double().eval()
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    expected = net(x)
    freeze_convolutions(make_fast(net))
    assert net[0].norm is None and isinstance(net[1].norm, nn.GroupNorm)
    torch.testing.assert_close(net(x), expected)


def few_groups(channels):
    return nn.GroupNorm(4, channels)


def block(kind, norm, stride, channels, out_channels):
    torch.manual_seed(0)
    more = {"bottleneck_channels": 16} if kind is BottleneckBlock else {}
    module = kind(channels, out_channels, stride=stride, norm=norm, **more)
    for name, value in module.state_dict().items():
        if ".norm." in name and value.is_floating_point():
            nn.init.normal_(value) if name.endswith(("bias", "mean")) else nn.init.uniform_(value, 0.5, 2.0)
    return nn.Sequential(module).eval()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN", ""])
@pytest.mark.parametrize(
    ("kind", "stride", "channels", "out_channels"),
    [
        (BottleneckBlock, 1, 64, 64),
        (BottleneckBlock, 2, 32, 64),
        (BasicBlock, 1, 32, 32),
        (BasicBlock, 2, 32, 64),
    ],
)
def test_residual_blocks(kind, stride, channels, out_channels, norm, layout, grad):
    slow = block(kind, few_groups if norm == "GN" else norm, stride, channels, out_channels)
    fast = make_fast(copy.deepcopy(slow)).to(memory_format=layout)
    assert isinstance(fast[0], kind) and type(fast[0]) is not kind
    assert list(fast.state_dict()) == list(slow.state_dict())
    x = torch.randn(2, channels, 18, 23).contiguous(memory_format=layout)
    before = x.clone()
    with torch.set_grad_enabled(grad):
        out, expected = fast(x), slow(x)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
        assert torch.equal(x, before)  # it may be an output of the network as well
        if grad:
            out.sum().backward(), expected.sum().backward()
            for one, other in zip(fast.parameters(), slow.parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_residual_blocks_in_other_forms():
    slow = block(BottleneckBlock, "FrozenBN", 1, 64, 64)
    fast = make_fast(copy.deepcopy(slow)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 18, 23).contiguous(memory_format=torch.channels_last)
    expected = slow(x)
    assert count_macs(lambda: fast(x)) == count_macs(lambda: slow(x)) > 0
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.jit.trace(fast, x)):
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), slow(x), rtol=0.05, atol=0.05 * float(expected.abs().max()))
    low = copy.deepcopy(fast).bfloat16()(x.bfloat16())
    torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("without", ["compiler", "oneDNN", "both"])
@torch.no_grad()
def test_whatever_is_missing(without, monkeypatch):
    slow = nn.Sequential(Conv2d(256, 256, 3, padding=1, activation=nn.ReLU()), block(BottleneckBlock, "", 1, 256, 256))
    if without != "oneDNN":
        monkeypatch.setattr(winograd, "library", lambda: None)
    if without != "compiler":
        monkeypatch.setattr(onednn_conv, "_works", lambda: False)
    used = set()
    for module, name in ((winograd, "convolve"), (onednn_conv, "convolve")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, m=module, **k: used.add(m.__name__[12:]) or f(*a, **k))
    x = torch.randn(1, 256, 41, 30).contiguous(memory_format=torch.channels_last)
    for freeze in (False, True):
        fast = make_fast(copy.deepcopy(slow))
        if freeze:
            freeze_convolutions(fast)
        torch.testing.assert_close(fast(x), slow(x), rtol=1e-5, atol=1e-5)
    expected = {"winograd"} if winograd.library() is not None else set()
    assert used == expected | ({"onednn_conv"} if onednn_conv._works() else set())


@torch.no_grad()
def test_a_relu_runs_once(monkeypatch):
    """Whether it is a module or a function, and whatever computes the convolution."""
    rectified = []
    relu_ = torch.Tensor.relu_
    monkeypatch.setattr(torch.Tensor, "relu_", lambda x: rectified.append(1) or relu_(x))
    for activation in (nn.ReLU(), torch.nn.functional.relu, torch.nn.functional.relu_):
        slow = Conv2d(32, 32, 3, padding=1, activation=activation)
        fast = make_fast(copy.deepcopy(slow))
        x = torch.randn(1, 32, 40, 40)
        torch.testing.assert_close(fast(x), slow(x), rtol=1e-5, atol=1e-5)
    assert not rectified or winograd.library() is None


@pytest.mark.parametrize("compiled", [True, False])
def test_pytorchs_group_norm_makes_only_its_own_convolution_slow(compiled, monkeypatch):
    """In training; its backward is many times slower on channels-last maps, while ours is made for them."""
    if not compiled:
        monkeypatch.setenv("FPN_D2_NATIVE", "group_norm")
    elif group_norm.library() is None:
        pytest.skip("no C++ compiler on this machine")
    net = nn.Sequential(Conv2d(16, 32, 3, padding=1), Conv2d(32, 32, 3, padding=1, norm=nn.GroupNorm(4, 32)))
    fast = make_fast(copy.deepcopy(net))
    seen = []
    for module in (fast[0], fast[1]):
        module.register_forward_hook(lambda module, args, out: seen.append(out.is_contiguous()))
    fast[1].register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    x = torch.randn(1, 16, 20, 20)
    fast(x)
    with torch.no_grad():
        fast(x)
    assert seen == [False, not compiled, False, False]
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
