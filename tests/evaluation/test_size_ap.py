"""AP by size: against Detectron2's evaluator where both have the same ranges, and on cases that show each range."""

import json
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_d2.analysis import ap_by_size
from fpn_d2.errors import UserError
from fpn_d2.evaluation.size_ap import range_names


def write(folder, boxes, detections):
    """``boxes``: (image, class, x, y, w, h); ``detections``: the same with a score behind."""
    images = sorted({box[0] for box in boxes} | {found[0] for found in detections})
    truth = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 400, "width": 400} for i in images],
        "categories": [{"id": c, "name": str(c)} for c in sorted({box[1] for box in boxes})],
        "annotations": [
            # The area of the mask is half that of the box.
            {"id": i, "image_id": b[0], "category_id": b[1], "bbox": b[2:], "area": b[4] * b[5] / 2, "iscrowd": 0}
            for i, b in enumerate(map(list, boxes), start=1)
        ],
    }
    found = [{"image_id": d[0], "category_id": d[1], "bbox": list(d[2:6]), "score": d[6]} for d in detections]
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(found))
    return folder / "truth.json", folder / "found.json"


def test_each_object_counts_in_the_range_of_its_box(tmp_path):
    boxes = [(1, 1, 0, 0, 15, 15), (1, 1, 100, 0, 16, 16), (1, 1, 200, 0, 20, 45), (1, 1, 0, 200, 150, 100)]
    # Found: the second, whose area lies on the edge, and the last.
    found = ap_by_size(*write(tmp_path, boxes, [(*boxes[1], 0.9), (*boxes[3], 0.8)]), edges=(16, 32, 64))
    # sqrt(20 * 45) = 30: two objects of 16-32, of which one is found: recall up to 0.5, at 51 of 101 recall points.
    assert found["sizes"]["16-32"] == pytest.approx(100 * 51 / 101)
    assert found["sizes"]["<16"] == 0.0  # the one that is found lies on the edge and does not count here
    assert found["sizes"][">=64"] == pytest.approx(100.0)
    assert math.isnan(found["sizes"]["32-64"])
    assert found["AP50"] == found["AP"] == pytest.approx(100 * 51 / 101)


def test_localisation_shows_in_ap_only(tmp_path):
    box = (1, 1, 0, 0, 100, 100)
    found = ap_by_size(*write(tmp_path, [box], [(1, 1, 0, 0, 100, 72, 0.9)]), edges=(50,))
    assert found["AP50"] == pytest.approx(100.0)
    assert found["AP"] == pytest.approx(50.0)  # IoU 0.72: five of the ten thresholds from 0.5 to 0.95


def test_no_detections(tmp_path):
    found = ap_by_size(*write(tmp_path, [(1, 1, 0, 0, 20, 20)], []), edges=(16, 32))
    assert found["AP"] == found["AP50"] == found["sizes"]["16-32"] == 0.0
    assert math.isnan(found["sizes"]["<16"])


def test_equals_cocoeval_with_its_own_ranges(tmp_path):
    rng = np.random.default_rng(0)
    boxes, detections = [], []
    for _ in range(120):
        side = np.exp(rng.uniform(np.log(8), np.log(200), 2))
        box = (int(rng.integers(1, 9)), int(rng.integers(1, 4)), *rng.uniform(0, 200, 2), *side)
        boxes.append(tuple(float(x) if i > 1 else x for i, x in enumerate(box)))
        if rng.random() < 0.8:
            moved = np.array(box[2:]) + rng.normal(0, 0.1, 4) * np.tile(side, 2)
            detections.append((*box[:2], *map(float, moved), float(rng.random())))
    truth, found = write(tmp_path, boxes, detections)
    ours = ap_by_size(truth, found, edges=(32, 96))

    theirs = COCO(str(truth))
    for annotation in theirs.dataset["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    evaluation = COCOeval(theirs, theirs.loadRes(str(found)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    expected = 100 * evaluation.stats
    assert [ours["AP"], ours["AP50"]] == pytest.approx([expected[0], expected[1]])
    assert list(ours["sizes"].values()) == pytest.approx(expected[3:6].tolist())
    assert 5 < ours["sizes"]["32-96"] < 95


def test_names_and_mistakes(tmp_path):
    assert range_names((16, 32.5)) == ["<16", "16-32.5", ">=32.5"]
    assert range_names((8,)) == ["<8", ">=8"]
    for edges in ((), (0, 3), (32, 16), (16, 16)):
        with pytest.raises(UserError, match="ascending"):
            ap_by_size("a", "b", edges)
