"""Average recall of proposals: by hand, and beside Detectron2's own."""

import math

import numpy as np
import pytest
import torch
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

from fpn_d2.evaluation.proposal_recall import average_recall


def boxes(rng, n, size=300.0):
    sides = np.exp(rng.uniform(math.log(8), math.log(250), (n, 2)))
    start = rng.uniform(0, size, (n, 2))
    return torch.tensor(np.concatenate([start, start + sides], axis=1), dtype=torch.float32)


def near(rng, objects, n):
    """Proposals, some of which lie near an object, in random order."""
    moved = objects[rng.integers(0, len(objects), n)] + torch.tensor(rng.normal(0, 6, (n, 4)), dtype=torch.float32)
    moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
    return moved


def test_by_hand():
    objects = torch.tensor([[0.0, 0, 10, 10], [100.0, 100, 200, 200]])
    # IoU 1 with the first object, but only the second best proposal; IoU 0.6 with the other.
    proposals = torch.tensor([[100.0, 100, 160, 200], [0.0, 0, 10, 10]])
    found = average_recall([proposals], [objects], [1, 2], [50])
    at_one, at_two = found["AR@1"], found["AR@2"]
    third = 100 * 3 / 10  # IoU 0.5, 0.55, 0.6 of the ten thresholds
    assert at_one["all"] == pytest.approx(third / 2) and at_two["all"] == pytest.approx((100 + third) / 2)
    assert at_one["<50"] == 0 and at_two["<50"] == pytest.approx(100) and at_two[">=50"] == pytest.approx(third)


def test_one_proposal_serves_one_object():
    objects = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 10]])
    assert average_recall([objects[:1]], [objects], [10], [50])["AR@10"]["all"] == pytest.approx(50)


def test_nothing_to_find_and_nothing_found():
    none = torch.zeros(0, 4)
    found = average_recall([none, none], [none, torch.tensor([[0.0, 0, 5, 5]])], [10], [50])["AR@10"]
    assert found["all"] == 0 and math.isnan(found[">=50"])


def test_beside_that_of_detectron2(tmp_path):
    """Detectron2's ranges go by the annotations' areas and include both ends; no box is on an edge here."""
    rng = np.random.default_rng(3)
    truth = [boxes(rng, int(rng.integers(1, 9))) for _ in range(12)]
    proposals = [near(rng, one, 40) for one in truth]
    annotations, predictions = [], []
    for image, (objects, found) in enumerate(zip(truth, proposals, strict=True), start=1):
        for x1, y1, x2, y2 in objects.tolist():
            box = [x1, y1, x2 - x1, y2 - y1]
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": 1, "iscrowd": 0}
            annotations.append(row | {"bbox": box, "area": box[2] * box[3]})
        one = Instances((600, 600), proposal_boxes=Boxes(found), objectness_logits=-torch.arange(40.0))
        predictions.append({"image_id": image, "proposals": one})
    api = COCO()
    api.dataset = {
        "images": [{"id": image} for image in range(1, 13)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}],
    }
    api.createIndex()
    found = average_recall(proposals, truth, [5, 40], [32, 96])
    for limit in (5, 40):
        for area, name in (("all", "all"), ("small", "<32"), ("medium", "32-96"), ("large", ">=96")):
            theirs = 100 * float(_evaluate_box_proposals(predictions, api, area=area, limit=limit)["ar"])
            assert found[f"AR@{limit}"][name] == pytest.approx(theirs, abs=1e-3), (limit, name)
