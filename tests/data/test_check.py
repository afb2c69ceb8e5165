"""``fpn-d2 data check`` on whatever it takes."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode

from fpn_d2 import cli
from fpn_d2.data.check import check_set
from fpn_d2.data.coco_annotations import CheckOptions
from fpn_d2.errors import UserError
from tests.messy_data import CASES, sound_content, write_messy

from .small_sets import coco_content, write_coco


def test_sound_set(tmp_path, capsys):
    files = write_coco(tmp_path, coco_content())
    assert cli.main(["data", "check", files[0], "--images", files[1], "--full"]) == 0
    out = capsys.readouterr().out
    assert "3 images, 4 annotations, 2 categories" in out and "kept" in out and "left out" not in out


def test_report_and_repaired_copy(tmp_path, capsys):
    files = write_messy(CASES["recorded size of another image"], tmp_path)
    before = (tmp_path / "set.json").read_bytes()
    command = ["data", "check", files[0], "--images", files[1]]
    assert cli.main([*command, "--report", str(tmp_path / "report.json"), "--fix", str(tmp_path / "fixed.json")]) == 1
    out = capsys.readouterr().out
    assert "1.png is 64 x 48, not 20 x 15 as recorded" in out
    assert f"Repaired copy: {tmp_path / 'fixed.json'}\nmended: 1 x a recorded size" in out
    assert json.loads((tmp_path / "report.json").read_text())["counts"]["size_differs"] == 1
    assert json.loads((tmp_path / "fixed.json").read_text()) == sound_content()
    assert (tmp_path / "set.json").read_bytes() == before
    assert cli.main(["data", "check", str(tmp_path / "fixed.json"), "--images", files[1]]) == 0


def test_corners_are_converted(tmp_path, capsys):
    files = write_messy(CASES["all boxes as x1 y1 x2 y2"], tmp_path)
    target = str(tmp_path / "fixed.json")
    assert cli.main(["data", "check", files[0], "--images", files[1], "--fix", target]) == 1
    assert "all boxes: from x1 y1 x2 y2 to x y width height" in capsys.readouterr().out
    sizes = [a["bbox"][2:] for a in json.loads((tmp_path / "fixed.json").read_text())["annotations"]]
    assert sizes == [a["bbox"][2:] for a in sound_content()["annotations"]]


# Boxes as x1 y1 x2 y2 are mended, and masks are not asked for.
STOPPED = [name for name, case in CASES.items() if case.stops and not case.masks and "x1 y1" not in name]


@pytest.mark.parametrize("name", STOPPED)
def test_what_cannot_be_repaired_is_said_in_one_line(tmp_path, capsys, name):
    files = write_messy(CASES[name], tmp_path)
    assert cli.main(["data", "check", files[0], "--images", files[1], "--fix", str(tmp_path / "fixed.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "cannot be repaired: " in error and error.count("\n") == 1
    assert not (tmp_path / "fixed.json").exists()


def test_the_set_itself_is_not_overwritten(tmp_path, capsys):
    files = write_coco(tmp_path, coco_content())
    assert cli.main(["data", "check", files[0], "--fix", files[0]]) == 2
    assert "is the set itself" in capsys.readouterr().err


def test_names_that_lead_nowhere(tmp_path, capsys):
    files = write_coco(tmp_path, coco_content())
    assert cli.main(["data", "check", files[0].replace("set", "sett")]) == 2
    assert "neither a file, nor a folder, nor a registered set" in capsys.readouterr().err
    assert cli.main(["data", "check", files[0], "--images", files[1] + "x"]) == 2
    assert "did you mean images" in capsys.readouterr().err
    assert cli.main(["data", "check", "coco_2017_vall"]) == 2
    assert "did you mean coco_2017_val" in capsys.readouterr().err


def test_voc_folder(voc, tmp_path, capsys):
    assert cli.main(["data", "check", str(voc), "--split", "train", "--fix", str(tmp_path / "fixed.json")]) == 0
    assert [image["file_name"] for image in json.loads((tmp_path / "fixed.json").read_text())["images"]] == [
        "one.jpg",
        "two.jpg",
    ]
    (voc / "JPEGImages" / "one.jpg").write_text("no image")
    assert cli.main(["data", "check", str(voc), "--test"]) == 1
    assert "one.jpg is of no kind of image" in capsys.readouterr().out


def test_registered_json(tmp_path):
    register_coco_instances("check_json", {}, *write_messy(CASES["box with NaN"], tmp_path))
    assert check_set("check_json", CheckOptions()).report.counts["box_not_finite"] == 1


def test_registered_records(tmp_path):
    write_coco(tmp_path, coco_content())

    def records():
        boxes = [([2, 3, 10, 12], BoxMode.XYWH_ABS), ([2, 3, 12, 15], BoxMode.XYXY_ABS), ([9, 9, 9, 9], 0), ("a", 0)]
        annotations = [{"bbox": box, "bbox_mode": mode, "category_id": 0} for box, mode in boxes]
        annotations.append({**annotations[0], "category_id": 5})
        name = str(tmp_path / "images" / "a.png")
        record = {"file_name": name, "image_id": "a", "width": 1, "height": 1, "annotations": annotations}
        return [record, {**record, "image_id": "b", "file_name": name + "x"}]

    DatasetCatalog.register("check_records", records)
    MetadataCatalog.get("check_records").set(thing_classes=["ant"])
    report = check_set("check_records", CheckOptions()).report
    expected = {"box_without_area": 1, "box_wrong_type": 1, "category_unknown": 1, "file_missing": 1, "size_differs": 1}
    assert expected.items() <= report.counts.items() and report.counts["image_left_out"] == 5


def test_registered_function_that_fails():
    DatasetCatalog.register("check_failing", lambda: 1 / 0)
    with pytest.raises(UserError, match="check_failing cannot be loaded: ZeroDivisionError: division by zero"):
        check_set("check_failing", CheckOptions())
