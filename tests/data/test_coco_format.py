import json
import os
import re
import subprocess
import sys

import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from fpn_d2.data import TrainingMapper, class_names, register_from_config
from fpn_d2.errors import UserError

from .small_sets import coco_content, config, write_coco


def perfect_predictions(name):
    """Inputs and outputs of a detector that finds each object that is not a crowd, on the data set ``name``."""
    for record in DatasetCatalog.get(name):
        objects = [a for a in record["annotations"] if not a.get("iscrowd")]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.pred_classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
        instances.scores = torch.ones(len(objects))
        yield record, {"instances": instances}


def evaluate(name, output, shift=0.0):
    evaluator = COCOEvaluator(name, ("bbox",), distributed=False, output_dir=str(output), use_fast_impl=False)
    evaluator.reset()
    for record, prediction in perfect_predictions(name):
        prediction["instances"].pred_boxes.tensor += shift
        evaluator.process([record], [prediction])
    return evaluator.evaluate()["bbox"]


def test_same_records_as_detectron2s_own_registration(tmp_path):
    files = write_coco(tmp_path, coco_content())
    cfg = config(tmp_path / "out", COCO_FORMAT=[["ours", *files]], TRAIN=("ours",))
    register_from_config(cfg)
    assert DatasetCatalog.get("ours") == load_coco_json(*files, "theirs")
    ours, theirs = MetadataCatalog.get("ours"), MetadataCatalog.get("theirs")
    assert ours.thing_classes == theirs.thing_classes == ["ant", "zebra"]
    assert ours.thing_dataset_id_to_contiguous_id == theirs.thing_dataset_id_to_contiguous_id == {4: 0, 20: 1}
    assert (ours.evaluator_type, ours.json_file, ours.image_root) == ("coco", *files)
    assert not (tmp_path / "out").exists()  # a clean json needs no copy


@pytest.mark.parametrize("spelling", ["list", "dictionary", "single list", "command line"])
def test_spellings_of_an_entry(tmp_path, spelling):
    json_file, images = write_coco(tmp_path, coco_content())
    cfg = config(tmp_path / "out")
    value = {
        "list": [["set", json_file, images]],
        "dictionary": [{"NAME": "set", "json": json_file, "Images": images}],
        "single list": ["set", json_file, images],
        "command line": f"[['set', '{json_file}', '{images}']]",
    }[spelling]
    cfg.merge_from_list(["DATASETS.COCO_FORMAT", value])
    register_from_config(cfg)
    assert len(DatasetCatalog.get("set")) == 3


def test_from_yaml_and_back(tmp_path):
    json_file, images = write_coco(tmp_path, coco_content())
    (tmp_path / "set.yaml").write_text(
        f"DATASETS:\n  COCO_FORMAT:\n  - {{NAME: set, JSON: {json_file}, IMAGES: {images}}}\n  TRAIN: [set]\n"
    )
    cfg = config(tmp_path / "out")
    cfg.merge_from_file(str(tmp_path / "set.yaml"))
    assert class_names(cfg) == ["ant", "zebra"]
    (tmp_path / "again.yaml").write_text(cfg.dump())
    again = config(tmp_path / "out")
    again.merge_from_file(str(tmp_path / "again.yaml"))
    assert class_names(again) == ["ant", "zebra"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([["set", "a.json"]], r"DATASETS.COCO_FORMAT: expected \[NAME, JSON, IMAGES\]"),
        ([{"NAME": "set", "JSON": "a.json"}], r"missing are \['IMAGES'\], unknown \[\]"),
        ([{"NAME": "s", "JSON": "a", "IMAGES": "b", "CLASES": []}], r"unknown \['CLASES'\]"),
        ([["set", "a.json", 3]], "expected text as IMAGES, got 3"),
        ([["", "a.json", "images"]], "expected text as NAME"),
        (7, "expected a list of entries"),
    ],
)
def test_malformed_entry(tmp_path, entry, message):
    with pytest.raises(UserError, match=message):
        register_from_config(config(tmp_path, COCO_FORMAT=entry))


def test_missing_json_and_image_folder(tmp_path):
    json_file, images = write_coco(tmp_path, coco_content())
    with pytest.raises(
        UserError, match=r"annotations of data set 'set': .*sett.json.* Did you mean .*set.json"
    ):
        register_from_config(
            config(tmp_path, COCO_FORMAT=[["set", json_file.replace("set.json", "sett.json"), images]])
        )
    with pytest.raises(UserError, match=r"images of data set 'set': .*imgs\. Did you mean .*images"):
        register_from_config(config(tmp_path, COCO_FORMAT=[["set", json_file, images.replace("images", "imgs")]]))


def test_json_that_is_not_json(tmp_path):
    _, images = write_coco(tmp_path, coco_content())
    (tmp_path / "set.json").write_text("{'images'")
    with pytest.raises(UserError, match="set.json: it is not valid json: expecting"):
        register_from_config(config(tmp_path, COCO_FORMAT=[["set", str(tmp_path / "set.json"), images]]))


def test_registering_again_reads_nothing_until_the_file_changes(tmp_path, monkeypatch):
    files = write_coco(tmp_path, coco_content())
    cfg = config(tmp_path / "out", COCO_FORMAT=[["set", *files]])
    register_from_config(cfg)
    with monkeypatch.context() as patch:
        patch.setattr("fpn_d2.data.coco_format.check_coco", lambda *_, **__: pytest.fail("read again"))
        register_from_config(cfg)
    content = coco_content()
    content["categories"].append({"id": 1, "name": "aardvark"})
    write_coco(tmp_path, content)
    os.utime(files[0], ns=(1, 1))
    register_from_config(cfg)
    assert MetadataCatalog.get("set").thing_classes == ["aardvark", "ant", "zebra"]


def test_name_with_two_meanings(tmp_path):
    first, second = (write_coco(tmp_path / name, coco_content()) for name in ("first", "second"))
    register_from_config(config(tmp_path, COCO_FORMAT=[["set", *first]]))
    with pytest.raises(UserError, match=r"'set' stands for .*first.* already; give .*second.* another name"):
        register_from_config(config(tmp_path, COCO_FORMAT=[["set", *second]]))
    with pytest.raises(UserError, match="name the data set 'twice' twice"):
        register_from_config(config(tmp_path, COCO_FORMAT=[["twice", *first], ["twice", *second]]))
    with pytest.raises(UserError, match="'coco_2017_val' is taken"):
        register_from_config(config(tmp_path, COCO_FORMAT=[["coco_2017_val", *first]]))


def test_classes_of_sets_that_disagree(tmp_path):
    first = write_coco(tmp_path / "first", coco_content())
    content = coco_content()
    content["categories"][0]["name"] = "yak"
    second = write_coco(tmp_path / "second", content)
    cfg = config(tmp_path, COCO_FORMAT=[["first", *first], ["second", *second]], TRAIN=("first",), TEST=("second",))
    with pytest.raises(UserError, match="'first' and 'second' differ .* only the first has zebra, .* second yak"):
        class_names(cfg)
    cfg.DATASETS.TRAIN = ()
    assert class_names(cfg) == ["ant", "yak"]


def test_classes_in_another_order(tmp_path):
    first = write_coco(tmp_path / "first", coco_content())
    content = coco_content()
    content["categories"][0]["id"], content["categories"][1]["id"] = 4, 20
    second = write_coco(tmp_path / "second", content)
    cfg = config(tmp_path, COCO_FORMAT=[["first", *first], ["second", *second]], TRAIN=("first", "second"))
    with pytest.raises(UserError, match="another order or number, ant, zebra and zebra, ant"):
        class_names(cfg)


def test_classes_of_detectron2s_sets_and_of_sets_registered_in_python(tmp_path):
    cfg = config(tmp_path, TRAIN=("coco_2017_train",), TEST=("coco_2017_val",))
    names = class_names(cfg)
    assert len(names) == 80 and names[0] == "person"
    cfg = config(tmp_path, TRAIN=("voc_2007_train",))
    assert len(class_names(cfg)) == 20
    register_coco_instances("by_hand", {}, *write_coco(tmp_path, coco_content()))
    assert class_names(config(tmp_path, TRAIN=("by_hand",))) == ["ant", "zebra"]
    assert class_names(config(tmp_path)) == []


def test_unknown_data_set_names_the_near_one(tmp_path):
    cells = write_coco(tmp_path, coco_content())
    cfg = config(tmp_path, COCO_FORMAT=[["cells_train", *cells]], TRAIN=("cell_train",))
    with pytest.raises(UserError, match="no data set 'cell_train'. Did you mean 'cells_train'.*: cells_train"):
        class_names(cfg)


def test_spawned_process_registers_from_the_configuration_alone(tmp_path):
    files = write_coco(tmp_path, coco_content())
    cfg = config(tmp_path / "out", COCO_FORMAT=[["set", *files]], TRAIN=("set",))
    script = tmp_path / "child.py"
    script.write_text(
        "import torch.multiprocessing as mp\n"
        "from detectron2.config import get_cfg\n"
        "from fpn_d2 import add_fpn_d2_config\n"
        "from fpn_d2.data import class_names, register_from_config\n"
        "from detectron2.data import DatasetCatalog, MetadataCatalog\n"
        "def child(rank, cfg):\n"
        "    assert 'set' not in DatasetCatalog.list()\n"
        "    register_from_config(cfg)\n"
        "    print('child', class_names(cfg), len(DatasetCatalog.get('set')))\n"
        "    from fpn_d2.data import coco_format\n"
        "    coco_format._registered.clear(), DatasetCatalog.remove('set'), MetadataCatalog.remove('set')\n"
        "    coco_format.check_coco = None\n"
        "    register_from_config(cfg)\n"
        "    print('not checked again', len(DatasetCatalog.get('set')))\n"
        "if __name__ == '__main__':\n"
        "    cfg = get_cfg()\n"
        "    add_fpn_d2_config(cfg)\n"
        f"    cfg.merge_from_file({str(tmp_path / 'cfg.yaml')!r})\n"
        "    register_from_config(cfg)\n"
        "    mp.start_processes(child, args=(cfg,), nprocs=1, start_method='spawn')\n"
    )
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "child ['ant', 'zebra'] 3\nnot checked again 3" in result.stdout


def messy_content():
    content = coco_content()
    del content["info"]
    content["annotations"].append({"image_id": 9, "category_id": 4, "bbox": [3, 3, 0, 4]})
    for number, annotation in enumerate(content["annotations"]):
        annotation.pop("area", None)
        annotation["id"] = number
    return content


def test_messy_data_evaluate_with_coco_tools(tmp_path):
    files = write_coco(tmp_path, messy_content())
    before = open(files[0]).read()
    cfg = config(tmp_path / "out", COCO_FORMAT=[["set/messy", *files]], TEST=("set/messy",))
    register_from_config(cfg)
    assert open(files[0]).read() == before
    copies = [path for path in (tmp_path / "out" / "data_sets").iterdir() if ".defects" not in path.name]
    assert len(copies) == 1
    assert re.fullmatch(r"set_messy_[0-9a-f]{8}\.json", copies[0].name)
    assert MetadataCatalog.get("set/messy").json_file == str(copies[0])
    results = evaluate("set/messy", tmp_path / "eval")
    assert [results[key] for key in ("AP", "AP-ant", "AP-zebra")] == pytest.approx([100, 100, 100])
    assert evaluate("set/messy", tmp_path / "eval", shift=4.0)["AP"] < 50


def test_copies_of_sets_with_nearly_the_same_name_are_kept_apart(tmp_path):
    names = ["my val", "my_val", "my/val"]
    entries = []
    for i, name in enumerate(names):
        content = messy_content()
        content["categories"][0]["name"] = f"beast{i}"
        entries.append([name, *write_coco(tmp_path / str(i), content)])
    register_from_config(config(tmp_path / "out", COCO_FORMAT=entries))
    files = [MetadataCatalog.get(name).json_file for name in names]
    assert len(set(files)) == 3
    for i, file in enumerate(files):
        with open(file) as copied:
            assert f"beast{i}" in [category["name"] for category in json.load(copied)["categories"]]


def test_json_with_a_byte_order_mark(tmp_path):
    files = write_coco(tmp_path, coco_content())
    with open(files[0]) as file:
        text = file.read()
    with open(files[0], "w", encoding="utf-8-sig") as file:
        file.write(text)
    register_from_config(config(tmp_path / "out", COCO_FORMAT=[["set", *files]]))
    assert len(DatasetCatalog.get("set")) == 3


def test_copy_is_written_beside_its_place_and_others_may_read_it(tmp_path, monkeypatch):
    """A rename is a single step only within a file system, and a temporary file is its owner's alone."""
    renamed = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: renamed.append(source) or replace(source, target))
    content = coco_content()
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    cfg = config(tmp_path / "out", COCO_FORMAT=[["set", *write_coco(tmp_path, content)]])
    register_from_config(cfg)
    copy = MetadataCatalog.get("set").json_file
    own = [path for path in renamed if path.startswith(str(tmp_path))]  # the other is the note for started processes
    assert [os.path.dirname(path) for path in own] == [os.path.dirname(copy)] * 2
    assert sorted(os.listdir(os.path.dirname(copy))) == ["set.defects.json", "set.json"]
    assert os.stat(copy).st_mode & 0o777 == 0o644


def test_copy_that_was_deleted_is_written_again(tmp_path):
    files = write_coco(tmp_path, messy_content())
    cfg = config(tmp_path / "out", COCO_FORMAT=[["set", *files]])
    register_from_config(cfg)
    os.unlink(MetadataCatalog.get("set").json_file)
    register_from_config(cfg)
    assert len(DatasetCatalog.get("set")) == 3


def test_messy_data_train(tmp_path, caplog):
    files = write_coco(tmp_path, messy_content())
    cfg = config(tmp_path / "out", COCO_FORMAT=[["set", *files]], TRAIN=("set",))
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.INPUT.MIN_SIZE_TRAIN = (32,)
    register_from_config(cfg)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"][:2] == [
        f"{files[0]}: left out: 1 x a box without area (image 9, annotation 4: [3, 3, 0, 4] in an image of 40 x 30)",
        f"All of it is listed in {tmp_path}/out/data_sets/set.defects.json",
    ]
    assert json.loads((tmp_path / "out/data_sets/set.defects.json").read_text())["counts"]["box_without_area"] == 1
    loader = build_detection_train_loader(
        get_detection_dataset_dicts(["set"], filter_empty=False),
        mapper=TrainingMapper(cfg, True),
        total_batch_size=3,
        num_workers=0,
    )
    batch = next(iter(loader))
    assert len(batch) == 3 and sum(len(image["instances"]) for image in batch) > 0


def test_images_without_annotations_for_testing_only(tmp_path):
    content = coco_content()
    del content["annotations"]
    files = write_coco(tmp_path, content)
    cfg = config(tmp_path / "out", COCO_FORMAT=[["set", *files]], TEST=("set",))
    register_from_config(cfg)
    loader = build_detection_test_loader(
        get_detection_dataset_dicts(["set"], filter_empty=False), mapper=TrainingMapper(cfg, False)
    )
    assert [batch[0]["image_id"] for batch in loader] == [3, 7, 9]
    cfg.DATASETS.TRAIN = ("set",)
    with pytest.raises(UserError, match="has no 'annotations'.*only a set that is not trained on"):
        register_from_config(cfg)


def test_keypoints_known_to_detectron2(tmp_path):
    content = coco_content()
    content["categories"][0]["keypoints"] = ["nose", "left_eye", "right_eye", "left_out"]
    register_from_config(config(tmp_path, COCO_FORMAT=[["set", *write_coco(tmp_path, content)]]))
    metadata = MetadataCatalog.get("set")
    assert metadata.keypoint_names == ["nose", "left_eye", "right_eye", "left_out"]
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]


def test_voc_folder_trains_and_evaluates_like_coco(tmp_path, voc):
    entries = [["wild_train", str(voc), "train"], {"NAME": "wild_val", "DIR": str(voc), "SPLIT": "val"}]
    cfg = config(tmp_path / "out", VOC_FORMAT=entries, TRAIN=("wild_train",), TEST=("wild_val",))
    assert class_names(cfg) == ["cat", "emu", "wolf"]
    records = DatasetCatalog.get("wild_train")
    assert [len(record["annotations"]) for record in records] == [2, 0]
    assert records[0]["annotations"][0]["category_id"] == 2
    mapped = TrainingMapper(cfg, True)(records[0])
    assert mapped["instances"].gt_classes.tolist() == [2, 0]
    assert evaluate("wild_train", tmp_path / "eval")["AP"] == pytest.approx(100)
    assert not any(path.suffix == ".json" for path in voc.iterdir())


def test_voc_with_given_classes(tmp_path, voc):
    entry = {"NAME": "wild", "DIR": str(voc), "SPLIT": "train", "CLASSES": ["wolf", "cat", "emu", "gnu"]}
    cfg = config(tmp_path / "out", VOC_FORMAT=[entry], TRAIN=("wild",))
    assert class_names(cfg) == ["wolf", "cat", "emu", "gnu"]
    with pytest.raises(UserError, match="expected a list of names as CLASSES of 'wild', got 'wolf'"):
        register_from_config(config(tmp_path, VOC_FORMAT=[{**entry, "CLASSES": "wolf"}]))


def test_voc_is_read_again_when_an_annotation_changes(tmp_path, voc):
    cfg = config(tmp_path / "out", VOC_FORMAT=["wild", str(voc), "train"], TRAIN=("wild",))
    assert class_names(cfg) == ["cat", "emu", "wolf"]
    xml = voc / "Annotations" / "three.xml"
    xml.write_text(xml.read_text().replace("emu", "gnu"))
    os.utime(xml, ns=(1, 1))
    assert class_names(cfg) == ["cat", "gnu", "wolf"]


@pytest.mark.parametrize("on_bad_data", ["skip", "error"])
def test_defects_are_left_out_or_stop(tmp_path, on_bad_data, caplog):
    files = write_coco(tmp_path, messy_content())
    cfg = config(tmp_path / "out", COCO_FORMAT=[["set", *files]], TRAIN=("set",), ON_BAD_DATA=on_bad_data)
    if on_bad_data == "error":
        with pytest.raises(UserError, match=r"set.json: 1 defects: 1 x a box without area \(image 9, annotation 4: "):
            register_from_config(cfg)
        assert not (tmp_path / "out").exists() and "set" not in DatasetCatalog.list()
        return
    register_from_config(cfg)
    assert "left out: 1 x a box without area" in caplog.text
    assert sum(len(record["annotations"]) for record in DatasetCatalog.get("set")) == 4


def test_ways_with_defects_that_do_not_exist(tmp_path):
    files = write_coco(tmp_path, coco_content())
    with pytest.raises(UserError, match="DATASETS.ON_BAD_DATA is 'ignore'; it must be skip or error"):
        register_from_config(config(tmp_path, COCO_FORMAT=[["set", *files]], ON_BAD_DATA="ignore"))


def test_boxes_without_anchors_and_images_with_too_many_objects_are_told(tmp_path, caplog):
    files = write_coco(tmp_path, coco_content())
    cfg = config(tmp_path / "out", COCO_FORMAT=[["set", *files]], TRAIN=("set",))
    cfg.INPUT.MIN_SIZE_TRAIN = (30,)
    cfg.TEST.DETECTIONS_PER_IMAGE = 1
    register_from_config(cfg)
    assert "3 of 3 boxes (100.0 %) overlap no anchor by 0.3 or more after resizing" in caplog.text
    assert "2 of 3 images have more than TEST.DETECTIONS_PER_IMAGE 1 objects, up to 2" in caplog.text
    assert not (tmp_path / "out").exists()


def test_what_is_used_as_it_is_and_doubtful_is_warned_of(tmp_path, caplog):
    content = coco_content()
    content["categories"][1]["name"] = "zebra"
    register_from_config(config(tmp_path / "out", COCO_FORMAT=[["set", *write_coco(tmp_path, content)]]))
    assert "set.json: 1 x a category name that stands for several ids (2 categories are zebra" in caplog.text
