"""Level assignment against an oracle that is written independently: exact rational arithmetic, then Detectron2."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from hypothesis import given
from hypothesis import strategies as st

from fpn_d2.errors import UserError
from fpn_d2.modeling.level_assign import (
    CanonicalLevelAssigner,
    FinestLevelAssigner,
    canonical_levels,
    check_finite,
)

LEVELS = (2, 3, 4, 5)


def oracle(area: float, levels=LEVELS, size=224, level=4) -> int:
    """floor(k0 + log2(sqrt(area) / s0)) without a logarithm: the k with 4^(k-k0) <= area / s0^2 < 4^(k-k0+1)."""
    ratio = Fraction(area) / Fraction(size) ** 2
    k = levels[0]
    while k < levels[-1] and ratio >= Fraction(4) ** (k + 1 - level):
        k += 1
    return k


def square(side: float) -> Boxes:
    return Boxes(torch.tensor([[0.0, 0.0, side, side]]))


def level_of(boxes: Boxes, **options) -> int:
    return LEVELS[int(CanonicalLevelAssigner(LEVELS, **options)([boxes]))]


@pytest.mark.parametrize(
    "side,level",
    [(1, 2), (56, 2), (111.9, 2), (112, 3), (200, 3), (223.9, 3), (224, 4), (447.9, 4), (448, 5), (896, 5), (1e4, 5)],
)
def test_paper_rule(side, level):
    assert oracle(float(np.float32(side) * np.float32(side))) == level
    assert level_of(square(side)) == level


@pytest.mark.parametrize("boundary,below,above", [(112, 2, 3), (224, 3, 4), (448, 4, 5)])
def test_boundaries_and_float_neighbours(boundary, below, above):
    """The boundary itself belongs to the coarser level; so does its upper neighbour.

    One float32 step below lies within the rounding of the logarithm, where Detectron2's arithmetic, and so ours,
    already gives the coarser level; 1e-6 below the boundary it gives the finer one.
    """
    assert level_of(square(float(boundary))) == above
    up = np.nextafter(np.float32(boundary), np.float32(np.inf))
    assert level_of(square(float(up))) == above
    assert level_of(square(boundary * (1 - 1e-6))) == below
    for side in (up, np.nextafter(np.float32(boundary), np.float32(0)), np.float32(boundary)):
        stock = assign_boxes_to_levels([square(float(side))], 2, 5, 224, 4)
        assert torch.equal(CanonicalLevelAssigner(LEVELS)([square(float(side))]), stock)


@pytest.mark.parametrize("shape", [(0, 0), (0, 50), (50, 0)])
def test_zero_area_goes_to_the_finest_level(shape):
    assert level_of(Boxes(torch.tensor([[5.0, 5.0, 5.0 + shape[0], 5.0 + shape[1]]]))) == 2


def test_inside_out_box_goes_to_the_finest_level():
    assert level_of(Boxes(torch.tensor([[300.0, 0.0, 0.0, 300.0]]))) == 2


def test_huge_box_whose_area_overflows_goes_to_the_coarsest_level():
    assert level_of(square(1e30)) == 5


def test_million_random_boxes_equal_detectron2():
    generator = torch.Generator().manual_seed(7)
    corner = torch.rand(1_000_000, 2, generator=generator) * 1000
    # log-uniform from 2^-2 to 2^12 pixels, and a tenth of them on whole pixels, where boundaries lie
    sides = 2 ** (torch.rand(1_000_000, 2, generator=generator) * 14 - 2)
    sides[::10] = sides[::10].round()
    boxes = [Boxes(torch.cat([corner, corner + sides], dim=1))]
    for levels, size, level in [((2, 3, 4, 5), 224, 4), ((3, 4, 5, 6, 7), 224, 4), ((2, 3, 4, 5), 56, 2)]:
        expected = assign_boxes_to_levels(boxes, levels[0], levels[-1], size, level)
        actual = CanonicalLevelAssigner(levels, size, level)(boxes)
        assert actual.dtype == torch.int64
        assert int((actual != expected).sum()) == 0
        assert expected.unique().numel() == len(levels)


def test_random_boxes_equal_the_oracle_away_from_rounding():
    generator = torch.Generator().manual_seed(3)
    areas = 4 ** (torch.rand(3000, generator=generator, dtype=torch.float64) * 14 - 2)
    k = 4 + 0.5 * torch.log2(areas) - math.log2(224)
    areas = areas[(k - k.round()).abs() > 1e-5].float()
    actual = canonical_levels(areas, LEVELS)
    assert [LEVELS[i] for i in actual.tolist()] == [oracle(area) for area in areas.tolist()]


@given(
    st.floats(1, 4096, width=32),
    st.sampled_from([28, 56, 112, 224, 300.5]),
    st.integers(1, 6),
    st.sets(st.integers(0, 8), min_size=1).map(sorted),
)
def test_any_size_level_and_subset(side, size, level, levels):
    area = float(np.float32(side) * np.float32(side))
    k = level + 0.5 * math.log2(area) - math.log2(size)
    if abs(k - round(k)) < 1e-5:
        return
    wanted = min(max(math.floor(k), levels[0]), levels[-1])
    expected = max(existing for existing in levels if existing <= wanted)
    actual = canonical_levels(torch.tensor([area]), levels, size, level)
    assert levels[int(actual)] == expected


def test_half_precision_boxes_are_computed_in_float32():
    """256 squared is more than float16 can hold."""
    boxes = square(1.0)
    boxes.tensor = torch.tensor([[0, 0, 256, 256], [0, 0, 500, 500], [0, 0, 60, 60]], dtype=torch.float16)
    assert CanonicalLevelAssigner(LEVELS)([boxes]).tolist() == [2, 3, 0]
    assert canonical_levels(torch.tensor([60000.0], dtype=torch.float16), LEVELS).tolist() == [2]


def test_order_of_images_and_empty_images():
    few = [square(30.0), Boxes(torch.zeros(0, 4)), Boxes(torch.tensor([[0.0, 0, 500, 500], [0, 0, 130, 130]]))]
    assert CanonicalLevelAssigner(LEVELS)(few).tolist() == [0, 3, 1]
    empty = CanonicalLevelAssigner(LEVELS)([])
    assert empty.shape == (0,) and empty.dtype == torch.int64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_names_image_and_row(bad):
    boxes = torch.ones(4, 4)
    boxes[2, 1] = bad
    with pytest.raises(UserError, match=r"image 1 in the batch: row 2 is .*finite"):
        check_finite([square(3.0), Boxes(boxes)])


@pytest.mark.parametrize("arguments", [((),), ((3, 2),), ((2, 2),), (LEVELS, 0), (LEVELS, -5), (LEVELS, math.nan)])
def test_construction_refuses(arguments):
    with pytest.raises(UserError):
        CanonicalLevelAssigner(*arguments)


def test_finest_names_one_level_whatever_the_size():
    assigner = FinestLevelAssigner((3, 5))
    levels = assigner([square(3.0), Boxes(torch.zeros(0, 4)), Boxes(torch.tensor([[0.0, 0, 500, 500], [0, 0, 9, 9]]))])
    assert levels.dtype == torch.int64 and levels.tolist() == [0, 0, 0]
    assert assigner([]).shape == (0,) and assigner([]).dtype == torch.int64
    assert "(3, 5)" in repr(assigner)


def test_another_size_and_level():
    assigner = CanonicalLevelAssigner(LEVELS, canonical_box_size=56, canonical_level=2)
    assert assigner([square(56.0)]).tolist() == [0]
    assert assigner([square(112.0)]).tolist() == [1]
    assert "canonical_box_size=56" in repr(assigner)
