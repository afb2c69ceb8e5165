"""A checkpoint is enough; a weight file and a configuration will do too."""


import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model

import fpn_d2
from fpn_d2.checkpoint.contents import contents
from fpn_d2.data import register_from_config
from fpn_d2.engine import ReportingCheckpointer, UserError
from tests.engine.small import small_config

NAMES = ("disc", "square", "triangle", "star", "ring", "cross")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes):
    """Configuration, model and folder with a checkpoint of the trainer's kind."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("load")
    cfg = small_config(folder / "cfg", scenes, "MODEL.DEVICE", "cpu")
    register_from_config(cfg)
    model = build_model(cfg).eval()
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    ReportingCheckpointer(model, str(folder), about=contents(cfg)).save("model", iteration=3)
    return cfg, model, folder


@pytest.mark.parametrize("optimize", [False, True])
def test_a_checkpoint_is_enough(trained, scenes, optimize):
    cfg, model, folder = trained
    predictor = fpn_d2.load(
        folder / "model.pth", device="cpu", optimize=optimize, opts=["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    )
    assert predictor.class_names == NAMES and predictor.category_ids == (1, 2, 3, 4, 5, 6)
    assert predictor.device.type == "cpu"
    path = sorted((scenes / "images" / "val").iterdir())[0]
    record = DatasetMapper(cfg, is_train=False)({"file_name": str(path), "height": 64, "width": 64})
    with torch.no_grad():
        expected = model([record])[0]["instances"]
    found = predictor(path)
    assert len(found) == len(expected) > 0
    tolerance = {"atol": 2e-3, "rtol": 1e-4} if optimize else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, **tolerance)
    torch.testing.assert_close(found.scores, expected.scores, **tolerance)


def test_config_beside_the_weights_or_given(trained, tmp_path):
    cfg, model, _ = trained
    DetectionCheckpointer(model, str(tmp_path)).save("bare")
    with pytest.raises(UserError, match="does not say how to build its model.*--config"):
        fpn_d2.load(tmp_path / "bare.pth")
    given = fpn_d2.load(tmp_path / "bare.pth", config=cfg, class_names=list("abcdef"))
    assert given.class_names == tuple("abcdef")
    assert given.cfg is not cfg and cfg.MODEL.WEIGHTS != given.cfg.MODEL.WEIGHTS
    (tmp_path / "config.yaml").write_text(cfg.dump())
    for predictor in (
        fpn_d2.load(tmp_path / "bare.pth"),
        fpn_d2.load(tmp_path / "bare.pth", config=tmp_path / "config.yaml"),
    ):
        assert predictor.cfg.MODEL.FPN.OUT_CHANNELS == 16
        assert len(predictor.class_names) == 6


def test_a_number_of_classes_that_was_left_to_the_data_comes_from_the_weights(trained, tmp_path):
    cfg, model, folder = trained
    open_cfg = cfg.clone()
    open_cfg.defrost()
    open_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    assert len(fpn_d2.load(folder / "model.pth", config=open_cfg).class_names) == 6


def test_weights_of_the_zoo_with_a_config_of_the_zoo(tmp_path, monkeypatch):
    """Detectron2's own model and the form of its files; its metadata has the names and ids of COCO's classes."""
    from detectron2 import model_zoo

    small = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "8"]
    small += ["MODEL.ROI_BOX_HEAD.FC_DIM", "8", "INPUT.MIN_SIZE_TEST", "64", "MODEL.RPN.POST_NMS_TOPK_TEST", "5"]
    name = "COCO-Detection/faster_rcnn_R_50_FPN_3x"
    cfg = model_zoo.get_config(f"{name}.yaml")
    cfg.merge_from_list([*small, "MODEL.DEVICE", "cpu"])
    DetectionCheckpointer(build_model(cfg), str(tmp_path)).save("zoo")
    predictor = fpn_d2.load(tmp_path / "zoo.pth", config=name, opts=small, dtype="bfloat16", device="cpu")
    assert predictor.class_names[0] == "person" and predictor.category_ids[79] == 90
    assert predictor(np.zeros((40, 60, 3), np.uint8), channels="BGR").image_size == (40, 60)
    assert predictor.model.backbone.bottom_up.stem.conv1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"config": "COCO-Detection/nothing_like_it"}, "no configuration file .*nor has fpn_d2 or Detectron2's"),
        ({"device": "quantum"}, "the device is 'quantum'"),
        ({"device": "cuda:99"}, "no such GPU"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"dtype": "bfloat16", "optimize": False}, "needs optimize=True"),
        ({"opts": ["INPUT.MIN_SIZE_TEST"]}, "without a partner"),
        ({"opts": ["INPUT.MINIMUM", "3"]}, "the options, cannot be used"),
        ({"class_names": ["a"]}, "6 classes, but 1 names"),
        ({"tile": 3}, "size of a tile"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(trained, options, text):
    with pytest.raises(UserError, match=text):
        fpn_d2.load(trained[2] / "model.pth", **options)


def test_files_that_are_no_checkpoints(tmp_path, trained):
    with pytest.raises(UserError, match="there is no checkpoint.*did you mean model.pth"):
        fpn_d2.load(trained[2] / "modle.pth")
    (tmp_path / "junk.pth").write_bytes(b"\x00junk")
    with pytest.raises(UserError, match="cannot be read as weights"):
        fpn_d2.load(tmp_path / "junk.pth", config=trained[0])


def test_another_architecture(trained):
    cfg, _, folder = trained
    opts = ["MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.PARTIAL_WEIGHTS", "allow"]
    predictor = fpn_d2.load(folder / "model.pth", opts=opts, device="cpu")
    found = predictor(np.zeros((64, 64, 3), np.uint8), channels="BGR")
    assert predictor.class_names == ("0",) and found.has("pred_boxes") and found.has("scores")
