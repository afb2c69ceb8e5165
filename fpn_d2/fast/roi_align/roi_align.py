"""Multi-level RoIAlign: checks the arguments and chooses an implementation.

Shape legend: N images, L levels, M RoIs of all images together, C channels, (h, w) cells of a pooled RoI.
"""

import functools
import logging
import os
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

from fpn_d2.errors import UserError

from . import compiled_roi_align as compiled
from .torch_roi_align import torch_roi_align

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "compiled", "torch", "triton", "torchvision")
VARIABLE = "FPN_D2_ROI_ALIGN"


def pyramid_roi_align(
    maps: Sequence[Tensor],
    rois: Tensor,
    level_indices: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    implementation: str = "auto",
    deterministic: bool | None = None,
) -> Tensor:
    """RoIAlign (Mask R-CNN, section 3) of each RoI from the level it is assigned to.

    Per level it computes what ``torchvision.ops.roi_align`` does, so rounding aside the result is that of Detectron2's
    ``ROIPooler``. Coordinates are worked out in float32, in float64 where the maps are; maps of half precision are
    summed in float32. The gradient reaches the maps, not the RoIs.

    Args:
        maps: L tensors (N, C, H_l, W_l) of one dtype and device. Channels-last memory is read as it is; on a CPU any
            other layout is copied first, except by "torchvision".
        rois: (M, 5) image index, x0, y0, x1, y1 in pixels of the image. A RoI with a NaN or infinite coordinate pools
            NaN ("torchvision": undefined).
        level_indices: (M,) int64, which of ``maps`` each RoI is pooled from.
        scales: of each level, map cells per pixel: 1 / stride.
        output_size: (h, w) cells of a pooled RoI.
        sampling_ratio: samples per cell and axis; 0: as many as the cell has map cells, rounded up.
        aligned: True: pixel centres lie at .5 ("ROIAlignV2"). False: at integers, and RoIs are at least 1 x 1 cells.
        implementation: one of ``IMPLEMENTATIONS``.
        deterministic: whether two backward passes on a GPU must agree to the last bit, at some cost; None: as in
            ``torch.are_deterministic_algorithms_enabled()``. On a CPU they always do.

    Returns:
        (M, C, h, w), contiguous, of the maps' dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, on a CPU also: an index is out of range.
        UserError: the implementation asked for is none, or does not run here.
    """
    arguments = (maps, rois, level_indices, scales, output_size, sampling_ratio, aligned)
    if torch.jit.is_tracing() or _is_exporting():
        return _torchvision(*arguments)
    return _eager_roi_align(arguments, implementation, deterministic)


def _eager_roi_align(arguments: tuple, implementation: str, deterministic: bool | None) -> Tensor:
    maps, rois, level_indices, scales, output_size, sampling_ratio, aligned = arguments
    _check(maps, rois, level_indices, scales, output_size, sampling_ratio)
    name = choose(implementation, maps)
    if rois.dtype in (torch.float16, torch.bfloat16):
        rois = rois.float()
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if name == "triton":
        return _triton().triton_roi_align(
            maps, rois, level_indices, scales, output_size, sampling_ratio, aligned, deterministic
        )
    if deterministic and name == "torchvision" and maps[0].is_cuda:
        name = "torch"
    function = {"compiled": compiled.compiled_roi_align, "torch": torch_roi_align, "torchvision": _torchvision}[name]
    return function(maps, rois, level_indices, scales, output_size, sampling_ratio, aligned)


def choose(implementation: str, maps: Sequence[Tensor]) -> str:
    """Return the implementation that "auto" means for these maps, or check that the one asked for runs on them.

    Raises:
        UserError: there is none of that name, or it does not run here.
    """
    source = "implementation"
    if implementation == "auto":
        implementation, source = os.environ.get(VARIABLE, "auto"), VARIABLE
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"{source} is {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    device = maps[0].device.type
    if implementation == "auto":
        if maps[0].dtype not in compiled.DTYPES:
            return "torchvision"
        if device == "cpu":
            return "compiled" if compiled.library() is not None else "torch"
        return "torchvision"
    if implementation == "compiled" and (device != "cpu" or compiled.library() is None):
        why = f"the maps are on {device}" if device != "cpu" else "it could not be built, see the log"
        raise UserError(f"{source} is 'compiled', which runs on a CPU with a C++ compiler: {why}")
    if implementation == "triton" and not _triton_fits(maps):
        why = "Triton cannot be imported" if _triton() is None else f"got {len(maps)} maps on {device}"
        raise UserError(f"{source} is 'triton', which pools from up to 6 maps on a GPU: {why}")
    return implementation


def _check(maps, rois, level_indices, scales, output_size, sampling_ratio) -> None:
    if not maps or len(maps) != len(scales):
        raise ValueError(
            f"got {len(maps)} maps and {len(scales)} scales; expected one scale for each of 1 or more maps"
        )
    first = maps[0]
    for level_map in maps:
        if level_map.dim() != 4 or level_map.shape[:2] != first.shape[:2] or 0 in level_map.shape[2:]:
            shapes = [tuple(m.shape) for m in maps]
            raise ValueError(f"the maps have shapes {shapes}; expected (N, C, height, width), N and C the same")
        if level_map.dtype != first.dtype or level_map.device != first.device:
            raise ValueError(f"the maps differ in dtype or device: {[(m.dtype, str(m.device)) for m in maps]}")
    if not first.is_floating_point():
        raise ValueError(f"the maps are of {first.dtype}; expected a floating-point type")
    if rois.dim() != 2 or rois.shape[1] != 5 or not rois.is_floating_point():
        raise ValueError(f"rois are {tuple(rois.shape)} of {rois.dtype}; expected (M, 5), floating-point")
    if level_indices.shape != rois.shape[:1] or level_indices.dtype != torch.int64:
        came = f"{tuple(level_indices.shape)} of {level_indices.dtype}"
        raise ValueError(f"level_indices are {came}; expected ({len(rois)},) of torch.int64")
    if rois.device != first.device or level_indices.device != first.device:
        raise ValueError(f"maps are on {first.device}, rois on {rois.device}, level_indices on {level_indices.device}")
    if len(output_size) != 2 or min(output_size) < 1 or sampling_ratio < 0:
        raise ValueError(
            f"output_size is {output_size!r}, sampling_ratio {sampling_ratio!r}; expected (height, width) of at least "
            "1, and at least 0"
        )
    if first.device.type == "cpu" and len(rois):  # a GPU would have to be waited for
        image = rois[:, 0]
        if not bool(((image >= 0) & (image < first.shape[0])).all()):
            raise ValueError(
                f"image indices of the rois reach from {image.min()} to {image.max()}, with {len(first)} images"
            )
        if not 0 <= int(level_indices.min()) <= int(level_indices.max()) < len(maps):
            reach = f"{level_indices.min()} to {level_indices.max()}"
            raise ValueError(f"level_indices reach from {reach}, with {len(maps)} maps")


def _torchvision(maps, rois, level_indices, scales, output_size, sampling_ratio, aligned) -> Tensor:
    pooled = maps[0].new_zeros((rois.shape[0], maps[0].shape[1], *output_size))
    wide = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    for level, (level_map, scale) in enumerate(zip(maps, scales, strict=True)):
        rows = torch.nonzero(level_indices == level)[:, 0]
        part = torchvision.ops.roi_align(
            level_map.to(wide), rois[rows].to(wide), output_size, scale, sampling_ratio, aligned
        )
        # index_put_ traces and differentiates; indexed assignment does not trace (pytorch issue 49852).
        pooled.index_put_((rows,), part.to(pooled.dtype))
    return pooled


def _is_exporting() -> bool:
    is_exporting = getattr(getattr(torch, "compiler", None), "is_exporting", None)  # torch 2.7
    return is_exporting is not None and is_exporting()


# torch.compile cannot look into what hands pointers to a library; it runs this part as it is.
if hasattr(torch, "compiler"):  # torch 2.1
    _eager_roi_align = torch.compiler.disable(_eager_roi_align)


@functools.lru_cache(maxsize=1)
def _triton():
    """Return the module with the Triton kernels; None where Triton is missing or does not fit this torch or driver."""
    try:
        from . import triton_roi_align
    except Exception as error:  # whatever such a Triton raises
        logger.warning(f"Triton cannot be imported: {error}")
        return None
    return triton_roi_align


def _triton_fits(maps: Sequence[Tensor]) -> bool:
    module = _triton()
    if module is None or len(maps) > module.MAX_LEVELS or maps[0].dtype not in module.DTYPES:
        return False
    # Offsets within an image are 32 bits wide.
    return (maps[0].is_cuda or module.INTERPRETED) and max(m[0].numel() if len(m) else 0 for m in maps) < 2**31
