"""Multi-level RoIAlign on GPUs in Triton: one launch for all levels forward, one backward; nothing waits for the GPU.

Each program takes one RoI, a block of its cells and a block of channels. It reads the RoI's level on the device and
picks that level's map there, so that no RoI is sorted by level, counted or copied on the way, and the host never asks
the device for a number. Maps may be contiguous or channels-last; the latter are read in whole cache lines.

Backward adds into float32 (float64) with atomic operations, in any order, so two runs differ in the last bits. The
deterministic variant adds integers instead: contributions are rounded to multiples of a quantum, computed on the
device from the largest gradient such that no sum can overflow, and integers give the same sum in any order.

Without a GPU the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before this module is imported).
"""

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LEVELS = 6
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_CELLS, _CHANNELS = 64, 32  # of a program; 64 holds 7 x 7 cells
_INTEGER_BITS = 62


@triton.jit
def _level_map(level, p0, p1, p2, p3, p4, p5, h0, h1, h2, h3, h4, h5, w0, w1, w2, w3, w4, w5, s0, s1, s2, s3, s4, s5):
    """Pick pointer, height, width and scale of a level."""
    pointer, height, width, scale = p0, h0, w0, s0
    if level == 1:
        pointer, height, width, scale = p1, h1, w1, s1
    elif level == 2:
        pointer, height, width, scale = p2, h2, w2, s2
    elif level == 3:
        pointer, height, width, scale = p3, h3, w3, s3
    elif level == 4:
        pointer, height, width, scale = p4, h4, w4, s4
    elif level == 5:
        pointer, height, width, scale = p5, h5, w5, s5
    return pointer, height, width, scale


@triton.jit
def _grid(low, high, scale, cells: tl.constexpr, SAMPLING_RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """Start, cell size and number of samples of one axis, in map cells."""
    offset = 0.5 if ALIGNED else 0.0
    start = low * scale - offset
    size = (high * scale - offset) - start
    if not ALIGNED:
        size = tl.maximum(size, 1.0)
    cell_size = size / cells
    if SAMPLING_RATIO > 0:
        samples = tl.full((), SAMPLING_RATIO, tl.int32)
    else:
        samples = tl.ceil(cell_size).to(tl.int32)
    return start, cell_size, samples


@triton.jit
def _neighbours(position, size):
    """Both neighbours of a position, their weights, and whether it counts; as torchvision's kernel does."""
    valid = (position >= -1.0) & (position <= size)
    position = tl.maximum(position, 0.0)
    low = tl.minimum(position.to(tl.int32), size - 1)
    high = tl.minimum(low + 1, size - 1)
    upper = tl.where(low == size - 1, 0.0, position - low)
    return low, high, 1.0 - upper, upper, valid


# Heights and widths differ from batch to batch: no kernel of its own for those that divide by 16.
_SIZES = [f"{axis}{level}" for axis in "hw" for level in range(MAX_LEVELS)]


@triton.jit(do_not_specialize=_SIZES)
def _roi_align_kernel(
    pooled, rois, level_indices, quantum,
    p0, p1, p2, p3, p4, p5, h0, h1, h2, h3, h4, h5, w0, w1, w2, w3, w4, w5, s0, s1, s2, s3, s4, s5,
    num_images, num_levels, num_channels,
    OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr, ALIGNED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BACKWARD: tl.constexpr, INTEGERS: tl.constexpr, COORDINATE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Forward: fill ``pooled`` (M, C, h, w) from the maps. Backward: add its gradient to those of the maps."""
    roi = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    cell_exists, channel_exists = cell < OUT_HEIGHT * OUT_WIDTH, channel < num_channels
    exists = cell_exists[:, None] & channel_exists[None, :]
    cell_y, cell_x = (cell // OUT_WIDTH).to(COORDINATE), (cell % OUT_WIDTH).to(COORDINATE)
    pooled += roi * num_channels * (OUT_HEIGHT * OUT_WIDTH)
    pooled += channel[None, :] * (OUT_HEIGHT * OUT_WIDTH) + cell[:, None]

    level = tl.load(level_indices + roi).to(tl.int32)
    map_pointer, height, width, scale = _level_map(
        level, p0, p1, p2, p3, p4, p5, h0, h1, h2, h3, h4, h5, w0, w1, w2, w3, w4, w5, s0, s1, s2, s3, s4, s5
    )
    scale = tl.full((), 0.0, COORDINATE) + scale
    image = tl.load(rois + roi * 5).to(COORDINATE)
    x0, y0 = tl.load(rois + roi * 5 + 1).to(COORDINATE), tl.load(rois + roi * 5 + 2).to(COORDINATE)
    x1, y1 = tl.load(rois + roi * 5 + 3).to(COORDINATE), tl.load(rois + roi * 5 + 4).to(COORDINATE)
    # Indices out of range cannot raise here; like boxes that are not finite they give NaN, and touch no memory.
    spread = tl.abs(x0) + tl.abs(y0) + tl.abs(x1) + tl.abs(y1)
    usable = (spread < float("inf")) & (image >= 0) & (image < num_images) & (level >= 0) & (level < num_levels)
    if usable:
        start_y, cell_height, samples_y = _grid(y0, y1, scale, OUT_HEIGHT, SAMPLING_RATIO, ALIGNED)
        start_x, cell_width, samples_x = _grid(x0, x1, scale, OUT_WIDTH, SAMPLING_RATIO, ALIGNED)
        count = tl.maximum(samples_y * samples_x, 1).to(ACCUMULATOR)
        image_pointer = map_pointer + image.to(tl.int64) * num_channels * height * width
        if CHANNELS_LAST:
            column_stride, row_stride = num_channels, width * num_channels
            channels = image_pointer + channel[None, :]
        else:
            column_stride, row_stride = 1, width
            channels = image_pointer + channel[None, :].to(tl.int64) * (height * width)
        total = tl.zeros((CELLS, CHANNELS), dtype=ACCUMULATOR)
        if BACKWARD:
            total = tl.load(pooled, mask=exists, other=0.0).to(ACCUMULATOR) / count
            if INTEGERS:
                total = total / tl.load(quantum)
        for i in range(0, samples_y):
            y = start_y + cell_y * cell_height + (i + 0.5) * cell_height / samples_y
            y_low, y_high, y_lower, y_upper, y_valid = _neighbours(y, height)
            for j in range(0, samples_x):
                x = start_x + cell_x * cell_width + (j + 0.5) * cell_width / samples_x
                x_low, x_high, x_lower, x_upper, x_valid = _neighbours(x, width)
                mask = exists & (y_valid & x_valid)[:, None]
                for corner in tl.static_range(4):
                    if corner < 2:
                        at = y_low * row_stride
                        weight = y_lower
                    else:
                        at = y_high * row_stride
                        weight = y_upper
                    if corner % 2 == 0:
                        at += x_low * column_stride
                        weight *= x_lower
                    else:
                        at += x_high * column_stride
                        weight *= x_upper
                    pointers = channels + at[:, None]
                    weight = weight[:, None].to(ACCUMULATOR)
                    if not BACKWARD:
                        value = tl.load(pointers, mask=mask, other=0.0).to(ACCUMULATOR)
                        total += tl.where(mask, weight * value, 0.0)
                    elif INTEGERS:
                        tl.atomic_add(pointers, (weight * total).to(tl.int64), mask=mask, sem="relaxed")
                    else:
                        tl.atomic_add(pointers, weight * total, mask=mask, sem="relaxed")
        if not BACKWARD:
            tl.store(pooled, (total / count).to(pooled.dtype.element_ty), mask=exists)
    elif not BACKWARD:
        nothing = tl.full((CELLS, CHANNELS), float("nan"), dtype=ACCUMULATOR)
        tl.store(pooled, nothing.to(pooled.dtype.element_ty), mask=exists)


def triton_roi_align(
    maps: Sequence[Tensor],
    rois: Tensor,
    level_indices: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    deterministic: bool,
) -> Tensor:
    """:func:`fpn_d2.fast.roi_align.pyramid_roi_align` with ``implementation="triton"``, of checked arguments."""
    channels_last = all(level_map.is_contiguous(memory_format=torch.channels_last) for level_map in maps)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    maps = [level_map.contiguous(memory_format=memory_format) for level_map in maps]
    settings = (tuple(scales), tuple(output_size), sampling_ratio, aligned, channels_last)
    return _Pool.apply(settings, deterministic, rois.detach().contiguous(), level_indices.contiguous(), *maps)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, deterministic, rois, level_indices, *maps):
        ctx.settings, ctx.deterministic, ctx.map_shapes = settings, deterministic, [m.shape for m in maps]
        ctx.save_for_backward(rois, level_indices)
        pooled = maps[0].new_empty((len(rois), maps[0].shape[1], *settings[1]))
        _launch(pooled, maps, rois, level_indices, settings, backward=False)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rois, level_indices = ctx.saved_tensors
        channels_last = ctx.settings[-1]
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        gradient = gradient.contiguous()
        sizes = [shape.numel() for shape in ctx.map_shapes]
        # One buffer for all levels, so that one operation clears it.
        sums = torch.zeros(sum(sizes), dtype=torch.int64 if ctx.deterministic else wide, device=gradient.device)
        maps = []
        for shape, part in zip(ctx.map_shapes, sums.split(sizes), strict=True):
            images, channels, height, width = shape
            maps.append(
                part.view(images, height, width, channels).permute(0, 3, 1, 2) if channels_last else part.view(shape)
            )
        quantum = _quantum(gradient) if ctx.deterministic else None
        _launch(gradient, maps, rois, level_indices, ctx.settings, backward=True, quantum=quantum)
        if ctx.deterministic:
            maps = [level_map.to(torch.float64) * quantum for level_map in maps]
        return None, None, None, None, *[level_map.to(gradient.dtype) for level_map in maps]


def _quantum(gradient: Tensor) -> Tensor:
    """Return a float64 scalar on the device: the unit of the integers that the deterministic backward adds.

    The weights with which a RoI's cells touch one number of a map sum to at most the number of its cells, so no sum
    exceeds the largest gradient times the number of all cells. A gradient that is not finite makes the quantum, and
    with it every gradient of the maps, NaN: mixed-precision training, which looks for that, sees it.
    """
    if gradient.numel() == 0:
        return torch.ones((), dtype=torch.float64, device=gradient.device)
    largest = gradient.abs().amax().double()
    cells = gradient.shape[0] * gradient.shape[2] * gradient.shape[3]
    quantum = largest * (cells / 2.0**_INTEGER_BITS)
    return torch.where(torch.isfinite(quantum), quantum.clamp(min=1e-300), torch.nan)


def _launch(pooled, maps, rois, level_indices, settings, backward, quantum=None) -> None:
    scales, (out_height, out_width), sampling_ratio, aligned, channels_last = settings
    images, channels = maps[0].shape[:2]
    if pooled.numel() == 0:
        return
    fill = (maps[0],) * (MAX_LEVELS - len(maps))
    all_maps = (*maps, *fill)
    grid = (len(rois), triton.cdiv(out_height * out_width, _CELLS), triton.cdiv(channels, _CHANNELS))
    wide = pooled.dtype == torch.float64
    with torch.cuda.device_of(pooled):
        _roi_align_kernel[grid](
            pooled, rois, level_indices, pooled if quantum is None else quantum,
            *all_maps, *[m.shape[2] for m in all_maps], *[m.shape[3] for m in all_maps],
            *scales, *(scales[:1] * len(fill)),
            images, len(maps), channels,
            OUT_HEIGHT=out_height, OUT_WIDTH=out_width,
            SAMPLING_RATIO=sampling_ratio, ALIGNED=aligned, CHANNELS_LAST=channels_last,
            BACKWARD=backward, INTEGERS=quantum is not None,
            COORDINATE=tl.float64 if wide else tl.float32,
            ACCUMULATOR=tl.float64 if wide or quantum is not None else tl.float32,
            CELLS=_CELLS, CHANNELS=_CHANNELS,
        )  # fmt: skip
