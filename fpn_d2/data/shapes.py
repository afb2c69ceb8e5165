"""The shapes of the synthetic scenes, one per class: outlines in the unit square and their rendering.

A class is a shape: texture, size, rotation and a slight stretch are drawn apart from it, and so is the colour unless
``own_colour`` is asked for.
"""

import cv2
import numpy as np

# Sub-pixels along each side of a pixel when an outline is filled; the edge of an object is as soft as a camera's.
_SUPERSAMPLING = 4


def _regular(corners: int) -> np.ndarray:
    turns = np.arange(corners) / corners
    return np.stack([np.sin(2 * np.pi * turns), -np.cos(2 * np.pi * turns)], axis=1)


def _star() -> np.ndarray:
    points = _regular(10)
    points[1::2] *= 0.42
    return points


def _cross() -> np.ndarray:
    arm = 0.3
    quarter = np.array([[arm, 1.0], [arm, arm], [1.0, arm]])
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])  # by 90 degrees
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


# Class -> outlines (n, 2) as (x, y) about the origin; the second outline, if there is one, is a hole.
SHAPES: dict[str, tuple[np.ndarray, ...]] = {
    "disc": (_regular(72),),
    "square": (np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]),),
    "triangle": (_regular(3),),
    "star": (_star(),),
    "ring": (_regular(72), 0.55 * _regular(72)),
    "cross": (_cross(),),
}


def render(name: str, size: float, angle: float, stretch: float) -> np.ndarray:
    """Render one shape, filled and with soft edges.

    Args:
        name: A key of ``SHAPES``.
        size: sqrt(width * height) of the tight box round the rendered shape, in pixels.
        angle: Rotation in radians.
        stretch: Ratio of width to height given to the shape before it is rotated.

    Returns:
        float32 array (height, width): the share of each pixel that the shape covers, 0 to 1, cut to the shape's box
        with up to one pixel of margin.

    Raises:
        ValueError: If there is no such shape or ``size`` is not greater than 0.
    """
    if name not in SHAPES:
        raise ValueError(f"Expected a shape among {', '.join(SHAPES)}, got {name!r}.")
    if not size > 0:
        raise ValueError(f"Expected a size greater than 0 pixels, got {size}.")
    cos, sin = np.cos(angle), np.sin(angle)
    move = np.array([[cos, sin], [-sin, cos]]) * np.array([[np.sqrt(stretch)], [1.0 / np.sqrt(stretch)]])
    outlines = [outline @ move for outline in SHAPES[name]]
    low, high = outlines[0].min(axis=0), outlines[0].max(axis=0)
    scale = size / np.sqrt(np.prod(high - low))
    width, height = (int(v) for v in np.ceil((high - low) * scale))
    canvas = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    for outline, value in zip(outlines, (255, 0), strict=False):
        points = (outline - low) * scale * _SUPERSAMPLING - 0.5  # pixel i of OpenCV is centred on i
        cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], value)
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0
