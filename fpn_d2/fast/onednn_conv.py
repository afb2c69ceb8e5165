"""Convolution by oneDNN with weights in its own layout, followed by a sum and a ReLU in the same pass; inference only.

PyTorch's convolution brings the weights into that layout in each call, hands 1x1 kernels to a slower library where it
has one thread, and each operation after it reads and writes all of the output again. The operations here are those that
``torch.compile`` calls on a CPU. They are not public, so that they are used only where a small sum comes out right.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu_maps

DTYPES = (torch.float32, torch.bfloat16)
# Stride, padding and dilation, of rows and columns, and groups.
Geometry = tuple[tuple[int, int], tuple[int, int] | str, tuple[int, int], int]


def pays(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    """Whether a convolution can run here, and is faster than PyTorch's.

    It can on a CPU, without gradients and outside autocast, on channels-last maps of float32 or bfloat16.

    Args:
        x: (N, C, H, W).
        weight: (C', C / groups, h, w).
        bias: (C',) or None.
        geometry: of the convolution; a padding by name is left to PyTorch.
    """
    return (
        cpu_maps.is_plain(x, weight, bias)
        and x.dtype in DTYPES
        and x.dtype == weight.dtype
        and x.shape[1] == weight.shape[1] * geometry[3]
        and not isinstance(geometry[1], str)
        and not torch.is_grad_enabled()
        and cpu_maps.autocast_dtype("cpu") is None
        and cpu_maps.is_on()
        and works()
    )


def pack(weight: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    """Bring weights into oneDNN's layout, the best for maps of the shape (N, C, H, W); it is right for others too."""
    stride, padding, dilation, groups = geometry
    arguments = (list(padding), list(stride), list(dilation), groups, list(shape))
    return torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *arguments)


def convolve(
    x: Tensor, packed: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool, add: Tensor | None = None
) -> Tensor:
    """Convolve, add ``add`` and rectify.

    Args:
        x: (N, C, H, W) for which :func:`pays` holds.
        packed: what :func:`pack` returned.
        bias: (C',) or None.
        geometry: as for :func:`pack`.
        relu: whether negative outputs become 0.
        add: of the shape of the output, or None.

    Returns:
        (N, C', H', W'), channels-last.
    """
    stride, padding, dilation, groups = geometry
    bias = None if bias is None else bias.detach().to(x.dtype)
    arguments = (packed, bias, list(padding), list(stride), list(dilation), groups)
    last = "relu" if relu else "none"
    if add is None:
        return torch.ops.mkldnn._convolution_pointwise(x, *arguments, last, [], "")
    # The operation trusts the caller with the shape of what it adds, and knows no groups in bfloat16.
    sides = zip(stride, padding, dilation, packed.shape[2:], strict=True)
    same_size = all(s == 1 and 2 * p == d * (k - 1) for s, p, d, k in sides)
    if groups > 1 or not same_size or add.shape != (len(x), len(packed), *x.shape[2:]) or add.dtype != x.dtype:
        out = convolve(x, packed, bias, geometry, relu=False).add_(add)
        return out.relu_() if relu else out
    add = add.contiguous(memory_format=torch.channels_last)
    binary = torch.ops.mkldnn._convolution_pointwise.binary
    return binary(x, add, *arguments, "add", 1.0, last if relu else None, [], "")


def accumulate(x: Tensor, packed: Tensor, out: Tensor, geometry: Geometry) -> None:
    """Add the convolution of ``x`` to ``out``, in place.

    Args:
        x: (N, C, H, W), channels-last, of float32.
        packed: what :func:`pack` returned.
        out: (N, C', H', W'), channels-last, of float32.
        geometry: as for :func:`pack`.
    """
    stride, padding, dilation, groups = geometry
    arguments = (packed, None, list(padding), list(stride), list(dilation), groups)
    torch.ops.mkldnn._convolution_pointwise_.binary(out, x, *arguments, "add", 1.0, None, [], "")


def works() -> bool:
    """Whether oneDNN is there and on, and this PyTorch has the operations, which compute what they should."""
    return torch.backends.mkldnn.enabled and _works()


@functools.lru_cache(maxsize=1)
def _works() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.arange(-16.0, 16.0).view(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.arange(-18.0, 18.0).view(2, 2, 3, 3)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    out = torch.nn.functional.conv2d(x, weight, padding=1)
    # In groups of two channels, a column of cells, as in minimal filtering.
    column, in_groups = x.reshape(1, 8, 1, 4).transpose(2, 3), ((1, 1), (0, 0), (1, 1), 4)
    weight_of_groups = torch.arange(-8.0, 8.0).view(8, 2, 1, 1)
    out_of_groups = torch.nn.functional.conv2d(column, weight_of_groups, groups=4)
    try:
        packed = pack(weight, x.shape, geometry)
        plain = convolve(x, packed, None, geometry, relu=False)
        rectified = convolve(x, packed, None, geometry, relu=True, add=x)
        total = column.contiguous(memory_format=torch.channels_last)
        accumulate(total.clone(), pack(weight_of_groups, column.shape, in_groups), total, in_groups)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    errors = plain - out, rectified - (out + x).relu(), total - (out_of_groups + column)
    error = torch.cat([one.flatten() for one in errors])
    return bool(error.abs().max() < 1e-4 * out.abs().max())
