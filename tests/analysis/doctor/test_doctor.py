"""What the doctor proposes, and what it says about runs."""

import json
import shlex

import numpy as np
import pytest

from fpn_d2 import cli
from fpn_d2.analysis.doctor.anchors import Anchors, best_ious, coverage, propose
from fpn_d2.analysis.doctor.config_advice import advise
from fpn_d2.analysis.doctor.examine import write_config
from fpn_d2.analysis.doctor.run_advice import explain_run
from fpn_d2.analysis.errors.detections import Objects, Scored
from fpn_d2.cli.doctor import EXAMPLE
from fpn_d2.engine import load_config
from fpn_d2.errors import UserError
from tests.engine.small import small_config
from tests.engine.small import write_config as write_small


def boxes(*sides, at=(32, 32)):
    return np.array([[at[0] - w / 2, at[1] - h / 2, at[0] + w / 2, at[1] + h / 2] for w, h in sides], float)


def test_iou_with_anchors_where_they_lie():
    anchors = Anchors((8, 16), ((16.0,), (32.0,)), (1.0,))
    best, level = best_ious(boxes((16, 16), (32, 32), (32, 16)), anchors)
    np.testing.assert_allclose(best, [1, 1, 0.5])
    assert level.tolist() == [0, 1, 0]  # of equals the finer
    moved, _ = best_ious(boxes((16, 16), at=(36, 32)), anchors)  # half a cell off
    np.testing.assert_allclose(moved, [12 / 20])
    shifted, _ = best_ious(boxes((16, 16), at=(36, 32)), anchors, offset=0.5)
    np.testing.assert_allclose(shifted, [12 / 20])  # off in the other direction now
    tall = Anchors((8,), ((16.0,),), (4.0,))
    np.testing.assert_allclose(best_ious(boxes((8, 32)), tall)[0], [1])


def test_proposed_anchors_cover_more_and_are_the_same_each_time():
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(10), np.log(60), 300))
    found = np.concatenate([boxes((s * 0.6, s / 0.6), at=rng.uniform(50, 400, 2)) for s in sides])
    anchors = Anchors((4, 8, 16, 32), ((32.0,), (64.0,), (128.0,), (256.0,)), (0.5, 1.0, 2.0))
    better = propose(found, anchors)
    assert sum(coverage(found, better)) > sum(coverage(found, anchors)) + 0.3
    assert better == propose(found, anchors) and len(better.sizes) == 4 and len(better.ratios) == 3
    assert propose(found[:0], anchors) == anchors


def data(images=50, side=40.0, per_image=2, label=lambda i: 0, names=("a",), size=400) -> Scored:
    count = images * per_image
    image = np.repeat(np.arange(images), per_image)
    corner = np.random.default_rng(0).uniform(0, size - side, (count, 2))
    box = np.concatenate([corner, corner + side], 1)
    labels = np.array([label(i) for i in range(count)])
    truth = Objects(image, labels, box, np.ones(count), np.zeros(count, bool))
    nothing = Objects(*(np.empty((0, 4) if name == "box" else 0) for name in ("i", "l", "box", "s", "c")))
    return Scored([str(i) for i in range(images)], np.full((images, 2), float(size)), list(names), truth, nothing)


@pytest.fixture
def cfg(tmp_path, scenes):
    """A configuration with which nothing is wrong for ``data()``."""
    cfg = small_config(tmp_path / "good", scenes, "MODEL.DEVICE", "cpu").clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (400,), 400
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 400, 400
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[40], [80], [160], [320], [640]]
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 100, 100
    cfg.MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE = 112
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER = 4, 0.005, 300
    return cfg


def keys(advice) -> dict:
    return {one.key: one.value for one in advice}


def test_nothing_is_proposed_where_nothing_is_wrong(cfg):
    sides = data()
    sides.truth.box[::2, 2:] = sides.truth.box[::2, :2] + 80  # so that objects are on two levels
    assert keys(advise(cfg, sides)) == {}


def test_each_finding(cfg):
    assert keys(advise(cfg, data(side=6.0)))["INPUT.MIN_SIZE_TRAIN"] is None  # to be known, not to be set
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (100,), 100
    assert keys(advise(cfg, data(side=24.0)))["INPUT.MIN_SIZE_TRAIN"] == [400]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (400,), 400
    assert "MODEL.ANCHOR_GENERATOR.SIZES" in keys(advise(cfg, data(side=9.0)))
    cfg.MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE = 1000
    assert 112 <= keys(advise(cfg, _two_sizes()))["MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE"] < 500
    full = keys(advise(cfg, data(per_image=120)))
    assert full["TEST.DETECTIONS_PER_IMAGE"] == 200 and full["MODEL.RPN.POST_NMS_TOPK_TRAIN"] == 1200
    rare = data(label=lambda i: int(i == 3), names=("a", "b", "c"))
    assert keys(advise(cfg, rare))["DATALOADER.SAMPLER_TRAIN"] == "RepeatFactorTrainingSampler"
    assert "c" in next(one.reason for one in advise(cfg, rare) if one.key == "DATASETS.TRAIN")
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 0.1, 20, (100,)
    found = keys(advise(cfg, data()))
    assert found["SOLVER.BASE_LR"] == 0.005 and found["SOLVER.MAX_ITER"] == 150 and found["SOLVER.STEPS"] == [13, 17]


def _two_sizes() -> Scored:
    both = data()
    both.truth.box[::2, 2:] = both.truth.box[::2, :2] + 150
    return both


def test_what_is_written_is_a_configuration_with_reasons(cfg, tmp_path, scenes):
    base = write_small(tmp_path / "base.yaml", scenes)
    cfg.MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE, cfg.SOLVER.BASE_LR = 1000, 0.1
    advice = advise(cfg, _two_sizes())
    path = tmp_path / "out" / "better.yaml"
    path.parent.mkdir()
    write_config(str(base), advice, str(path))
    read = load_config(str(path), [])
    for key, value in keys(advice).items():
        node = read
        for part in key.split("."):
            node = node[part]
        assert value is None or node == value, key
    assert path.read_text().count("#") == 2 * sum(one.value is not None for one in advice) > 0
    with pytest.raises(UserError, match="exists already"):
        write_config(str(base), advice, str(path))


def run_folder(tmp_path, losses=(), figures=(), rate=0.1, finished=True):
    records = [{"iteration": 20 * i, "total_loss": loss, "lr": rate} for i, loss in enumerate(losses)]
    records += [{"iteration": 100 * i, **one} for i, one in enumerate(figures)]
    (tmp_path / "metrics.json").write_text("\n".join(json.dumps(one) for one in records) + '\n{"half')
    if finished:
        (tmp_path / "model_final.pth").write_text("")
    return str(tmp_path)


FALLING = list(np.linspace(2, 1, 20)) + [1.0] * 20 + [0.9] * 20
GOOD = [{"bbox/AP": 30.0, "bbox/AP-a": 30.0}]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ({"losses": [2.0, 1.5, float("nan")], "figures": GOOD}, "became nan at iteration 40"),
        ({"losses": [2.0] * 10 + [1.0] * 10 + [9.0] * 10, "figures": GOOD}, "the loss grew from 1"),
        ({"losses": [2.0] * 10 + [1.0] * 40, "figures": GOOD}, "stopped falling"),
        ({"losses": list(np.linspace(2, 0.5, 40)), "figures": GOOD, "rate": 0.1}, "still falling"),
        ({"losses": FALLING}, "never evaluated"),
        ({"losses": FALLING, "figures": [{"bbox/AP": float("nan")}]}, "AP is nan"),
        ({"losses": FALLING, "figures": [{"bbox/AP": 0.0}]}, "AP is 0.00"),
        ({"losses": FALLING, "figures": [{"bbox/AP": 5.0, "bbox/AP-a": float("nan")}]}, "AP of a is nan"),
        ({"losses": FALLING, "figures": [{"bbox/AP": v} for v in (10, 20, 12)]}, "AP was 20.0 at iteration 100"),
        ({"losses": FALLING, "figures": GOOD, "finished": False}, "no model_final.pth"),
        ({"figures": GOOD}, "no record of a loss"),
    ],
)
def test_what_went_wrong_in_a_run(tmp_path, what, text):
    (found,) = explain_run(run_folder(tmp_path, **what))
    assert text in found


def test_a_good_run_and_no_run(tmp_path):
    assert explain_run(run_folder(tmp_path, FALLING, GOOD)) == []
    with pytest.raises(UserError, match="is no folder of a run"):
        explain_run(str(tmp_path / "nowhere"))


def test_the_example_in_help_runs(tmp_path, scenes, monkeypatch, capsys):
    (tmp_path / "my").mkdir()
    (tmp_path / "output" / "my").mkdir(parents=True)
    write_small(tmp_path / "my" / "config.yaml", scenes)
    run_folder(tmp_path / "output" / "my", FALLING, GOOD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert EXAMPLE in " ".join(capsys.readouterr().out.split())
    assert cli.main(shlex.split(EXAMPLE)[1:]) == 0
    out = capsys.readouterr().out
    assert "MODEL.ANCHOR_GENERATOR.SIZES" in out and "nothing wrong" in out and "Written: my/better.yaml" in out
    assert load_config("my/better.yaml", []).MODEL.ANCHOR_GENERATOR.SIZES[0][0] < 16
