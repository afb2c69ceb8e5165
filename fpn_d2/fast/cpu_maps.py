"""When an operation of our own may take the place of PyTorch's on a CPU: questions that several of them ask."""

import os

import torch
from torch import Tensor

from fpn_d2.errors import UserError

from .guard import are_plain, autocast_dtype

VARIABLE = "FPN_D2_CONV"
IMPLEMENTATIONS = ("auto", "direct")


def is_on() -> bool:
    """Whether convolutions may be others than PyTorch's: the environment variable ``FPN_D2_CONV`` is not "direct".

    Raises:
        UserError: it is neither that nor "auto".
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in IMPLEMENTATIONS:
        raise UserError(f"{VARIABLE} is {value!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    return value == "auto"


def is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are a channels-last map and ordinary tensors on the CPU, and nobody follows the operations."""
    return are_plain(x, weight, bias) and x.dim() == 4 and x.numel() > 0 and is_channels_last(x)


def is_channels_last(x: Tensor) -> bool:
    """Whether the map lies channels-last and not as well in PyTorch's own order."""
    # With one channel or one cell a map is both; such maps are small, and none of ours.
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


__all__ = ["autocast_dtype", "is_channels_last", "is_on", "is_plain"]
