"""Mosaic, pasted objects and large-scale jitter: pixels and boxes, and that the order of a training stays exact."""

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode

from fpn_d2.data import TrainingMapper, mixing
from fpn_d2.data.mixing import CopyPaste, Mosaic, boxes_alone, mosaic, paste
from fpn_d2.errors import UserError

from .small_sets import HEIGHT, WIDTH, config, write_image


def picture(number, boxes, size=(12, 16)):
    """An image of one colour, which says where a pixel comes from, with objects of the same class number."""
    found = [{"bbox": list(map(float, b)), "bbox_mode": BoxMode.XYXY_ABS, "category_id": number} for b in boxes]
    return np.full((*size, 3), number, np.uint8), found


def covered(box, size=(12, 16)):
    """The pixels of a box of whole numbers, one by one."""
    return {(y, x) for y in range(size[0]) for x in range(size[1]) if box[1] <= y < box[3] and box[0] <= x < box[2]}


def _share(box, centre):
    """Of a box of the first image what is in the top left quarter: its last rows and columns are next to the point."""
    quarter = {(y, x) for y in range(12 - centre[0], 12) for x in range(16 - centre[1], 16)}
    pixels = covered(tuple(map(int, box)))
    return len(pixels & quarter) / len(pixels)


def test_a_mosaic_pixel_by_pixel():
    """At full scale every image fills its quarter with the part that is next to the point."""
    first = [(0, 0, 16, 12), (9, 9, 12, 12), (7, 8, 13, 11), (6, 8, 12, 11), (4, 8, 12, 12), (2, 8, 14, 12)]
    boxes = [first, [(2, 6, 6, 10), (12, 0, 16, 4)], [(0, 0, 2, 2)], [(1, 1, 9, 3)]]
    pictures = [picture(k, own) for k, own in enumerate(boxes)]
    for k, (image, _) in enumerate(pictures):
        image[:, :, 1], image[:, :, 2] = np.arange(12)[:, None], np.arange(16)[None]
        image[:, :, 0] = k
    centre = (7, 6)
    canvas, found = mosaic(pictures, (12, 16), centre, 1.0)
    for y in range(12):
        for x in range(16):
            k = 2 * (y >= centre[0]) + (x >= centre[1])
            source = (y - centre[0]) % 12, (x - centre[1]) % 16
            assert canvas[y, x].tolist() == [k, *source], (y, x)
    expected = []
    for k, own in enumerate(boxes):
        quarter = {(y, x) for y in range(12) for x in range(16) if k == 2 * (y >= centre[0]) + (x >= centre[1])}
        top, left = (centre[0] - 12, centre[0])[k // 2], (centre[1] - 16, centre[1])[k % 2]
        for box in own:
            moved = {(y + top, x + left) for y, x in covered(box)}
            seen = moved & quarter
            if len(seen) >= 0.25 * len(moved):
                rows, columns = [y for y, _ in seen], [x for _, x in seen]
                expected.append((k, [min(columns), min(rows), max(columns) + 1, max(rows) + 1]))
    assert [(a["category_id"], a["bbox"]) for a in found] == expected
    shares = [round(_share(a["bbox"], centre), 2) for a in pictures[0][1]]
    assert shares == [0.22, 0.67, 0.5, 0.33, 0.25, 0.33] and sum(k == 0 for k, _ in expected) == 5


def test_a_mosaic_of_other_sizes_scales_images_and_boxes_alike():
    sizes = [(24, 32), (6, 8), (12, 16), (9, 4)]
    pictures = [picture(k, [(0, 0, *reversed(size))], size) for k, size in enumerate(sizes)]
    canvas, found = mosaic(pictures, (12, 16), (6, 8), 0.5)
    # Half of what fits: 6 x 8, and of the narrow one 6 x 3, next to the point.
    assert [a["bbox"] for a in found] == [[0, 0, 8, 6], [8, 0, 16, 6], [0, 6, 8, 12], [8, 6, 11, 12]]
    assert (canvas[:6, :8] == 0).all() and (canvas[:6, 8:] == 1).all() and (canvas[6:, :8] == 2).all()
    assert (canvas[6:, 8:11] == 3).all() and (canvas[6:, 11:] == 128).all()


def test_pasting_pixel_by_pixel():
    image, annotations = picture(0, [(0, 0, 4, 4), (5, 5, 9, 9), (0, 8, 16, 12)])
    before = image.copy()
    patches = [(np.full((5, 4, 3), 7, np.uint8), 5, 5, {"category_id": 7}), (np.full((2, 3, 3), 8, np.uint8), 6, 6, {})]
    patches[1][3].update(category_id=8)
    made, found = paste((image, annotations), patches)
    assert np.array_equal(image, before) and len(annotations) == 3  # they stay
    expected = before.copy()
    for patch, top, left, _ in patches:
        for y in range(patch.shape[0]):
            for x in range(patch.shape[1]):
                expected[top + y, left + x] = patch[y, x]
    assert np.array_equal(made, expected)
    # The second object lies under the first patch with all its area; of that patch 6 of 20 pixels are hidden.
    assert [(a["category_id"], a["bbox"]) for a in found] == [
        (0, [0, 0, 4, 4]),
        (0, [0, 8, 16, 12]),
        (7, [5, 5, 9, 10]),
        (8, [6, 6, 9, 8]),
    ]


@pytest.mark.parametrize("mixer", [Mosaic, CopyPaste])
@pytest.mark.parametrize("size", [(12, 16), (16, 12, 1), (30, 7, 3)])
def test_boxes_stay_inside_and_hold_the_colour_of_their_class(mixer, size):
    def draw():
        number, other = np.random.randint(1, 5), np.random.randint(6, 25, 2)
        boxes = [np.array([1, 1, *np.random.randint(3, min(other), 2)]) for _ in range(3)]
        image, annotations = picture(number, boxes, tuple(other))
        crowd = {"bbox": [0.0, 0.0, 5.0, 5.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 99, "iscrowd": 1}
        return (image[:, :, 0] if len(size) == 2 else image[:, :, : size[2]]), [*annotations, crowd]

    first = np.full(size, 9, np.uint8), []
    pasted = 0
    for seed in range(40):
        np.random.seed(seed)
        image, annotations = mixer(1.0)(first, draw)
        assert image.shape == size and image.dtype == np.uint8
        for a in annotations:
            x1, y1, x2, y2 = a["bbox"]
            assert 0 <= x1 < x2 <= size[1] and 0 <= y1 < y2 <= size[0]
            if a["category_id"] != 99 and mixer is Mosaic:
                assert (image[int(np.ceil(y1)) : int(y2), int(np.ceil(x1)) : int(x2)] == a["category_id"]).all()
            assert mixer is Mosaic or a["category_id"] != 99  # crowds are not pasted
        pasted += len(annotations)
    assert pasted > 40


def test_about_half_of_the_objects_are_pasted_anywhere_and_at_other_sizes(monkeypatch):
    asked = []
    monkeypatch.setattr(mixing, "paste", lambda picture, pasted: asked.extend(pasted) or picture)
    other = picture(5, [(2, 2, 10, 8)] * 10, (12, 16))
    for seed in range(30):
        np.random.seed(seed)
        CopyPaste(1.0)(picture(0, [], (40, 60)), lambda: other)
    assert 120 < len(asked) < 180
    assert {patch.shape[0] for patch, *_ in asked} == {4, 5, 6, 7} and {p.shape[1] for p, *_ in asked} == {6, 7, 8, 9}
    tops, lefts = [top for _, top, _, _ in asked], [left for _, _, left, _ in asked]
    assert min(tops) <= 1 and max(t + p.shape[0] for p, t, _, _ in asked) >= 39
    assert min(lefts) <= 1 and max(x + p.shape[1] for p, _, x, _ in asked) >= 59


@pytest.mark.parametrize("mixer", [Mosaic, CopyPaste])
def test_probability(mixer, monkeypatch):
    monkeypatch.setattr(mixing, "mosaic", lambda *_: "mixed")
    monkeypatch.setattr(mixing, "paste", lambda *_: "mixed")
    np.random.seed(0)
    one = picture(0, [])
    done = [mixer(0.3)(one, lambda: one) == "mixed" for _ in range(400)]
    assert 90 < sum(done) < 150


def records(folder):
    made = []
    for k, name in enumerate("abcd"):
        write_image(folder / f"{name}.png")
        boxes = [{"bbox": [2, 3, 10, 12], "bbox_mode": BoxMode.XYWH_ABS, "category_id": k, "segmentation": [[1]]}]
        size = {"height": HEIGHT, "width": WIDTH}
        made.append({"file_name": str(folder / f"{name}.png"), "image_id": k, **size, "annotations": boxes})
    return made


def mapper(folder, *options):
    cfg = config(folder)
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (HEIGHT,), *options])
    return TrainingMapper(cfg, True)


@pytest.mark.parametrize("key", ["MOSAIC", "COPY_PASTE"])
def test_the_mapper_mixes_what_it_may_draw_from(tmp_path, key):
    made, plain = mapper(tmp_path, f"INPUT.{key}", 1.0, "INPUT.RANDOM_FLIP", "none"), mapper(tmp_path)
    all_records = records(tmp_path)
    made.others = all_records
    classes = set()
    for seed in range(24):
        np.random.seed(seed)
        got = made(all_records[0])
        assert got["image"].shape == (3, HEIGHT, WIDTH) == tuple(plain(all_records[0])["image"].shape)
        assert got["file_name"] == all_records[0]["file_name"]
        classes |= set(got["instances"].gt_classes.tolist())
    assert classes == {0, 1, 2, 3}
    assert all_records == records(tmp_path)  # they stay
    made.others = ()
    np.random.seed(0)
    assert made(all_records[0])["instances"].gt_classes.tolist() == [0]


def test_another_image_that_cannot_be_read_is_passed_over(tmp_path, caplog):
    made = mapper(tmp_path, "INPUT.MOSAIC", 1.0)
    made.others = records(tmp_path)
    (tmp_path / "b.png").write_bytes(b"junk")
    for seed in range(6):
        np.random.seed(seed)
        assert 1 not in made(made.others[0])["instances"].gt_classes.tolist()
    assert "b.png" in caplog.text


def test_large_scale_jitter_is_detectron2s(tmp_path):
    """Every image is the square; a box is where the pixels of its object are."""
    keys = ["INPUT.SCALE_JITTER", [0.5, 2.0], "INPUT.SCALE_JITTER_SIZE", 48]
    made = mapper(tmp_path, *keys, "INPUT.RANDOM_FLIP", "none")
    kinds = [type(one).__name__ for one in made.augmentations.augs]
    assert kinds == ["ResizeScale", "FixedSizeCrop"]
    record = records(tmp_path)[0]
    from PIL import Image

    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[3:15, 2:12] = 255
    Image.fromarray(image).save(record["file_name"])
    widths = []
    for seed in range(20):
        np.random.seed(seed)
        got = made(record)
        assert got["image"].shape == (3, 48, 48)
        rows, columns = torch.where(got["image"][0] > 200)
        if not len(rows):
            continue
        box = got["instances"].gt_boxes.tensor[0]
        real = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (box - real).abs().max() <= 2
        widths.append(float(box[2] - box[0]))
    assert max(widths) > 2 * min(widths)


@pytest.mark.parametrize(
    "options,message",
    [
        (["INPUT.MOSAIC", 1.5], "INPUT.MOSAIC is 1.5; expected a probability"),
        (["INPUT.COPY_PASTE", -0.1], "INPUT.COPY_PASTE is -0.1; expected a probability"),
        (["INPUT.MOSAIC", 0.5, "MODEL.MASK_ON", True], "mixes boxes alone and does not go with MODEL.MASK_ON"),
        (["INPUT.COPY_PASTE", 0.5, "MODEL.KEYPOINT_ON", True], "does not go with MODEL.KEYPOINT_ON"),
        (["INPUT.SCALE_JITTER", [0.5]], r"SCALE_JITTER is \[0.5\]; expected the lowest and the highest"),
        (["INPUT.SCALE_JITTER", [2.0, 0.5]], "expected the lowest and the highest"),
        (["INPUT.SCALE_JITTER", ["a", "b"]], "expected the lowest and the highest"),
        (["INPUT.SCALE_JITTER", [0.5, float("inf")]], "expected the lowest and the highest"),
        (["INPUT.SCALE_JITTER", [0.5, 1.0], "INPUT.SCALE_JITTER_SIZE", -1], "SCALE_JITTER_SIZE is -1"),
    ],
)
def test_bad_values(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        mapper(tmp_path, *options)


def test_labels_that_would_go_wrong_are_refused(tmp_path):
    record = records(tmp_path)[0]
    with pytest.raises(UserError, match="labelled pixels"):
        boxes_alone(record | {"sem_seg_file_name": "x.png"})
    record["annotations"][0].update(bbox=[5, 5, 3, 3, 45], bbox_mode=BoxMode.XYWHA_ABS)
    with pytest.raises(UserError, match="upright boxes"):
        boxes_alone(record)
