"""Detectron2's and PyTorch's convolution with the frozen normalisation folded in and faster operations, on a CPU.

Maps become channels-last here, and stay so from layer to layer; parameters and their gradients keep their layout.
Nothing is kept between calls: the weights are read, scaled and transformed anew in each.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from . import depthwise, group_norm, onednn_conv, winograd
from .guard import Fast, are_plain, autocast_dtype, is_itself, need_gradients, need_not_be_called

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
PLAIN_3X3 = ((3, 3), (1, 1), (1, 1), (1, 1), 1)


class Weights(NamedTuple):
    """What one call convolves with.

    Args:
        weight: (C', C / groups, h, w), as in the module.
        scale: (C',) factors of the weights, from a frozen norm; None: 1.
        bias: (C',) or None, that of the norm included.
        packed: the weights as :func:`winograd.pack` makes them, where :func:`winograd.pays` says so of them, or else as
            :func:`onednn_conv.reorder` does; None: to be made in the call. There is no scale then.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    packed: Tensor | None = None


class FastConvolution(Fast):
    """Detectron2's ``Conv2d``, within float rounding.

    A frozen batch normalisation scales the weights rather than the output. 3x3 kernels run by minimal filtering where
    that is faster, the others by oneDNN, which adds and rectifies in the same pass where no gradients are needed.
    """

    REPLACES = ("forward",)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        if not accelerates(self, x):
            return super().forward(x)
        return convolve(self, x)

    def weights(self, folds: bool, x: Tensor) -> Weights:
        """What a call with ``x`` convolves with.

        Args:
            folds: whether the norm is to be part of it.
            x: (N, C, H, W), channels-last.
        """
        scale, bias = folded_scale(self) if folds else (None, self.bias)
        return Weights(self.weight, scale, bias)


class FastTorchConvolution(FastConvolution):
    """PyTorch's own ``Conv2d``, which has no norm and no activation."""

    norm = activation = None


class FastSameConvolution(FastTorchConvolution):
    """timm's ``Conv2dSame``, which pads by the size of the map, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride))."""
        if not (accelerates(self, x) and self.padding == (0, 0)):
            return super(FastConvolution, self).forward(x)
        return convolve(self, padded_by_size(self, x))


def padded_by_size(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``x`` with zeros round it, so that ``conv`` without padding gives ceil(size / stride) cells a side."""
    sides = zip(x.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1], conv.dilation[::-1], strict=True)
    borders = [max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0) for size, k, s, d in sides]
    return F.pad(x, [part for border in borders for part in (border // 2, border - border // 2)])


def accelerates(conv: FastConvolution, x: Tensor) -> bool:
    """Whether :func:`convolve` does what ``conv`` is asked for, and nobody interferes."""
    if not (is_itself(conv) and are_plain(x, conv.weight, conv.bias)):
        return False
    dtype = autocast_dtype("cpu")
    return (
        x.dim() == 4
        and x.numel() > 0
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and x.dtype in DTYPES
        and (x.dtype == conv.weight.dtype if dtype is None else dtype == torch.bfloat16)
        # PyTorch's backward of a group norm is many times slower on channels-last maps.
        and not (
            isinstance(conv.norm, nn.GroupNorm)
            and need_gradients(x, conv.weight, conv.norm.weight)
            and not group_norm.can_run(conv.norm)
        )
    )


def convolve(conv: FastConvolution, x: Tensor, relu: bool = False, add: Tensor | None = None) -> Tensor:
    """``conv(x)``, plus ``add``, rectified if ``relu``; :func:`accelerates` holds.

    Args:
        conv: with an activation only if there are neither ``relu`` nor ``add``.
        x: (N, C, H, W).
        relu: whether negative outputs become 0.
        add: of the shape of the output, which it may become, or None.
    """
    norm, activation = conv.norm, conv.activation
    folds = norm is not None and need_not_be_called(norm, FrozenBatchNorm2d)
    if norm is None or folds:
        rectifies = _is_relu(activation)
        x = _convolved(conv, x, folds, relu or rectifies, add)
        return x if activation is None or rectifies else activation(x)
    x = norm(_convolved(conv, x, False, False, None))
    return _then(x if activation is None else activation(x), relu, add)


def _is_relu(activation) -> bool:
    if isinstance(activation, nn.Module):
        return need_not_be_called(activation, nn.ReLU)
    return activation in (F.relu, F.relu_, torch.relu, torch.relu_)


def _convolved(conv: FastConvolution, x: Tensor, folds: bool, relu: bool, add: Tensor | None) -> Tensor:
    """Convolution, the norm if it ``folds``, ``add``, and ReLU if ``relu``."""
    if (dtype := autocast_dtype("cpu")) is not None:
        x = x.to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    weights = conv.weights(folds, x)
    grads = need_gradients(x, weights.weight, weights.bias, weights.scale)
    if (conv.kernel_size, *geometry) == PLAIN_3X3 and winograd.pays(
        x, weights.weight, weights.bias, weights.packed is not None
    ):
        if grads:
            return _then(winograd.conv3x3(x, weights.weight, weights.bias, weights.scale), relu, add)
        packed = weights.packed
        if packed is None:
            packed = winograd.pack(weights.weight, winograd.factor_dtype(x), weights.scale)
        out = winograd.convolve(x, packed, weights.bias, relu and add is None)
        return out if add is None else _then(out, relu, add)
    if not grads:
        if _scales_outputs(x, weights, geometry):
            out = _without_gradients(x, weights._replace(scale=None, bias=None), geometry, False, None)
            out.mul_(weights.scale[:, None, None]).add_(weights.bias[:, None, None])
            return _then(out, relu, add)
        return _without_gradients(x, weights, geometry, relu, add)
    if weights.scale is None:
        if depthwise.pays(x, weights.weight, weights.bias, geometry):
            return _then(depthwise.convolve(x, weights.weight, weights.bias, geometry), relu, add)
        return _then(F.conv2d(x, weights.weight, weights.bias, *geometry), relu, add)
    return _then(_FoldedConvolution.apply(x, weights.weight, weights.bias, weights.scale, geometry), relu, add)


def _scales_outputs(x: Tensor, weights: Weights, geometry: onednn_conv.Geometry) -> bool:
    """Whether there are fewer outputs to scale than weights, as at the top of a ResNet."""
    if weights.scale is None:
        return False
    cells = x.shape[0] * x.shape[2] * x.shape[3] // (geometry[0][0] * geometry[0][1])
    return 2 * cells * len(weights.weight) < weights.weight.numel()


def _without_gradients(
    x: Tensor, weights: Weights, geometry: onednn_conv.Geometry, relu: bool, add: Tensor | None
) -> Tensor:
    weight = weights.packed
    if weight is None:
        weight = winograd.scaled(weights.weight, weights.scale).to(x.dtype)
    bias = None if weights.bias is None else weights.bias.to(x.dtype)
    if onednn_conv.works(x):
        return onednn_conv.convolve(x, weight, bias, geometry, relu, add)
    return _then(F.conv2d(x, weight, bias, *geometry), relu, add)


def _then(x: Tensor, relu: bool, add: Tensor | None) -> Tensor:
    x = x if add is None else x.add_(add)
    return x.relu_() if relu else x


class _FoldedConvolution(torch.autograd.Function):
    """Convolution with scaled weights, which are computed again for the backward pass.

    Those of a ResNet-50 would take 90 MB from its forward to its backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale, geometry):
        ctx.save_for_backward(x, weight, scale)
        ctx.geometry = geometry
        folded = winograd.scaled(weight, scale).to(x.dtype)
        return F.conv2d(x, folded, bias.to(x.dtype), *geometry)

    @staticmethod
    def backward(ctx, gradient):
        return (*winograd.gradients(gradient, *ctx.saved_tensors, ctx.geometry, ctx.needs_input_grad[:3]), None, None)


def folded_scale(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """The scale of its weights and the bias with which ``conv`` alone computes ``conv.norm(conv(x))``, (C',) each.

    Args:
        conv: its ``norm`` is frozen, or a batch normalisation with running statistics in evaluation mode.
    """
    norm = conv.norm
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:  # batch normalisation without affine parameters has none
        scale = scale * norm.weight
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = bias * scale
    return scale, bias if norm.bias is None else bias + norm.bias
