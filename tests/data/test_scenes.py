import json
import math
import os

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_d2.data import TrainingMapper, register_from_config, scenes, textures
from fpn_d2.data.scenes import MIN_VISIBLE, draw_scene, make_scenes
from fpn_d2.data.shapes import SHAPES, render
from fpn_d2.errors import UserError

from .small_sets import config

SMALL = {"train": 6, "val": 3, "image_size": 64, "min_size": 8.0, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "set", train=100, val=20, image_size=128, progress=False)


@pytest.fixture(scope="module")
def content(folder):
    return json.loads((folder / "annotations" / "instances_train.json").read_text())


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes(tmp_path):
    first = files(make_scenes(tmp_path / "first", seed=3, **SMALL))
    assert first == files(make_scenes(tmp_path / "second", seed=3, **SMALL))
    other = files(make_scenes(tmp_path / "third", seed=4, **SMALL))
    assert first.keys() == other.keys()
    assert not any(first[name] == other[name] for name in first)


def test_more_scenes_begin_with_the_same_ones(tmp_path):
    few = files(make_scenes(tmp_path / "few", **SMALL))
    many = files(make_scenes(tmp_path / "many", **{**SMALL, "train": 9}))
    assert all(many[name] == data for name, data in few.items() if name.startswith("images"))
    assert few["images/train/000000.jpg"] != few["images/val/000000.jpg"]


def test_layout_and_counts(folder, content):
    assert sorted(path.name for path in folder.iterdir()) == ["annotations", "images", "scenes.json"]
    assert len(content["images"]) == 100
    assert {path.name for path in (folder / "images" / "train").iterdir()} == {
        i["file_name"] for i in content["images"]
    }
    assert len(json.loads((folder / "annotations" / "instances_val.json").read_text())["images"]) == 20
    assert [category["name"] for category in content["categories"]] == list(SHAPES)
    for image in content["images"]:
        pixels = cv2.imread(str(folder / "images" / "train" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3) == (128, 128, 3)


def test_box_and_area_are_those_of_the_mask(content):
    assert content["annotations"]
    by_image = {}
    for annotation in content["annotations"]:
        mask = mask_util.decode(annotation["segmentation"])
        rows, columns = np.nonzero(mask)
        x, y = columns.min(), rows.min()
        assert annotation["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
        assert annotation["area"] == mask.sum() > 0
        by_image.setdefault(annotation["image_id"], []).append(mask)
    for masks in by_image.values():  # no pixel belongs to two objects
        assert np.sum(masks, axis=0).max() == 1


def test_share_of_empty_scenes_is_exact(content):
    with_objects = {annotation["image_id"] for annotation in content["annotations"]}
    assert len(content["images"]) - len(with_objects) == 5


def test_every_class_occurs_about_equally(content):
    counts = np.bincount([annotation["category_id"] for annotation in content["annotations"]])[1:]
    assert len(counts) == len(SHAPES) and counts.min() > 0.5 * counts.mean()


def test_every_pyramid_level_has_work(content):
    """By the canonical rule at a quarter of the paper's size, on images a quarter as large: P2 to P5."""
    sides = [math.sqrt(a["bbox"][2] * a["bbox"][3]) for a in content["annotations"]]
    levels = [min(max(math.floor(4 + math.log2(side / 32)), 2), 5) for side in sides]
    counts = np.bincount(levels, minlength=6)[2:]
    assert counts.min() >= 0.08 * counts.sum()


def test_objects_cover_others_now_and_then(content):
    """An object of which a tenth or more is hidden has less area than its shape has in its own box."""
    disc = next(c["id"] for c in content["categories"] if c["name"] == "disc")
    fills = [a["area"] / (a["bbox"][2] * a["bbox"][3]) for a in content["annotations"] if a["category_id"] == disc]
    assert 0.0 < np.mean(np.array(fills) < 0.9 * np.pi / 4) < 0.6


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    image_size=st.integers(32, 96),
    objects=st.integers(0, 12),
    low=st.floats(4.0, 16.0),
    ratio=st.floats(1.0, 2.0),
)
def test_any_scene_is_sound(seed, image_size, objects, low, ratio):
    pixels, drawn = draw_scene(
        np.random.default_rng(seed), image_size=image_size, min_size=low, max_size=low * ratio, objects=objects
    )
    assert pixels.shape == (image_size, image_size, 3) and pixels.dtype == np.uint8
    assert len(drawn) <= objects
    for name, mask in drawn:
        assert name in SHAPES and mask.any()
        rows, columns = np.nonzero(mask)
        assert max(np.ptp(rows), np.ptp(columns)) + 1 <= 2.5 * low * ratio + 2
    assert not drawn or np.sum([mask for _, mask in drawn], axis=0).max() == 1


def test_enough_of_every_object_stays_visible(monkeypatch):
    """Against the whole shapes as they were rendered, kept aside here."""
    rendered, full = [], []
    original = scenes._paint

    def keep(*args):
        rendered.append(render(*args))
        return rendered[-1]

    def paint(*args):
        full.append((rendered[-1] > 0.5).sum())
        original(*args)

    monkeypatch.setattr(scenes, "render", keep)
    monkeypatch.setattr(scenes, "_paint", paint)
    hidden = 0
    for seed in range(40):
        full.clear()
        _, drawn = draw_scene(np.random.default_rng(seed), image_size=64, min_size=10, max_size=50, objects=10)
        shares = [mask.sum() / area for (_, mask), area in zip(drawn, full, strict=True)]
        assert min(shares) >= MIN_VISIBLE
        hidden += sum(share < 0.9 for share in shares)
    assert hidden > 10


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=20, deadline=None)
@given(size=st.floats(8.0, 120.0), angle=st.floats(0.0, 7.0), stretch=st.floats(0.8, 1.25))
def test_rendered_shape_has_the_size_asked_for(name, size, angle, stretch):
    alpha = render(name, size, angle, stretch)
    assert alpha.dtype == np.float32 and alpha.min() >= 0 and alpha.max() <= 1
    rows, columns = np.nonzero(alpha > 0.02)
    assert math.sqrt((np.ptp(rows) + 1) * (np.ptp(columns) + 1)) == pytest.approx(size, abs=2.0)


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("disc", math.pi / 4),
        ("square", 1.0),
        ("triangle", 0.5),
        ("ring", math.pi / 4 * (1 - 0.55**2)),
        ("cross", 1 - 4 * 0.35**2),
    ],
)
def test_rendered_shape_covers_what_geometry_says(name, area):
    assert render(name, 100.0, 0.0, 1.0).sum() / 100**2 == pytest.approx(area, abs=0.02)


def test_render_refuses():
    with pytest.raises(ValueError, match="Expected a shape among disc, .* got 'hexagon'"):
        render("hexagon", 10, 0, 1)
    with pytest.raises(ValueError, match="size greater than 0"):
        render("disc", 0, 0, 1)


def test_class_does_not_show_in_the_colour(folder, content):
    """Shape is what tells the classes apart: their mean colours are alike."""
    means = {}
    pixels = {i["id"]: cv2.imread(str(folder / "images" / "train" / i["file_name"])) for i in content["images"]}
    for a in content["annotations"]:
        mask = mask_util.decode(a["segmentation"]).astype(bool)
        means.setdefault(a["category_id"], []).append(pixels[a["image_id"]][mask].mean(axis=0))
    averages = np.array([np.mean(values, axis=0) for values in means.values()])
    assert np.ptp(averages, axis=0).max() < 45
    assert min(np.std(values, axis=0).min() for values in means.values()) > 30


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_own_colour_tells_the_class_of_its_share_of_objects(share):
    """The hue of an object's mean colour, taken for the class with the nearest hue, is right as often as asked for."""
    right = drawn = 0
    for seed in range(60):
        image, objects = draw_scene(
            np.random.default_rng(seed), image_size=96, min_size=24, max_size=48, objects=4, own_colour=share
        )
        for name, mask in objects:
            mean = image[mask].mean(axis=0).round().astype(np.uint8)
            hue = cv2.cvtColor(mean[None, None], cv2.COLOR_BGR2HSV)[0, 0, 0] / 180
            right += round(hue * len(SHAPES)) % len(SHAPES) == list(SHAPES).index(name)
            drawn += 1
    by_chance = (1 - share) / len(SHAPES)
    assert right / drawn == pytest.approx(share + by_chance, abs=0.1)


def test_contrasting_colour_is_far_from_the_other():
    rng = np.random.default_rng(0)
    other = np.array([120, 120, 120], np.float32)
    distances = [np.linalg.norm(textures.contrasting_colour(rng, other) - other) for _ in range(200)]
    assert np.mean(np.array(distances) >= 90) > 0.95


def test_complete_scenes_are_kept(tmp_path, monkeypatch):
    folder = make_scenes(tmp_path / "set", **SMALL)
    monkeypatch.setattr(scenes, "draw_scene", lambda *_, **__: pytest.fail("drawn again"))
    assert make_scenes(tmp_path / "set", **SMALL) == folder


def test_other_parameters_are_refused_or_overwritten(tmp_path):
    folder = make_scenes(tmp_path / "set", **SMALL)
    before = files(folder)
    with pytest.raises(
        ValueError, match="other parameters .seed 0 there, 5 asked for.; choose another folder.*--overwrite"
    ):
        make_scenes(folder, **SMALL, seed=5)
    assert files(folder) == before
    make_scenes(folder, **SMALL, seed=5, overwrite=True)
    assert json.loads((folder / "scenes.json").read_text())["seed"] == 5
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_was_not_made_here_is_never_touched(tmp_path, overwrite):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="does not hold scenes made here"):
        make_scenes(tmp_path / "set", **SMALL, overwrite=overwrite)
    assert os.listdir(tmp_path / "set") == ["thesis.tex"]


def test_empty_folder_may_be_there(tmp_path):
    (tmp_path / "set").mkdir()
    assert (make_scenes(tmp_path / "set", **SMALL) / "scenes.json").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_run_leaves_nothing_half_made(tmp_path, monkeypatch, overwrite):
    if overwrite:
        make_scenes(tmp_path / "set", **SMALL)
    before = files(tmp_path)
    calls = []

    def draw(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw_scene(*args, **kwargs)

    monkeypatch.setattr(scenes, "draw_scene", draw)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "set", **SMALL, seed=9, overwrite=overwrite)
    assert files(tmp_path) == before
    assert os.listdir(tmp_path) == (["set"] if overwrite else [])


def test_another_process_that_was_quicker(tmp_path, monkeypatch):
    """It made the same scenes between our look at the folder and our renaming: keep them."""
    other = make_scenes(tmp_path / "other", **SMALL)
    original = scenes._write_split

    def write(work, split, *args):
        original(work, split, *args)
        if split == "val":
            other.rename(tmp_path / "set")

    monkeypatch.setattr(scenes, "_write_split", write)
    make_scenes(tmp_path / "set", **SMALL)
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"train": 0}, "Expected train to be a whole number of at least 1, got 0"),
        ({"val": 2.5}, "Expected val to be a whole number"),
        ({"seed": -1}, "Expected seed to be a whole number of at least 0"),
        ({"max_objects": True}, "Expected max_objects"),
        ({"image_size": 16}, "image_size of at least 32"),
        ({"min_size": 2.0}, "Expected 4 <= min_size"),
        ({"min_size": 30.0, "max_size": 20.0}, "got min_size 30 and max_size 20"),
        ({"max_size": 65.0}, "max_size <= image_size .64 pixels."),
        ({"max_size": math.nan}, "got min_size 8 and max_size nan"),
        ({"empty": 1.5}, "share empty to lie between 0 and 1, got 1.5"),
        ({"own_colour": -0.1}, "share own_colour to lie between 0 and 1, got -0.1"),
    ],
)
def test_parameters_out_of_range(tmp_path, parameters, message):
    with pytest.raises(UserError, match=message):
        make_scenes(tmp_path / "set", **{**SMALL, **parameters})
    assert not os.listdir(tmp_path)


def test_all_scenes_may_be_empty(tmp_path):
    folder = make_scenes(tmp_path / "set", **SMALL, empty=1.0)
    assert json.loads((folder / "annotations" / "instances_val.json").read_text())["annotations"] == []


def test_scenes_register_and_evaluate_without_a_copy(folder, tmp_path):
    cfg = config(
        tmp_path,
        COCO_FORMAT=[["val", str(folder / "annotations" / "instances_val.json"), str(folder / "images" / "val")]],
    )
    register_from_config(cfg)
    assert not os.listdir(tmp_path)
    assert len(DatasetCatalog.get("val")) == 20
    COCOEvaluator("val", ("bbox",), distributed=False, use_fast_impl=False)


def test_masks_and_boxes_agree_in_the_mapper(folder, tmp_path):
    json_file, images = folder / "annotations" / "instances_train.json", folder / "images" / "train"
    cfg = config(tmp_path, COCO_FORMAT=[["train", str(json_file), str(images)]], TRAIN=("train",))
    cfg.MODEL.MASK_ON = True
    with pytest.raises(UserError, match="set INPUT.MASK_FORMAT to bitmask"):
        register_from_config(cfg)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN = (128,)
    register_from_config(cfg)
    mapper = TrainingMapper(cfg, True)
    for record in DatasetCatalog.get("train")[:20]:
        instances = mapper(record)["instances"]
        assert len(instances) == len(record["annotations"])
        if not record["annotations"]:  # Detectron2 gives an empty image no masks
            continue
        assert torch.equal(instances.gt_boxes.tensor, instances.gt_masks.get_bounding_boxes().tensor)


def test_enough_of_a_shape_lies_inside_the_image():
    """A box whose solid part is all in one corner: cutting that corner off must not count as a place."""
    alpha = np.zeros((20, 20), np.float32)
    alpha[:5, :5] = 1.0
    owner = np.full((32, 32), -1)
    rng = np.random.default_rng(0)
    places = [scenes._find_place(rng, alpha, owner, []) for _ in range(300)]
    shares = [(part > 0.5).sum() / 25 for _, _, part in places]
    assert min(shares) >= MIN_VISIBLE
    assert any(share < 1.0 for share in shares)
