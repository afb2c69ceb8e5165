"""Checks a COCO-format set before anything trains on it, and mends what can be mended.

The set is read as a stream, twice: images and categories first, then annotations. What is kept of it is a line for each
image and the ids, so that a million annotations fit anywhere; `CocoCheck.repaired` reads it once more and gives the
records as they are to be used.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fpn_d2.errors import shown, shown_value

from .coco_annotations import DROP, FARTHEST, LARGEST_ID, AnnotationCheck, CheckOptions, ImageEntry, whole
from .defects import FILL, MEND, SKIP, Report
from .image_files import look_at_all, name_problem
from .json_stream import JsonError, has_byte_order_mark, read_records, records_of
from .voc_format import read_voc

Records = Callable[[], Iterator[tuple[str, int | None, Any]]]

_LONGEST_NAME = 100  # characters of a class name
_MANY_OBJECTS = 5000  # annotations of one image that are named


class CocoCheck:
    """The check of one set. After `run`, ``report`` says what was found, ``changed`` whether anything is to be mended.

    Attributes:
        report: The findings.
        changed: Whether `repaired` differs from what was read.
        stopped: Whether something was found after which the rest means nothing.
        extents: (N, 4): width and height of each object that is kept, and of its image, in pixels; crowds left out.
        objects: Number of annotations that are kept of each image.
        image_folder: See below.
    """

    def __init__(
        self, records: Records, source: str, image_folder: Path | None, options: CheckOptions
    ):
        """
        Args:
            records: Gives the set's records, as `read_records`; called several times.
            source: Name of the set, for the messages.
            image_folder: Where the images lie; None: they are not looked at.
            options: What to look for.
        """
        self.report = Report(source)
        self.changed = False
        self.stopped = False
        self.extents = np.zeros((0, 4), np.float32)
        self.objects: list[int] = []
        self._records = records
        self.image_folder = image_folder
        self._options = options
        self._note = self.report.add
        self._images: dict[int | str, ImageEntry] = {}
        self._dropped: dict[str, set[int]] = {"images": set(), "categories": set()}
        self._categories: dict[int, dict] = {}
        self._renumber = False
        self._pointed: set[str] = set()  # lists in which an id has a decimal point
        self._category_numbers: dict[str, int] = {}  # what stands for category ids that are text

    # ---- The whole ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Look at everything."""
        try:
            self._structure()
            if not self.stopped and self.image_folder is not None:
                self._look_at_files()
            if not self.stopped:
                self._look_at_annotations()
        except JsonError as error:
            self.stop(error.kind, str(error))
        self.changed |= self.report.count(SKIP, MEND, FILL) > 0

    def repaired(self) -> Iterator[tuple[str, int | None, Any]]:
        """The set as it is to be used: as `read_records`, with what is of no use left out and the rest mended."""
        annotations = AnnotationCheck(
            self._images,
            self._categories,
            self._options,
            lambda *_: None,
            renumber=self._renumber,
            category_numbers=self._category_numbers,
        )
        changes_of = {
            "images": self._changes_of_image,
            "categories": self._changes_of_category,
            "annotations": annotations.changes,
        }
        if self.report.counts["info_missing"]:
            yield "info", None, {}
        for key, index, value in self._records():
            if key == "info" and self.report.counts["info_missing"]:
                continue
            if index is None or key not in changes_of:
                yield key, index, value
                continue
            if not isinstance(value, dict) or index in self._dropped.get(key, ()):
                continue
            changes = changes_of[key](index, value)
            if changes is not None:
                yield key, index, _changed(value, changes)

    def categories(self) -> list[dict]:
        """The categories that are kept, in the order of their ids, each with ``id``, ``name`` and ``keypoints``."""
        return [
            {"id": own, **category, **category.get("changes", {})} for own, category in sorted(self._categories.items())
        ]

    def stop(self, kind: str, message: str, *where: Any) -> None:
        """Note something after which the rest means nothing."""
        self.stopped = True
        self._note(kind, message, *where)

    # ---- Images and categories ------------------------------------------------------------------------------

    def _structure(self) -> None:
        keys: dict[str, Any] = {}
        totals: Counter = Counter()
        entries = {"images": self._image, "categories": self._category}
        for key, index, value in self._records():
            if index is None:
                keys[key] = value
                continue
            totals[key] += 1
            if key in ("images", "categories", "annotations") and not isinstance(value, dict):
                self._note("entry_not_object", f"entry {index} of {key!r} is {shown_value(value)}")
                if key != "annotations":
                    self._dropped[key].add(index)
            elif key in entries and not entries[key](index, value):
                self._dropped[key].add(index)
        self.report.totals = {key: totals[key] for key in ("images", "annotations", "categories")}
        self._check_keys(keys, totals)
        if not isinstance(keys.get("info"), dict):
            self._note("info_missing", "COCO's tools ask for an object under 'info'")
        if len({type(value) for value in self._images}) > 1:
            self.stop("image_ids_mixed", "the image ids are a mixture of numbers and text")
        self._number_categories()
        self._check_category_names()
        if not self.stopped and not any(image.usable for image in self._images.values()):
            self.stop("nothing_left", "no image is left")
        elif not self.stopped and not self._categories:
            self.stop("nothing_left", "no category is left")

    def _check_keys(self, keys: dict[str, Any], totals: Counter) -> None:
        for key in ("images", "annotations", "categories"):
            if key not in keys:
                if key == "annotations" and not self._options.training:
                    self._note("no_annotations", "there is no list 'annotations'")
                    continue
                hint = " (only a set that is not trained on may do without)" if key == "annotations" else ""
                holds = shown(", ".join(keys), 200) or "nothing"
                self.stop("not_coco", f"it is not in COCO format: it has no {key!r}{hint}; it holds {holds}")
            elif not isinstance(keys[key], list):
                self.stop("not_coco", f"expected a list under {key!r}, got a {type(keys[key]).__name__}")
            elif key != "annotations" and not totals[key]:
                self.stop("not_coco", f"the list {key!r} is empty")

    def _image(self, index: int, record: dict) -> bool:
        """Take in one image; whether it is kept."""
        own, name = self._whole(record, "images"), record.get("file_name")
        if type(own) not in (int, str) or own == "":
            self._note("image_id_wrong", f"entry {index} of the images: not a number or text: {shown_value(own)}")
            return False
        image = ImageEntry(name, 0, 0)
        if own in self._images:
            first = self._images[own]
            if first.name != name and first.usable:  # whose are the annotations?
                first.usable = False
                self._note("image_id_twice", f"{shown(first.name)} and {shown(name)}", own)
            self._note("image_id_twice", f"{shown(first.name)} and {shown(name)}", own)
            return False
        self._images[own] = image
        if type(own) is int and abs(own) > LARGEST_ID:
            self._note("image_id_beyond_64_bits", "the evaluation numbers the images by itself", own)
        elif type(own) is str and not self.report.counts["image_id_text"]:  # once: it is a property of the set
            self._note("image_id_text", "the evaluation numbers the images by itself", own)
        problem = name_problem(name, None if self._options.outside else self.image_folder)
        if problem:
            self._note(*problem, own)
            image.usable = False
            return True  # known, so that its annotations are not called strays
        width, height = record.get("width"), record.get("height")
        if _is_side(width) and _is_side(height):
            image.width, image.height = image.recorded = width, height
        elif self.image_folder is None:
            self._note("size_missing", f"{shown(name)}: width {shown_value(width)}, height {shown_value(height)}", own)
        return True

    def _whole(self, record: dict, key: str) -> Any:
        given = record.get("id")
        own = whole(given)
        if own is not given and key not in self._pointed:
            self._pointed.add(key)
            self._note("ids_with_point", f"in the {key}, as {shown_value(given)}")
        return own

    def _category(self, index: int, record: dict) -> bool:
        own, name = self._whole(record, "categories"), record.get("name")
        kinds = (type(next(iter(self._categories))),) if self._categories else (int, str)
        if type(own) not in kinds or own == "" or (type(own) is int and abs(own) > LARGEST_ID):
            self._note("category_id_wrong", f"entry {index} of the categories: not a number: {shown_value(own)}")
            return False
        if own in self._categories:
            if self._categories[own].get("name") == name:
                self._note("category_id_twice", f"category {own}, {shown(name)}")
            else:
                names = f"{shown(self._categories[own].get('name'))} and {shown(name)}"
                self.stop("category_id_two_names", f"category {own} is {names}")
            return False
        self._categories[own] = {"name": name, "keypoints": record.get("keypoints")}
        return True

    def _number_categories(self) -> None:
        """Give numbers to categories whose ids are text: those that the texts are, or else their places."""
        if not self._categories or type(next(iter(self._categories))) is int:
            return
        texts = list(self._categories)
        numbers = [int(text) if text.isascii() and text.isdecimal() and len(text) < 18 else 0 for text in texts]
        if len(set(numbers)) < len(texts) or 0 in numbers:
            numbers = range(1, len(texts) + 1)
        self._category_numbers = dict(zip(texts, numbers, strict=True))
        self._categories = {self._category_numbers[text]: self._categories[text] for text in texts}
        first = f"{shown_value(texts[0])} becomes {numbers[0]}"
        self._note("category_ids_text", f"the evaluation and Detectron2 go by numbers: {first}")

    def _check_category_names(self) -> None:
        for own, category in self._categories.items():
            name = category["name"]
            if not isinstance(name, str) or not name.strip():
                category["changes"] = {"name": f"category {own}"}
                self._note("category_name_missing", f"category {own}: expected text as name, got {shown_value(name)}")
            elif shown(name, _LONGEST_NAME) != name:
                category["changes"] = {"name": shown(name, _LONGEST_NAME)}
                self._note("category_name_unprintable", f"category {own} becomes {shown(name)}")
        names = Counter(category.get("changes", category)["name"] for category in self._categories.values())
        for name, count in names.items():
            if count > 1:
                self._note("category_name_twice", f"{count} categories are {shown(name)}; each is a class of its own")
        if self._categories and sorted(self._categories) != list(range(1, len(self._categories) + 1)):
            ids = sorted(self._categories)
            self._note("category_ids_sparse", f"{len(ids)} ids from {ids[0]} to {ids[-1]}; classes go by their order")

    def _changes_of_category(self, index: int, record: dict) -> dict:
        own = whole(self._category_numbers.get(record["id"], record["id"]))
        return {**self._categories[own].get("changes", {}), "id": own}

    # ---- Image files ----------------------------------------------------------------------------------------

    def _look_at_files(self) -> None:
        todo = [(own, image) for own, image in self._images.items() if image.usable]
        paths = (os.path.join(self.image_folder, image.name) for _, image in todo)
        all_facts = look_at_all(paths, len(todo), full=self._options.full, jobs=self._options.jobs)
        names: set[str] = set()
        for (own, image), facts in zip(todo, all_facts, strict=True):
            for kind, message in facts.findings:
                self._note(kind, message, own)
            if image.name in names:
                self._note("file_named_twice", shown(image.name), own)
            names.add(image.name)
            image.usable = facts.usable
            if facts.usable:
                self._compare_sizes(own, image, facts.width, facts.height, facts.turned)
        if not any(image.usable for _, image in todo):
            self.stop("nothing_left", "no image file can be used" + self._folder_hint(todo))
        elif self.report.counts["file_missing"] and (hint := self._folder_hint(todo)):
            first = self.report.first["file_missing"]
            self.report.first["file_missing"] = dataclasses.replace(first, message=first.message + hint)

    def _compare_sizes(self, own: int | str, image: ImageEntry, width: int, height: int, turned: bool) -> None:
        recorded = image.recorded
        image.width, image.height = width, height
        if recorded is None:
            self._note("size_missing", f"{shown(image.name)} is {width} x {height}", own)
        elif turned and recorded == (height, width) and width != height:
            self._note(
                "exif_ambiguous",
                f"{shown(image.name)} is {width} x {height} when turned as EXIF says, and recorded as {height} x "
                f"{width}: its boxes may be meant either way; turn the file itself, or correct the record",
                own,
            )
            image.usable = False
        elif recorded != (width, height):
            self._note(
                "size_differs",
                f"{shown(image.name)} is {width} x {height}, not {recorded[0]} x {recorded[1]} as recorded",
                own,
            )

    def _folder_hint(self, images: list[tuple[Any, ImageEntry]]) -> str:
        missing = next((i.name for _, i in images if not os.path.exists(os.path.join(self.image_folder, i.name))), "")
        if os.path.dirname(missing) and os.path.exists(os.path.join(self.image_folder, os.path.basename(missing))):
            return "; names without the folder are there: drop it from file_name or from the image folder"
        return f" (the image folder is {shown(str(self.image_folder), 200)})" if missing else ""

    def _changes_of_image(self, index: int, record: dict) -> dict | None:
        image = self._images[record["id"]]
        if not image.usable:
            return None
        own = {"id": whole(record["id"])} if type(record["id"]) is float else {}
        if (record.get("width"), record.get("height")) == (image.width, image.height) or not image.width:
            return own
        return {**own, "width": image.width, "height": image.height}

    # ---- Annotations ----------------------------------------------------------------------------------------

    def _look_at_annotations(self) -> None:
        found = AnnotationCheck(
            self._images, self._categories, self._options, self._note, category_numbers=self._category_numbers
        )
        for key, index, record in self._records():
            if key == "annotations" and index is not None and isinstance(record, dict):
                self.changed |= bool(found.changes(index, record))
        if found.number_them:
            # COCO's evaluation takes a matched object with id 0 for an unmatched one, so ids have to start at 1.
            self._renumber = True
            self._note("annotations_numbered", "COCO's evaluation needs ids that are whole numbers from 1")
        most = self._options.most_objects
        for own, image in self._images.items():
            if most and image.objects > most:
                image.usable = False  # and with it, when the set is read again, its annotations
                self._note(
                    "too_many_objects",
                    f"{image.objects} objects; as many as {most} can be matched with anchors in half of the memory, or "
                    "are allowed by DATASETS.MAX_OBJECTS_PER_IMAGE: cut it into smaller images",
                    own,
                )
                found.kept["objects"] -= image.objects
            elif image.objects > _MANY_OBJECTS:
                self._note("many_objects", f"{image.objects} annotations: memory grows with them times anchors", own)
        self.extents = np.frombuffer(found.extents, np.float32).reshape(-1, 4)
        self.objects = [image.objects for image in self._images.values() if image.usable]
        self._judge_the_whole(found)

    def _judge_the_whole(self, found: AnnotationCheck) -> None:
        boxes, kept, report = found.boxes, found.kept, self.report
        if found.are_corners():
            self.stop(
                "boxes_are_corners",
                f"{boxes['over']} of {boxes['all']} boxes end outside their images if they are x y width height, and "
                "none does if they are x1 y1 x2 y2: `fpn-d2 data check ... --fix` converts them",
            )
        if not kept["objects"] and self._options.training:
            crowds = f", and {kept['crowds']} crowds" if kept["crowds"] else ""
            self.stop("nothing_left", f"no object to train on: no usable annotation that is not a crowd{crowds}")
        elif not report.totals["annotations"] and not report.counts["no_annotations"]:
            self._note("no_annotations", "the list 'annotations' is empty")
        if self._options.masks and kept["objects"] and kept["bare"] == kept["objects"]:
            self.stop("masks_missing", "its objects have boxes only, but MODEL.MASK_ON needs masks")
        if self._options.polygons_only and kept["run_lengths"]:
            self.stop(
                "masks_are_run_lengths",
                f"{kept['run_lengths']} masks are run-length encoded: set INPUT.MASK_FORMAT to bitmask",
            )


def check_coco(json_file: Path, image_folder: Path | None, options: CheckOptions) -> CocoCheck:
    """Check a COCO-format json; without a folder of images those are not looked at."""
    found = CocoCheck(lambda: read_records(json_file), str(json_file), image_folder, options)
    if has_byte_order_mark(json_file):
        found.report.add("byte_order_mark", "pycocotools stumbles over it")
    found.run()
    return found


def check_voc(folder: Path, split: str | None, classes: list[str] | None, options: CheckOptions) -> CocoCheck:
    """Check one split of a Pascal VOC folder; the arguments are those of `read_voc`."""
    content: dict = {}
    name = f"{split} of {folder}" if split else str(folder)
    found = CocoCheck(lambda: records_of(content), name, folder / "JPEGImages", options)
    content.update(read_voc(folder, split, classes, note=found.report.add, training=options.training))
    if content["images"]:
        found.run()
    else:
        found.stop("nothing_left", "no image has both a file and an XML file that can be read")
    return found


def _changed(record: dict, changes: dict) -> dict:
    return {key: value for key, value in {**record, **changes}.items() if value is not DROP} if changes else record


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < FARTHEST
