"""The check of a data set by its name, whatever it is: a json, a folder, or one that is registered."""

import dataclasses
import numbers
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fpn_d2.errors import UserError, did_you_mean, not_found, shown

from .coco_annotations import CheckOptions
from .coco_check import CocoCheck, check_coco, check_voc
from .defects import FILL, MEND, SKIP, STOP
from .json_stream import write_records


def check_set(
    source: str, options: CheckOptions, *, images: str | None = None, split: str | None = None
) -> CocoCheck:
    """Check one data set.

    Args:
        source: Path of a COCO-format json or of a folder in Pascal VOC's layout, or the name of a registered set.
        options: What to look for.
        images: Folder of the json's images; None: they are not looked at.
        split: List of a VOC folder; None: all of its XML files.

    Raises:
        UserError: There is no such set.
    """
    path = Path(source).expanduser()
    if images is not None and not os.path.isdir(os.path.expanduser(images)):
        raise UserError(f"there is no folder of images {images}: {not_found(images)}")
    if os.path.isdir(path):
        return check_voc(path, split, None, options)
    if os.path.exists(path):
        return check_coco(path, Path(images).expanduser() if images else None, options)
    if source in DatasetCatalog.list():
        return check_registered(source, options)
    near = did_you_mean(source, DatasetCatalog.list())
    raise UserError(f"{shown(source)} is neither a file, nor a folder, nor a registered set{near}: {not_found(source)}")


def fix_set(source: str, options: CheckOptions, found: CocoCheck, target: str, **where: str | None) -> str:
    """Write a repaired copy of a set as a COCO-format json.

    Args:
        source, options, where: As for `check_set`.
        found: What `check_set` has found.
        target: The file to write.

    Returns:
        What was changed, in words.

    Raises:
        UserError: It cannot be repaired, or ``target`` is the set itself.
    """
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
        raise UserError(f"{target} is the set itself: name another file, the set stays as it is")
    changes = []
    if found.report.kinds(STOP) == ["boxes_are_corners"]:
        found = check_set(source, dataclasses.replace(options, corners=True), **where)
        changes.append("all boxes: from x1 y1 x2 y2 to x y width height")
    if found.report.kinds(STOP):
        raise UserError(f"{found.report.source} cannot be repaired: {found.report.reasons()}")
    write_records(found.repaired(), Path(target))
    changes += [f"{fate}: {found.report.phrase(fate)}" for fate in (SKIP, MEND, FILL) if found.report.kinds(fate)]
    return "\n".join([f"Repaired copy: {target}", *(changes or ["nothing had to be changed"])])


def check_registered(name: str, options: CheckOptions) -> CocoCheck:
    """Check a set that Detectron2's catalog knows: its json where it is in COCO's format, else its records."""
    metadata = MetadataCatalog.get(name)
    json_file, root = metadata.get("json_file"), metadata.get("image_root")
    if metadata.get("evaluator_type") == "coco" and json_file and os.path.isfile(json_file) and os.path.isdir(root):
        return check_coco(Path(json_file), Path(root), options)
    try:
        dicts = DatasetCatalog.get(name)
    except Exception as error:  # a function of the user's
        reason = f"{type(error).__name__}: {shown(str(error), 300)}"
        raise UserError(f"data set {name} cannot be loaded: {reason}") from error
    return check_dicts(dicts, name, MetadataCatalog.get(name).get("thing_classes") or [], options)


def check_dicts(dicts: list[dict], name: str, classes: list[str], options: CheckOptions) -> CocoCheck:
    """Check records in Detectron2's standard format.

    Annotations are numbered from 1, over all images; images are numbered where they have no ids of their own.
    """
    content = CocoCheck(
        lambda: _as_coco(dicts, classes), name, Path("/"), dataclasses.replace(options, outside=True)
    )
    content.run()
    return content


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
    record = {
        "id": number,
        "image_id": image_id,
        "category_id": int(category) + 1 if isinstance(category, numbers.Integral) else category,
        "bbox": box,
        "iscrowd": annotation.get("iscrowd", 0),
        "area": box[2] * box[3] if isinstance(box, list) and len(box) == 4 and all(box) else None,
    }
    return {**record, **{key: annotation[key] for key in ("segmentation", "keypoints") if key in annotation}}
