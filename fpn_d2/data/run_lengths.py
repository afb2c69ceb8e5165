"""Masks as run lengths, in COCO's two forms: whether they fit their image, before C code takes their word for it."""

from typing import Any

import numpy as np

_MOST_DIGITS = 7  # of 5 bits, in one number: 2^35 pixels


def fill_exactly(counts: Any, pixels: int) -> bool:
    """Whether run lengths are of so many pixels together; some versions of pycocotools write beyond the mask otherwise.

    Args:
        counts: A list of numbers, or COCO's compressed text.
        pixels: Height times width.
    """
    if isinstance(counts, list):
        return all(type(n) is int and 0 <= n <= pixels for n in counts) and sum(counts) == pixels
    if not isinstance(counts, str) or not counts.isascii():
        return False
    lengths = decompress(counts)
    return lengths is not None and bool((lengths >= 0).all()) and int(lengths.sum()) == pixels


def decompress(text: str) -> np.ndarray | None:
    """Run lengths out of COCO's compressed text (pycocotools' ``rleFrString``); None if it is none.

    A number is written in digits of 5 bits, the lowest first, each plus 48, and plus 32 where more follow; the highest
    bit of the last digit is the sign. From the fourth number on it is the difference to the one before the last.
    """
    digits = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        return None
    ends = np.flatnonzero(digits & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > _MOST_DIGITS:
        return None
    places = np.arange(len(digits)) - np.repeat(starts, sizes)
    numbers = np.add.reduceat((digits & 31) << (5 * places), starts)
    numbers -= np.where(digits[ends] & 16, 1 << (5 * sizes), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
