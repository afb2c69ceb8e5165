"""Seeded textures for the synthetic scenes: smooth noise, gradients, stripes, checks, dots, and mixtures of them.

Images are float32 arrays (height, width, 3) with values 0 to 255 in BGR order, as OpenCV writes them. Every function
takes its randomness from the generator that it is given, so a scene depends on its seed alone.
"""

import colorsys

import cv2
import numpy as np


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float, channels: int = 1) -> np.ndarray:
    """Noise whose blobs are about ``cell`` pixels wide: a coarse random grid, interpolated.

    Returns:
        float32 array (height, width, channels), roughly within -1 and 1.
    """
    grid = (max(2, round(height / cell) + 1), max(2, round(width / cell) + 1))
    coarse = rng.uniform(-1.0, 1.0, (*grid, channels)).astype(np.float32)
    fine = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return fine.reshape(height, width, channels)


def _waves(rng: np.random.Generator, height: int, width: int, period: float) -> tuple[np.ndarray, np.ndarray]:
    """Phases, in turns, of two perpendicular plane waves at a random angle: two float32 arrays (height, width)."""
    angle = rng.uniform(0.0, np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / period
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    first, second = rng.uniform(0.0, 1.0, 2).astype(np.float32)
    return x * cos + y * sin + first, y * cos - x * sin + second


def _pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One pattern of a random kind and period; float32 array (height, width, 1) within about -1 and 1."""
    kind = rng.choice(["plain", "noise", "gradient", "stripes", "checks", "dots"])
    period = float(np.exp(rng.uniform(np.log(5.0), np.log(28.0))))
    if kind == "plain":
        pattern = np.zeros((height, width), np.float32)
    elif kind == "noise":
        return smooth_noise(rng, height, width, period)
    else:
        along, across = _waves(rng, height, width, max(height, width) if kind == "gradient" else period)
        if kind == "gradient":
            pattern = 2.0 * along - 1.0 - np.mean(2.0 * along - 1.0)
        elif kind == "stripes":
            pattern = np.sin(2.0 * np.pi * along)
        elif kind == "checks":
            pattern = np.where((np.floor(2.0 * along) + np.floor(2.0 * across)) % 2 == 0, 1.0, -1.0)
        else:
            pattern = np.where((along % 1.0 - 0.5) ** 2 + (across % 1.0 - 0.5) ** 2 < 0.09, 1.0, -1.0)
    return pattern.astype(np.float32)[:, :, None]


def colour(rng: np.random.Generator, hue: float | None = None) -> np.ndarray:
    """A random BGR colour, neither black nor white: float32 array (3,).

    Args:
        rng: Source of randomness.
        hue: 0 to 1, once round the colour circle; the colour is then a clear one of about this hue.
    """
    if hue is None:
        return rng.uniform(25.0, 230.0, 3).astype(np.float32)
    hsv = ((hue + rng.uniform(-0.05, 0.05)) % 1.0, rng.uniform(0.5, 1.0), rng.uniform(0.5, 0.95))
    red, green, blue = colorsys.hsv_to_rgb(*hsv)
    return np.float32(255.0) * np.array([blue, green, red], np.float32)


def contrasting_colour(
    rng: np.random.Generator, other: np.ndarray, hue: float | None = None, distance: float = 90.0
) -> np.ndarray:
    """A random BGR colour at least ``distance`` away (Euclidean, of 0 to 255) from ``other``: float32 array (3,).

    Should eight draws all lie too near, the farthest of them is taken.
    """
    draws = [colour(rng, hue)]
    while np.linalg.norm(draws[-1] - other) < distance and len(draws) < 8:
        draws.append(colour(rng, hue))
    return max(draws, key=lambda draw: float(np.linalg.norm(draw - other)))


def background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A background: a gradient between two colours, noise at several scales, one pattern and a few strokes."""
    start, end = colour(rng), colour(rng)
    along, _ = _waves(rng, height, width, float(height + width))
    share = np.clip(along - along.min(), 0.0, 1.0)[:, :, None]
    image = start * (1.0 - share) + end * share
    for cell, amplitude in ((64.0, 28.0), (16.0, 16.0), (4.0, 9.0)):
        amplitude *= rng.uniform(0.3, 1.2)
        image += np.float32(amplitude) * smooth_noise(rng, height, width, cell, channels=3)
    image += rng.uniform(-22.0, 22.0, 3).astype(np.float32) * _pattern(rng, height, width)
    for _ in range(rng.integers(0, 5)):  # clutter that belongs to no class
        ends = rng.uniform(0.0, 1.0, (2, 2)) * (width, height)
        tone = np.clip(image.mean(axis=(0, 1)) + rng.uniform(-60.0, 60.0, 3), 0.0, 255.0)
        first, second = (tuple(int(v) for v in point) for point in ends)
        cv2.line(image, first, second, tone.tolist(), int(rng.integers(1, 4)), cv2.LINE_AA)
    return np.clip(image, 0.0, 255.0)


def fill(
    rng: np.random.Generator, height: int, width: int, against: np.ndarray, hue: float | None = None
) -> np.ndarray:
    """The surface of an object: a colour that stands out from ``against`` (BGR), a pattern and a little noise."""
    base = contrasting_colour(rng, against, hue)
    surface = base + rng.uniform(-32.0, 32.0, 3).astype(np.float32) * _pattern(rng, height, width)
    surface += np.float32(rng.uniform(2.0, 12.0)) * smooth_noise(rng, height, width, 4.0)
    return np.clip(surface, 0.0, 255.0)
