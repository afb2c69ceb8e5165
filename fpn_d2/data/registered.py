"""Data sets that Detectron2's catalog has from elsewhere: its own, and those that a user has registered in Python."""

import dataclasses
import numbers
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from fpn_d2.errors import UserError, shown

from .coco_annotations import CheckOptions
from .coco_check import CocoCheck, check_coco
from .defects import MEND, SKIP
from .findings import file_about, refuse, say
from .fit import misfits, most_objects
from .json_stream import write_records


def settle_registered(cfg: CfgNode, name: str, *, training: bool) -> None:
    """Check a registered set as those of the configuration are checked, if it is one of objects in boxes.

    What is of no use is left out in this process: the name then stands for a copy, or for the other records. Sets of
    other kinds that Detectron2 brings along (panoptic, Cityscapes, LVIS, ...) are not looked at.

    Args:
        cfg: The configuration.
        name: Name of the set.
        training: Whether it is trained on.

    Raises:
        UserError: It cannot be used, or has defects and DATASETS.ON_BAD_DATA is "error".
    """
    options = CheckOptions(training=training, outside=True, most_objects=most_objects(cfg) if training else 0)
    copy = None
    if _is_coco_json(name):
        found = check_registered(name, options)
        refuse(found.report, cfg.DATASETS.ON_BAD_DATA)
        if found.report.count(SKIP, MEND):
            copy = file_about(cfg, name, ".json")
            write_records(found.repaired(), copy)
            metadata = MetadataCatalog.get(name).as_dict()
            _replace(name, lambda: load_coco_json(str(copy), metadata["image_root"], name), json_file=str(copy))
    elif not getattr(DatasetCatalog[name], "__module__", "").startswith("detectron2."):
        dicts = _records(name)
        if not _has_plain_boxes(dicts):
            return
        found = check_dicts(dicts, name, MetadataCatalog.get(name).get("thing_classes") or [], options)
        refuse(found.report, cfg.DATASETS.ON_BAD_DATA)
        if found.report.count(SKIP, MEND):
            kept = _kept(dicts, found)
            _replace(name, lambda: kept)
    else:
        return
    say(found.report, copy, file_about(cfg, name, ".defects.json"), *misfits(cfg, name, found))


def _is_coco_json(name: str) -> bool:
    own = getattr(DatasetCatalog[name], "__module__", "") == "detectron2.data.datasets.coco"
    return own and MetadataCatalog.get(name).get("evaluator_type") == "coco"


def _has_plain_boxes(dicts: list) -> bool:
    """Whether there are boxes, and none of them is rotated."""
    boxes = [a for record in dicts if isinstance(record, dict) for a in record.get("annotations") or ()]
    return bool(boxes) and not any(a.get("bbox_mode") == BoxMode.XYWHA_ABS for a in boxes if isinstance(a, dict))


def _replace(name: str, function: Any, **metadata: Any) -> None:
    metadata = {**MetadataCatalog.get(name).as_dict(), **metadata}
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    DatasetCatalog.register(name, function)
    MetadataCatalog.get(name).set(**metadata)


def _kept(dicts: list[dict], found: CocoCheck) -> list[dict]:
    """The records without what is left out, with the sizes of their files."""
    images, annotations = {}, set()
    for key, index, record in found.repaired():
        if index is not None and key == "images":
            images[record["id"]] = record
        elif index is not None and key == "annotations":
            annotations.add(record["id"])
    kept, number = [], 0
    for index, record in enumerate(dicts):
        own = record.get("annotations") or ()
        numbered = list(enumerate(own, start=number + 1))
        number += len(own)
        image = images.get(record.get("image_id", index))
        if image is not None:
            record = {**record, "width": image["width"], "height": image["height"]}
            if "annotations" in record:
                record["annotations"] = [annotation for n, annotation in numbered if n in annotations]
            kept.append(record)
    return kept


def _records(name: str) -> list[dict]:
    try:
        return DatasetCatalog.get(name)
    except Exception as error:  # a function of the user's
        reason = f"{type(error).__name__}: {shown(str(error), 300)}"
        raise UserError(f"data set {name} cannot be loaded: {reason}") from error


def check_registered(name: str, options: CheckOptions) -> CocoCheck:
    """Check a set that Detectron2's catalog knows: its json where it is in COCO's format, else its records."""
    metadata = MetadataCatalog.get(name)
    json_file, root = metadata.get("json_file"), metadata.get("image_root")
    if metadata.get("evaluator_type") == "coco" and json_file and os.path.isfile(json_file) and os.path.isdir(root):
        return check_coco(Path(json_file), Path(root), options)
    return check_dicts(_records(name), name, MetadataCatalog.get(name).get("thing_classes") or [], options)


def check_dicts(dicts: list[dict], name: str, classes: list[str], options: CheckOptions) -> CocoCheck:
    """Check records in Detectron2's standard format.

    Annotations are numbered from 1, over all images; images are numbered where they have no ids of their own.
    """
    options = dataclasses.replace(options, outside=True, masks=False)
    found = CocoCheck(lambda: _as_coco(dicts, classes), name, Path("/"), options)
    found.run()
    return found


def _as_coco(dicts: list[dict], classes: list[str]) -> Iterator[tuple[str, int | None, Any]]:
    yield "info", None, {}
    yield "categories", None, []
    yield from (("categories", i, {"id": i + 1, "name": class_name}) for i, class_name in enumerate(classes))
    yield "images", None, []
    for index, record in enumerate(dicts):
        size = {key: record[key] for key in ("width", "height") if key in record}
        own = record.get("image_id", index)
        yield "images", index, {"id": own, "file_name": _absolute(record.get("file_name")), **size}
    yield "annotations", None, []
    number = 0
    for index, record in enumerate(dicts):
        for annotation in record.get("annotations") or ():
            number += 1
            yield "annotations", number - 1, _annotation(annotation, record.get("image_id", index), number)


def _absolute(name: Any) -> Any:
    return os.path.abspath(name) if isinstance(name, (str, os.PathLike)) else name


def _annotation(annotation: dict, image_id: Any, number: int) -> dict:
    category, box = annotation.get("category_id"), annotation.get("bbox")
    try:
        box = BoxMode.convert(list(map(float, box)), annotation.get("bbox_mode"), BoxMode.XYWH_ABS)
    except Exception:  # of another kind, which the check names
        box = list(box) if isinstance(box, (list, tuple)) else box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": int(category) + 1 if isinstance(category, numbers.Integral) else category,
        "bbox": box,
        "iscrowd": annotation.get("iscrowd", 0),
        "area": box[2] * box[3] if isinstance(box, list) and len(box) == 4 and all(box) else None,
    }
