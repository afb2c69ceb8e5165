"""Convolution on the CPU that computes 3x3 kernels by minimal filtering, with fewer products (``winograd_cpu.cpp``).

Winograd, "Arithmetic complexity of computations", 1980; Lavin and Gray, "Fast algorithms for convolutional neural
networks", CVPR 2016: F(4x4, 3x3) takes 36 products for each 4 x 4 outputs where the sum as it is written takes 144.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .compiled import Source, load

SOURCE = Source(
    Path(__file__).with_name("winograd_cpu.cpp"),
    flags=("-O3", "-ffp-contract=fast"),
    does="3x3 convolution",
    otherwise="in PyTorch",
)
VARIABLE = "FPN_D2_CONV"
IMPLEMENTATIONS = ("auto", "direct")
DTYPES = (torch.float32, torch.bfloat16)
# Vectors are of 16 channels.
_LANES = 16
# Below this many tiles of 4 x 4 outputs, transforming the weights takes longer than the products that are saved.
_MIN_TILES, _MIN_TILES_PACKED = 64, 8


class _Problem(ctypes.Structure):
    """``Problem`` of the C++ source."""

    _fields_ = [
        *[
            (name, ctypes.c_int64)
            for name in "num_images height width in_channels out_channels num_threads relu".split()
        ],
        *[(name, ctypes.c_void_p) for name in "input packed weights strides bias output weight_gradient".split()],
    ]


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled library, see :func:`.compiled.load`; None also where this processor gains nothing by it."""
    loaded = load(SOURCE)
    if loaded is None or not loaded.winograd_pays():
        return None
    for name in ("convolve", "weight_gradient"):
        for kind in ("float32", "bfloat16"):
            function = getattr(loaded, f"winograd_{name}_{kind}")
            function.argtypes, function.restype = [ctypes.POINTER(_Problem)], ctypes.c_int64
    loaded.winograd_pack.argtypes = [ctypes.POINTER(_Problem), ctypes.c_void_p]
    loaded.winograd_pack.restype = ctypes.c_int64
    return loaded


class PackedWeights:
    """Transformed weights of one layer, kept from one inference to the next for as long as they are the same.

    They take four times the weights' memory in float32. Copies and pickles of it are empty.
    """

    def __init__(self):
        # One attribute, which other threads find whole: what it was made from, the transformed weights, the bias, and
        # the memory that it was made from, which nobody else can then be given.
        self._kept: tuple[tuple, Tensor, Tensor | None, list] | None = None

    def __reduce__(self) -> tuple:
        return PackedWeights, ()

    def clear(self) -> None:
        """Forget them."""
        self.__init__()

    def get(
        self, tensors: Sequence[Tensor], make: Callable[[], tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the transformed weights, and the bias.

        Args:
            tensors: what they are made from: as long as these are the same and nobody wrote to them, so are they.
            make: returns weights (C', C, 3, 3) and bias (C',) or None.
        """
        if any(tensor.is_inference() for tensor in tensors):  # these do not say when they were written to
            weight, bias = make()
            return pack(weight), bias
        made_from = tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors)
        kept = self._kept
        if kept is None or kept[0] != made_from:
            weight, bias = make()
            kept = self._kept = made_from, pack(weight), bias, [tensor.untyped_storage() for tensor in tensors]
        return kept[1:3]


def pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a 3x3 convolution with stride 1 and padding 1 can run here, and is faster than PyTorch's.

    It can on a CPU, on channels-last maps of float32 or bfloat16 with channels that are multiples of 16, where there is
    a compiler. The environment variable ``FPN_D2_CONV`` switches it off: "direct".

    Args:
        x: (N, C, H, W).
        weight: (C', C, 3, 3).
        bias: (C',) or None.
    """
    if is_watched():
        return False
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    autocast = autocast_dtype("cpu")
    tiles = x.shape[0] * -(-x.shape[-2] // 4) * -(-x.shape[-1] // 4) if x.dim() == 4 else 0
    return (
        x.device.type == weight.device.type == "cpu"
        and tiles >= (_MIN_TILES if torch.is_grad_enabled() else _MIN_TILES_PACKED)
        and x.shape[1] == weight.shape[1]
        and weight.shape[0] % _LANES == weight.shape[1] % _LANES == 0
        and all(tensor.dtype in DTYPES for tensor in tensors)
        and (x.dtype == weight.dtype if autocast is None else autocast in DTYPES)
        and _is_channels_last(x)
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and _is_on()
        and library() is not None
    )


def _is_on() -> bool:
    value = os.environ.get(VARIABLE, "auto")
    if value not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE} is {value!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    return value == "auto"


def _is_channels_last(x: Tensor) -> bool:
    # With one channel or one cell a map is both; such maps are small, and none of ours.
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def is_watched() -> bool:
    """Whether someone follows the operations, and has to see a convolution: a trace, an export, a count of FLOPs."""
    compiler = getattr(torch, "compiler", None)  # before torch 2.1 there is none
    if torch.jit.is_tracing() or (hasattr(compiler, "is_compiling") and compiler.is_compiling()):
        return True
    depth = getattr(torch._C, "_len_torch_dispatch_stack", None)
    functorch = getattr(torch._C, "_functorch", None)
    level = getattr(functorch, "maybe_current_level", lambda: None)()
    return (depth is not None and depth() > 0) or level is not None


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast asks of convolutions on this kind of device; None where it is off."""
    try:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except RuntimeError:  # a kind of device without autocast
        return None
    except (AttributeError, TypeError):  # before torch 2.4
        if device == "cpu":
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.conv2d(x, weight, bias, padding=1)``, within float rounding, by minimal filtering.

    Maps in bfloat16 are summed in float32. Where an input is infinite or NaN, so are outputs, or they are NaN; outputs
    of the same tile, up to three cells further, may be NaN too. There is no second derivative.

    Args:
        x: (N, C, H, W) for which :func:`pays` holds.
        weight: (C', C, 3, 3).
        bias: (C',) or None.
        scale: (C',) factors of the weights, without a gradient; None: 1. The product is not kept for the backward pass.

    Returns:
        (N, C', H, W), channels-last, of x's type, or autocast's.
    """
    if (dtype := autocast_dtype("cpu")) is not None:
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
    if (dtype := autocast_dtype("cpu")) is not None:
        x = x.to(dtype)
    return _convolve(x, packed.numel() // (36 * x.shape[1]), bias, relu=relu, packed=packed)


def pack(weight: Tensor) -> Tensor:
    """Transform weights (C', C, 3, 3) to 36 matrices of C' x C, in the order in which they are read."""
    weight = weight.detach().float()
    packed = torch.empty(36 * weight.shape[0] * weight.shape[1])
    problem, strides = _problem(None, weight, None)
    problem.in_channels, problem.out_channels = weight.shape[1], weight.shape[0]
    _run("winograd_pack", problem, packed.data_ptr())
    del strides  # alive until here
    return packed


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale):
        ctx.save_for_backward(x, weight, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _convolve(x, weight.shape[0], bias, scaled(weight, scale))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        gradient = gradient.to(x.dtype).contiguous(memory_format=torch.channels_last)
        of_x = of_weight = of_bias = None
        if wants_x:  # the same convolution with the kernels turned round, from out to in
            of_x = _convolve(gradient, weight.shape[1], None, scaled(weight, scale).flip(2, 3).transpose(0, 1))
        if wants_weight:
            of_weight = scaled(_weight_gradient(x, gradient), scale).to(weight.dtype)
        if wants_bias:
            of_bias = gradient.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Weights (C', ...) times ``scale`` (C',), where there is one."""
    return weight if scale is None else weight * scale[:, None, None, None].to(weight.dtype)


def _convolve(
    x: Tensor,
    out_channels: int,
    bias: Tensor | None,
    weight: Tensor | None = None,
    relu: bool = False,
    packed: Tensor | None = None,
) -> Tensor:
    images, _, height, width = x.shape
    out = torch.empty((images, out_channels, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    weight = None if weight is None else weight.detach().float()
    bias = None if bias is None else bias.detach().float().contiguous()
    problem, strides = _problem(x, weight, out)
    problem.relu, problem.bias = relu, None if bias is None else bias.data_ptr()
    problem.packed = None if packed is None else packed.data_ptr()
    _run(f"winograd_convolve_{_name(x)}", problem)
    del strides
    return out


def _weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    out_channels, channels = gradient.shape[1], x.shape[1]
    result = torch.empty((3, 3, channels, out_channels))
    problem, strides = _problem(x, None, gradient)
    problem.weight_gradient = result.data_ptr()
    _run(f"winograd_weight_gradient_{_name(x)}", problem)
    del strides
    return result.permute(3, 2, 0, 1)


def _problem(x: Tensor | None, weight: Tensor | None, out: Tensor | None) -> tuple[_Problem, object]:
    """The problem, and what has to stay alive while it is worked on."""
    problem = _Problem(num_threads=torch.get_num_threads())
    if x is not None:
        problem.num_images, problem.in_channels, problem.height, problem.width = x.shape
        problem.input, problem.output, problem.out_channels = x.data_ptr(), out.data_ptr(), out.shape[1]
    strides = None
    if weight is not None:
        strides = (ctypes.c_int64 * 4)(*weight.stride())
        problem.weights, problem.strides = weight.data_ptr(), ctypes.addressof(strides)
    return problem, strides


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _run(name: str, problem: _Problem, *args) -> None:
    if getattr(library(), name)(ctypes.byref(problem), *args):
        raise MemoryError("compiled 3x3 convolution ran out of memory or threads")
