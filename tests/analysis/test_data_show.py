"""The picture of a data set."""

import json
import shlex

import cv2
import numpy as np
import pytest

from fpn_d2 import cli
from fpn_d2.analysis import data_show
from fpn_d2.analysis.data_show import histograms, read_set, samples, words
from fpn_d2.analysis.level_rule import Rule
from fpn_d2.cli.data import SHOW_EXAMPLE
from tests.data.small_sets import COCO, coco_content, write_coco
from tests.engine.small import write_config


def test_a_set_is_read_as_it_is_used(tmp_path):
    content = coco_content()
    content["annotations"].append({"id": 6, "image_id": 9, "category_id": 4, "bbox": [5, 5, 0, 3], "iscrowd": 0})
    data = read_set(*write_coco(tmp_path, content))
    assert data.class_names == ["ant", "zebra"] and data.sizes.tolist() == [[30, 40]] * 3
    assert [name.rsplit("/", 1)[1] for name in data.files] == ["b.png", "a.png", "empty.png"]
    assert len(data.truth) == 4 and data.truth.crowd.sum() == 1  # the box without area is left out
    rule = Rule((2, 3), canonical_box_size=40, canonical_level=3, min_size=60, max_size=200)
    # Twice as large: sides of 21.9 (p2), 17.5 (p2) and 34.6 (p2); the crowd is no object.
    assert words(data, rule).splitlines() == [
        "3 images, 3 objects of 2 classes, 1 crowds",
        "objects per image: 1.0 on average, 2 at most; 1 images without",
        "sides in pixels of the images: 9 to 17 for nine of ten, 11 in the middle",
        "levels: p2 100 %, p3 0 %",
    ]
    assert words(data, rule.other(17.4)).endswith("p2 0 %, p3 100 %")


def test_histograms_count_what_is_there(tmp_path):
    data = read_set(*write_coco(tmp_path, coco_content()))
    classes, per_image, sizes, levels = histograms(data, Rule((2, 3), min_size=0)).axes[:4]
    assert [bar.get_width() for bar in classes.patches] == [2, 1]
    assert [label.get_text() for label in classes.get_yticklabels()] == ["zebra", "ant"]
    assert [bar.get_height() for bar in per_image.patches] == [1, 1, 1]
    assert sum(bar.get_height() for bar in sizes.patches) == 3
    assert [bar.get_height() for bar in levels.patches] == [100, 0]


def test_many_classes_and_an_empty_set(tmp_path):
    content = coco_content()
    content["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, 41)]
    axes = histograms(read_set(*write_coco(tmp_path / "a", content)), Rule((2, 3))).axes[0]
    assert axes.get_yticklabels()[-1].get_text() == "20 others" and len(axes.patches) == 21
    nothing = read_set(*write_coco(tmp_path / "b", {**coco_content(), "annotations": []}))
    assert "0 objects" in words(nothing, Rule((2, 3)))
    assert len(histograms(nothing, Rule((2, 3))).axes) == 8


def test_samples_show_the_boxes_and_broken_files(tmp_path):
    json_file, images = write_coco(tmp_path, coco_content())
    data = read_set(json_file, images)
    picture = samples(data, 3)
    bare = samples(read_set(*write_coco(tmp_path / "bare", {**coco_content(), "annotations": []})), 3)
    width = (picture.shape[1] - 12) // 4
    assert picture.shape == bare.shape and (picture[:, :width] != bare[:, :width]).any()
    assert (picture[:, 2 * (width + 4) :] == bare[:, 2 * (width + 4) :]).all()  # the image without objects
    assert samples(data, 2, seed=1).shape == samples(data, 2, seed=1).shape
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    broken = samples(data, 3)
    assert (broken[:, width + 10 : 2 * width - 10, 0] == 235).mean() > 0.5


@pytest.fixture
def here(tmp_path, scenes, monkeypatch):
    (tmp_path / "my").mkdir()
    write_config(tmp_path / "my" / "config.yaml", scenes)
    (tmp_path / "my" / "images").symlink_to(scenes / "images" / "train")
    (tmp_path / "my" / "train.json").symlink_to(scenes / "annotations" / "instances_train.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_in_help_runs(here, capsys):
    with pytest.raises(SystemExit):
        cli.main(["data", "show", "--help"])
    assert SHOW_EXAMPLE in " ".join(capsys.readouterr().out.split())
    assert cli.main(shlex.split(SHOW_EXAMPLE)[1:]) == 0
    assert "levels: p2" in capsys.readouterr().out
    whole = cv2.imread("output/train.jpg")
    assert whole.shape[1] == data_show._WIDTH
    assert cli.main(["data", "show", "my/train.json", "--output", "output/boxes.png"]) == 0  # without images
    assert cv2.imread("output/boxes.png").shape[0] < whole.shape[0]
    np.testing.assert_array_equal(cv2.imread("output/boxes.png")[:3], 255)


def test_mistakes_are_said(here, capsys):
    assert cli.main(["data", "show", "my/trian.json", "--output", "a.jpg"]) == 2
    assert "did you mean train.json" in capsys.readouterr().err
    assert cli.main(["data", "show", "my/train.json", "--output", "a.gif"]) == 2
    assert "call it .jpg or .png" in capsys.readouterr().err
    (here / "bad.json").write_text(json.dumps({"images": COCO["images"]}))
    assert cli.main(["data", "show", "bad.json", "--output", "a.jpg"]) == 2
    assert "cannot be shown" in capsys.readouterr().err and not (here / "a.jpg").exists()
