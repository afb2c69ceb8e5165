"""Ground truth and detections of a whole data set as arrays, out of COCO json or JSON lines."""

import json
import os
from dataclasses import dataclass

import numpy as np

from fpn_d2.errors import UserError, not_found
from fpn_d2.inference.json_lines import read_lines

MOST = 100  # detections of an image that count, the best ones, as in COCO


@dataclass
class Objects:
    """Boxes of a data set, those of an image behind each other.

    Attributes:
        image: (N,) place of the image in `Scored.files`, ascending.
        label: (N,) place of the class in `Scored.class_names`.
        box: (N, 4) x1, y1, x2, y2 in pixels of the image.
        score: (N,) of detections, descending within an image; ones for ground truth.
        crowd: (N,) whether it is a region of many objects, which detections may lie in unpunished.
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    score: np.ndarray
    crowd: np.ndarray

    def __len__(self) -> int:
        return len(self.image)

    @property
    def area(self) -> np.ndarray:
        """(N,) in square pixels."""
        return (self.box[:, 2] - self.box[:, 0]) * (self.box[:, 3] - self.box[:, 1])


@dataclass
class Scored:
    """A data set and what was found in it.

    Attributes:
        files: name of each image.
        sizes: (I, 2) height and width of each.
        class_names: of all classes.
        truth: ground truth.
        found: detections.
    """

    files: list[str]
    sizes: np.ndarray
    class_names: list[str]
    truth: Objects
    found: Objects


def read(annotations: str, predictions: str, most: int = MOST) -> Scored:
    """Read a COCO annotation file and predictions on its images.

    Args:
        annotations: COCO json.
        predictions: COCO results (a list), a COCO data set with scores, or the ``predictions.jsonl`` of
            ``fpn-d2 predict --annotations``.
        most: detections per image that are kept, the best ones.

    Raises:
        UserError: a file is missing or of another kind, or the predictions are of other images or classes.
    """
    scored, place, label = _truth(annotations)
    results = _results(predictions)
    try:
        found = objects_of(results, place, label, predictions)
    except (KeyError, TypeError) as error:
        raise UserError(f"{predictions} holds no COCO results: {error} is missing or of another kind") from None
    scored.found = _best(found, most)
    return scored


def read_truth(annotations: str) -> Scored:
    """Read a COCO annotation file; there are no detections.

    Raises:
        UserError: the file is missing or of another kind.
    """
    return _truth(annotations)[0]


def _truth(annotations: str) -> tuple[Scored, dict, dict]:
    content = _json(annotations)
    try:
        images, categories = content["images"], sorted(content["categories"], key=lambda one: one["id"])
        place = {image["id"]: i for i, image in enumerate(images)}
        label = {category["id"]: i for i, category in enumerate(categories)}
        files = [str(image["file_name"]) for image in images]
        sizes = np.array([[image["height"], image["width"]] for image in images], float).reshape(-1, 2)
        truth = objects_of(content["annotations"], place, label, annotations)
    except (KeyError, TypeError) as error:
        raise UserError(f"{annotations} is no COCO annotation file: {error} is missing or of another kind") from None
    nothing = objects_of([], {}, {}, "")
    return Scored(files, sizes, [str(one["name"]) for one in categories], truth, nothing), place, label


def _results(path: str) -> list[dict]:
    if path.endswith(".jsonl"):
        if not os.path.isfile(path):
            raise UserError(f"no file {path}: {not_found(path)}")
        lines = [line for line in read_lines(path) if "error" not in line]
        if any("image_id" not in line for line in lines):
            raise UserError(f"{path} has no image ids: run fpn-d2 predict with --annotations")
        return [{**one, "image_id": line["image_id"]} for line in lines for one in line["detections"]]
    content = _json(path)
    return content["annotations"] if isinstance(content, dict) and "annotations" in content else content


def _json(path: str):
    if not os.path.isfile(path):
        raise UserError(f"no file {path}: {not_found(path)}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except ValueError as error:
        raise UserError(f"{path} is not valid json: {error}") from None


def objects_of(rows: list[dict], place: dict, label: dict, path: str) -> Objects:
    """COCO annotations or results as arrays.

    Args:
        rows: with ``image_id``, ``category_id``, ``bbox``, and where there are some ``score`` and ``iscrowd``.
        place: of each image by its id.
        label: of each class by its id.
        path: where they come from, for the message.

    Raises:
        UserError: an id is unknown.
    """
    strange = next((row for row in rows if row["image_id"] not in place or row["category_id"] not in label), None)
    if strange is not None:
        key = "image_id" if strange["image_id"] not in place else "category_id"
        raise UserError(f"{path} has {key} {strange[key]!r}, which is not among those of the annotation file")
    image = np.array([place[row["image_id"]] for row in rows], np.int64)
    box = np.array([row["bbox"] for row in rows], float).reshape(-1, 4)
    box[:, 2:] += box[:, :2]
    objects = Objects(
        image,
        np.array([label[row["category_id"]] for row in rows], np.int64),
        box,
        np.array([row.get("score", 1.0) for row in rows], float),
        np.array([bool(row.get("iscrowd", 0)) for row in rows], bool),
    )
    return take(objects, np.lexsort((-objects.score, image)))


def take(objects: Objects, rows: np.ndarray) -> Objects:
    """Some of the objects, by index or mask."""
    return Objects(*(getattr(objects, name)[rows] for name in ("image", "label", "box", "score", "crowd")))


def _best(found: Objects, most: int) -> Objects:
    first = np.searchsorted(found.image, found.image)  # where the image of each begins
    return take(found, np.arange(len(found)) - first < most)
