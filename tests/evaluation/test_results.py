"""The final table and its one number."""

import math

import pytest

from fpn_d2.engine import load_config, results_table
from fpn_d2.evaluation.results import headline

COCO = {"AP": 40.04, "AP50": 60.06, "AP75": 41.0, "APs": 10.0, "APm": 20.0, "APl": 30.0}
COCO |= {"AP-cat": 33.3, "AP-hot-dog": 5}


def _cfg(*names):
    cfg = load_config()
    cfg.DATASETS.TEST = names
    return cfg


def _rows(table):
    return [line.split() for line in table.splitlines()]


def test_one_data_set():
    rows = _rows(results_table(_cfg("val"), {"bbox": COCO}))
    assert rows[0] == ["val,", "bbox"]
    assert rows[1] == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert rows[3] == ["40.0", "60.1", "41.0", "10.0", "20.0", "30.0"]
    assert ["cat", "33.3"] in rows
    assert ["hot-dog", "5.0"] in rows
    assert headline(_cfg("val"), {"bbox": COCO, "segm": {"AP50": 2.0}}) == "AP50 60.1"


def test_several_data_sets_and_tasks_with_augmentation():
    cfg = _cfg("a", "b")
    results = {"a": {"bbox": COCO, "segm": COCO}, "b": {"bbox": {"AP50": 1.0}}, "a_TTA": {"bbox": {"AP50": 2.0}}}
    table = results_table(cfg, results)
    titles = [line for line in table.splitlines() if ", " in line]
    assert titles == ["a, bbox", "a, segm", "a, bbox_TTA", "b, bbox"]
    assert headline(cfg, results) == "AP50 60.1"


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ({"box_proposals": {"AR@100": 3.0, "AR@1000": 57.26}}, "box_proposals AR@1000 57.3"),
        ({"sem_seg": {"mIoU": 40.0, "fwIoU": 60.0}}, "sem_seg mIoU 40.0"),
        ({"sem_seg": {"mIoU": 40.0}, "panoptic_seg": {"PQ": 41.0}, "segm": {"AP50": 2.0}}, "segm AP50 2.0"),
        ({"sem_seg": {"mIoU": 40.0}, "panoptic_seg": {"PQ": 41.0}}, "panoptic_seg PQ 41.0"),
        ({"mine": {"F1": 12.34}}, "mine F1 12.3"),
    ],
)
def test_a_task_without_boxes_has_a_figure_of_its_own(results, line):
    assert headline(_cfg("val"), results) == line


def test_nothing_measured():
    assert headline(_cfg("val"), {"bbox": {"AP": math.nan, "AP50": math.nan}}) == "AP50 nan"
    assert headline(_cfg("val"), {}) == headline(_cfg(), {}) == "nothing was measured"
    assert results_table(_cfg("val"), {}) == ""
    assert "nan" in results_table(_cfg("val"), {"bbox": {"AP": math.nan}})
