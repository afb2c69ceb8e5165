"""timm's frozen norm as one operation: timm's own result and gradients, and timm's own code for whoever looks in."""

import pytest
import torch
from torch import nn

from fpn_d2.fast.apply import make_fast, make_plain
from fpn_d2.fast.norms import FastFrozenNormAct

norm_act = pytest.importorskip("timm.layers.norm_act")


def norm(channels=8, kind=None, **more):
    torch.manual_seed(0)
    made = (kind or norm_act.FrozenBatchNormAct2d)(channels, eps=1e-3, **more)
    with torch.no_grad():
        made.weight.uniform_(-2, 2), made.bias.normal_(), made.running_mean.normal_(), made.running_var.uniform_(0.1, 3)
    return made


def by_formula(made, x):
    """(x - mean) / sqrt(variance + eps) * weight + bias, channel by channel."""
    out = torch.empty_like(x, dtype=torch.float64)
    for c in range(x.shape[1]):
        mean, variance, weight, bias = (
            getattr(made, name)[c].double() for name in ("running_mean", "running_var", "weight", "bias")
        )
        out[:, c] = (x[:, c].double() - mean) / torch.sqrt(variance + made.eps) * weight + bias
    return made.act(out)


@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.ReLU6, nn.SiLU])
@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (0, 8, 5, 7), (1, 8, 1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_result_and_gradient(act_layer, shape, memory_format):
    made = make_fast(norm(act_layer=act_layer))
    assert isinstance(made, FastFrozenNormAct)
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    gradients = []
    for function in (made, lambda x: by_formula(made, x)):
        seen = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = function(seen)
        (out.double() * torch.arange(out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
        gradients.append(seen.grad)
        torch.testing.assert_close(out.float(), by_formula(made, x).float())
    torch.testing.assert_close(*gradients)


def test_autocast_keeps_the_precision_of_the_maps():
    made, x = make_fast(norm()), torch.randn(2, 8, 9, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), by_formula(made, x), rtol=2**-8, atol=2**-8)


def test_whoever_looks_in_sees_timms_own(monkeypatch):
    plain = norm_act.FrozenBatchNormAct2d.forward
    calls = []
    monkeypatch.setattr(norm_act.FrozenBatchNormAct2d, "forward", lambda self, x: calls.append(x) or plain(self, x))
    x = torch.randn(1, 8, 4, 4)
    make_fast(norm())(x)
    assert len(calls) == 1  # patched
    monkeypatch.undo()

    class Other(norm_act.FrozenBatchNormAct2d):
        def forward(self, x):
            return super().forward(x) + 1

    assert not isinstance(make_fast(norm(kind=Other)), FastFrozenNormAct)
    made = make_fast(norm())
    traced = torch.jit.trace(made, x)
    assert "aten::batch_norm" not in str(traced.inlined_graph)
    assert "batch_norm" not in str(torch.fx.symbolic_trace(make_plain(made)).graph)


def test_written_parameters_are_heard():
    made, x = make_fast(norm()), torch.randn(2, 8, 4, 4)
    before = made(x)
    made.running_mean.data += 1
    assert not torch.equal(before, made(x))
    torch.testing.assert_close(made(x).double(), by_formula(made, x))
