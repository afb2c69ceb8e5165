"""Names that do not exist and files that are not there."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from fpn_d2.engine import UserError, load_config
from fpn_d2.engine.checks import check_data_files, check_weight_file

from .small import TEST, TRAIN, small_config

WRONG = [
    ("MODEL.META_ARCHITECTURE", "GeneralizedRCN", "GeneralizedRCNN"),
    ("MODEL.BACKBONE.NAME", "build_fpn_backbon", "build_fpn_backbone"),
    ("MODEL.FPN.BOTTOM_UP", "build_resnt_backbone", "build_resnet_backbone"),
    ("MODEL.FPN.NECK", "FPM", "FPN"),
    ("MODEL.PROPOSAL_GENERATOR.NAME", "RPM", "RPN"),
    ("MODEL.RPN.HEAD_NAME", "StandardRPNHed", "StandardRPNHead"),
    ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGen", "DefaultAnchorGenerator"),
    ("MODEL.ROI_HEADS.NAME", "FPNRoIHead", "FPNROIHeads"),
    ("MODEL.ROI_LEVEL_ASSIGN.NAME", "canonicle", "canonical"),
    ("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHed", "FastRCNNConvFCHead"),
    ("MODEL.PARTIAL_WEIGHTS", "alow", "allow"),
    ("INPUT.RANDOM_FLIP", "horizontl", "horizontal"),
    ("DATASETS.TEST", f"('{TEST[:-1]}',)", TEST),
]


@pytest.mark.parametrize(("key", "value", "meant"), WRONG)
def test_a_name_that_does_not_exist_names_the_nearest(tmp_path, scenes, key, value, meant):
    with pytest.raises(UserError) as error:
        small_config(tmp_path, scenes, key, value)
    assert key in str(error.value)
    assert f"did you mean {meant}" in str(error.value)


@pytest.mark.parametrize(
    ("switch", "key"),
    [
        ("MODEL.MASK_ON", "MODEL.ROI_MASK_HEAD.NAME"),
        ("MODEL.KEYPOINT_ON", "MODEL.ROI_KEYPOINT_HEAD.NAME"),
    ],
)
def test_the_name_of_a_head_matters_only_where_it_is_built(switch, key):
    load_config("", [key, "Nothing"])
    with pytest.raises(UserError, match=key):
        load_config("", [key, "Nothing", switch, "True"])


def test_files_of_the_data_that_are_there_pass(tmp_path, scenes):
    check_data_files(small_config(tmp_path, scenes), train=True)


@pytest.mark.parametrize("what", ["json_file", "image_root"])
def test_missing_files_of_a_registered_set_are_named(tmp_path, what):
    present = tmp_path / "there"
    present.mkdir()
    (present / "a.json").write_text("{}")
    metadata = {"json_file": str(present / "a.json"), "image_root": str(present), what: str(tmp_path / "gone")}
    DatasetCatalog.register("half_a_set", list)
    MetadataCatalog.get("half_a_set").set(thing_classes=["a"], **metadata)
    try:
        cfg = load_config("", ["DATASETS.TRAIN", "('half_a_set',)"])
        with pytest.raises(UserError, match=f"half_a_set: its {what} does not exist: looked for {tmp_path}/gone"):
            check_data_files(cfg, train=True)
    finally:
        DatasetCatalog.remove("half_a_set")
        MetadataCatalog.remove("half_a_set")


def test_a_builtin_set_without_files_says_which_variable_names_its_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = load_config("", ["DATASETS.TEST", "('coco_2017_val',)"])
    with pytest.raises(UserError, match="coco_2017_val.*looked for .*instances_val2017.json"):
        check_data_files(cfg, train=False)


@pytest.mark.parametrize(("train", "key"), [(True, "DATASETS.TRAIN"), (False, "DATASETS.TEST")])
def test_no_data_set_at_all_is_refused(train, key):
    with pytest.raises(UserError, match=f"{key} is empty"):
        check_data_files(load_config(), train=train)


def test_only_the_test_sets_are_needed_to_evaluate(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes, "DATASETS.TRAIN", "()")
    check_data_files(cfg, train=False)
    with pytest.raises(UserError, match="DATASETS.TRAIN"):
        check_data_files(cfg, train=True)
    assert TRAIN not in cfg.DATASETS.TRAIN


def test_a_missing_weight_file_is_named_and_addresses_pass(tmp_path):
    (tmp_path / "model_final.pth").touch()
    for path in ("", "detectron2://ImageNetPretrained/MSRA/R-50.pkl", str(tmp_path / "model_final.pth")):
        check_weight_file(path)
    with pytest.raises(UserError, match=f"looked for {tmp_path}/model_finl.pth .did you mean model_final.pth"):
        check_weight_file(str(tmp_path / "model_finl.pth"))
