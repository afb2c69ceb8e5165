"""Reading configurations: what they become, and what a mistake says."""

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from fpn_d2 import add_fpn_d2_config
from fpn_d2.engine import UserError, load_config, load_prepared, prepare_data
from fpn_d2.engine.device import on_this_machine

from .small import TEST, TRAIN, data_keys, small_config, write_config

SECTIONS = [("GeneralizedRCNN", "ROI_HEADS")]
SECTIONS += [(name, "RETINANET") for name in ("RetinaNet", "FPNRetinaNet", "TorchvisionRetinaNet")]


def _file(folder, text):
    path = folder / "c.yaml"
    path.write_text(text)
    return str(path)


def test_without_a_file_the_defaults_come_back():
    expected = get_cfg()
    add_fpn_d2_config(expected)
    assert load_config() == expected


def test_a_configuration_is_read_and_nothing_else_happens(tmp_path, scenes):
    """Neither data nor a folder for outputs have to be there, and none is made."""
    path = write_config(tmp_path / "c.yaml", scenes)
    path.write_text(path.read_text().replace(str(scenes), "/nowhere").replace(TRAIN, "read_only"))
    known = DatasetCatalog.list()
    cfg = load_config(str(path))
    assert cfg.DATASETS.TRAIN == ("read_only",) and DatasetCatalog.list() == known
    assert cfg.MODEL.DEVICE == "cuda" and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.yaml"]
    with pytest.raises(UserError, match="read_only.*/nowhere"):
        prepare_data(cfg, str(path))


def test_an_evaluation_can_do_without_the_training_set(tmp_path, scenes):
    path = write_config(tmp_path / "c.yaml", scenes)
    gone = path.read_text().replace("instances_train.json", "gone.json").replace(TRAIN, "gone_scenes")
    path.write_text(gone)
    cfg = load_prepared(str(path), train=False)
    assert "gone_scenes" not in DatasetCatalog.list()
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == len(MetadataCatalog.get(TEST).thing_classes)
    with pytest.raises(UserError, match="'gone_scenes'.*gone.json"):
        load_prepared(str(path))
    with pytest.raises(UserError, match="NUM_CLASSES is 80, but the data has"):
        load_prepared(str(path), ["MODEL.ROI_HEADS.NUM_CLASSES", "80"], train=False)


def test_a_set_that_is_trained_and_tested_on_is_needed_to_evaluate(tmp_path, scenes):
    path = write_config(tmp_path / "c.yaml", scenes)
    path.write_text(path.read_text().replace("instances_val.json", "gone.json").replace(TEST, "gone_scenes"))
    with pytest.raises(UserError, match="'gone_scenes'.*gone.json"):
        load_prepared(str(path), ["DATASETS.TRAIN", "('gone_scenes',)"], train=False)


def test_options_win_over_the_file_and_the_file_over_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("VERSION: 2\nSOLVER: {MAX_ITER: 1, IMS_PER_BATCH: 1, BASE_LR: 0.5}")
    path = _file(tmp_path, "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 2, IMS_PER_BATCH: 2}")
    solver = load_config(path, ["SOLVER.MAX_ITER", "3"]).SOLVER
    assert (solver.MAX_ITER, solver.IMS_PER_BATCH, solver.BASE_LR) == (3, 2, 0.5)


def test_a_configuration_saved_by_a_run_loads_again(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes)
    again = load_config(_file(tmp_path, cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["MODEL.FPN.NEK", "FPN"], ["no key MODEL.FPN.NEK", "did you mean MODEL.FPN.NECK"]),
        (["MODEL.WEIGHTS.FILE", "x"], ["no key MODEL.WEIGHTS.FILE", "MODEL.WEIGHTS"]),
        (["SOLVER.BASE_LR", "1"], ["SOLVER.BASE_LR", "float", "write 1.0"]),
        (["SOLVER.MAX_ITER", "soon"], ["SOLVER.MAX_ITER", "int", "soon"]),
        (["DATASETS.TEST", "coco"], ["DATASETS.TEST", "tuple", "write ('coco',)"]),
        (["SOLVER", "3"], ["SOLVER is a section", "BASE_LR"]),
        (["SOLVER.MAX_ITER"], ["pairs", "SOLVER.MAX_ITER"]),
        (["SOLVER.MAX_ITER=3"], ["no =", "SOLVER.MAX_ITER=3"]),
        (["MODEL.DEVICE", "gpu"], ["MODEL.DEVICE", "'gpu'", "cuda"]),
        (["SOLVER.AMP.DTYPE", "bf16"], ["SOLVER.AMP.DTYPE", "bfloat16"]),
    ],
)
def test_a_wrong_option_says_what_was_meant(opts, words):
    with pytest.raises(UserError) as error:
        load_config("", opts)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MODEL: {FPNN: {NECK: FPN}}", ["no key MODEL.FPNN", "did you mean MODEL.FPN"]),
        ("SOLVER: {BASE_LR: high}", ["SOLVER.BASE_LR", "float", "high"]),
        ("VERSION: 1\nTEST: {AUG_ON: 3}", ["TEST.AUG_ON", "Type mismatch"]),
        ("MODEL: {DEVICE: cpu}\nTEST: 1", ["TEST is a section", "EVAL_PERIOD", "1"]),
        (f"SOLVER: {{BASE_LR: {'9' * 400}}}", ["SOLVER.BASE_LR", "float", "999"]),
        ("_BASE_: nowhere.yaml", ["_BASE_", "nowhere.yaml", "looked for"]),
        ("SOLVER: {BASE_LR: 0.1", ["not valid YAML", "line"]),
        ("", ["no KEY: value pairs"]),
        ("- 1", ["no KEY: value pairs"]),
    ],
)
def test_a_wrong_file_says_where_and_what(tmp_path, text, words):
    path = _file(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert all(word in str(error.value) for word in [path, *words]), error.value


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    _file(tmp_path, "VERSION: 2")
    with pytest.raises(UserError, match=r"looked for .*d\.yaml \(did you mean c\.yaml"):
        load_config(str(tmp_path / "d.yaml"))


def test_the_number_of_classes_is_taken_from_the_data(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes)
    names = yaml.safe_load((scenes / "annotations" / "instances_val.json").read_text())["categories"]
    assert len(names) != 80
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == len(names)


@pytest.mark.parametrize(("meta", "section"), SECTIONS)
def test_a_number_of_classes_that_contradicts_the_data_is_refused(tmp_path, scenes, meta, section):
    # 80 is also Detectron2's default: written down it counts.
    opts = ["MODEL.META_ARCHITECTURE", meta, f"MODEL.{section}.NUM_CLASSES", 80]
    with pytest.raises(UserError, match=rf"MODEL\.{section}\.NUM_CLASSES is 80, but the data has \d+ classes"):
        small_config(tmp_path, scenes, *opts)


def test_the_number_of_classes_of_a_model_that_is_not_built_does_not_matter(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes, "MODEL.RETINANET.NUM_CLASSES", 80)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 80


def test_a_builtin_set_keeps_its_classes_without_its_files():
    cfg = load_prepared("", ["DATASETS.TRAIN", "('coco_2017_train',)"])
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert load_prepared("", ["DATASETS.TEST", "('keypoints_coco_2017_val',)"]).MODEL.ROI_HEADS.NUM_CLASSES == 1


def test_data_sets_can_be_named_on_the_command_line(scenes):
    datasets = data_keys(scenes)["DATASETS"]
    cfg = load_prepared("", [part for key, value in datasets.items() for part in (f"DATASETS.{key}", str(value))])
    assert cfg.DATASETS.TRAIN == tuple(datasets["TRAIN"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_device_becomes_cpu_with_a_line(caplog):
    asked = load_config("", ["MODEL.DEVICE", "cuda:0"])
    assert on_this_machine(asked).MODEL.DEVICE == "cpu" and asked.MODEL.DEVICE == "cuda:0"
    assert "cuda:0 becomes cpu" in caplog.text
    caplog.clear()
    assert on_this_machine(load_config("", ["MODEL.DEVICE", "cpu"])).MODEL.DEVICE == "cpu"
    assert caplog.text == ""


def test_loading_twice_gives_the_same(tmp_path, scenes):
    path = str(write_config(tmp_path / "c.yaml", scenes))
    assert load_prepared(path) == load_prepared(path)


def test_a_switch_after_the_options_is_named():
    with pytest.raises(UserError, match="--eval-only stands among the KEY VALUE pairs: put it before them"):
        load_config("", ["OUTPUT_DIR", "somewhere", "--eval-only"])


def test_the_home_directory_is_found(tmp_path, monkeypatch):
    """As after --config-file=~/c.yaml, in which no shell replaces the ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    _file(tmp_path, "VERSION: 2\nSOLVER: {MAX_ITER: 7}")
    assert load_config("~/c.yaml").SOLVER.MAX_ITER == 7
    with pytest.raises(UserError, match=rf"looked for {tmp_path}/d\.yaml"):
        load_config("~/d.yaml")
