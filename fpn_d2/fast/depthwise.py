"""Gradients of depthwise convolutions on the CPU (``depthwise_cpu.cpp``).

EfficientNets, MobileNets and ConvNeXts are made of such convolutions. PyTorch leaves their gradients to oneDNN, which
for channels-last maps and weights of 5 x 5, or stride 2, takes many times as long as for their outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_d2.native import memory
from fpn_d2.native.op import Op, problem

from . import cpu_maps

DTYPES = (torch.float32, torch.bfloat16)
KERNELS = (3, 5, 7)
_LANES = 16  # vectors are of 16 channels


def _trial() -> str:
    x = torch.arange(2.0 * 16 * 9 * 10).view(2, 9, 10, 16).permute(0, 3, 1, 2).sin()
    weight = torch.arange(16.0 * 25).view(16, 1, 5, 5).cos()
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    out = F.conv2d(*leaves, stride=2, padding=2, groups=16)
    wanted = torch.autograd.grad(out, leaves, out.detach())
    found = _gradients(out.detach().float(), x, weight, 2, 2, (True, True))
    errors = [(one - other).abs().max() / other.abs().max() for one, other in zip(found, wanted, strict=True)]
    return "" if max(errors) < 1e-5 else f"it is wrong by {max(errors):.1g} of the largest number"


OP = Op(
    "depthwise",
    "depthwise_cpu.cpp",
    flags=("-O3", "-ffp-contract=fast"),
    does="The backward pass of depthwise convolution",
    otherwise="in PyTorch",
    problem=problem(
        "num_images channels height width out_height out_width kernel stride padding num_threads",
        "input gradient weights input_gradient weight_gradient",
    ),
    functions=tuple(f"depthwise_gradients_{kind}" for kind in ("float32", "bfloat16")),
    trial=_trial,
)
library = OP.library


def pays(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple) -> bool:
    """Whether the gradients of a convolution can be computed here, and sooner than by PyTorch.

    On a CPU, of channels-last maps in float32 or bfloat16 whose channels are a multiple of 16, each convolved by itself
    with a square kernel of 5 or 7, in bfloat16 of 3 too, where there is a compiler. ``FPN_D2_CONV`` switches it off:
    "direct".

    Args:
        x: (N, C, H, W).
        weight: (C', C / groups, h, w).
        bias: (C',) or None.
        geometry: stride, padding, dilation and groups.
    """
    stride, padding, dilation, groups = geometry
    return (
        groups == x.shape[1] == weight.shape[0]
        and groups % _LANES == 0
        and weight.shape[-1] == weight.shape[-2]
        and weight.shape[-1] in (KERNELS if x.dtype == torch.bfloat16 else KERNELS[1:])
        and stride[0] == stride[1]
        and padding[0] == padding[1]
        and tuple(dilation) == (1, 1)
        and x.dtype in DTYPES
        and weight.dtype in DTYPES
        and cpu_maps.is_plain(x, weight, bias)
        and cpu_maps.is_on()
        and library() is not None
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple) -> Tensor:
    """``torch.nn.functional.conv2d(x, weight, bias, *geometry)`` with gradients from here; :func:`pays` holds.

    Gradients are summed in float32. Second derivatives are PyTorch's.
    """
    return _Convolution.apply(x, weight, bias, geometry)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.geometry = geometry
        return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *geometry)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wants = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # for a second derivative
            found = torch.ops.aten.convolution_backward(
                *(gradient, x, weight.to(x.dtype), [groups], stride, padding, dilation, False, [0, 0], groups, wants)
            )
            of_x, of_weight, of_bias = found
        else:
            gradient = gradient.to(x.dtype).contiguous(memory_format=torch.channels_last)
            of_x, of_weight = _gradients(gradient, x, weight, stride[0], padding[0], wants[:2])
            of_bias = gradient.sum((0, 2, 3), dtype=torch.float32) if wants[2] else None
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        return of_x, of_weight, None if of_bias is None else of_bias.to(ctx.bias_dtype), None


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    (images, channels, height, width), kernel = x.shape, weight.shape[-1]
    of_x = memory.empty(x.shape, x.dtype, channels_last=True) if wanted[0] else None
    of_weight = torch.empty((images, kernel, kernel, channels), device="cpu") if wanted[1] else None
    OP.run(
        f"depthwise_gradients_{str(x.dtype).removeprefix('torch.')}",
        num_images=images, channels=channels, height=height, width=width,
        out_height=gradient.shape[2], out_width=gradient.shape[3], kernel=kernel, stride=stride, padding=padding,
        num_threads=torch.get_num_threads(), input=x, gradient=gradient,
        weights=weight.detach().float().squeeze(1).permute(1, 2, 0).contiguous(),
        input_gradient=of_x, weight_gradient=of_weight,
    )  # fmt: skip
    return of_x, None if of_weight is None else of_weight.sum(0).permute(2, 0, 1).unsqueeze(1)
