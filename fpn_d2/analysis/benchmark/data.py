"""Benchmarks of what stands before and behind the detector: reading images, and COCO's figures."""

import contextlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.structures import Boxes, BoxMode, Instances

from fpn_d2.data import textures
from fpn_d2.data.fast_transforms import enlarges_to_the_bit
from fpn_d2.data.mapper import TrainingMapper
from fpn_d2.evaluation.coco import FastCOCOEvaluator, fast_evaluation_is_there

from ..measure.timing import stopwatch
from ..subjects import read_config
from .detector import CONFIG
from .line import Check, Ours, Timing, line, show_checks, time_in_turn, time_lines

_JPEG_QUALITY = 90
_OBJECTS = 7  # of an image, as in COCO
_GREY_LEVELS, _PLACE = 1, 1e-3  # by which the fast way may differ: pixels where OpenCV enlarges, and boxes in pixels
_SAME_FIGURE = 1e-9  # the order in which percentages are added up shows in the last bit of a float64
_SIZE = (480, 640)


def loading(
    timing: Timing,
    *,
    images: int = 16,
    size: tuple[int, int] = _SIZE,
    short_side: int = 800,
    config: str = CONFIG,
    opts: Sequence[str] = (),
) -> list[dict]:
    """Training images from the file to the tensor, with resizing, random flip and boxes: processor time of one thread.

    Args:
        timing: how often.
        images: read in one call.
        size: (height, width) of the files in pixels.
        short_side: to which they are resized.
        config: whose INPUT keys hold.
        opts: KEY value pairs on top of it.
    """
    opts = [*opts, "INPUT.MIN_SIZE_TRAIN", f"({short_side},)"]
    cfgs = {name: read_config(config, [*opts, "MODEL.NUMERICS", name], "cpu")[1] for name in ("fast", "exact")}
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        records = _photographs(Path(folder), images, size)
        stock = DatasetMapper(cfgs["exact"], True)
        ours: dict[str, Ours | str] = {}
        for name, cfg in cfgs.items():
            mapper = TrainingMapper(cfg, True)
            theirs, mine = list(_mapped(stock, records)), list(_mapped(mapper, records))
            exact = name == "exact"
            levels = 0 if exact or enlarges_to_the_bit() else _GREY_LEVELS
            checks = _loading_checks(theirs, mine, levels, place=0 if exact else _PLACE)
            ours[f"MODEL.NUMERICS {name}"] = Ours(_mapping(mapper, records), checks)
        kilobytes = sum(Path(record["file_name"]).stat().st_size for record in records) / images / 1000
        lines = time_lines(_mapping(stock, records), ours, timing, stopwatch(time.process_time))
    return [{**one, "note": f"{images} images of {kilobytes:.0f} kB in a call"} for one in lines]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker of the data loader."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def _photographs(folder: Path, number: int, size: tuple[int, int]) -> list[dict]:
    """Files with detail at all scales and noise, as photographs have, and their records with boxes."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(number):
        pixels = textures.background(rng, *size) + 6 * rng.standard_normal((*size, 3), dtype=np.float32)
        path = folder / f"{index}.jpg"
        cv2.imwrite(str(path), np.clip(pixels, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        objects = [
            {"bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
            for box in _boxes(rng, _OBJECTS, size)
        ]
        records.append({"file_name": str(path), "height": size[0], "width": size[1], "image_id": index})
        records[-1]["annotations"] = objects
    return records


def _boxes(rng: np.random.Generator, number: int, size: tuple[int, int]) -> np.ndarray:
    """(number, 4) boxes within the image, their sides 8 px to half of its, in equal steps of the logarithm."""
    extent = np.array(size[::-1], dtype=np.float64)
    sides = 8 * (extent / 16) ** rng.uniform(size=(number, 1))
    start = rng.uniform(size=(number, 2)) * (extent - sides)
    return np.concatenate([start, start + sides], axis=1)


def _mapping(mapper: Callable[[dict], dict], records: list[dict]) -> Callable[[], None]:
    def call() -> None:
        for _ in _mapped(mapper, records):  # handed on one by one, as a worker does
            pass

    return call


def _mapped(mapper: Callable[[dict], dict], records: list[dict]) -> Iterator[dict]:
    np.random.seed(0)  # the same images are flipped
    random.seed(0)
    torch.manual_seed(0)
    return map(mapper, records)


def _loading_checks(theirs: list[dict], ours: list[dict], levels: int, place: float) -> list[Check]:
    pixels, corners = 0.0, 0.0
    for a, b in zip(theirs, ours, strict=True):
        boxes = [one["instances"].gt_boxes.tensor for one in (a, b)]
        if a["image"].shape != b["image"].shape or boxes[0].shape != boxes[1].shape:
            raise ValueError(f"images of {tuple(a['image'].shape)} and {tuple(b['image'].shape)}, or other boxes")
        pixels = max(pixels, float((a["image"].int() - b["image"].int()).abs().max()))
        corners = max(corners, float((boxes[0] - boxes[1]).abs().max()) if len(boxes[0]) else 0.0)
    return [
        Check("images", pixels, levels, "grey level", pixels <= levels),
        Check("boxes", corners, place, "px", corners <= place),
    ]


def evaluation(timing: Timing, *, images: int = 1000, classes: int = 80, detections: int = 100) -> list[dict]:
    """COCO's figures of boxes from detections that are there: pycocotools, Detectron2's compiled way, ours.

    Args:
        timing: how often.
        images: in the data set.
        classes: in the data set.
        detections: of each image.
    """
    if not fast_evaluation_is_there():
        why = "faster-coco-eval is not installed (pip install faster-coco-eval)"
        return [{"ours": "faster-coco-eval", "against": "pycocotools", "not_measured": why}]
    with tempfile.TemporaryDirectory() as folder, _data_set(Path(folder), images, classes) as (name, truth):
        found = _detections(truth, classes, detections)
        common = {"dataset_name": name, "tasks": ("bbox",), "distributed": False}
        evaluators = {
            "faster-coco-eval": FastCOCOEvaluator(**common),
            "pycocotools": COCOEvaluator(**common, use_fast_impl=False),
        }
        # Without the extension COCOEvaluator takes pycocotools, whatever it is told.
        compiled = coco_evaluation.COCOeval_opt is not coco_evaluation.COCOeval
        if compiled:
            evaluators["Detectron2's extension"] = COCOEvaluator(**common, use_fast_impl=True)
        return _time_evaluators(evaluators, found, timing, compiled)


def _time_evaluators(evaluators: dict, found: list[tuple[dict, dict]], timing: Timing, compiled: bool) -> list[dict]:
    own, official, *_ = evaluators
    figures = {name: _evaluate(evaluator, found)[1] for name, evaluator in evaluators.items()}
    check = _same_figures(figures[official], figures[own])
    if not check.within:
        raise ValueError(f"{own} and {official} give other figures: {show_checks([check])}")
    calls = {name: lambda evaluator=evaluator: _evaluate(evaluator, found)[0] for name, evaluator in evaluators.items()}
    # Each call says itself how long it took: handing the detections over is none of it.
    samples = time_in_turn(calls, timing, measure=lambda call: call())
    note = f"{len(found)} images, {sum(len(output['instances']) for _, output in found)} detections"
    lines = [line(own, samples[name], samples[own], "s", [check], note, name) for name in evaluators if name != own]
    if not compiled:
        why = "this Detectron2 was built without its compiled evaluation"
        lines.append({"ours": own, "against": "Detectron2's extension", "not_measured": why})
    return lines


def _evaluate(evaluator: COCOEvaluator, found: list[tuple[dict, dict]]) -> tuple[float, dict[str, float]]:
    """Seconds of one evaluation, and its figures."""
    evaluator.reset()
    evaluator.process(*zip(*found, strict=True))
    start = time.perf_counter()
    figures = evaluator.evaluate()["bbox"]
    return time.perf_counter() - start, figures


def _same_figures(theirs: dict[str, float], ours: dict[str, float]) -> Check:
    """A class without objects has NaN in both."""
    if theirs.keys() != ours.keys():
        return Check("figures", None, _SAME_FIGURE, "points", False)
    numbers = [np.array(list(figures.values())) for figures in (theirs, {name: ours[name] for name in theirs})]
    same_gaps = np.array_equal(*map(np.isnan, numbers))
    difference = float(np.nan_to_num(np.abs(numbers[0] - numbers[1])).max(initial=0.0))
    return Check("figures", difference, _SAME_FIGURE, "points", same_gaps and difference <= _SAME_FIGURE)


@contextlib.contextmanager
def _data_set(folder: Path, images: int, classes: int) -> Iterator[tuple[str, dict]]:
    """A registered data set in COCO's format, with objects at random; its name, and what is in its file."""
    rng = np.random.default_rng(0)
    truth: dict = {
        "images": [
            {"id": n + 1, "file_name": f"{n}.jpg", "height": _SIZE[0], "width": _SIZE[1]} for n in range(images)
        ],
        "categories": [{"id": n + 1, "name": f"class {n}"} for n in range(classes)],
        "annotations": [],
    }
    for image in truth["images"]:
        for x0, y0, x1, y1 in _boxes(rng, int(rng.integers(0, 2 * _OBJECTS + 1)), _SIZE).tolist():
            one = {"id": len(truth["annotations"]) + 1, "image_id": image["id"], "iscrowd": int(rng.random() < 0.01)}
            one |= {"category_id": int(rng.integers(classes)) + 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            truth["annotations"].append(one | {"area": (x1 - x0) * (y1 - y0)})
    path = folder / "instances.json"
    path.write_text(json.dumps(truth))
    name = f"benchmark {folder.name}"
    DatasetCatalog.register(name, lambda: load_coco_json(str(path), str(folder), name))
    MetadataCatalog.get(name).set(json_file=str(path), image_root=str(folder), evaluator_type="coco")
    try:
        DatasetCatalog.get(name)  # fills in the classes
        yield name, truth
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _detections(truth: dict, classes: int, number: int) -> list[tuple[dict, dict]]:
    """For each image ``number`` boxes: those of its objects, a little off, and others with lower scores."""
    rng = np.random.default_rng(1)
    of_image: dict[int, list[dict]] = {image["id"]: [] for image in truth["images"]}
    for one in truth["annotations"]:
        of_image[one["image_id"]].append(one)
    found = []
    for image, objects in of_image.items():
        objects = objects[:number]
        near = np.array([one["bbox"] for one in objects]).reshape(-1, 4)
        near[:, 2:] += near[:, :2]
        near += rng.normal(size=near.shape) * 0.05 * (near[:, [2, 3, 2, 3]] - near[:, [0, 1, 0, 1]])
        boxes = np.concatenate([near, _boxes(rng, number - len(near), _SIZE)])
        labels = [one["category_id"] - 1 for one in objects]
        instances = Instances(_SIZE, pred_boxes=Boxes(torch.from_numpy(boxes).float()))
        scores = np.concatenate([rng.uniform(0.3, 1, len(near)), rng.uniform(0.05, 0.6, number - len(near))])
        instances.scores = torch.from_numpy(scores)
        instances.pred_classes = torch.tensor([*labels, *rng.integers(classes, size=number - len(near)).tolist()])
        found.append(({"image_id": image}, {"instances": instances}))
    return found
