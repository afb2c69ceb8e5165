"""Run the Triton kernels in Triton's interpreter and save what they give; a program, since the choice is per process.

TRITON_INTERPRET=1 python -m tests.fast.roi_align.triton_cases RESULTS.pt
"""

import sys

import torch

from fpn_d2.fast.roi_align import pyramid_roi_align

from .reference import SCALES, edge_rois, make_maps, random_rois, with_gradients


def cases() -> dict[str, tuple]:
    """Name -> maps, the arguments after them, and whether the backward pass is deterministic."""
    rois, level_indices = edge_rois()
    few = rois[[0, 1, 2, 3, 4, 6, 9]], level_indices[[0, 1, 2, 3, 4, 6, 9]]
    small = random_rois(4, height=30, width=30)
    last = [m.contiguous(memory_format=torch.channels_last) for m in make_maps(35, dtype=torch.float32)]
    broken = rois[:4].clone()
    broken[1, 2], broken[2, 0], broken_levels = float("nan"), 2, level_indices[:4].clone()
    broken_levels[3] = 3
    six_sizes = ((13, 18), (7, 9), (4, 5), (2, 3), (1, 2), (1, 1))
    six = random_rois(6, levels=6)[0], torch.arange(6)
    double, single, half = make_maps(), make_maps(dtype=torch.float32), make_maps(dtype=torch.float16)
    return {
        "adaptive": (double, (*few, SCALES, (2, 3), 0, True), False),
        "not_aligned": (double, (*few, SCALES, (2, 2), 2, False), False),
        "not_aligned_adaptive": (single, (*small, SCALES, (3, 2), 0, False), False),
        "deterministic": (single, (*few, SCALES, (2, 3), 2, True), True),
        "deterministic_float64": (double, (*small, SCALES, (2, 3), 2, True), True),
        "channels_last_in_blocks": (last, (*small, SCALES, (3, 3), 1, True), False),
        "channels_last_deterministic": (last, (*small, SCALES, (3, 3), 1, True), True),
        "cells_in_blocks": (single, (*small, SCALES, (9, 9), 1, True), False),
        "mixed_layouts": ([last[0], *make_maps(35, dtype=torch.float32)[1:]], (*small, SCALES, (2, 2), 1, True), False),
        "float16": (half, (*small, SCALES, (2, 2), 2, True), False),
        "bfloat16": (make_maps(dtype=torch.bfloat16), (*small, SCALES, (2, 2), 2, True), True),
        "six_levels": (make_maps(sizes=six_sizes), (*six, [0.5**k for k in range(2, 8)], (2, 2), 1, True), False),
        "one_level": (double[1:2], (small[0], torch.zeros(4, dtype=torch.int64), (1 / 8,), (2, 2), 1, True), False),
        "no_rois": (single, (torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), SCALES, (2, 2), 1, True), False),
        "no_rois_deterministic": (
            single,
            (torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), SCALES, (2, 2), 1, True),
            True,
        ),
        "broken": (double, (broken, broken_levels, SCALES, (2, 2), 1, True), False),
    }


def main(path: str) -> None:
    from fpn_d2.fast.roi_align.triton_roi_align import triton_roi_align

    results = {}
    for name, (maps, arguments, deterministic) in cases().items():
        if name == "broken":  # what the checks on a CPU would refuse
            results[name] = with_gradients(triton_roi_align, maps, *arguments, deterministic)
        else:
            keywords = {"implementation": "triton", "deterministic": deterministic}
            results[name] = with_gradients(pyramid_roi_align, maps, *arguments, **keywords)
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
