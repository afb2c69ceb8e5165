"""Fully connected layers through oneDNN against ``F.linear``."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from torch import nn

from fpn_d2.fast import linear as linear_module
from fpn_d2.fast.apply import make_fast
from fpn_d2.fast.linear import linear


@pytest.mark.parametrize("shape", [(7, 37), (1, 37), (0, 37), (2, 5, 37), (37,)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_linear_with_gradients(shape, bias):
    layer = nn.Linear(37, 11, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    parameters = [x, *layer.parameters()]
    expected = F.linear(x, layer.weight, layer.bias)
    actual = linear(layer, x)
    weight = torch.randn_like(actual)
    actual.mul_(1)  # changed in place, as some activations do
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad((actual * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture
def products(monkeypatch):
    """The products that oneDNN was asked for."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    calls = []
    product = linear_module._product
    monkeypatch.setattr(linear_module, "_product", lambda *args: calls.append(args[1]) or product(*args))
    return calls


def test_goes_through_onednn_in_float32_only(products):
    layer = nn.Linear(8, 4)
    linear(layer, torch.randn(3, 8))
    assert len(products) == 1
    linear(layer.double(), torch.randn(3, 8, dtype=torch.float64))
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(layer, torch.randn(3, 8)).dtype == torch.bfloat16
    assert len(products) == 1


def test_torch_before_2_4_asks_about_autocast_in_another_way(monkeypatch, products):
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda: False)
    torch.testing.assert_close(linear(layer, x), layer(x))
    assert len(products) == 1


def test_frozen_parameters_get_no_gradient():
    layer = nn.Linear(8, 4).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    linear(layer, x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and x.grad is not None


def test_layers_of_a_box_head_stay_what_they_are(products):
    slow = FastRCNNConvFCHead(ShapeSpec(channels=4, height=3, width=3), conv_dims=[], fc_dims=[8, 8])
    fast = make_fast(copy.deepcopy(slow))
    x = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(fast(x), slow(x))
    assert [id(weight) for weight in products] == [id(fast.fc1.weight), id(fast.fc2.weight)]
    assert type(fast.fc1) is nn.Linear and fast.fcs[0] is fast.fc1
    fast.fc1.register_forward_hook(lambda module, inputs, output: output * 2)
    fast.fc2 = nn.Sequential(fast.fc2)  # as a wrapper would
    expected = slow.fc2(F.relu(slow.fc1(x.flatten(1)) * 2)).relu()
    torch.testing.assert_close(fast(x), expected)
    assert len(products) == 2
