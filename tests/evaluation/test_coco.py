"""faster-coco-eval against the official evaluation: the same numbers."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_tools

from fpn_d2.config import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.evaluation import evaluators
from fpn_d2.evaluation.coco import FastCOCOEvaluator, ReadableCOCOEvaluator
from tests.batches import random_boxes

pytest.importorskip("faster_coco_eval")
CLASSES = ["one", "two", "three"]
SIZE = (200, 240)


@pytest.fixture
def data(tmp_path):
    """A COCO-format set with crowds, empty images and category ids with gaps."""
    generator = torch.Generator().manual_seed(3)
    images, annotations = [], []
    for image in range(12):
        images.append({"id": 10 * image + 7, "file_name": f"{image}.jpg", "height": SIZE[0], "width": SIZE[1]})
        for n, (x0, y0, x1, y1) in enumerate(random_boxes(0 if image == 5 else 9, *SIZE, generator).tolist()):
            crowd = n == 8 and image % 2
            filled = np.zeros(SIZE, dtype=np.uint8)
            filled[int(y0) : int(y1), int(x0) : int(x1)] = 1
            rle = mask_tools.encode(np.asfortranarray(filled))
            points = [[x0 + 3 * k, y0 + 2 * k, 2] for k in range(17)]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": images[-1]["id"], "category_id": 5 * (n % 3) + 2}
                | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": float(filled.sum()), "iscrowd": int(crowd)}
                | {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
                | {"keypoints": sum(points, []), "num_keypoints": 17}
            )
    categories = [{"id": 5 * i + 2, "name": name} for i, name in enumerate(CLASSES)]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    name = f"fast_evaluation_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: load_coco_json(str(path), str(tmp_path), name))
    MetadataCatalog.get(name).set(json_file=str(path), image_root=str(tmp_path))
    DatasetCatalog.get(name)  # fills in the classes
    yield name, images, annotations
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def predictions(images, annotations, *, masks, keypoints):
    """Detections near the truth, with others among them and with scores that are equal now and then."""
    generator = torch.Generator().manual_seed(4)
    for image in images:
        own = [a for a in annotations if a["image_id"] == image["id"]]
        boxes = torch.tensor([[*a["bbox"][:2], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in own])
        boxes = torch.cat([boxes.reshape(-1, 4), random_boxes(130 if image is images[0] else 6, *SIZE, generator)])
        boxes += torch.randn(boxes.shape, generator=generator) * 3
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        found = Instances(SIZE)
        found.pred_boxes = Boxes(boxes)
        found.scores = (torch.rand(len(boxes), generator=generator) * 20).round() / 20
        classes = [(a["category_id"] - 2) // 5 for a in own]
        found.pred_classes = torch.tensor(classes + [1] * (len(boxes) - len(own)))
        if masks:
            filled = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(filled, boxes.clamp(min=0).long().tolist(), strict=True):
                mask[y0:y1, x0:x1] = True
            found.pred_masks = filled
        if keypoints:
            start = boxes[:, None, :2] + torch.arange(17)[:, None] * torch.tensor([3.0, 2.0])
            found.pred_keypoints = torch.cat([start, torch.ones(len(boxes), 17, 1)], dim=2)
        yield {"image_id": image["id"]}, {"instances": found}


def evaluate(cls, data, folder, img_ids=None, **options):
    name, images, annotations = data
    evaluator = cls(name, output_dir=str(folder), **options)
    evaluator.reset()
    for item, output in predictions(images, annotations, masks=True, keypoints=True):
        evaluator.process([item], [output])
    return evaluator.evaluate(img_ids=img_ids)


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for task, figures in expected.items():
        assert actual[task].keys() == figures.keys()
        for key, value in figures.items():
            # Means are added up in another order: the last bit of a float64 may differ.
            assert actual[task][key] == pytest.approx(value, rel=1e-12, nan_ok=True), (task, key)


def test_same_numbers_for_boxes_masks_and_keypoints(data, tmp_path, monkeypatch):
    expected = evaluate(COCOEvaluator, data, tmp_path / "official")
    monkeypatch.setattr(COCOEvaluator, "_eval_predictions", None)  # what it would fall back on
    actual = evaluate(FastCOCOEvaluator, data, tmp_path / "fast")
    assert list(expected) == ["bbox", "keypoints", "segm"]
    assert 5 < expected["bbox"]["AP"] < 95 and 5 < expected["segm"]["AP"] < 95
    assert_same(actual, expected)
    official, fast = (
        json.loads((tmp_path / n / "coco_instances_results.json").read_text()) for n in ("official", "fast")
    )
    assert official == fast


def test_same_numbers_on_some_images_and_with_other_sigmas(data, tmp_path):
    options = {"img_ids": [7, 27, 57], "kpt_oks_sigmas": tuple([0.05] * 17)}
    expected = evaluate(COCOEvaluator, data, tmp_path / "official", **options)
    assert_same(evaluate(FastCOCOEvaluator, data, tmp_path / "fast", **options), expected)
    assert expected["bbox"] != evaluate(COCOEvaluator, data, tmp_path / "all")["bbox"]


def test_another_limit_of_detections_gives_detectron2s_numbers(data, tmp_path, monkeypatch):
    expected = evaluate(COCOEvaluator, data, tmp_path / "official", max_dets_per_image=120)
    assert expected["bbox"] != evaluate(COCOEvaluator, data, tmp_path / "hundred")["bbox"]
    monkeypatch.setattr(COCOEvaluator, "_eval_predictions", None)  # what it would fall back on
    assert_same(evaluate(FastCOCOEvaluator, data, tmp_path / "fast", max_dets_per_image=120), expected)


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(("asked", "limit"), [(120, 120), (100, 100), (30, 100)])
def test_detections_per_image_above_100_reach_the_evaluator(data, tmp_path, monkeypatch, installed, asked, limit):
    monkeypatch.setattr(evaluators, "fast_evaluation_is_there", lambda: installed)
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.OUTPUT_DIR, cfg.TEST.DETECTIONS_PER_IMAGE = str(tmp_path), asked
    assert evaluators.build_evaluator(cfg, data[0])._max_dets_per_image == [1, 10, limit]


def test_no_predictions_at_all(data, tmp_path):
    results = []
    for cls in (COCOEvaluator, FastCOCOEvaluator):
        evaluator = cls(data[0], tasks=("bbox",), output_dir=str(tmp_path))
        evaluator.reset()
        evaluator.process([{"image_id": 7}], [{"instances": Instances(SIZE, pred_boxes=Boxes(torch.zeros(0, 4)))}])
        results.append(evaluator.evaluate())
    assert_same(*results)


def test_a_wrong_number_of_sigmas_is_told(data, tmp_path):
    with pytest.raises(UserError, match="predictions have 17 keypoints, the annotations 17.*SIGMAS 3"):
        evaluate(FastCOCOEvaluator, data, tmp_path, kpt_oks_sigmas=(0.1, 0.1, 0.1))


@pytest.mark.parametrize("installed", [True, False])
def test_sigmas_of_the_configuration_reach_the_figures(data, tmp_path, monkeypatch, installed):

    monkeypatch.setattr(evaluators, "fast_evaluation_is_there", lambda: installed)
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    figures = {}
    for sigmas in ([], [0.01] * 17):
        cfg.TEST.KEYPOINT_OKS_SIGMAS = sigmas
        evaluator = evaluators.build_evaluator(cfg, data[0], str(tmp_path))
        evaluator.reset()
        for item, output in predictions(*data[1:], masks=False, keypoints=True):
            evaluator.process([item], [output])
        figures[len(sigmas)] = evaluator.evaluate()["keypoints"]["AP"]
    expected = evaluate(COCOEvaluator, data, tmp_path / "official", kpt_oks_sigmas=tuple([0.01] * 17))
    assert figures[17] == pytest.approx(expected["keypoints"]["AP"], rel=1e-12)
    assert figures[17] < figures[0] - 1


def test_taken_where_it_is_installed(data, tmp_path, monkeypatch):

    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    assert type(evaluators.build_evaluator(cfg, data[0])) is FastCOCOEvaluator
    monkeypatch.setattr(evaluators, "fast_evaluation_is_there", lambda: False)
    assert type(evaluators.build_evaluator(cfg, data[0])) is ReadableCOCOEvaluator


@pytest.mark.parametrize("cls", [FastCOCOEvaluator, ReadableCOCOEvaluator])
@pytest.mark.parametrize("name", [lambda own: f"{own:06d}", lambda own: own + 2**63, lambda own: own - 2**70])
def test_image_ids_of_any_kind(data, tmp_path, cls, name):
    expected = evaluate(COCOEvaluator, data, tmp_path / "official")
    dataset, images, annotations = data
    metadata = MetadataCatalog.get(dataset)
    content = json.loads(open(metadata.json_file).read())
    for record in (*content["images"], *content["annotations"], *images, *annotations):
        key = "image_id" if "image_id" in record else "id"
        record[key] = name(record[key])
    (tmp_path / "named.json").write_text(json.dumps(content))
    MetadataCatalog.get("named").set(
        json_file=str(tmp_path / "named.json"),
        **{key: metadata.get(key) for key in ("thing_classes", "thing_dataset_id_to_contiguous_id")},
    )
    try:
        assert_same(evaluate(cls, ("named", images, annotations), tmp_path / "named"), expected)
        saved = json.loads((tmp_path / "named" / "coco_instances_results.json").read_text())
        assert saved[0]["image_id"] == images[0]["id"]  # the user's own
    finally:
        MetadataCatalog.remove("named")


@pytest.mark.parametrize("cls", [FastCOCOEvaluator, ReadableCOCOEvaluator])
def test_images_that_could_not_be_read_are_left_out_of_the_figures(data, tmp_path, cls, caplog):
    name, images, annotations = data
    evaluator = cls(name, output_dir=str(tmp_path / "some"))
    evaluator.reset()
    for number, (item, output) in enumerate(predictions(images, annotations, masks=True, keypoints=True)):
        evaluator.process([{**item, "unreadable": "why"} if number in (0, 3) else item], [output])
    kept = [image["id"] for number, image in enumerate(images) if number not in (0, 3)]
    assert_same(evaluator.evaluate(), evaluate(COCOEvaluator, data, tmp_path / "official", img_ids=kept))
    assert "2 images could not be read: the figures are of the other 10" in caplog.text


def test_a_faster_evaluation_is_named_where_it_is_missed(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fpn_d2.evaluation.coco._MANY", 5)
    evaluate(ReadableCOCOEvaluator, data, tmp_path)
    assert "faster-coco-eval gives" not in caplog.text
    monkeypatch.setattr("fpn_d2.evaluation.coco.fast_evaluation_is_there", lambda: False)
    evaluate(ReadableCOCOEvaluator, data, tmp_path)
    assert "objects take long to evaluate: pip install faster-coco-eval" in caplog.text
