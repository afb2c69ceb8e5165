"""Convolution by oneDNN, followed by a sum and a ReLU in the same pass; inference only.

PyTorch's convolution hands 1x1 kernels to a slower library where it has one thread, and each operation after it reads
and writes all of the output again. The operations here are those that ``torch.compile`` calls on a CPU. They are not
public, so that they are used only where a small sum comes out right. Weights are brought into oneDNN's own layout in
each call, which takes a twentieth of a detector's time, unless they are final: then :func:`reorder` does it once.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu_maps

DTYPES = (torch.float32, torch.bfloat16)
# Stride, padding and dilation, of rows and columns, and groups.
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


def reorder(weight: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    """Bring weights into oneDNN's layout: the best for maps of the shape (N, C, H, W), and right for all others."""
    stride, padding, dilation, groups = geometry
    arguments = (list(padding), list(stride), list(dilation), groups, list(shape))
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *arguments)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool, add: Tensor | None = None
) -> Tensor:
    """Convolve, add ``add`` and rectify; no gradients.

    Args:
        x: (N, C, H, W), channels-last, for which :func:`works` holds.
        weight: (C', C / groups, h, w), of its type, as it is or as :func:`reorder` returned it.
        bias: (C',) of its type, or None.
        geometry: of the convolution.
        relu: whether negative outputs become 0.
        add: of the shape of the output, or None.

    Returns:
        (N, C', H', W'), channels-last.
    """
    stride, padding, dilation, groups = geometry
    arguments = (weight, bias, list(padding), list(stride), list(dilation), groups)
    last = "relu" if relu else "none"
    if add is None:
        return torch.ops.mkldnn._convolution_pointwise(x, *arguments, last, [], "")
    # The operation trusts the caller with the shape of what it adds, and knows no groups in bfloat16.
    sides = zip(stride, padding, dilation, weight.shape[2:], strict=True)
    same_size = all(s == 1 and 2 * p == d * (k - 1) for s, p, d, k in sides)
    if groups > 1 or not same_size or add.shape != (len(x), len(weight), *x.shape[2:]) or add.dtype != x.dtype:
        out = convolve(x, weight, bias, geometry, relu=False).add_(add)
        return out.relu_() if relu else out
    add = add.contiguous(memory_format=torch.channels_last)
    binary = torch.ops.mkldnn._convolution_pointwise.binary
    return binary(x, add, *arguments, "add", 1.0, last if relu else None, [], "")


def works(x: Tensor) -> bool:
    """Whether oneDNN is there and on for ``x``, and this PyTorch has the operations, which compute what they should."""
    return x.dtype in DTYPES and torch.backends.mkldnn.enabled and cpu_maps.is_on() and _works()


@functools.lru_cache(maxsize=1)
def _works() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.arange(-16.0, 16.0).view(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.arange(-18.0, 18.0).view(2, 2, 3, 3)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    out = torch.nn.functional.conv2d(x, weight, padding=1)
    try:
        with torch.no_grad():
            plain = convolve(x, reorder(weight, x.shape, geometry), None, geometry, relu=False)
            rectified = convolve(x, weight, None, geometry, relu=True, add=x)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    error = torch.cat([(plain - out).flatten(), (rectified - (out + x).relu()).flatten()])
    return bool(error.abs().max() < 1e-4 * out.abs().max())
