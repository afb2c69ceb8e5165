"""Masks as run lengths, against pycocotools' own compression."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from fpn_d2.data.run_lengths import decompress, fill_exactly


def lengths_of(mask):
    """Run lengths of a mask in COCO's order, column by column, by a loop."""
    lengths, value = [0], 0
    for pixel in mask.T.ravel():
        if pixel != value:
            lengths.append(0)
            value = pixel
        lengths[-1] += 1
    return lengths


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (300, 410)])
def test_compressed_text_is_read_as_pycocotools_writes_it(share, size):
    mask = (np.random.default_rng(0).random(size) < share).astype(np.uint8)
    text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    assert decompress(text).tolist() == lengths_of(mask)
    for counts in (text, lengths_of(mask)):
        assert fill_exactly(counts, mask.size)
        assert not fill_exactly(counts, mask.size + 1)


@pytest.mark.parametrize(
    "counts",
    [None, 5, "", "P", "\x00", "zz", "é", "P" * 60 + "0", "o", [], [3, "1"], [5, -1], [3.0, 1], [True, 3], [1 << 70]],
)
def test_what_is_no_mask_of_four_pixels(counts):
    assert not fill_exactly(counts, 4)
    assert fill_exactly([1, 3], 4)
