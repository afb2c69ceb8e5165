"""Convolution on the CPU that computes 3x3 kernels by minimal filtering, with fewer products (``winograd_cpu.cpp``).

Winograd, "Arithmetic complexity of computations", 1980; Lavin and Gray, "Fast algorithms for convolutional neural
networks", CVPR 2016: F(4x4, 3x3) takes 36 products for each 4 x 4 outputs where the sum as it is written takes 144.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_d2.native import memory
from fpn_d2.native.op import Op, problem

from . import cpu_maps

DTYPES = (torch.float32, torch.bfloat16)
# Vectors are of 16 channels.
_LANES = 16
# Below this many tiles of 4 x 4 outputs, transforming the weights takes longer than the products that are saved.
_MIN_TILES_TRAINING, _MIN_TILES, _MIN_TILES_PACKED = 64, 32, 8


def _trial() -> str:
    if not OP.ask("winograd_pays"):
        return "this processor's vectors are too short"
    x = torch.arange(2.0 * 16 * 9 * 10).view(2, 9, 10, 16).permute(0, 3, 1, 2).sin()
    weight = torch.arange(32.0 * 16 * 9).view(32, 16, 3, 3).cos()
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = torch.nn.functional.conv2d(*leaves, padding=1)
    found = _convolve(x, 32, None, weight), _weight_gradient(x, expected.detach().float())
    wanted = expected.detach(), torch.autograd.grad(expected, leaves[1], expected.detach())[0]
    errors = [(one - other).abs().max() / other.abs().max() for one, other in zip(found, wanted, strict=True)]
    return "" if max(errors) < 1e-5 else f"it is wrong by {max(errors):.1g} of the largest number"


OP = Op(
    "winograd",
    "winograd_cpu.cpp",
    flags=("-O3", "-ffp-contract=fast"),
    does="3x3 convolution",
    otherwise="in PyTorch",
    problem=problem(
        "num_images height width in_channels out_channels num_threads relu in_bfloat16",
        "input packed weights strides scale bias output weight_gradient",
    ),
    functions=(
        "winograd_pack",
        *[f"winograd_{verb}_{kind}" for verb in ("convolve", "weight_gradient") for kind in ("float32", "bfloat16")],
    ),
    questions=("winograd_pays", "winograd_has_bfloat16"),
    trial=_trial,
)
library = OP.library


def pays(x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool = False) -> bool:
    """Whether a 3x3 convolution with stride 1 and padding 1 can run here, and is faster than PyTorch's.

    It can on a CPU, on channels-last maps of float32 or bfloat16 with channels that are multiples of 16, where there is
    a compiler. The environment variable ``FPN_D2_CONV`` switches it off: "direct".

    Args:
        x: (N, C, H, W).
        weight: (C', C, 3, 3).
        bias: (C',) or None.
        packed: whether the weights need not be transformed in the call.
    """
    if not cpu_maps.is_plain(x, weight, bias):
        return False
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    autocast = cpu_maps.autocast_dtype("cpu")
    tiles = x.shape[0] * -(-x.shape[-2] // 4) * -(-x.shape[-1] // 4)
    least = _MIN_TILES_TRAINING if torch.is_grad_enabled() else _MIN_TILES
    return (
        tiles >= (_MIN_TILES_PACKED if packed else least)
        and x.shape[1] == weight.shape[1]
        and weight.shape[0] % _LANES == weight.shape[1] % _LANES == 0
        and all(tensor.dtype in DTYPES for tensor in tensors)
        and (x.dtype == weight.dtype if autocast is None else autocast in DTYPES)
        and cpu_maps.is_on()
        and library() is not None
        and bool(OP.ask("winograd_pays", (autocast or x.dtype) == torch.bfloat16))
    )


def can_pack(weight: Tensor) -> bool:
    """Whether there are maps for which the packed ``weight`` (C', C, 3, 3) pays; see :func:`pays`."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and weight.shape[0] % _LANES == weight.shape[1] % _LANES == 0
        and cpu_maps.is_on()
        and library() is not None
    )


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.conv2d(x, weight, bias, padding=1)``, within float rounding, by minimal filtering.

    Maps in bfloat16 are summed in float32; where the processor multiplies bfloat16 (AVX512_BF16), the transformed maps
    and weights are rounded to it, at an error of about 1 % of the size of the outputs. Where an input is infinite or
    NaN, so are outputs, or they are NaN; outputs of the same tile, up to three cells further, may be NaN too. There is
    no second derivative.

    Args:
        x: (N, C, H, W) for which :func:`pays` holds.
        weight: (C', C, 3, 3).
        bias: (C',) or None.
        scale: (C',) factors of the weights, without a gradient; None: 1. The product is not kept for the backward pass.

    Returns:
        (N, C', H, W), channels-last, of x's type, or autocast's.
    """
    if (dtype := cpu_maps.autocast_dtype("cpu")) is not None:
        x = x.to(dtype)  # the weights stay as they are: they are transformed in float32 anyway
    return _Convolution.apply(x, weight, bias, scale)


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """:func:`conv3x3` of transformed weights, and a ReLU if ``relu``; no gradients.

    Args:
        x: as there.
        packed: what :func:`pack` returned.
        bias: as there.
        relu: whether negative outputs become 0.
    """
    if (dtype := cpu_maps.autocast_dtype("cpu")) is not None:
        x = x.to(dtype)
    return _convolve(x, packed.numel() // (36 * x.shape[1]), bias, relu=relu, packed=packed)


def factor_dtype(x: Tensor) -> torch.dtype:
    """The type of what is multiplied for a map: bfloat16 if the map is, and the processor multiplies it."""
    dtype = cpu_maps.autocast_dtype("cpu") or x.dtype
    return dtype if dtype == torch.bfloat16 and OP.ask("winograd_has_bfloat16") else torch.float32


def pack(weight: Tensor, factors: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """Transform weights (C', C, 3, 3), times ``scale`` (C',), to 36 matrices of C' x C, in the order of reading.

    Args:
        weight: (C', C, 3, 3).
        factors: the type of the matrices.
        scale: (C',) or None: 1.
    """
    packed = memory.empty((36 * weight.shape[0] * weight.shape[1],), factors)
    sizes = {"out_channels": weight.shape[0], "in_channels": weight.shape[1]}
    _run("winograd_pack", factors, output=packed, **sizes, **_weights(weight, scale))
    return packed


def _weights(weight: Tensor, scale: Tensor | None) -> dict:
    weight = weight.detach().float()
    scale = None if scale is None else scale.detach().float().contiguous()
    return {"weights": weight, "strides": weight.stride(), "scale": scale}


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale):
        ctx.save_for_backward(x, weight, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _convolve(x, weight.shape[0], bias, weight, scale)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            geometry = ((1, 1), (1, 1), (1, 1), 1)
            return (*gradients(gradient, x, weight, scale, geometry, ctx.needs_input_grad[:3]), None)
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        gradient = gradient.to(x.dtype).contiguous(memory_format=torch.channels_last)
        of_x = of_weight = of_bias = None
        if wants_x:  # the same convolution with the kernels turned round, from out to in
            of_x = _convolve(gradient, weight.shape[1], None, scaled(weight, scale).flip(2, 3).transpose(0, 1))
        if wants_weight:
            of_weight = scaled(_weight_gradient(x, gradient), scale).to(weight.dtype)
        if wants_bias:
            # In parts: PyTorch turns all that it sums into float32 first.
            cells = gradient.permute(0, 2, 3, 1).flatten(0, 2).split(4096)
            of_bias = sum(part.sum(0, dtype=torch.float32) for part in cells).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None


def gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, geometry: tuple, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of input, weight and bias of a convolution, in operations of PyTorch's, which autograd can follow.

    Args:
        gradient: of the output.
        x, weight, scale: see :func:`conv3x3`.
        geometry: stride, padding, dilation and groups.
        wanted: which of the three; the others are None.
    """
    stride, padding, dilation, groups = geometry
    of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
        *(gradient, x, scaled(weight, scale).to(x.dtype), [len(weight)], stride, padding, dilation, False, [0, 0]),
        *(groups, wanted),
    )
    if of_weight is not None:
        of_weight = scaled(of_weight.to(weight.dtype), scale)
    return of_x, of_weight, of_bias


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Weights (C', ...) times ``scale`` (C',), where there is one."""
    return weight if scale is None else weight * scale[:, None, None, None].to(weight.dtype)


def _convolve(
    x: Tensor,
    out_channels: int,
    bias: Tensor | None,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = False,
    packed: Tensor | None = None,
) -> Tensor:
    out = memory.empty((x.shape[0], out_channels, *x.shape[2:]), x.dtype, channels_last=True)
    weights = _weights(weight, scale) if packed is None else {}
    bias = None if bias is None else bias.detach().float().contiguous()
    factors = factor_dtype(x) if packed is None else packed.dtype
    _run(f"winograd_convolve_{_name(x)}", factors, x, out, packed=packed, bias=bias, relu=relu, **weights)
    return out


def _weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    result = torch.empty((3, 3, x.shape[1], gradient.shape[1]))
    _run(f"winograd_weight_gradient_{_name(x)}", factor_dtype(x), x, gradient, weight_gradient=result)
    return result.permute(3, 2, 0, 1)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _run(function: str, factors: torch.dtype, x: Tensor | None = None, out: Tensor | None = None, **values) -> None:
    if x is not None:
        sizes = zip(("num_images", "in_channels", "height", "width"), x.shape, strict=True)
        values |= {**dict(sizes), "out_channels": out.shape[1], "input": x, "output": out}
    OP.run(function, num_threads=torch.get_num_threads(), in_bfloat16=factors == torch.bfloat16, **values)
