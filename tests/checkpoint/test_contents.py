"""What a checkpoint says about its model: configuration and classes."""

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from torch import nn

from fpn_d2.checkpoint.contents import KEY, contents
from fpn_d2.engine import ReportingCheckpointer, UserError


@pytest.fixture
def cfg():
    """A configuration with one registered set, whose category ids are not in the order of its classes."""
    metadata = MetadataCatalog.get("contents_set")
    metadata.set(
        thing_classes=["ant", "zebra", "bee"],
        thing_dataset_id_to_contiguous_id={20: 1, 4: 0, 9: 2},
        keypoint_names=["nose", "left_eye", "right_eye"],
        keypoint_flip_map=[("left_eye", "right_eye")],
    )
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("contents_without_any", "contents_set")
    yield cfg
    MetadataCatalog.remove("contents_set")
    MetadataCatalog.remove("contents_without_any")


def _checkpointer(folder, cfg, **kwargs):
    return ReportingCheckpointer(nn.Linear(2, 2), str(folder), about=contents(cfg), **kwargs)


def test_a_file_carries_its_configuration_and_its_classes(tmp_path, cfg):
    cfg.MODEL.PIXEL_STD = [1.5, 2.0, 2.5]
    _checkpointer(tmp_path, cfg).save("model", iteration=3)
    held = torch.load(tmp_path / "model.pth", weights_only=True)[KEY]
    assert held["format"] == 1
    assert held["classes"] == {
        "thing_classes": ["ant", "zebra", "bee"],
        "thing_ids": [4, 20, 9],
        "keypoint_names": ["nose", "left_eye", "right_eye"],
        "keypoint_flip_map": [["left_eye", "right_eye"]],
    }
    again = get_cfg()
    again.merge_from_other_cfg(CfgNode.load_cfg(held["config"]))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump()) and again.MODEL.PIXEL_STD == [1.5, 2.0, 2.5]


def test_detectron2s_own_checkpointer_loads_it(tmp_path, cfg):
    ours = _checkpointer(tmp_path, cfg)
    ours.save("model", iteration=3)
    model = nn.Linear(2, 2)
    rest = DetectionCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 3
    assert torch.equal(model.weight, ours.model.weight)


def test_other_classes_than_the_datas_are_refused_with_both_lists(tmp_path, cfg):
    _checkpointer(tmp_path, cfg).save("model")
    file = str(tmp_path / "model.pth")
    MetadataCatalog.get("contents_set").thing_classes[:] = ["ant", "bee", "zebra" * 100]
    wanted = r"model.pth was trained on the classes \['ant', 'zebra', 'bee'\] \(3\), but the data has \['ant', 'bee'"
    with pytest.raises(UserError, match=wanted) as error:
        _checkpointer(tmp_path, cfg, whole=True).load(file)
    assert len(str(error.value)) < 1000
    with pytest.raises(UserError, match=wanted):
        _checkpointer(tmp_path, cfg).resume_or_load("", resume=True)
    # As weights to start from they are welcome, and who insists gets them.
    _checkpointer(tmp_path, cfg).load(file, checkpointables=[])
    _checkpointer(tmp_path, cfg, whole=True, partial_weights="allow").load(file)


def test_data_without_classes_of_its_own_is_no_contradiction(tmp_path, cfg):
    _checkpointer(tmp_path, cfg).save("model")
    cfg.DATASETS.TRAIN = ()
    _checkpointer(tmp_path, cfg, whole=True).load(str(tmp_path / "model.pth"))
