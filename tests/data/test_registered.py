"""Sets that are registered elsewhere are checked, and mended, as those of the configuration."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode

from fpn_d2.data import check_others
from fpn_d2.errors import UserError
from tests.messy_data import CASES, sound_content, write_messy

from .small_sets import config, write_coco


def checked(tmp_path, name, **keys):
    cfg = config(tmp_path / "out", TRAIN=(name,), **keys)
    check_others(cfg, train=True)
    return DatasetCatalog.get(name)


def test_json_with_defects_is_used_without_them(tmp_path, caplog):
    files = write_messy(CASES["recorded size of another image"], tmp_path)
    register_coco_instances("others_json", {"mine": 5}, *files)
    records = checked(tmp_path, "others_json")
    assert {(record["width"], record["height"]) for record in records} == {(64, 48)}
    metadata = MetadataCatalog.get("others_json")
    assert metadata.json_file == str(tmp_path / "out" / "data_sets" / "others_json.json") and metadata.mine == 5
    assert json.loads(open(metadata.json_file).read()) == sound_content()
    assert "mended: 1 x a recorded size" in caplog.text
    assert (tmp_path / "out/data_sets/others_json.defects.json").exists()


def test_sound_json_stays_where_it_is(tmp_path):
    json_file, images = write_messy(CASES["crowd"], tmp_path)
    register_coco_instances("others_sound", {}, json_file, images)
    before = DatasetCatalog["others_sound"]
    checked(tmp_path, "others_sound")
    assert DatasetCatalog["others_sound"] is before and not (tmp_path / "out").exists()


def test_error_stops(tmp_path):
    register_coco_instances("others_bad", {}, *write_messy(CASES["box with NaN"], tmp_path))
    with pytest.raises(UserError, match="1 defects: 1 x a box that is not finite"):
        checked(tmp_path, "others_bad", ON_BAD_DATA="error")


def test_records_of_a_function(tmp_path):
    write_coco(tmp_path, sound_content())
    own = {"bbox": [2, 3, 12, 15], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "mine": "stays"}
    flat = {**own, "bbox": [2, 3, 2, 15]}

    def records():
        image = {"file_name": str(tmp_path / "images" / "1.png"), "width": 1, "height": 1}
        gone = {**image, "file_name": "gone.png", "image_id": "c", "annotations": [own]}
        return [{**image, "image_id": "a", "annotations": [own, flat, own]}, gone, {**image, "image_id": "b"}]

    DatasetCatalog.register("others_function", records)
    MetadataCatalog.get("others_function").set(thing_classes=["ant"])
    first, second = checked(tmp_path, "others_function")
    assert first["annotations"] == [own, own] and (first["width"], first["height"]) == (40, 30)
    assert second["image_id"] == "b" and "annotations" not in second
    report = json.loads((tmp_path / "out/data_sets/others_function.defects.json").read_text())
    assert {"box_without_area": 1, "file_missing": 1, "image_left_out": 1, "size_differs": 2}.items() <= (
        report["counts"].items()
    )


def test_rotated_boxes_are_left_alone(tmp_path):
    turned = {"bbox": [20, 20, 9, 9, 45], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0}
    DatasetCatalog.register("others_rotated", lambda: [{"file_name": "gone.png", "annotations": [turned]}])
    MetadataCatalog.get("others_rotated").set(thing_classes=["ant"])
    assert len(checked(tmp_path, "others_rotated")) == 1
