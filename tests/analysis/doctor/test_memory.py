"""The estimate of what a training step takes."""

import json
from pathlib import Path

import numpy as np
import pytest

from fpn_d2.analysis import published
from fpn_d2.analysis.doctor import memory
from fpn_d2.analysis.doctor.memory import memory_advice, training_memory
from fpn_d2.engine import load_config
from tests.analysis.doctor.test_doctor import data
from tests.engine.small import small_config

ROOT = Path(__file__).resolve().parents[3]
ZOO = json.loads((Path(published.__file__).parent / "zoo_baselines.json").read_text())["rows"]


@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/faster_rcnn_R_50_FPN_1x",
        "COCO-Detection/retinanet_R_50_FPN_1x",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
        "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x",
    ],
)
def test_peaks_that_were_published_lie_between_the_estimates(name):
    """Two images on each GPU; batches are padded to something between a landscape and a square of its longer side."""
    (row,) = [row for row in ZOO if row["config"] == name]
    cfg = load_config(str(ROOT / "configs" / f"{name}.yaml"), ["MODEL.WEIGHTS", ""])
    low, high = (training_memory(cfg, size, 30).total(2) / 2**30 for size in ((800, 1344), (1344, 1344)))
    assert 0.97 * low < row["train_memory_gb"] < 1.03 * high and high < 1.6 * low


def test_parts_of_the_estimate(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes, "MODEL.DEVICE", "cpu")
    one, large = training_memory(cfg, (64, 64), 5), training_memory(cfg, (128, 128), 5)
    # Maps grow with the area; RoIs do not.
    assert one.per_image < large.per_image < 4 * one.per_image and one.fixed == large.fixed
    assert one.total(3) == one.fixed + 3 * one.per_image + one.passing
    assert [one.images(one.total(n) + 1) for n in (1, 7)] == [1, 7] and one.images(0) == 0
    adam = small_config(tmp_path / "b", scenes, "MODEL.DEVICE", "cpu", "SOLVER.OPTIMIZER", "AdamW")
    assert training_memory(adam, (64, 64), 5).fixed == pytest.approx(4 / 3 * one.fixed, rel=1e-3)
    half = small_config(tmp_path / "c", scenes, "MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", "True")
    assert training_memory(half, (64, 64), 5).per_image == pytest.approx(0.6 * one.per_image)


def test_advice(tmp_path, scenes, monkeypatch):
    opts = ("MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "8", "INPUT.MIN_SIZE_TRAIN", "(64, 96)")
    cfg = small_config(tmp_path, scenes, *opts, "INPUT.MAX_SIZE_TRAIN", "150")
    set_ = data(size=400)
    set_.sizes = np.array([[400.0, 700.0], [600.0, 400.0]] * 25)  # 86 x 150 and 144 x 96 in training
    (plain,) = memory_advice(cfg, set_)
    assert plain.key == "SOLVER.IMS_PER_BATCH" and plain.value is None
    assert "a step with 8 images of 160 x 160 pixels takes about 0." in plain.reason
    need = training_memory(cfg, (160, 160), 2)
    monkeypatch.setattr(memory, "_room", lambda cfg: (need.total(3) + 1, 2, "the GPU has little"))
    (less,) = memory_advice(cfg, set_)
    assert less.value == 6 and "8 images" not in less.reason and "the GPU has little" in less.reason
    monkeypatch.setattr(memory, "_room", lambda cfg: (0, 1, ""))
    assert memory_advice(cfg, set_)[0].value == 1
    c4 = load_config(str(ROOT / "configs/COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"), ["MODEL.WEIGHTS", ""])
    assert memory_advice(c4, set_) == []
