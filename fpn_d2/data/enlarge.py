"""Enlarging of 8-bit images to the bits of Pillow's "bilinear", in compiled code (``enlarge_cpu.cpp``).

Pillow interpolates with a triangle: where an image grows, between the two cells next to a place. It rounds the weights
to 22 bits, stretches the rows, rounds to 8 bits, and does the same with the columns.
"""

import ctypes
import functools

import numpy as np
import torch
from PIL import Image

from fpn_d2.native.build import FOLDER, Source, load

SOURCE = Source(
    FOLDER / "enlarge_cpu.cpp", flags=("-O3",), does="Enlarging of images", otherwise="in OpenCV"
)
_BITS = 22
_OFFSETS = 16  # of a block, whether it has as many columns or not


class _Problem(ctypes.Structure):
    """``Problem`` of the C++ source."""

    _fields_ = [
        *[
            (name, ctypes.c_int64)
            for name in "height width channels row_stride column_stride channel_stride "
            "new_height new_width plane_stride".split()
        ],
        *[(name, ctypes.c_void_p) for name in "image result starts offsets weights rows row_weights".split()],
    ]


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library, see :func:`fpn_d2.native.build.load`.

    None as well where this processor gains nothing by it, or this Pillow has other bits.
    """
    loaded = load(SOURCE)
    if loaded is None or not loaded.enlarge_lanes():
        return None
    loaded.enlarge_image.argtypes, loaded.enlarge_image.restype = [ctypes.POINTER(_Problem)], ctypes.c_int64
    trial = np.random.default_rng(0).integers(0, 256, (13, 37, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(trial).resize((91, 40), Image.BILINEAR))
    return loaded if np.array_equal(_enlarge(loaded, trial, 40, 91).transpose(1, 2, 0), expected) else None


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
    return None if library() is None else _enlarge(library(), image, height, width)


def _enlarge(loaded: ctypes.CDLL, image: np.ndarray, height: int, width: int) -> np.ndarray:
    planes = torch.empty((image.shape[2], height, width), dtype=torch.uint8).numpy()
    rows, row_weights = _taps(image.shape[0], height)
    starts, offsets, weights = _blocks(image.shape[1], width, loaded.enlarge_lanes())
    names = ("height", "width", "channels", "row_stride", "column_stride", "channel_stride")
    problem = _Problem(**dict(zip(names, (*image.shape, *image.strides), strict=True)))
    problem.new_height, problem.new_width, problem.plane_stride = height, width, planes.strides[0]
    arrays = {"image": image, "result": planes, "starts": starts, "offsets": offsets, "weights": weights}
    for name, array in {**arrays, "rows": rows, "row_weights": row_weights}.items():
        setattr(problem, name, array.ctypes.data)
    if loaded.enlarge_image(ctypes.byref(problem)):
        raise MemoryError("enlarging an image: too little memory for its rows")
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
