"""RoIAlign one sample at a time, and the inputs that it is compared on."""

import math

import torch
from torch import Tensor


def slow_roi_align(maps, rois, level_indices, scales, output_size, sampling_ratio, aligned) -> Tensor:
    """What ``pyramid_roi_align`` should give, by loops over RoIs, cells and samples; (M, C, h, w) in float64."""
    height, width = output_size
    offset = 0.5 if aligned else 0.0
    pooled = []
    for roi, level in zip(rois.tolist(), level_indices.tolist(), strict=True):
        level_map = maps[level][int(roi[0])].double()
        x0, y0, x1, y1 = (scales[level] * number - offset for number in roi[1:])
        roi_width, roi_height = x1 - x0, y1 - y0
        if not aligned:
            roi_width, roi_height = max(roi_width, 1.0), max(roi_height, 1.0)
        cell_width, cell_height = roi_width / width, roi_height / height
        samples_y = sampling_ratio or math.ceil(cell_height)
        samples_x = sampling_ratio or math.ceil(cell_width)
        for row in range(height):
            for column in range(width):
                total = level_map.new_zeros(level_map.shape[0])
                for i in range(samples_y):
                    for j in range(samples_x):
                        y = y0 + (row + (i + 0.5) / samples_y) * cell_height
                        x = x0 + (column + (j + 0.5) / samples_x) * cell_width
                        total = total + bilinear(level_map, y, x)
                pooled.append(total / max(samples_y * samples_x, 1))
    channels = maps[0].shape[1]
    if not pooled:
        return maps[0].new_zeros((0, channels, height, width), dtype=torch.float64) + 0 * sum(m.sum() for m in maps)
    return torch.stack(pooled).view(len(rois), height, width, channels).permute(0, 3, 1, 2)


def bilinear(level_map: Tensor, y: float, x: float) -> Tensor:
    """(C, H, W) at one point -> (C,). Up to one cell outside, the border's value; further out 0."""
    height, width = level_map.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return level_map.new_zeros(level_map.shape[0])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = level_map[:, top, left] * (1 - (x - left)) + level_map[:, top, right] * (x - left)
    lower = level_map[:, bottom, left] * (1 - (x - left)) + level_map[:, bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


SCALES = (1 / 4, 1 / 8, 1 / 16)
SIZES = ((13, 18), (7, 9), (4, 5))  # of the maps of a 52 x 72 image


def make_maps(channels=3, images=2, dtype=torch.float64, sizes=SIZES, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, channels, *size, generator=generator, dtype=dtype) for size in sizes]


def edge_rois() -> tuple[Tensor, Tensor]:
    """RoIs and the level of each. On the unaligned grid, none has a sample within rounding of the limit at -1."""
    rois = [
        (0, 3.1, 4.2, 40.3, 30.7, 0),  # an ordinary one
        (1, 3.1, 4.2, 40.3, 30.7, 1),
        (1, -20.3, -13.1, 90.2, 70.9, 2),  # leaves the image on every side
        (0, -9.3, 11.7, 13.2, 19.1, 0),  # leaves it on one
        (1, 300.0, 200.0, 340.0, 280.0, 0),  # beyond it
        (0, 20.0, 30.0, 20.0, 30.0, 1),  # no area
        (0, 20.0, 30.0, 45.0, 30.0, 0),  # no height
        (1, 11.3, 12.1, 11.9, 12.3, 2),  # within one cell of the map
        (0, 0.0, 0.0, 72.0, 52.0, 0),  # the image
        (1, 50.3, 40.2, 30.1, 20.9, 0),  # turned inside out
        (0, 5.2, 48.1, 60.3, 51.9, 1),  # flat, at the lower border
    ]
    table = torch.tensor(rois, dtype=torch.float64)
    return table[:, :5].contiguous(), table[:, 5].long()


def random_rois(count, images=2, height=52, width=72, levels=3, seed=1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 4, generator=generator) * torch.tensor([width, height, width, height]) * 1.3 - 8
    image = torch.randint(images, (count, 1), generator=generator)
    rois = torch.cat([image, torch.minimum(corners[:, :2], corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])], 1)
    return rois, torch.randint(levels, (count,), generator=generator)


def with_gradients(function, maps, *arguments, **keywords) -> list[Tensor]:
    """Return what ``function`` pools, and the gradients of the maps for a fixed gradient of that."""
    leaves = [level_map.detach().requires_grad_() for level_map in maps]
    pooled = function(leaves, *arguments, **keywords)
    generator = torch.Generator().manual_seed(7)
    gradient = torch.randn(pooled.shape, generator=generator, dtype=torch.float64).to(pooled.dtype)
    return [pooled.detach(), *torch.autograd.grad(pooled, leaves, gradient)]
