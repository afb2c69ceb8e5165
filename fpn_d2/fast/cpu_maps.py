"""When an operation of our own may take the place of PyTorch's on a CPU: questions that several of them ask."""

import os

import torch
from torch import Tensor, nn

VARIABLE = "FPN_D2_CONV"
IMPLEMENTATIONS = ("auto", "direct")


def is_on() -> bool:
    """Whether convolutions may be others than PyTorch's: the environment variable ``FPN_D2_CONV`` is not "direct".

    Raises:
        ValueError: it is neither that nor "auto".
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE} is {value!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    return value == "auto"


def is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are a channels-last map and ordinary tensors on the CPU, and nobody follows the operations.

    Args:
        x: (N, C, H, W).
        weight: of a convolution of ``x``.
        bias: (C',) or None.
    """
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return (
        not is_watched()  # first: a trace would record the questions after it
        and x.dim() == 4
        and x.numel() > 0
        and all(tensor.device.type == "cpu" for tensor in tensors)
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and is_channels_last(x)
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether the map lies channels-last and not as well in PyTorch's own order."""
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
