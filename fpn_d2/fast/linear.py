"""Fully connected layers through oneDNN, which PyTorch uses for convolutions but not for float32 matrices on CPUs.

The layers stay PyTorch's own ``Linear``, so that whoever looks for them finds them: the box head that owns them
computes them, unless one has hooks or is another module by now.
"""

import torch
from torch import Tensor, nn

from .guard import Fast, are_plain, autocast_dtype, is_itself, need_not_be_called


class FastBoxHead(Fast):
    """Detectron2's ``FastRCNNConvFCHead``: convolutions, then fully connected layers."""

    REPLACES = ("forward",)

    def forward(self, x: Tensor) -> Tensor:
        """(M, C, h, w) -> (M, D), or (M, C', h, w) without fully connected layers."""
        if not is_itself(self):
            return super().forward(x)
        for layer in self:
            x = linear(layer, x)
        return x


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, within float rounding: by oneDNN where ``layer`` is a plain ``nn.Linear`` and that can be.

    PyTorch's own library for float32 products, MKL, is the slower one on AMD processors.

    Args:
        layer: of any kind.
        x: for a fully connected one (..., C).
    """
    if type(layer) is nn.Linear and need_not_be_called(layer, nn.Linear) and _available(x, layer.weight, layer.bias):
        # Unflattened out here: autograd does not let a view that is made inside be changed in place.
        return _Linear.apply(x.flatten(0, -2), layer.weight, layer.bias).unflatten(0, x.shape[:-1])
    return layer(x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for a second derivative
            of_x, of_weight = (grad @ weight if wants_x else None), (grad.t() @ x if wants_weight else None)
        else:
            grad = grad.contiguous()
            of_x = _product(grad, weight.t().contiguous()) if wants_x else None
            of_weight = _product(grad.t().contiguous(), x.t().contiguous()) if wants_weight else None
        return of_x, of_weight, grad.sum(0) if wants_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _available(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        are_plain(x, weight, bias)
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and x.dim() > 1
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and autocast_dtype("cpu") is None
    )
