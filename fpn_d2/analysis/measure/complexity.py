"""Parameters and multiply-adds of a module."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

# oneDNN's fully connected layer is a matrix product like any other, which torch's counter does not know.
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flop(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]


def count_parameters(*modules: nn.Module) -> int:
    """Number of parameters of all ``modules`` together, frozen ones included; shared ones count once."""
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


def count_macs(call: Callable[[], object]) -> int:
    """Multiply-adds in what ``call`` computes.

    Counted are convolutions, matrix products and attention, one for each pair of a multiplication and an addition:
    what most papers and fvcore call FLOPs. Norms, activations, RoIAlign and NMS are left out. The count follows from
    shapes alone, so that weights do not matter and meta tensors do. Needs torch 2.3 or newer.
    """
    # Fused attention on the CPU is not counted; as plain matrix products it is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2  # torch counts the two operations of a pair
