"""Enlarging of 8-bit images to the bits of Pillow's "bilinear", in compiled code (``enlarge_cpu.cpp``).

Pillow interpolates with a triangle: where an image grows, between the two cells next to a place. It rounds the weights
to 22 bits, stretches the rows, rounds to 8 bits, and does the same with the columns.
"""

import functools

import numpy as np
import torch
from PIL import Image

from fpn_d2.native import memory
from fpn_d2.native.op import Op, problem

_BITS = 22
_OFFSETS = 16  # of a block, whether it has as many columns or not


def _trial() -> str:
    if not OP.ask("enlarge_lanes"):
        return "this processor's vectors are too short"
    image = (np.arange(13 * 37 * 3) * 89 % 256).astype(np.uint8).reshape(13, 37, 3)
    expected = np.asarray(Image.fromarray(image).resize((91, 40), Image.BILINEAR))
    return "" if np.array_equal(_enlarge(image, 40, 91).transpose(1, 2, 0), expected) else "this Pillow has other bits"


OP = Op(
    "enlarge",
    "enlarge_cpu.cpp",
    flags=("-O3",),
    does="Enlarging of images",
    otherwise="in OpenCV",
    problem=problem(
        "height width channels row_stride column_stride channel_stride new_height new_width plane_stride",
        "image result starts offsets weights rows row_weights",
    ),
    functions=("enlarge_image",),
    questions=("enlarge_lanes",),
    trial=_trial,
)
library = OP.library


def enlarge(image: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """Enlarge an image as Pillow does.

    Args:
        image: uint8, (H, W, C) with H and W of at least 1; any view.
        height: new height, at least H.
        width: new width, at least W.

    Returns:
        (C, height, width), in memory of PyTorch's; None where there is no compiled library.

    Raises:
        MemoryError: there is too little for a row or two.
    """
    return None if library() is None else _enlarge(image, height, width)


def _enlarge(image: np.ndarray, height: int, width: int) -> np.ndarray:
    planes = memory.empty((image.shape[2], height, width), torch.uint8).numpy()
    rows, row_weights = _taps(image.shape[0], height)
    starts, offsets, weights = _blocks(image.shape[1], width, OP.ask("enlarge_lanes"))
    names = ("height", "width", "channels", "row_stride", "column_stride", "channel_stride")
    OP.run(
        "enlarge_image",
        **dict(zip(names, (*image.shape, *image.strides), strict=True)),
        **{"new_height": height, "new_width": width, "plane_stride": planes.strides[0]},
        **{"image": image, "result": planes, "starts": starts, "offsets": offsets, "weights": weights},
        **{"rows": rows, "row_weights": row_weights},
    )
    return planes


@functools.lru_cache(maxsize=256)
def _taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each new cell the first of the two old ones it is between, (new_size,), and their weights, (2, new_size)."""
    centre = (np.arange(new_size) + 0.5) * (size / new_size)
    first = np.maximum((centre - 0.5).astype(np.int32), 0)  # towards zero, as C rounds
    weights = np.stack([1 - np.abs(first + k + 0.5 - centre) for k in (0, 1)]).clip(0)
    count = np.minimum((centre + 1.5).astype(np.int32), size) - first
    weights[1, count < 2] = 0
    return first, (0.5 + weights / weights.sum(0) * (1 << _BITS)).astype(np.int32)


@functools.lru_cache(maxsize=256)
def _blocks(size: int, new_size: int, lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``starts``, ``offsets`` and ``weights`` of the C++ source; what is behind the end has weights of zero."""
    first, weights = _taps(size, new_size)
    behind = -new_size % lanes
    first = np.pad(first, (0, behind), mode="edge").reshape(-1, lanes)
    starts = np.ascontiguousarray(first[:, 0])
    offsets = np.pad((first - starts[:, None]).astype(np.uint8), ((0, 0), (0, _OFFSETS - lanes)))
    return starts, offsets, np.pad(weights, ((0, 0), (0, behind)))
