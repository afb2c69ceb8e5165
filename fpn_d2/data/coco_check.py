"""Checks a COCO-format annotation file before anything trains on it, and mends what can be mended.

What breaks the structure (an unknown image, the same id twice, a missing file) is an error that names the record. A
single unusable box is left out with one warning that counts. What COCO's own tools need and can be derived (``info``,
``area``, ``iscrowd``, annotation ids that start at 1) is filled in.
"""

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

_EXIF_ORIENTATION = 0x0112
_EXIF_QUARTER_TURNS = (5, 6, 7, 8)
_NUMBERS = (int, float)  # what a number in json becomes; bool, a subclass of int, is none


def check_coco(
    data: Any,
    source: str,
    image_folder: Path,
    *,
    need_annotations: bool = True,
    masks: bool = False,
    polygons_only: bool = False,
) -> tuple[list[str], list[str]]:
    """Check the content of a COCO-format json, and mend it in place.

    Args:
        data: The parsed json.
        source: Name of the file, for the messages.
        image_folder: Where the images lie.
        need_annotations: Whether there have to be annotations; without, a list of images and the categories will do.
        masks: Whether instance masks are going to be used. An object without a usable mask is then marked as crowd,
            which training and evaluation pass over.
        polygons_only: Whether masks in run-length encoding are an error (``INPUT.MASK_FORMAT: polygon``).

    Returns:
        What was mended silently (a list of short notes, empty if ``data`` is as it was) and warnings that the user
        should see.

    Raises:
        ValueError: If the structure is broken. The message names the file and the record.
        FileNotFoundError: If images are missing from the folder.
    """
    _check_structure(data, source, need_annotations)
    notes: list[str] = []
    warnings: list[str] = []
    if not isinstance(data.get("info"), dict):
        data["info"] = {}
        notes.append("info added")
    images = _check_images(data["images"], source, image_folder, notes)
    categories = _check_categories(data["categories"], source, warnings)
    if "annotations" in data:
        _check_annotations(data, source, images, categories, notes, warnings)
        if need_annotations and all(annotation["iscrowd"] for annotation in data["annotations"]):
            raise ValueError(f"{source} holds no object to train on: it has no usable annotation that is not a crowd.")
        if masks:
            _check_masks(data, source, polygons_only, notes, warnings)
    return notes, warnings


def _check_structure(data: Any, source: str, need_annotations: bool) -> None:
    if not isinstance(data, dict):
        raise ValueError(
            f"{source} is not in COCO format: expected an object with images, annotations and categories, "
            f"got a {type(data).__name__}."
        )
    for key in ("images", "annotations", "categories"):
        if key == "annotations" and key not in data and not need_annotations:
            continue
        if key not in data:
            hint = " (only a set that is not in DATASETS.TRAIN may do without)" if key == "annotations" else ""
            raise ValueError(
                f"{source} is not in COCO format: it has no {key!r}{hint}; it holds {', '.join(data) or 'nothing'}."
            )
        if not isinstance(data[key], list):
            raise ValueError(f"{source}: expected a list under {key!r}, got a {type(data[key]).__name__}.")
        for number, record in enumerate(data[key]):
            if not isinstance(record, dict):
                raise ValueError(f"{source}: entry {number} of {key!r} is not an object but {record!r}.")
    for key in ("images", "categories"):
        if not data[key]:
            raise ValueError(f"{source}: the list {key!r} is empty.")


def _check_ids(records: list[dict], what: str, source: str, types: tuple[type, ...]) -> dict:
    """Records by id; ids must be there, all of one of ``types``, and used once."""
    by_id: dict = {}
    kind = " or ".join({int: "a whole number", str: "text"}[t] for t in types)
    for number, record in enumerate(records):
        value = record.get("id")
        if isinstance(value, bool) or not isinstance(value, types):
            raise ValueError(f"{source}: {what} {number} of the list: expected {kind} as id, got {value!r}.")
        if value in by_id:
            raise ValueError(f"{source}: the {what} id {value!r} is used more than once.")
        by_id[value] = record
    if len({type(value) for value in by_id}) > 1:
        raise ValueError(f"{source}: the {what} ids are a mixture of numbers and text.")
    return by_id


def _check_images(images: list[dict], source: str, folder: Path, notes: list[str]) -> dict:
    by_id = _check_ids(images, "image", source, (int, str))
    for number, image in by_id.items():
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{source}: image id {number!r}: expected text as file_name, got {name!r}.")
    _check_image_files(images, source, folder)
    unsized = [image for image in images if not all(_is_side(image.get(key)) for key in ("width", "height"))]
    for image in unsized:
        image["width"], image["height"] = image_size(folder / image["file_name"])
    if unsized:
        notes.append(f"width and height of {len(unsized)} images read from their files")
    return by_id


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of an image file as it is shown, that is turned as its EXIF data say.

    Raises:
        ValueError: If the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_QUARTER_TURNS
            return image.size[::-1] if turned else image.size
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from error


def _check_image_files(images: list[dict], source: str, folder: Path) -> None:
    listed: dict[str, set[str]] = {}  # one listing per folder is far quicker than a look at each file

    def exists(path: str) -> bool:
        parent, name = os.path.split(path)
        if parent not in listed:
            listed[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        return name in listed[parent]

    missing = [image["file_name"] for image in images if not exists(os.path.join(folder, image["file_name"]))]
    if not missing:
        return
    message = f"{source}: {len(missing)} of {len(images)} images are not in {folder}: {', '.join(missing[:3])}"
    message += ", ..." if len(missing) > 3 else "."
    if exists(os.path.join(folder, os.path.basename(missing[0]))):
        message += " Their names without the folder are there; drop the folder from file_name or from the image folder."
    raise FileNotFoundError(message)


def _check_categories(categories: list[dict], source: str, warnings: list[str]) -> dict:
    by_id = _check_ids(categories, "category", source, (int,))
    for number, category in by_id.items():
        if not isinstance(category.get("name"), str):
            raise ValueError(f"{source}: category id {number}: expected text as name, got {category.get('name')!r}.")
    twice = [name for name, count in Counter(category["name"] for category in categories).items() if count > 1]
    if twice:
        warnings.append(f"{source}: several categories share the name {twice[0]!r}; each counts as a class of its own.")
    return by_id


def _check_annotations(
    data: dict, source: str, images: dict, categories: dict, notes: list[str], warnings: list[str]
) -> None:
    annotations = data["annotations"]
    kept, faults, filled = [], {}, Counter()
    seen = set()
    for number, annotation in enumerate(annotations):
        own_id = annotation.get("id")
        where = f"{source}: annotation id {own_id!r} (entry {number})"
        if own_id is not None:
            if not isinstance(own_id, (int, str)):
                raise ValueError(f"{where}: expected a whole number as id.")
            if own_id in seen:
                raise ValueError(f"{source}: the annotation id {own_id!r} is used more than once.")
            seen.add(own_id)
        for key, known in (("image_id", images), ("category_id", categories)):
            value = annotation.get(key)
            if not isinstance(value, (int, str)) or value not in known:
                kind = key.removesuffix("_id")
                raise ValueError(f"{where}: {key} {value!r} is not the id of any {kind} of this file.")
        box = annotation.get("bbox")
        if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(type(v) in _NUMBERS for v in box):
            raise ValueError(f"{where}: expected bbox to be four numbers [x, y, width, height], got {box!r}.")
        fault = _box_fault(box, images[annotation["image_id"]])
        if fault:
            faults.setdefault(fault, []).append(own_id if own_id is not None else f"of entry {number}")
            continue
        kept.append(annotation)
        _fill(annotation, filled)
    if faults:
        total = sum(len(ids) for ids in faults.values())
        counts = ", ".join(f"{len(ids)} {fault} (first: id {ids[0]})" for fault, ids in faults.items())
        warnings.append(f"{source}: {total} of {len(annotations)} annotations are left out: {counts}.")
        data["annotations"] = kept
        notes.append("annotations left out")
    # COCO's evaluation takes a matched object with id 0 for an unmatched one, so ids have to start at 1.
    if any(not isinstance(annotation.get("id"), int) or annotation["id"] < 1 for annotation in kept):
        for number, annotation in enumerate(kept, start=1):
            annotation["id"] = number
        notes.append("annotations numbered from 1")
    notes.extend(f"{key} filled in {count} times" for key, count in filled.items())


def _box_fault(box: list[float], image: dict) -> str | None:
    x, y, width, height = box
    if not all(math.isfinite(v) for v in box):
        return "with a box that is not finite"
    if width < 0 or height < 0:
        return "with a box of negative width or height"
    if width == 0 or height == 0:
        return "with a box without area"
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        return "with a box outside its image"
    return None


def _fill(annotation: dict, filled: Counter) -> None:
    if annotation.get("iscrowd") not in (0, 1):
        annotation["iscrowd"] = 0
        filled["iscrowd"] += 1
    if annotation.get("ignore"):  # Detectron2 refuses this key; crowd is the mark that it and COCO know
        annotation["iscrowd"] = 1
        filled["iscrowd from ignore"] += 1
    if annotation.pop("ignore", None) is not None:
        filled["ignore"] += 1
    area = annotation.get("area")
    if type(area) not in _NUMBERS or not math.isfinite(area):
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        filled["area"] += 1
    if annotation.get("keypoints") and "num_keypoints" not in annotation:
        annotation["num_keypoints"] = sum(visibility > 0 for visibility in annotation["keypoints"][2::3])
        filled["num_keypoints"] += 1
    segmentation = annotation.get("segmentation")
    if segmentation and not _is_mask(segmentation):
        # Detectron2 would drop the whole object, box and all.
        usable = [polygon for polygon in segmentation if _is_polygon(polygon)] if isinstance(segmentation, list) else []
        annotation["segmentation"] = usable
        filled["segmentation without its broken polygons"] += 1


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    try:
        return math.isfinite(sum(polygon))  # one number that is not finite spoils the sum; quicker than one by one
    except TypeError:
        return False


def _is_mask(segmentation: Any) -> bool:
    if isinstance(segmentation, dict):
        return isinstance(segmentation.get("counts"), (str, list)) and len(segmentation.get("size") or ()) == 2
    return isinstance(segmentation, list) and all(_is_polygon(polygon) for polygon in segmentation)


def _check_masks(data: dict, source: str, polygons_only: bool, notes: list[str], warnings: list[str]) -> None:
    objects = [annotation for annotation in data["annotations"] if not annotation["iscrowd"]]
    bare = [annotation for annotation in data["annotations"] if not annotation.get("segmentation")]
    bare_objects = [annotation for annotation in bare if not annotation["iscrowd"]]
    if objects and len(bare_objects) == len(objects):
        raise ValueError(f"{source} has boxes only, but MODEL.MASK_ON needs masks: none of its objects has one.")
    if polygons_only and any(isinstance(annotation.get("segmentation"), dict) for annotation in objects):
        raise ValueError(f"{source} holds run-length encoded masks: set INPUT.MASK_FORMAT to bitmask.")
    for annotation in bare:
        x, y, width, height = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        annotation["iscrowd"] = 1
    if bare:
        notes.append(f"{len(bare)} objects without mask marked as crowd")
    if bare_objects:
        warnings.append(
            f"{source}: {len(bare_objects)} of {len(objects)} objects have no usable mask "
            f"(first: id {bare_objects[0]['id']}); training and evaluation pass over them."
        )
