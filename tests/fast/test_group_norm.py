"""Group normalisation of channels-last maps: the definition, group by group in float64; who takes part and who not."""

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn

from fpn_d2.fast import cpu_maps, group_norm
from fpn_d2.fast.apply import make_fast, make_plain

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _needs_library(monkeypatch):
    monkeypatch.delenv(cpu_maps.VARIABLE, raising=False)
    if group_norm.library() is None:
        pytest.skip("no C++ compiler on this machine: group normalisation of channels-last maps is NOT tested")


def norm(groups=4, channels=32, eps=1e-5):
    torch.manual_seed(0)
    made = nn.GroupNorm(groups, channels, eps)
    with torch.no_grad():
        made.weight.uniform_(-2, 2), made.bias.normal_()
    return make_fast(made)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def by_definition(x, made, weight, bias):
    """Each group of channels of each image by itself: less its mean, by its standard deviation."""
    out, size = [], x.shape[1] // made.num_groups
    for image in x:
        for group in range(made.num_groups):
            part = image[group * size : (group + 1) * size]
            squares = ((part - part.mean()) ** 2).mean()
            out.append((part - part.mean()) / torch.sqrt(squares + made.eps))
    return torch.stack(out).view_as(x) * weight[:, None, None] + bias[:, None, None]


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 16, 3, 5), 1),
        ((2, 32, 7, 7), 32),
        ((3, 48, 9, 4), 3),
        ((2, 128, 16, 16), 32),  # one part
        ((1, 64, 17, 31), 4),  # two parts and a bit
        ((5, 96, 1, 2), 8),
    ],
)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_result_and_gradients(shape, groups, dtype, offset):
    """With an offset too: squares of large numbers cancel where they are summed as they are."""
    made = norm(groups, shape[1], 1e-3)
    generator = torch.Generator().manual_seed(1)
    x = channels_last((torch.randn(shape, generator=generator) + offset).to(dtype)).requires_grad_()
    gradient = torch.randn(shape, generator=generator).to(dtype)
    out = made(x)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    found = torch.autograd.grad(out, (x, made.weight, made.bias), gradient)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, made.weight, made.bias)]
    expected = by_definition(wide[0], made, wide[1], wide[2])
    tolerance = ROUNDING[dtype] * (1 if offset == 0 else 100)
    assert_close(out, expected.detach(), tolerance)
    for one, other in zip(found, torch.autograd.grad(expected, wide, gradient.double()), strict=True):
        assert_close(one, other, tolerance)
    with torch.no_grad():
        assert torch.equal(made(x), out)


def test_a_constant_map():
    """Its deviation is zero, or what rounding leaves: never below, which would give NaN."""
    made = norm(eps=1e-12)
    out = made(channels_last(torch.full((1, 32, 60, 70), 0.1)))
    assert out.isfinite().all()
    made.eps = 1e-5
    torch.testing.assert_close(made(torch.full_like(out, 0.1))[0, :, 3, 3], made.bias, atol=1e-4, rtol=0)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_threads(threads):
    x = channels_last(torch.randn(2, 32, 40, 41))
    before, made, found = torch.get_num_threads(), norm(), []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            made.zero_grad()
            seen = x.clone().requires_grad_()
            made(seen).square().sum().backward()
            found.append((seen.grad, made.weight.grad.clone(), made.bias.grad.clone()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_only_what_is_wanted():
    made, x = norm(), channels_last(torch.randn(1, 32, 5, 6))
    made.requires_grad_(False)
    seen = x.clone().requires_grad_()
    made(seen).sum().backward()
    assert seen.grad is not None and made.weight.grad is None
    made.bias.requires_grad_()
    made(x).sum().backward()
    assert made.weight.grad is None
    assert torch.equal(made.bias.grad, torch.full((32,), 30.0))


def test_second_derivative():
    made, x = norm(2, 16), channels_last(torch.randn(2, 16, 3, 5)).requires_grad_()
    results = []
    for change in (lambda module: module, make_plain):
        change(made)
        (gradient,) = torch.autograd.grad(made(x).sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), (x, made.weight)))
    for one, other in zip(*results, strict=True):
        assert_close(one, other.double(), 1e-4)


def test_a_patched_norm_is_the_patched_one(monkeypatch):
    made, x = norm(), channels_last(torch.randn(1, 32, 5, 6))
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, x: x + 1)
    assert torch.equal(made(x), x + 1) and not group_norm.can_run(made)


def test_what_is_left_to_pytorch(monkeypatch):
    calls = []
    real = group_norm._forward
    monkeypatch.setattr(group_norm, "_forward", lambda *a: calls.append(a) or real(*a))
    made, x = norm(), channels_last(torch.randn(1, 32, 5, 6))
    made(x)
    assert len(calls) == 1
    bare = make_fast(nn.GroupNorm(4, 32, affine=False))
    others = [(made, x.contiguous()), (bare, x), (norm(4, 40), channels_last(torch.randn(1, 40, 5, 6))), (made, x[0])]
    for module, value in others:
        value = value if value.dim() == 4 else value[None].contiguous()
        assert_close(module(value), make_plain(nn.Sequential(module))[0](value).double(), 1e-5)
        make_fast(module)
    with pytest.raises(RuntimeError, match="number of channels|weight"):
        made(channels_last(torch.randn(1, 64, 5, 6)))
    made.half()
    with pytest.raises(RuntimeError):
        made(x)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_convolutions_with_it_keep_maps_channels_last(dtype):
    """Detectron2's ``Conv2d`` with a group norm: fast in training too, with its own results and gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(*[Conv2d(32, 32, 3, padding=1, norm=nn.GroupNorm(8, 32), activation=torch.relu)] * 2)
    x = torch.randn(2, 32, 11, 14)
    results = []
    for change in (lambda module: module, make_fast):
        change(net)
        net.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = net(x)
        out.float().square().sum().backward()
        results.append((out, *(parameter.grad.clone() for parameter in net.parameters())))
    assert out.is_contiguous(memory_format=torch.channels_last) and out.grad_fn is not None
    for one, other in zip(*results, strict=True):
        assert_close(other, one.double(), 1e-4 if dtype is None else 0.03)


def test_hooks_on_the_norm_are_called():
    net = make_fast(nn.Sequential(Conv2d(16, 16, 3, padding=1, norm=nn.GroupNorm(4, 16))))
    seen = []
    net[0].norm.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    net(torch.randn(1, 16, 5, 6)).sum().backward()
    assert seen == [(1, 16, 5, 6)]
