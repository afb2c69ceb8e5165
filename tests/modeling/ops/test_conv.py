"""Convolutions with a frozen norm folded in, against the two operations one after the other."""

import copy
import pickle

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from torch import nn

from fpn_d2.modeling.ops.conv import FastConv2d, fuse_norms, use_fast_convolutions


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
    folded = use_fast_convolutions(copy.deepcopy(net))
    assert type(folded[0]) is FastConv2d and type(net[0]) is Conv2d
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
    folded = use_fast_convolutions(copy.deepcopy(net))
    assert list(folded.state_dict()) == list(net.state_dict())
    assert [type(module) for module in folded[1]] == [FastConv2d, FastConv2d]
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
    fused = copy.deepcopy(net)
    assert fuse_norms(fused) == 1 and fused[0].norm is None
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)
    assert fuse_norms(fused) == 0


def test_batch_norm_without_affine_parameters_and_group_norm():
    net = nn.Sequential(Conv2d(5, 6, 1, norm=nn.BatchNorm2d(6, affine=False)), Conv2d(6, 6, 1, norm=nn.GroupNorm(2, 6)))
    net[0].norm.running_mean.normal_()
    net[0].norm.running_var.uniform_(0.5, 2)
    net = net.double().eval()
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    expected = net(x)
    assert fuse_norms(net) == 1 and isinstance(net[1].norm, nn.GroupNorm)
    torch.testing.assert_close(net(x), expected)
