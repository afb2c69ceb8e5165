"""The processes of a study: real trainings of a few iterations, and what they measure."""

import json
import pickle
from pathlib import Path

import numpy as np
from detectron2.config import get_cfg

from fpn_d2.analysis.study import run as study
from fpn_d2.analysis.study import worker as study_run
from fpn_d2.analysis.subjects import random_batch
from fpn_d2.data.scenes import make_scenes

from .test_run import CONFIGS, SCRATCH, with_few_scenes


def test_one_run_measures_what_it_says(tmp_path):
    """A real training of three iterations in a process of its own, and a real comparison of times in this one."""
    scenes = make_scenes(tmp_path / "scenes", seed=1, progress=False, **with_few_scenes(SCRATCH, 4, 2).scenes)
    opts = [*study._places(scenes, tmp_path / "out", 1), "SOLVER.MAX_ITER", "3", "SOLVER.WARMUP_ITERS", "0"]
    common = {"config": str(CONFIGS / "fpn.yaml"), "opts": opts, "settings": {"a": 1}}
    annotations = str(scenes / "annotations" / "instances_val.json")
    task = common | {
        "kind": "train",
        "annotations": annotations,
        "edges": [16, 32, 64],
        "recall_at": [100, 2000],
        "maps": None,
        "image_pyramid": False,
        "result": str(tmp_path / "r.json"),
        "console": str(tmp_path / "console.txt"),
    }
    # In this one, memory that other tests have left would serve: the peak would not rise.
    assert study._do_one(task), (tmp_path / "console.txt").read_text()
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["settings"] == {"a": 1}
    assert 0 <= result["AP"] <= result["AP50"] <= 100 and list(result["sizes"]) == ["<16", "16-32", "32-64", ">=64"]
    recall = [result["recall"][f"AR@{limit}"]["all"] for limit in (100, 2000)]
    assert 0 <= recall[0] <= recall[1] < 100 and recall[1] > 0
    assert 11e6 < result["parameters"] < 14e6  # a ResNet-18 has 11.2 million
    assert 0.5e9 < result["macs"] < 3e9  # of an image of 128 x 128; its share is 0.59e9
    assert 10 < result["peak_memory_mb"] < 4000

    task = common | {"kind": "time", "reference_config": common["config"], "reference_opts": opts, "pairs": 3}
    found = study_run.compare_times(task)
    assert len(found["ratios"]) == 3 and found["quartiles"][0] <= found["median"] <= found["quartiles"][1]
    assert 0.1 < found["median"] < 10  # of the same model


def test_proposals_are_those_of_the_trained_variant(tmp_path):
    """Two real trainings of an iteration: one whose proposals are written, and one that has them for its RPN."""
    scenes = make_scenes(tmp_path / "scenes", seed=1, progress=False, **with_few_scenes(SCRATCH, 3, 2).scenes)
    opts = [*study._places(scenes, tmp_path / "out", 1), "SOLVER.MAX_ITER", "1", "SOLVER.WARMUP_ITERS", "0"]
    files = {name: str(tmp_path / f"{name}.pkl") for name in study.SETS}
    common = {
        "config": str(CONFIGS / "fpn.yaml"), "settings": {}, "edges": [16, 32, 64], "recall_at": [], "maps": None,
        "image_pyramid": False, "annotations": str(scenes / "annotations" / "instances_val.json"),
    }  # fmt: skip
    of_fpn = common | {"kind": "propose", "opts": opts, "proposals": files}
    of_fpn |= {"result": str(tmp_path / "fpn.json"), "console": str(tmp_path / "fpn.txt")}
    assert study._do_one(of_fpn), (tmp_path / "fpn.txt").read_text()
    counts = json.loads((tmp_path / "fpn.json").read_text())["proposals"]
    for (name, split), images in zip(study.SETS.items(), (3, 2), strict=True):
        found = pickle.loads(Path(files[name]).read_bytes())
        truth = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())["images"]
        assert sorted(found["ids"]) == sorted(image["id"] for image in truth) and len(found["boxes"]) == images
        assert counts[name] == np.mean([len(boxes) for boxes in found["boxes"]]) > 10
        for boxes, logits in zip(found["boxes"], found["objectness_logits"], strict=True):
            assert boxes.shape == (len(logits), 4) and boxes.min() >= 0 and 64 < boxes.max() <= 128
            assert (boxes[:, 2:] >= boxes[:, :2]).all() and (np.diff(logits) <= 0).all()
    fixed = study._with_proposals({"MODEL.RPN.POST_NMS_TOPK_TRAIN": 20, "MODEL.RPN.POST_NMS_TOPK_TEST": 7}, files)
    heads = common | {"kind": "train", "opts": [*opts, *fixed]}
    heads |= {"result": str(tmp_path / "heads.json"), "console": str(tmp_path / "heads.txt")}
    assert study._do_one(heads), (tmp_path / "heads.txt").read_text()
    console = (tmp_path / "heads.txt").read_text()
    for file in files.values():
        assert f"Loading proposals from: {file}" in console
    assert "rpn" not in console.partition("Starting training")[2]


def test_reading_images_is_not_timed(tmp_path, monkeypatch):
    drawn = []

    class Loader:
        def __iter__(self):
            for number in range(100):
                drawn.append(number)
                yield random_batch(get_cfg(), 1, (64, 64))

    during = []

    def seconds(trainer):
        before = len(drawn)
        next(trainer._trainer._data_loader_iter)
        during.append(len(drawn) - before)
        return 1.0

    monkeypatch.setattr(study_run.Trainer, "build_train_loader", lambda *_: Loader())
    monkeypatch.setattr(study_run, "_seconds_of_a_step", seconds)
    opts = ["OUTPUT_DIR", str(tmp_path), "DATASETS.COCO_FORMAT", "[]"]
    opts += ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.ROI_HEADS.NUM_CLASSES", "6"]
    config = str(CONFIGS / "fpn.yaml")
    task = {"config": config, "opts": opts, "reference_config": config, "reference_opts": opts, "pairs": 2}
    assert study_run.compare_times(task)["ratios"] == [1.0, 1.0]
    assert during == [0] * 8 and len(drawn) == 8
