"""Fully connected layers through oneDNN, which PyTorch uses for convolutions but not for float32 matrices on CPUs."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class OneDNNLinear(nn.Linear):
    """``nn.Linear`` whose products run through oneDNN on a CPU; elsewhere, and where torch has none, it is ``Linear``.

    PyTorch's own library for float32 products, MKL, is the slower one on AMD processors. The sums are added in another
    order: the result differs by float rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        if not _available(x, self.weight):
            return super().forward(x)
        # Unflattened out here: autograd does not let a view that is made inside be changed in place.
        return _Linear.apply(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t().contiguous()) if wants_x else None,
            _product(grad.t().contiguous(), x.t().contiguous()) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _available(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and x.dim() > 1
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not _autocasts()
        and not torch.jit.is_tracing()
        and not _compiles()
    )


def _autocasts() -> bool:
    try:
        return torch.is_autocast_enabled("cpu")
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled()


def _compiles() -> bool:
    is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", None)  # before torch 2.1: never
    return is_compiling is not None and is_compiling()


def use_onednn(module: nn.Module) -> nn.Module:
    """Replace, in place, each fully connected layer in ``module``; parameters and their names stay the same."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            linear = OneDNNLinear.__new__(OneDNNLinear)
            linear.__dict__ = child.__dict__
            setattr(module, name, linear)
        else:
            use_onednn(child)
    return module
