"""Compiled multi-level RoIAlign for the CPU: calls ``roi_align_cpu.cpp``."""

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable

from fpn_d2.native import memory
from fpn_d2.native.op import Op, problem

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _trial() -> str:
    """One map, against torchvision, there and back."""
    rois = torch.tensor([[0, 3.0, 5, 33, 21], [1, -4, 9.5, 60, 50], [1, 17, 2, 18, 44]])
    level_map = torch.arange(2.0 * 19 * 12 * 15).view(2, 19, 12, 15).sin().requires_grad_()
    found = []
    for pooled in (
        compiled_roi_align([level_map], rois, torch.zeros(3, dtype=torch.int64), [0.25], (3, 2), 0, True),
        torchvision.ops.roi_align(level_map, rois, (3, 2), 0.25, 0, True),
    ):
        found.append((pooled.detach(), *torch.autograd.grad(pooled, level_map, pooled.detach())))
    errors = [float((one - other).abs().max()) for one, other in zip(*found, strict=True)]
    return "" if max(errors) < 1e-5 else f"it is off by {max(errors):.1g}"


OP = Op(
    "roi_align",
    "roi_align_cpu.cpp",
    # One rounding decides on which side of a limit a coordinate lies: none may be left out.
    flags=("-O2", "-ffp-contract=off"),
    does="Pooling",
    otherwise="in pure torch",
    problem=problem(
        "num_levels num_images num_channels num_rois out_height out_width sampling_ratio aligned num_threads "
        "pooled_channels_last",
        "heights widths scales maps rois level_indices pooled",
    ),
    functions=tuple(f"{verb}_{kind}" for verb in ("pool", "unpool") for kind in ("float32", "float64", "bfloat16")),
    trial=_trial,
)
library = OP.library


def compiled_roi_align(
    maps: Sequence[Tensor],
    rois: Tensor,
    level_indices: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """:func:`fpn_d2.fast.roi_align.pyramid_roi_align` with ``implementation="compiled"``, of checked arguments."""
    dtype = maps[0].dtype
    if dtype == torch.float16:  # rare on CPUs
        maps = [level_map.float() for level_map in maps]
    # The sums run over vectors of channels; a map that is not channels-last in memory is copied.
    maps = [level_map.contiguous(memory_format=torch.channels_last) for level_map in maps]
    settings = (tuple(scales), tuple(output_size), sampling_ratio, aligned)
    return _Pool.apply(settings, rois.detach(), level_indices, *maps).to(dtype)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, rois, level_indices, *maps):
        ctx.settings = settings
        ctx.map_shapes = [level_map.shape for level_map in maps]
        rois = rois.to(torch.float64 if maps[0].dtype == torch.float64 else torch.float32).contiguous()
        level_indices = level_indices.contiguous()
        ctx.save_for_backward(rois, level_indices)
        pooled = memory.empty((len(rois), maps[0].shape[1], *settings[1]), maps[0].dtype)
        _call("pool", pooled, maps, rois, level_indices, settings, channels_last=False)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rois, level_indices = ctx.saved_tensors
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        gradients = [memory.empty(shape, wide, channels_last=True) for shape in ctx.map_shapes]
        # Heads of convolutions hand back a channels-last gradient, those of fully connected layers another.
        channels_last = not gradient.is_contiguous() and gradient.is_contiguous(memory_format=torch.channels_last)
        if not channels_last:
            gradient = gradient.contiguous()
        _call("unpool", gradient, gradients, rois, level_indices, ctx.settings, channels_last)
        return None, None, None, *[level_gradient.to(gradient.dtype) for level_gradient in gradients]


def _call(verb, pooled, maps, rois, level_indices, settings, channels_last) -> None:
    """Run one of the library's functions; ``maps`` are its input ("pool") or output ("unpool")."""
    scales, output_size, sampling_ratio, aligned = settings
    OP.run(
        f"{verb}_{str(pooled.dtype).removeprefix('torch.')}",
        **{"num_levels": len(maps), "num_images": len(maps[0]), "num_channels": maps[0].shape[1]},
        **{"num_rois": len(rois), "out_height": output_size[0], "out_width": output_size[1]},
        **{"sampling_ratio": sampling_ratio, "aligned": aligned, "num_threads": torch.get_num_threads()},
        **{"pooled": pooled, "pooled_channels_last": channels_last, "rois": rois, "level_indices": level_indices},
        **{"maps": maps, "scales": [float(scale) for scale in scales]},
        **{"heights": [m.shape[2] for m in maps], "widths": [m.shape[3] for m in maps]},
    )
