"""The check of a data set by its name, whatever it is: a json, a folder, or one that is registered."""

import dataclasses
import os
from pathlib import Path

from detectron2.data import DatasetCatalog

from fpn_d2.errors import UserError, did_you_mean, not_found, shown

from .coco_annotations import CheckOptions
from .coco_check import CocoCheck, check_coco, check_voc
from .defects import FILL, MEND, SKIP, STOP
from .json_stream import write_records
from .registered import check_registered


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
