"""Registers a user's own data sets, named in a configuration, with Detectron2.

``DATASETS.COCO_FORMAT`` and ``DATASETS.VOC_FORMAT`` name files and folders; after ``register_from_config`` the names
work in ``DATASETS.TRAIN`` and ``DATASETS.TEST`` like Detectron2's own, and Detectron2's ``COCOEvaluator`` gives its
tables for both. The user's files are only read. Where COCO's tools need a mended or converted annotation file, it is
written to ``<OUTPUT_DIR>/data_sets``, and beside it the list of all that was mended or left out.
"""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from fpn_d2.errors import UserError
from fpn_d2.files import locate

from .coco_annotations import CheckOptions
from .coco_check import CocoCheck, check_coco, check_voc
from .findings import file_about, refuse, say
from .fit import misfits, most_objects
from .json_stream import write_records
from .registered import settle_registered
from .remembered import recall, remember

# Name -> (where its data come from, the state of those files and of the keys that matter): what this process knows.
_registered: dict[str, tuple[tuple, tuple]] = {}


# Of the entries of each key: what they need, and what they may have.
_FIELDS = {
    "COCO_FORMAT": (("NAME", "JSON", "IMAGES"), ()),
    "VOC_FORMAT": (("NAME", "DIR", "SPLIT"), ("CLASSES",)),
}


def register_from_config(cfg: CfgNode, *, train: bool = True) -> None:
    """Register the data sets of ``DATASETS.COCO_FORMAT`` and ``DATASETS.VOC_FORMAT`` in this process.

    All of them are checked first-hand. Registering the same again does nothing; if the annotations have changed on
    disk since, they are read again.

    Args:
        cfg: Configuration with the keys of ``add_fpn_d2_config``.
        train: Whether there is training; else sets that are only trained on are passed over, and may be gone.

    Raises:
        UserError: If a json, a folder or images are missing, an entry or an annotation file is malformed, or a name
            stands for other data already.
    """
    seen: set[str] = set()
    for (key, fields), register in zip(_FIELDS.items(), (_register_coco, _register_voc), strict=True):
        for entry in _entries(cfg.DATASETS[key], f"DATASETS.{key}", *fields):
            if entry["NAME"] in seen:
                raise UserError(f"DATASETS.COCO_FORMAT and VOC_FORMAT name the data set {entry['NAME']!r} twice.")
            seen.add(entry["NAME"])
            if train or entry["NAME"] not in cfg.DATASETS.TRAIN or entry["NAME"] in cfg.DATASETS.TEST:
                register(cfg, entry)


def check_others(cfg: CfgNode, *, train: bool) -> None:
    """Check the data sets that are registered elsewhere; see `settle_registered`.

    Args:
        cfg: The configuration; its own data sets are registered, and so have been checked.
        train: Whether DATASETS.TRAIN is used as well as DATASETS.TEST.

    Raises:
        UserError: A set cannot be used, or has defects and DATASETS.ON_BAD_DATA is "error".
    """
    for name in dict.fromkeys((*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST)):
        if name not in _registered:
            settle_registered(cfg, name, training=train and name in cfg.DATASETS.TRAIN)


def sources(cfg: CfgNode) -> dict[str, tuple[str | None, str]]:
    """Annotation file, None for VOC, and image folder of the sets of the configuration, by name; nothing is read."""
    coco, voc = (_entries(cfg.DATASETS[key], f"DATASETS.{key}", *fields) for key, fields in _FIELDS.items())
    found: dict[str, tuple[str | None, str]] = {entry["NAME"]: (entry["JSON"], entry["IMAGES"]) for entry in coco}
    return found | {entry["NAME"]: (None, os.path.join(entry["DIR"], "JPEGImages")) for entry in voc}


def class_names(cfg: CfgNode, *, train: bool = True) -> list[str]:
    """The classes of the data sets in ``DATASETS.TRAIN``, or of those in ``DATASETS.TEST`` if TRAIN is empty.

    Data sets of ``DATASETS.COCO_FORMAT`` and ``VOC_FORMAT`` are registered on the way.

    Args:
        cfg: Configuration with the keys of ``add_fpn_d2_config``.
        train: Whether there is training; else ``DATASETS.TEST`` alone is looked at.

    Returns:
        The names in the order of the class indices; empty if no data set is named or if none of them has classes.

    Raises:
        UserError: If a data set is unknown, or if the data sets, those for testing among them, do not agree.
    """
    register_from_config(cfg, train=train)
    reference: tuple[str, list[str]] | None = None
    for name in (*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST):
        _require_known(name)
        metadata = MetadataCatalog.get(name)
        if metadata.get("thing_classes") is None and metadata.get("evaluator_type") != "sem_seg":
            DatasetCatalog.get(name)  # registered in Python: the classes become known as it loads
        classes = metadata.get("thing_classes")
        if classes is None:
            continue
        if reference is None:
            reference = (name, list(classes))
        elif list(classes) != reference[1]:
            raise UserError(
                f"The data sets {reference[0]!r} and {name!r} differ in their classes: "
                + _difference(reference[1], list(classes))
            )
    return reference[1] if reference else []


def _require_known(name: str) -> None:
    known = DatasetCatalog.list()
    if name not in known:
        own = ", ".join(sorted(_registered)) or "none"
        close = difflib.get_close_matches(name, known, n=1)
        raise UserError(
            f"There is no data set {name!r}. "
            + (f"Did you mean {close[0]!r}? " if close else "")
            + f"Named in DATASETS.COCO_FORMAT or VOC_FORMAT: {own}."
        )


def _difference(first: list[str], second: list[str]) -> str:
    only_first = [name for name in first if name not in second]
    only_second = [name for name in second if name not in first]
    if only_first or only_second:
        return f"only the first has {_some(only_first)}, only the second {_some(only_second)}."
    return f"the same names in another order or number, {_some(first)} and {_some(second)}."


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def _entries(value: Any, key: str, fields: tuple[str, ...], optional: tuple[str, ...]) -> list[dict]:
    """The entries of one key as dictionaries, whatever way they were written."""
    expected = f"[{', '.join(fields)}] or a dictionary with the keys {', '.join(fields)}" + (
        f" and, if wanted, {', '.join(optional)}" if optional else ""
    )
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{key}: expected a list of entries, each {expected}; got {value!r}.")
    if value and all(isinstance(part, str) for part in value):
        value = [value]  # a single entry without the outer list
    entries = []
    for entry in value:
        if isinstance(entry, (list, tuple)) and len(entry) == len(fields):
            entry = dict(zip(fields, entry, strict=True))
        elif not isinstance(entry, dict):
            raise UserError(f"{key}: expected {expected}; got {entry!r}.")
        entry = {str(name).upper(): part for name, part in entry.items()}
        missing = [name for name in fields if name not in entry]
        unknown = [name for name in entry if name not in fields + optional]
        if missing or unknown:
            raise UserError(f"{key}: expected {expected}; missing are {missing}, unknown {unknown}.")
        for name in fields:
            if not isinstance(entry[name], str) or not entry[name]:
                raise UserError(f"{key}: expected text as {name}, got {entry[name]!r} in {entry}.")
        entries.append(entry)
    return entries


def _register_coco(cfg: CfgNode, entry: dict) -> None:
    name = entry["NAME"]
    json_file = locate(entry["JSON"], f"the annotations of data set {name!r}")
    image_folder = locate(entry["IMAGES"], f"the images of data set {name!r}", folder=True)
    status = json_file.stat()
    state = (status.st_mtime_ns, status.st_size)
    source = ("COCO", json_file)

    _register(
        cfg, name, source, image_folder, state, lambda options: check_coco(json_file, image_folder, options), json_file
    )


def _register_voc(cfg: CfgNode, entry: dict) -> None:
    name, split, classes = entry["NAME"], entry["SPLIT"], entry.get("CLASSES")
    if classes is not None and not (
        isinstance(classes, (list, tuple)) and classes and all(isinstance(c, str) for c in classes)
    ):
        raise UserError(f"DATASETS.VOC_FORMAT: expected a list of names as CLASSES of {name!r}, got {classes!r}.")
    classes = list(classes) if classes else None
    folder = locate(entry["DIR"], f"data set {name!r}", folder=True)
    files = [folder / "ImageSets" / "Main" / f"{split}.txt", *sorted((folder / "Annotations").glob("*.xml"))]
    state = tuple(file.stat().st_mtime_ns for file in files if file.is_file())
    source = ("VOC", folder, split, tuple(classes or ()))
    images = folder / "JPEGImages"
    _register(cfg, name, source, images, state, lambda options: check_voc(folder, split, classes, options), None)


def _register(
    cfg: CfgNode,
    name: str,
    source: tuple,
    image_folder: Path,
    state: tuple,
    check: Callable[[CheckOptions], CocoCheck],
    json_file: Path | None,
) -> None:
    """Register one data set unless it is registered already.

    Args:
        cfg: The configuration.
        name: Name of the data set.
        source: What identifies the data set.
        image_folder: Where its images lie.
        state: What changes when the annotations change.
        check: Looks at the set.
        json_file: File that holds its annotations in COCO's format; None if there is none yet.
    """
    source = (*source, image_folder)
    training = name in cfg.DATASETS.TRAIN
    masks = bool(cfg.MODEL.MASK_ON)
    options = CheckOptions(
        training=training,
        masks=masks,
        polygons_only=masks and training and cfg.INPUT.MASK_FORMAT == "polygon",
        outside=cfg.DATASETS.FILES_OUTSIDE_FOLDER,
        most_objects=most_objects(cfg) if training else 0,
    )
    state = (*state, options, cfg.DATASETS.ON_BAD_DATA)
    if name in _registered and name in DatasetCatalog.list():
        known_source, known_state = _registered[name]
        if known_source != source:
            raise UserError(
                f"The data set name {name!r} stands for {_words(known_source)} already; "
                f"give {_words(source)} another name."
            )
        if known_state == state and os.path.isfile(MetadataCatalog.get(name).json_file):
            return
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    elif name in DatasetCatalog.list():
        raise UserError(f"The data set name {name!r} is taken by Detectron2 or your own code; choose another one.")

    known = recall(name, (source, state))
    if known is None or not os.path.isfile(known["json_file"]):
        known = _settled(cfg, name, check(options), json_file)
        remember(name, (source, state), known)
    categories = known["categories"]
    metadata = {
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {category["id"]: i for i, category in enumerate(categories)},
        **_keypoint_metadata(categories),
    }
    register_coco_instances(name, metadata, known["json_file"], str(image_folder))
    _registered[name] = (source, state)


def _settled(cfg: CfgNode, name: str, found: CocoCheck, json_file: Path | None) -> dict:
    """Stop, or say what was found, and write a copy if one is needed: the file that is used, and the categories."""
    refuse(found.report, cfg.DATASETS.ON_BAD_DATA)
    copy = None
    if found.changed or json_file is None:
        json_file = copy = file_about(cfg, name, ".json")
        write_records(found.repaired(), copy)
    say(found.report, copy, file_about(cfg, name, ".defects.json"), *misfits(cfg, name, found))
    return {"json_file": str(json_file), "categories": found.categories()}


def _words(source: tuple) -> str:
    return " ".join(str(part) for part in source[1:] if part)


def _keypoint_metadata(categories: list[dict]) -> dict:
    """The names of the keypoints, if a category lists any, and the pairs that a flip swaps, for Detectron2."""
    names = next((category["keypoints"] for category in categories if category.get("keypoints")), None)
    if not names:
        return {}
    pairs = [(name, name.replace("left", "right", 1)) for name in names if "left" in name]
    return {"keypoint_names": list(names), "keypoint_flip_map": [pair for pair in pairs if pair[1] in names]}
