"""Tiles: every object once, wherever borders cut it."""

import numpy as np
import pytest
import torch

from fpn_d2.errors import UserError
from fpn_d2.inference import Tiling
from fpn_d2.inference.tiles import merge
from tests.inference.finder import finder, picture


@pytest.mark.parametrize("size", [(100, 100), (101, 257), (64, 300), (40, 30), (65, 64)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_tiles_cover_the_image_with_the_overlap_and_are_of_one_size(size, overlap):
    height, width = size
    frames = Tiling(64, overlap).frames(height, width)
    seen = np.zeros(size, int)
    for x1, y1, x2, y2 in frames:
        assert (x2 - x1, y2 - y1) == (min(64, width), min(64, height))
        assert 0 <= x1 and x2 <= width and 0 <= y1 and y2 <= height
        seen[y1:y2, x1:x2] += 1
    assert seen.min() >= 1
    columns = sorted({x1 for x1, *_ in frames})
    assert all(64 - (b - a) >= round(64 * overlap) - 1 for a, b in zip(columns, columns[1:], strict=False))


@pytest.mark.parametrize("wrong", [{"size": 8}, {"size": 64.0}, {"size": 64, "overlap": 0.95}])
def test_impossible_tilings_are_refused(wrong):
    with pytest.raises(UserError):
        Tiling(**wrong)


def assert_found(instances, expected, within=1.5):
    """The expected (class, box) and no other."""
    found = sorted(zip(instances.pred_classes.tolist(), instances.pred_boxes.tensor.tolist(), strict=True))
    assert len(found) == len(expected), found
    for (label, box), (right_label, *right) in zip(found, sorted(expected), strict=True):
        assert label == right_label
        torch.testing.assert_close(torch.tensor(box), torch.tensor(right, dtype=torch.float32), atol=within, rtol=0)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("place", range(30, 110, 3))
def test_an_object_anywhere_is_found_once(place, whole):
    """Tiles of 64 that overlap by 16: borders at 48, 64, 96 and 112 cut the square at one place or the other."""
    squares = [(0, place, place, place + 14, place + 14), (1, 8, 8, 18, 18)]
    predictor = finder(64, tiling=Tiling(64, 0.25, whole))
    instances = predictor(picture(160, 160, *squares), channels="BGR")
    assert instances.image_size == (160, 160)
    assert_found(instances, squares)


@pytest.mark.parametrize("whole", [False, True])
def test_an_object_larger_than_the_overlap_is_put_together(whole):
    """A bar over three tiles and a square over four, which no tile sees whole."""
    objects = [(0, 20, 20, 140, 30), (1, 40, 50, 90, 100)]
    predictor = finder(64, tiling=Tiling(64, 0.25, whole))
    assert_found(predictor(picture(160, 160, *objects), channels="BGR"), objects, within=4 if whole else 1.5)


def test_neighbours_of_one_class_stay_apart():
    """Two columns of squares with two pixels between them, on both sides of every border."""
    squares = [(0, x, y, x + 12, y + 12) for x in range(4, 140, 14) for y in range(4, 140, 14)]
    predictor = finder(128, tiling=Tiling(64, 0.25))  # twice enlarged, so that the gaps stay
    assert_found(predictor(picture(160, 160, *squares), channels="BGR"), squares)


def test_small_images_are_shown_whole_and_tiles_make_batches():
    predictor = finder(64, tiling=Tiling(64, 0.25), batch_size=4)
    predictor(picture(60, 60, (0, 5, 5, 20, 20)), channels="BGR")
    assert predictor.model.batches == [[(3, 64, 64)]]
    predictor.model.batches.clear()
    predictor(picture(100, 100, (0, 5, 5, 20, 20)), channels="BGR")
    assert [len(batch) for batch in predictor.model.batches] == [4, 1]  # the whole image is as large as a tile here


def test_masks_are_put_together_too():
    bar = (0, 20, 20, 140, 30)
    predictor = finder(64, masks=True, tiling=Tiling(64, 0.25, whole=False))
    instances = predictor(picture(160, 160, bar), channels="BGR")
    assert instances.pred_masks.shape == (1, 160, 160)
    rows, columns = instances.pred_masks[0].nonzero().T
    assert abs(columns.min() - 20) <= 2 and abs(columns.max() - 139) <= 2 and abs(rows.min() - 20) <= 1
    empty = predictor(picture(160, 160), channels="BGR")
    assert len(empty) == 0 and empty.pred_masks.shape == (0, 160, 160)


FRAMES = torch.tensor([[0.0, 0, 64, 64], [48, 0, 112, 64]])


def merged(*rows):
    """Rows of (class, tile, score, x1, y1, x2, y2) -> groups."""
    table = torch.tensor(rows, dtype=torch.float32)
    return merge(table[:, 3:], table[:, 2], table[:, 0].long(), table[:, 1].long(), FRAMES, (64, 112), 0.5)[2]


def test_the_uncut_box_wins_over_a_part_with_a_higher_score():
    assert merged((0, 0, 0.6, 30, 10, 60, 40), (0, 1, 0.9, 48, 10, 60, 40)) == [[0]]


def test_a_part_of_another_class_goes_only_with_a_lower_score():
    assert merged((0, 0, 0.8, 30, 10, 60, 40), (1, 1, 0.7, 48, 10, 60, 40)) == [[0]]
    assert merged((0, 0, 0.7, 30, 10, 60, 40), (1, 1, 0.8, 48, 10, 60, 40)) == [[1], [0]]


def test_a_small_object_on_the_edge_of_a_large_one_stays():
    """Of the large one the other tile sees a strip that the small one, which nothing cuts, just fills."""
    assert merged((0, 0, 0.9, 10, 10, 60, 24), (0, 1, 0.8, 50.5, 11, 61, 24)) == [[0], [1]]


def test_within_a_tile_nothing_is_merged():
    assert merged((0, 0, 0.9, 10, 10, 30, 30), (0, 0, 0.8, 11, 10, 31, 30)) == [[0], [1]]
