"""Group normalisation of channels-last maps on the CPU (``group_norm_cpu.cpp``).

PyTorch's backward pass of it is many times slower on such maps than on maps in its own order, in which the convolutions
before and behind it are slower in turn. Wu and He, "Group normalization", ECCV 2018.
"""

import torch
from torch import Tensor, nn

from fpn_d2.native import memory
from fpn_d2.native.op import Op, problem

from . import cpu_maps
from .guard import Fast, is_itself

DTYPES = (torch.float32, torch.bfloat16)
_LANES = 16  # vectors are of 16 channels


def _trial() -> str:
    x = torch.arange(2.0 * 32 * 9 * 31).view(2, 9, 31, 32).permute(0, 3, 1, 2).sin()
    weight, bias = torch.arange(32.0).cos(), torch.arange(32.0).sin()
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = nn.functional.group_norm(leaves[0], 4, leaves[1], leaves[2], 1e-3)
    gradient = torch.cos(3 * expected.detach())
    found, moments = _forward(x, 4, weight, bias, 1e-3)
    found = found, *_backward(gradient.float(), x, 4, weight, moments, True)
    wanted = expected.detach(), *torch.autograd.grad(expected, leaves, gradient)
    errors = [(one - other).abs().max() / other.abs().max() for one, other in zip(found, wanted, strict=True)]
    return "" if max(errors) < 1e-5 else f"it is wrong by {max(errors):.1g} of the largest number"


OP = Op(
    "group_norm",
    "group_norm_cpu.cpp",
    flags=("-O3", "-ffp-contract=fast"),
    does="Group normalisation",
    otherwise="in PyTorch",
    problem=problem(
        "num_images cells channels groups num_threads",
        "input weight bias moments output gradient input_gradient weight_gradient",
        "epsilon",
    ),
    functions=tuple(f"group_norm_{way}_{kind}" for way in ("forward", "backward") for kind in ("float32", "bfloat16")),
    trial=_trial,
)
library = OP.library


class FastGroupNorm(Fast):
    """PyTorch's ``GroupNorm``, within float rounding, with sums in float32 for maps in bfloat16."""

    REPLACES = ("forward",)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if not (can_run(self) and x.dtype in DTYPES and cpu_maps.is_plain(x, self.weight, self.bias)):
            return super().forward(x)
        if x.shape[1] != self.num_channels:
            return super().forward(x)  # which says so
        return _GroupNorm.apply(x, self.num_groups, self.weight, self.bias, self.eps)


def can_run(norm: nn.Module) -> bool:
    """Whether ``norm`` is a group normalisation that runs here on channels-last maps of the usual types."""
    return (
        isinstance(norm, FastGroupNorm)
        and is_itself(norm)
        and norm.affine
        and norm.num_channels % _LANES == 0
        and norm.weight.dtype == norm.bias.dtype == torch.float32
        and cpu_maps.is_on()
        and library() is not None
    )


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps):
        out, moments = _forward(x, groups, weight, bias, eps)
        ctx.save_for_backward(x, weight, moments)
        ctx.groups, ctx.eps = groups, eps
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, weight, moments = ctx.saved_tensors
        wants_x, _, wants_weight, wants_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for a second derivative
            of_x, of_weight, of_bias = _differentiable(gradient, x, ctx.groups, weight, ctx.eps)
        else:
            gradient = gradient.to(x.dtype).contiguous(memory_format=torch.channels_last)
            of_x, of_weight, of_bias = _backward(gradient, x, ctx.groups, weight, moments, wants_x)
        return of_x, None, of_weight if wants_weight else None, of_bias if wants_bias else None, None


def _differentiable(
    gradient: Tensor, x: Tensor, groups: int, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients in operations that autograd can follow."""
    of_group = (2, 3, 4)
    grouped = x.unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(grouped, of_group, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    normed = (grouped - mean) * rstd
    weighted = (gradient * weight[:, None, None]).unflatten(1, (groups, -1))
    along = normed * (weighted * normed).mean(of_group, keepdim=True)
    of_x = rstd * (weighted - weighted.mean(of_group, keepdim=True) - along)
    return of_x.flatten(1, 2), (gradient * normed.flatten(1, 2)).sum((0, 2, 3)), gradient.sum((0, 2, 3))


def _forward(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = memory.empty(x.shape, x.dtype, channels_last=True)
    moments = torch.empty((x.shape[0], 2, groups), device="cpu")
    weight, bias = weight.detach().contiguous(), bias.detach().contiguous()
    _run("forward", x, groups, weight, epsilon=eps, bias=bias, moments=moments, output=out)
    return out, moments


def _backward(
    gradient: Tensor, x: Tensor, groups: int, weight: Tensor, moments: Tensor, wants_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    of_x = memory.empty(x.shape, x.dtype, channels_last=True) if wants_x else None
    sums = torch.empty((x.shape[0], 2, x.shape[1]), device="cpu")
    weight = weight.detach().contiguous()
    values = {"gradient": gradient, "moments": moments, "input_gradient": of_x, "weight_gradient": sums}
    _run("backward", x, groups, weight, **values)
    return of_x, *sums.sum(0).unbind()


def _run(way: str, x: Tensor, groups: int, weight: Tensor, **values) -> None:
    images, channels, height, width = x.shape
    OP.run(
        f"group_norm_{way}_{str(x.dtype).removeprefix('torch.')}",
        num_images=images, cells=height * width, channels=channels, groups=groups,
        num_threads=torch.get_num_threads(), input=x, weight=weight, **values,
    )  # fmt: skip
