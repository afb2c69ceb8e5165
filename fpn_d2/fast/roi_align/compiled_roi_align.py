"""Compiled multi-level RoIAlign for the CPU: calls ``roi_align_cpu.cpp``."""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fpn_d2.native.build import FOLDER, Source, load

SOURCE = Source(
    FOLDER / "roi_align_cpu.cpp",
    # One rounding decides on which side of a limit a coordinate lies: none may be left out.
    flags=("-O2", "-ffp-contract=off"),
    does="Pooling",
    otherwise="in pure torch",
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Problem(ctypes.Structure):
    """``Problem`` of the C++ source."""

    _fields_ = [
        *[
            (name, ctypes.c_int64)
            for name in (
                "num_levels num_images num_channels num_rois out_height out_width "
                "sampling_ratio aligned num_threads pooled_channels_last"
            ).split()
        ],
        *[(name, ctypes.c_void_p) for name in "heights widths scales maps rois level_indices".split()],
    ]


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled library, see :func:`.compiled.load`; a failure is remembered, not tried again."""
    loaded = load(SOURCE)
    for kind in ("float32", "float64", "bfloat16") if loaded else ():
        for name in (f"pool_{kind}", f"unpool_{kind}"):
            function = getattr(loaded, name)
            function.argtypes, function.restype = [ctypes.POINTER(_Problem), ctypes.c_void_p], ctypes.c_int64
    return loaded


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
        pooled = maps[0].new_empty((len(rois), maps[0].shape[1], *settings[1]))
        _call("pool", pooled, maps, rois, level_indices, settings, channels_last=False)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rois, level_indices = ctx.saved_tensors
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        gradients = [_empty_channels_last(shape, wide) for shape in ctx.map_shapes]
        # Heads of convolutions hand back a channels-last gradient, those of fully connected layers another.
        channels_last = not gradient.is_contiguous() and gradient.is_contiguous(memory_format=torch.channels_last)
        if not channels_last:
            gradient = gradient.contiguous()
        _call("unpool", gradient, gradients, rois, level_indices, ctx.settings, channels_last)
        return None, None, None, *[level_gradient.to(gradient.dtype) for level_gradient in gradients]


def _empty_channels_last(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    images, channels, height, width = shape
    return torch.empty((images, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def _call(verb, pooled, maps, rois, level_indices, settings, channels_last) -> None:
    """Run one of the library's functions; ``maps`` are its input ("pool") or output ("unpool")."""
    scales, output_size, sampling_ratio, aligned = settings
    images, channels = maps[0].shape[:2]
    levels = len(maps)
    problem = _Problem(
        levels, images, channels, len(rois), *output_size, sampling_ratio, aligned, torch.get_num_threads(),
        channels_last,
        ctypes.addressof(heights := (ctypes.c_int64 * levels)(*[m.shape[2] for m in maps])),
        ctypes.addressof(widths := (ctypes.c_int64 * levels)(*[m.shape[3] for m in maps])),
        ctypes.addressof(factors := (ctypes.c_double * levels)(*scales)),
        ctypes.addressof(pointers := (ctypes.c_void_p * levels)(*[m.data_ptr() for m in maps])),
        rois.data_ptr(),
        level_indices.data_ptr(),
    )  # fmt: skip
    kind = str(pooled.dtype).removeprefix("torch.")
    failed = getattr(library(), f"{verb}_{kind}")(ctypes.byref(problem), pooled.data_ptr())
    del heights, widths, factors, pointers  # alive until here
    if failed:
        raise MemoryError("compiled RoIAlign ran out of memory or threads")
