"""Fully connected layers through oneDNN against ``F.linear``."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fpn_d2.fast import linear as linear_module
from fpn_d2.fast.linear import OneDNNLinear, use_onednn


@pytest.mark.parametrize("shape", [(7, 37), (1, 37), (0, 37), (2, 5, 37), (37,)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_linear_with_gradients(shape, bias):
    layer = use_onednn(nn.Sequential(nn.Linear(37, 11, bias=bias)))[0]
    assert type(layer) is OneDNNLinear
    x = torch.randn(shape, requires_grad=True)
    parameters = [x, *layer.parameters()]
    expected = F.linear(x, layer.weight, layer.bias)
    actual = layer(x)
    weight = torch.randn_like(actual)
    actual.mul_(1)  # changed in place, as some activations do
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad((actual * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_goes_through_onednn_in_float32_only(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    calls = []
    product = linear_module._product
    monkeypatch.setattr(linear_module, "_product", lambda *args: calls.append(1) or product(*args))
    layer = use_onednn(nn.Sequential(nn.Linear(8, 4)))
    layer(torch.randn(3, 8))
    assert len(calls) == 1
    layer.double()(torch.randn(3, 8, dtype=torch.float64))
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16
    assert len(calls) == 1


def test_torch_before_2_4_asks_about_autocast_in_another_way(monkeypatch):
    layer = use_onednn(nn.Sequential(nn.Linear(8, 4)))
    x = torch.randn(3, 8)
    expected = layer(x)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda: False)
    assert torch.equal(layer(x), expected)


def test_frozen_parameters_get_no_gradient():
    layer = use_onednn(nn.Sequential(nn.Linear(8, 4)))[0].requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and x.grad is not None


def test_names_stay_and_subclasses_are_left_alone():
    class Special(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(Special(4, 2)))
    changed = use_onednn(copy.deepcopy(net))
    assert list(changed.state_dict()) == list(net.state_dict())
    assert type(changed[1][0]) is Special
    pickle.loads(pickle.dumps(changed[0]))
