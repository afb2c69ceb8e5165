"""Pooling against a loop over single RoIs, and against Detectron2's own pooler where that is defined."""

import functools
import math

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torchvision.ops import roi_align

from fpn_d2.errors import UserError
from fpn_d2.fast.apply import speed_up
from fpn_d2.modeling import CanonicalLevelAssigner, PyramidROIPooler
from tests.batches import random_boxes

# The exact path against the loop: the same operation, the same bits. The fast one: float32 rounding.
PATHS = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])


def pooler_of(*args, exact, **kwargs):
    return speed_up(PyramidROIPooler(*args, **kwargs), "exact" if exact else "fast")



def assert_equal(actual, expected, exact):
    torch.testing.assert_close(actual, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


def maps(levels=(2, 3, 4, 5), images=2, channels=3, size=(320, 416), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, channels, math.ceil(size[0] / 2**k), math.ceil(size[1] / 2**k)) for k in levels]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def box_lists(counts=(30, 20), size=(320, 416), seed=1):
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for count in counts:
        boxes = random_boxes(count, *size, generator)
        boxes[::3, 2:] = boxes[::3, :2] + 20  # so that small ones are there as well
        lists.append(Boxes(boxes))
    return lists


def pool_row_by_row(x, lists, levels, output_size, sampling_ratio, canonical_box_size=224, canonical_level=4):
    """The expected result: each RoI alone, from the map that the paper's formula names."""
    rows = []
    for image, boxes in enumerate(lists):
        for box in boxes.tensor.double():
            side = float(((box[2] - box[0]) * (box[3] - box[1])) ** 0.5)
            k = math.floor(canonical_level + math.log2(side / canonical_box_size))
            k = max(level for level in levels if level <= max(k, levels[0]))
            level_map = x[levels.index(k)][image : image + 1]
            roi = torch.cat([torch.zeros(1), box])[None].to(level_map.dtype)
            rows.append(roi_align(level_map, roi, output_size, 0.5**k, sampling_ratio, aligned=True))
    return torch.cat(rows)


@pytest.mark.parametrize("levels", [(2, 3, 4, 5), (3, 4, 5), (2, 5), (2, 4, 5), (4,)])
@pytest.mark.parametrize("output_size", [(7, 7), (4, 9)])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@PATHS
def test_row_by_row(levels, output_size, sampling_ratio, exact):
    x, lists = maps(levels), box_lists()
    pooler = pooler_of(output_size, [0.5**k for k in levels], sampling_ratio, "ROIAlignV2", exact=exact)
    expected = pool_row_by_row(x, lists, levels, output_size, sampling_ratio)
    actual = pooler(x, lists)
    assert actual.shape == (50, 3, *output_size)
    assert_equal(actual, expected, exact)


def test_canonical_box_size_moves_rois():
    levels, x, lists = (2, 3, 4, 5), maps(), box_lists()
    pooler = PyramidROIPooler(
        7, [0.5**k for k in levels], 2, "ROIAlignV2", lambda existing: CanonicalLevelAssigner(existing, 64, 4)
    )
    expected = pool_row_by_row(x, lists, levels, (7, 7), 2, canonical_box_size=64)
    assert_equal(pooler(x, lists), expected, exact=False)
    assert not torch.equal(expected, pool_row_by_row(x, lists, levels, (7, 7), 2))


@pytest.mark.parametrize("pooler_type", ["ROIAlignV2", "ROIAlign", "ROIPool"])
@pytest.mark.parametrize("channels_last", [False, True])
@PATHS
def test_equal_to_detectron2_with_gradients(pooler_type, channels_last, exact):
    lists = box_lists()
    lists[0].tensor[0] = torch.tensor([-40.0, -30.0, 500.0, 400.0])  # leaves the image
    lists[0].tensor[1] = torch.tensor([50.0, 50.0, 50.0, 50.0])  # no area
    results = []
    for cls in (ROIPooler, functools.partial(pooler_of, exact=exact)):
        x = maps()
        if channels_last:
            x = [m.to(memory_format=torch.channels_last) for m in x]
        for m in x:
            m.requires_grad_()
        pooled = cls(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, pooler_type)(x, lists)
        pooled.square().sum().backward()
        results.append([pooled, *[m.grad for m in x]])
    for stock, ours in zip(*results, strict=True):
        assert_equal(ours, stock, exact or pooler_type == "ROIPool")
        assert stock.abs().sum() > 0


def test_gradcheck_float64():
    x = maps((3, 4), images=1, channels=2, size=(48, 64), dtype=torch.float64)
    lists = [Boxes(torch.tensor([[3.0, 5.0, 30.0, 40.0], [0.0, 0.0, 64.0, 48.0]]))]
    pooler = PyramidROIPooler((2, 3), [1 / 8, 1 / 16], 2, "ROIAlignV2", lambda ks: CanonicalLevelAssigner(ks, 40, 4))
    assert torch.autograd.gradcheck(lambda *m: pooler(list(m), lists), [m.requires_grad_() for m in x])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("levels", [(2, 3, 4, 5), (3,)])
@PATHS
def test_half_precision_maps_do_not_move_the_boxes(dtype, levels, exact):
    """bfloat16 has no number between 256 and 258; neither type may reach the coordinates."""
    x = [m.to(dtype) for m in maps(levels)]
    lists = [Boxes(torch.tensor([[257.3, 60.7, 389.1, 301.9]])), Boxes(torch.tensor([[129.4, 30.6, 160.2, 70.3]]))]
    pooler = pooler_of(7, [0.5**k for k in levels], 2, "ROIAlignV2", exact=exact)
    pooled = pooler(x, lists)
    assert pooled.dtype == dtype
    expected = pool_row_by_row([m.float() for m in x], lists, levels, (7, 7), 2)
    if exact:
        assert torch.equal(pooled, expected.to(dtype))
    else:  # the last step rounds to the maps' type
        torch.testing.assert_close(pooled.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_half_precision_boxes():
    lists = box_lists((4, 0))
    wide = [boxes.clone() for boxes in lists]
    for boxes, same in zip(lists, wide, strict=True):
        boxes.tensor = boxes.tensor.half()
        same.tensor = boxes.tensor.float()
    pooler = PyramidROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 2, "ROIAlignV2")
    assert torch.equal(pooler(maps(), lists), pooler(maps(), wide))


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0)])
def test_images_without_boxes(counts):
    pooler = PyramidROIPooler((5, 3), [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, "ROIAlignV2")
    x, lists = maps(), box_lists(counts)
    pooled = pooler(x, lists)
    assert pooled.shape == (sum(counts), 3, 5, 3)
    torch.testing.assert_close(
        pooled, torch.cat([pooled[:0], *([pool_row_by_row(x, lists, (2, 3, 4, 5), (5, 3), 0)] if sum(counts) else [])])
    )


@pytest.mark.parametrize("levels", [(2, 3, 4, 5), (3,)])
def test_batch_without_images(levels):
    pooler = PyramidROIPooler((5, 3), [0.5**k for k in levels], 0, "ROIAlignV2")
    assert pooler(maps(levels, images=0), []).shape == (0, 3, 5, 3)


@pytest.mark.parametrize("levels", [(2, 3, 4, 5), (3,)])
def test_not_finite_is_an_error_with_one_level_too(levels):
    lists = box_lists((2, 2))
    lists[1].tensor[1, 0] = math.nan
    with pytest.raises(UserError, match="image 1 .*row 1"):
        PyramidROIPooler(7, [0.5**k for k in levels], 0, "ROIAlignV2")(maps(levels), lists)
    careless = PyramidROIPooler(7, [0.5**k for k in levels], 0, "ROIAlignV2", lambda _: lambda boxes: None)
    with pytest.raises(UserError, match="image 1 .*row 1"):
        careless(maps(levels), lists)


def test_wrong_number_of_maps_or_images():
    pooler = PyramidROIPooler(7, [1 / 4, 1 / 8], 0, "ROIAlignV2")
    with pytest.raises(ValueError, match="got 3 maps"):
        pooler(maps((2, 3, 4)), box_lists())
    with pytest.raises(ValueError, match="boxes of 1 images and maps of 2"):
        pooler(maps((2, 3)), box_lists((4,)))


@pytest.mark.parametrize(
    "arguments",
    [
        (0, [1 / 4]),
        ((7,), [1 / 4]),
        ((7, -1), [1 / 4]),
        ((7, 2.5), [1 / 4]),
        (7, []),
        (7, [1 / 4, 1 / 4]),
        (7, [1 / 8, 1 / 4]),
        (7, [1 / 6]),
    ],
)
def test_construction_refuses(arguments):
    with pytest.raises(UserError, match="expected"):
        PyramidROIPooler(*arguments, 0, "ROIAlignV2")


def test_unknown_pooler_type():
    with pytest.raises(UserError, match="POOLER_TYPE is .ROIWarp.*expected one of ROIAlignV2, ROIAlign"):
        PyramidROIPooler(7, [1 / 4], 0, "ROIWarp")
