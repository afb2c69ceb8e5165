"""The report on errors: groups, confusions, files, and the command."""

import json
import shlex

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg

from fpn_d2 import add_fpn_d2_config, cli
from fpn_d2.analysis.errors.report import report_errors, write_report
from fpn_d2.analysis.level_rule import Rule
from fpn_d2.cli.errors import EXAMPLE
from fpn_d2.errors import UserError
from fpn_d2.evaluation.coco_results import evaluate_predictions

BOXES = {"small": [10, 10, 20, 20], "medium": [40, 10, 50, 50], "large": [10, 70, 120, 120]}


@pytest.fixture
def files(tmp_path):
    """One image with an object of each size; the small one is missed, the medium one found as another class."""
    (tmp_path / "my" / "images").mkdir(parents=True)
    (tmp_path / "output" / "predictions").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "my/images/a.jpg"), np.full((200, 240, 3), 90, np.uint8))
    truth = {
        "images": [{"id": 5, "file_name": "a.jpg", "height": 200, "width": 240}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}],
        "annotations": [
            {"id": i, "image_id": 5, "category_id": 7, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, box in enumerate(BOXES.values(), start=1)
        ],
    }
    found = [
        {"image_id": 5, "category_id": 3, "bbox": BOXES["medium"], "score": 0.8},
        {"image_id": 5, "category_id": 7, "bbox": BOXES["large"], "score": 0.9},
        {"image_id": 5, "category_id": 7, "bbox": [200, 10, 30, 30], "score": 0.7},
    ]
    (tmp_path / "my/val.json").write_text(json.dumps(truth))
    (tmp_path / "output/predictions/predictions.json").write_text(json.dumps(found))
    return tmp_path


def paths(files):
    return str(files / "my/val.json"), str(files / "output/predictions/predictions.json")


def test_counts_groups_and_confusion(files):
    rule = Rule((2, 3, 4, 5), canonical_box_size=64, min_size=400, max_size=1000)  # twice as large as the image
    report = report_errors(*paths(files), rule=rule)
    assert report.counts == {**dict.fromkeys(report.counts, 0), "classification": 1, "background": 1, "missed": 1}
    assert {name: group["objects"] for name, group in report.groups.items()} == {
        **{"small": 1, "medium": 1, "large": 1},
        **{"p2": 0, "p3": 1, "p4": 1, "p5": 1},  # sides of 40, 100 and 240 pixels beside 64 for p4
    }
    assert [report.groups[name]["recall"] for name in ("p3", "p4", "p5")] == [0, 0, 100]
    assert report.groups["medium"]["counts"]["classification"] == 1 == report.groups["p4"]["counts"]["classification"]
    assert report.groups["small"]["counts"]["missed"] == 1
    assert report.scored.class_names == ["ant", "cat"]
    np.testing.assert_array_equal(report.confusion, [[0, 0, 0], [1, 1, 1], [0, 1, 0]])
    assert report_errors(*paths(files), min_score=0.85).confusion.tolist() == [[0, 0, 0], [0, 1, 2], [0, 0, 0]]


def test_ap_is_cocos(files):
    """COCO leaves out classes without objects; TIDE counts them as 0."""
    truth, found = paths(files)
    content = [one for one in json.loads(open(found).read()) if one["category_id"] == 7]
    open(found, "w").write(json.dumps(content))
    assert report_errors(truth, found).ap == pytest.approx(evaluate_predictions(truth, found)["AP50"])


def test_the_rule_is_that_of_the_configuration():
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE = 112
    rule = Rule.of(cfg)
    assert rule == Rule((2, 3, 4, 5), 112, 4, 800, 1333)
    assert rule.other(canonical_level=5).canonical_level == 5 and rule.other() == rule
    np.testing.assert_allclose(rule.scales(np.array([[400.0, 500], [400, 1333], [1600, 800]])), [2, 1, 1333 / 1600])
    with pytest.raises(UserError, match="canonical box size is 0"):
        rule.other(0)
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    with pytest.raises(UserError, match="no pyramid"):
        Rule.of(cfg)


def test_the_worst_image_shows_what_is_wrong(files):
    report = report_errors(*paths(files))
    written = write_report(report, str(files / "out"), str(files / "my/images"))
    assert [path.rsplit("/", 1)[1] for path in written] == ["errors.json", "errors.md", "errors.png", "worst.jpg"]
    picture = cv2.imread(written[-1])
    assert picture.shape == (420, 420, 3)
    scale = 420 / 240
    x, y, width, height = BOXES["small"]
    assert picture[round((y + height) * scale), round((x + width / 2) * scale)].min() > 150  # white: missed
    x, y, width, height = BOXES["large"]
    assert picture[round((y + height / 2) * scale), round(x * scale)].max() < 120  # found: nothing is drawn
    figures = json.loads((files / "out/errors.json").read_text())
    assert figures["counts"]["missed"] == 1 and figures["classes"] == ["ant", "cat"]


def test_the_example_in_help_runs(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit):
        cli.main(["errors", "--help"])
    assert EXAMPLE in " ".join(capsys.readouterr().out.split())
    assert cli.main(shlex.split(EXAMPLE)[1:]) == 0
    out = capsys.readouterr().out
    assert "| missed |" in out and "output/errors/worst.jpg" in out


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda found: found[0].update(image_id=9), "image_id 9, which is not among those"),
        (lambda found: found[0].update(category_id=9), "category_id 9"),
        (lambda found: found[0].pop("bbox"), "holds no COCO results: 'bbox'"),
    ],
)
def test_what_does_not_fit_is_said(files, change, text):
    truth, path = paths(files)
    found = json.loads(open(path).read())
    change(found)
    open(path, "w").write(json.dumps(found))
    with pytest.raises(UserError, match=text):
        report_errors(truth, path)
    with pytest.raises(UserError, match="did you mean predictions.json"):
        report_errors(truth, path + "x")
