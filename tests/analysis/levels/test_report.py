"""Levels of objects, proposals and detections, and what is shown of them."""

import json
import shlex
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

import fpn_d2
from fpn_d2 import cli
from fpn_d2.analysis.errors.detections import Objects, Scored, take
from fpn_d2.analysis.errors.tide import overlaps
from fpn_d2.analysis.level_rule import Rule
from fpn_d2.analysis.levels.collect import collect
from fpn_d2.analysis.levels.pictures import draw_levels, draw_maps
from fpn_d2.analysis.levels.report import group_ap, report_levels
from fpn_d2.checkpoint.contents import contents
from fpn_d2.cli.levels import EXAMPLE
from fpn_d2.data import register_from_config
from fpn_d2.engine import ReportingCheckpointer
from fpn_d2.errors import UserError
from fpn_d2.evaluation.coco_results import evaluate_predictions
from fpn_d2.modeling import ROI_RULE_REGISTRY
from tests.analysis.errors.test_tide import random_data, scored
from tests.engine.small import TEST, small_config


def test_rows_and_other_rules():
    """Sides of 10, 20, 40 and 80 pixels, shown twice as large."""
    truth = [(0, 0, 0, 0, side, side) for side in (10, 20, 40, 80)]
    found = [(0, 0, 0, 0, 40, 40, 0.9), (0, 0, 0, 0, 78, 80, 0.8), (0, 0, 90, 90, 100, 100, 0.7)]
    data = scored(truth, found)
    rule = Rule((2, 3, 4), canonical_box_size=64, canonical_level=4, min_size=200, max_size=400)
    proposals = take(data.found, np.arange(2))
    report = report_levels(data, rule, proposals, others=(rule.other(1000, 4),))
    assert [report.rows[name]["objects"] for name in ("p2", "p3", "p4")] == [1, 1, 2]
    assert [report.rows[name]["cells"] for name in ("p2", "p3", "p4")] == [5, 5, 7.5]
    assert [report.rows[name]["proposals"] for name in ("p2", "p3", "p4")] == [0, 0, 2]
    assert [report.rows[name]["detections"] for name in ("p2", "p3", "p4")] == [1, 0, 2]
    assert [report.rows[name]["recall"] for name in ("p2", "p3", "p4")] == [0, 0, 100]
    assert [report.rows[name]["proposal_recall"] for name in ("p2", "p3", "p4")] == [0, 0, 100]
    assert report.rows["p4"]["AP"] == pytest.approx(100) and report.rows["p2"]["AP"] == 0
    assert report.others == {
        **{"64, 4": [0.25, 0.25, 0.5], "32, 4": [0.0, 0.25, 0.75], "128, 4": [0.5, 0.25, 0.25]},
        "1000, 4": [1.0, 0.0, 0.0],
    }
    assert np.isnan(report.rows["large"]["AP"]) and "| p4 | 2 | 7.5 |" in report.table()


class LongerSide:
    """A user's rule that looks at more than the area."""

    def __init__(self, levels):
        self.levels = levels

    @classmethod
    def from_config(cls, cfg, levels, channels):
        return {"levels": levels}

    def __call__(self, box_lists):
        longer = torch.cat([(boxes.tensor[:, 2:] - boxes.tensor[:, :2]).amax(1) for boxes in box_lists])
        return (longer >= 100).long()


def test_rules_that_are_not_the_canonical_one(tmp_path, scenes, monkeypatch):
    monkeypatch.setitem(ROI_RULE_REGISTRY._obj_map, "longer", LongerSide)
    cfg = small_config(tmp_path, scenes)
    data = scored([(0, 0, 0, 0, 10, 60), (0, 0, 0, 0, 40, 40)], [])
    scales = np.full(2, 2.0)
    canonical, finest, longer = Rule.of(cfg), Rule.of(cfg, "finest"), Rule.of(cfg, "longer")
    np.testing.assert_array_equal(longer.assign(data.truth.box, scales), [3, 2])
    np.testing.assert_array_equal(finest.assign(data.truth.box, 100 * scales), [2, 2])
    np.testing.assert_array_equal(canonical.assign(data.truth.box, 100 * scales), [5, 5])
    assert longer.other(112) == canonical.other(112) and longer.words() == "longer"
    assert Rule.of(cfg, "soft") == replace(canonical, name="soft")  # pooled from two levels: by its canonical one
    with pytest.raises(UserError, match="fines.*did you mean finest"):
        Rule.of(cfg, "fines")
    changed = small_config(tmp_path / "b", scenes, "MODEL.ROI_LEVEL_ASSIGN.NAME", "finest")
    assert report_levels(data, Rule.of(changed), with_model=False).rows["p2"]["objects"] == 2


def coco_rows(rows: Objects) -> list[dict]:
    return [
        {
            "id": i + 1,
            "image_id": int(rows.image[i]),
            "category_id": int(rows.label[i]) + 1,
            "bbox": [*rows.box[i, :2], *(rows.box[i, 2:] - rows.box[i, :2])],
            "area": float(rows.area[i]),
            "iscrowd": 0,
            "score": float(rows.score[i]),
        }
        for i in range(len(rows))
    ]


def test_ap_of_all_objects_is_cocos_ap(tmp_path):
    data = random_data(5)
    data = Scored(data.files, data.sizes, data.class_names, take(data.truth, ~data.truth.crowd), data.found)
    images = [{"id": i, "file_name": name, "height": 100, "width": 100} for i, name in enumerate(data.files)]
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    truth = {"images": images, "categories": categories, "annotations": coco_rows(data.truth)}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(coco_rows(data.found)))
    coco = evaluate_predictions(str(tmp_path / "truth.json"), str(tmp_path / "found.json"))
    ap, _ = group_ap(data, overlaps(data, 0.5), lambda o: np.ones(len(o), bool))
    assert ap == pytest.approx(coco["AP"], abs=1e-6) and ap > 1
    small, _ = group_ap(data, overlaps(data, 0.5), lambda o: o.area < 32**2)
    # COCO lets a detection take an object of the group before a nearer one of another.
    assert small == pytest.approx(coco["APs"], abs=1.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes):
    """Folder with a checkpoint of a small detector with random weights."""
    folder = tmp_path_factory.mktemp("levels")
    cfg = small_config(folder / "cfg", scenes, "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    register_from_config(cfg)
    (folder / "output" / "my").mkdir(parents=True)
    checkpointer = ReportingCheckpointer(build_model(cfg), str(folder / "output" / "my"), about=contents(cfg))
    checkpointer.save("model_best")
    (folder / "my").mkdir()
    (folder / "my" / "images").symlink_to(scenes / "images" / "val")
    (folder / "my" / "val.json").symlink_to(scenes / "annotations" / "instances_val.json")
    assert MetadataCatalog.get(TEST).thing_classes
    return folder


def test_proposals_and_detections_are_in_pixels_of_the_images(trained):
    path = trained / "output/my/model_best.pth"
    predictor = fpn_d2.load(path, device="cpu", opts=["INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "96"])
    data, proposals = collect(predictor, str(trained / "my/val.json"), str(trained / "my/images"), progress=False)
    assert len(data.files) == 3 and len(proposals) > 0 and len(data.found) > 0
    assert proposals.box.min() >= 0 and 40 < proposals.box.max() <= 64.001
    first = predictor(trained / "my/images" / data.files[0])
    mine = data.found.box[data.found.image == 0]
    np.testing.assert_allclose(mine, first.pred_boxes.tensor.numpy(), atol=0.02)
    assert not predictor.model.proposal_generator._forward_hooks
    some, _ = collect(predictor, str(trained / "my/val.json"), str(trained / "my/images"), most=2, progress=False)
    assert some.files == [data.files[0], data.files[2]]
    np.testing.assert_array_equal(some.found.box[some.found.image == 1], data.found.box[data.found.image == 2])
    np.testing.assert_array_equal(some.truth.box[some.truth.image == 1], data.truth.box[data.truth.image == 2])


def test_pictures(trained):
    predictor = fpn_d2.load(trained / "output/my/model_best.pth", device="cpu")
    paths = sorted(str(path) for path in (trained / "my/images").iterdir())[:2]
    plain = draw_levels(predictor, Rule.of(predictor.cfg), paths, min_score=2.0)
    drawn = draw_levels(predictor, Rule.of(predictor.cfg), paths, min_score=0.0)
    assert plain.shape == drawn.shape == (360, 728, 3) and (plain != drawn).any()
    maps = draw_maps(predictor, paths[0])
    assert maps.shape == (384, 6 * 364, 3)  # the image and p2 to p6
    assert not predictor.model.backbone._forward_hooks


def test_the_example_in_help_runs(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    with pytest.raises(SystemExit):
        cli.main(["levels", "--help"])
    assert EXAMPLE in " ".join(capsys.readouterr().out.split())
    assert cli.main(shlex.split(EXAMPLE)[1:]) == 0
    assert "proposal recall" in capsys.readouterr().out
    for name in ("levels.png", "detections.jpg", "maps.jpg"):
        assert cv2.imread(f"output/levels/{name}").size
    boxes_alone = "levels cfg/config.yaml my/val.json --output output/boxes --canonical-box-size 30 --other-rule finest"
    assert cli.main(shlex.split(boxes_alone)) == 0
    out = capsys.readouterr().out
    assert "| 30, 4 |" in out and "| finest | 100 | 0 | 0 | 0 |" in out and "proposals" not in out
