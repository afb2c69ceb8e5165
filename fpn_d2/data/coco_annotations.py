"""Checks the annotations of a COCO-format set one by one; see ``coco_check`` for the whole."""

import array
import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from fpn_d2.errors import shown_value

from .defects import KINDS, SKIP
from .run_lengths import fill_exactly

NUMBERS = (int, float)  # what a number in json becomes; bool, a subclass of int, is none
LARGEST_ID = (1 << 63) - 1
FARTHEST = 1e7  # pixels; beyond, a coordinate is an accident, and 32-bit arithmetic goes wrong
DROP = object()  # in a record's changes: the key goes
# Boxes are taken for corners if all of them can be, and this share of them ends outside its image otherwise.
_CORNERS_SHARE, _CORNERS_LEAST = 0.3, 3


@dataclasses.dataclass(frozen=True)
class CheckOptions:
    """What a set is going to be used for, and how closely to look."""

    training: bool = True  # there have to be objects
    masks: bool = False  # an object without a usable mask then becomes a crowd, which training and figures pass over
    polygons_only: bool = False  # run-length encoded masks stop (INPUT.MASK_FORMAT polygon)
    outside: bool = False  # image files may lie outside the image folder
    full: bool = False  # decode every pixel
    jobs: int = 0  # threads that look at images; 0: chosen
    corners: bool = False  # boxes are x1 y1 x2 y2
    most_objects: int = 0  # an image with more is left out; 0: none is


@dataclasses.dataclass(slots=True)
class ImageEntry:
    """One image: its size in pixels, 0 if nothing is known, and the number of annotations that are kept."""

    name: str
    width: int = 0
    height: int = 0
    usable: bool = True
    objects: int = 0
    recorded: tuple[int, int] | None = None


def whole(value: Any) -> Any:
    """An id without the decimal point that a table with an empty cell has left in it, as in 7.0; others as they are."""
    return int(value) if type(value) is float and value.is_integer() and abs(value) < 1 << 53 else value


class AnnotationCheck:
    """Goes over annotations in their order.

    Attributes:
        kept: Counts of what is kept: objects, crowds, run_lengths and bare (objects without a mask).
        boxes: Counts of boxes: all, over (ending outside their images), corners (that they could be).
        extents: Width and height of each object that is kept, and of its image, one after the other.
        number_them: Whether there was one without an id that COCO's tools can use.
    """

    def __init__(
        self,
        images: dict[int | str, ImageEntry],
        categories: dict[int, dict],
        options: CheckOptions,
        note: Callable[..., None],
        renumber: bool = False,
        category_numbers: dict[str, int] | None = None,
    ):
        """
        Args:
            images: The images by id.
            categories: The categories by id, with their ``keypoints``.
            options: What to look for.
            note: Takes findings, as `Report.add`.
            renumber: Whether annotations get ids from 1 on.
            category_numbers: What stands for category ids that are text.
        """
        self._images = images
        self._categories = categories
        self._options = options
        self._note = note
        self._renumber = renumber
        self._category_numbers = category_numbers or {}
        self._seen: set = set()
        self._number = 0
        self._point_told = False
        self.number_them = False
        self.kept: Counter = Counter()
        self.boxes: Counter = Counter()
        self.extents = array.array("f")

    def are_corners(self) -> bool:
        """Whether all boxes together look like x1 y1 x2 y2."""
        boxes = self.boxes
        many = boxes["over"] >= max(_CORNERS_LEAST, _CORNERS_SHARE * boxes["all"])
        return many and boxes["corners"] == boxes["all"]

    def changes(self, index: int, record: dict) -> dict | None:
        """What to change in an annotation; None: it is of no use."""
        own, of, category = record.get("id"), record.get("image_id"), record.get("category_id")
        changes: dict = {}
        if float in (type(own), type(of), type(category)):
            ids = {"id": own, "image_id": of, "category_id": category}
            changes = {key: whole(value) for key, value in ids.items() if type(value) is float}
            own, of, category = ({**ids, **changes}).values()
            if not self._point_told:
                self._point_told = True
                self._note("ids_with_point", f"in the annotations, as {shown_value(ids)}")
        shown_id = own if own is not None else f"entry {index}"
        if type(own) is int or type(own) is str:
            if own in self._seen:
                self._note("annotation_id_twice", f"entry {index} of the annotations", of, shown_id)
                return None
            self._seen.add(own)
            if type(own) is int and abs(own) > LARGEST_ID:
                self._note("annotation_id_wrong", f"entry {index} gets a new id", of, shown_id)
        elif own is not None:
            self._note("annotation_id_wrong", f"entry {index} gets a new id", of, shown_id)
        image = self._images.get(of) if type(of) is int or type(of) is str else None
        if image is None or not image.usable:
            kind = "image_unknown" if image is None else "image_left_out"
            self._note(kind, f"image_id is {shown_value(of)}", of, shown_id)
            return None
        if type(category) is str and category in self._category_numbers:
            category = changes["category_id"] = self._category_numbers[category]
        if type(category) is not int or category not in self._categories:
            kind = "category_missing" if category is None else "category_unknown"
            self._note(kind, f"category_id is {shown_value(category)}", of, shown_id)
            return None
        box = self._box(record.get("bbox"), image, of, shown_id)
        if box is None:
            return None
        if self._options.corners:
            changes["bbox"] = box
        self._fill(record, box, image, changes, of, shown_id)
        self._number += 1
        image.objects += 1
        self.number_them |= type(own) is not int or not 1 <= own <= LARGEST_ID
        if self._renumber:
            changes["id"] = self._number
        return changes

    def _box(self, box: Any, image: ImageEntry, of: Any, own: Any) -> list | None:
        """The box as [x, y, width, height]; None if it is of no use."""
        if type(box) is not list or len(box) != 4 or not all(type(value) in NUMBERS for value in box):
            kind = "box_missing" if box is None or box == [] else "box_wrong_type"
            self._note(kind, f"expected four numbers [x, y, width, height], got {shown_value(box)}", of, own)
            return None
        x, y, width, height = box
        if self._options.corners:
            width, height = width - x, height - y
            box = [x, y, width, height]
        boxes = self.boxes
        boxes["all"] += 1
        known = image.width > 0
        if x >= 0 and y >= 0 and width > 0 and height > 0 and known and x + width <= image.width:
            if y + height <= image.height:
                boxes["corners"] += width > x and height > y
                return box
        fault = self._fault(box, image, known)
        if fault in ("box_not_finite", "box_beyond_reason"):
            boxes["all"] -= 1
        elif known:
            corners = 0 <= x < width <= image.width and 0 <= y < height <= image.height
            over = x + width > image.width + 2 or y + height > image.height + 2
            boxes["corners"] += corners
            boxes["over"] += over
            if corners and over and not fault:
                fault = "box_like_corners"
        if not fault:
            fault = "box_partly_outside" if known and not _is_inside(box, image) else None
        if fault:
            size = f" in an image of {image.width} x {image.height}" if known else ""
            was = ""
            if fault == "box_outside" and image.recorded and _overlaps(box, *image.recorded):
                was = f", recorded as {image.recorded[0]} x {image.recorded[1]}: was it resized after it was annotated?"
            self._note(fault, f"{shown_value(box)}{size}{was}", of, own)
        return None if fault and KINDS[fault][0] == SKIP else box

    @staticmethod
    def _fault(box: list, image: ImageEntry, known: bool) -> str | None:
        x, y, width, height = box
        try:
            if not all(map(math.isfinite, box)):
                return "box_not_finite"
        except OverflowError:
            return "box_beyond_reason"
        if not all(-FARTHEST < value < FARTHEST for value in box):
            return "box_beyond_reason"
        if width < 0 or height < 0:
            return "box_negative"
        if width == 0 or height == 0:
            return "box_without_area"
        if known and not _overlaps(box, image.width, image.height):
            return "box_outside"
        return None

    def _fill(self, record: dict, box: list, image: ImageEntry, changes: dict, of: Any, own: Any) -> None:
        """Fill in what COCO's tools need, and what of the record's other entries has to change."""
        crowd = record.get("iscrowd")
        if type(crowd) is not int or crowd not in (0, 1):
            kind = "iscrowd_missing" if crowd is None or type(crowd) is bool else "iscrowd_wrong"
            self._note(kind, f"iscrowd is {shown_value(crowd)}", of, own)
            crowd = changes["iscrowd"] = int(crowd is True)
        if "ignore" in record:  # Detectron2 refuses this key; crowd is the mark that it and COCO know
            changes["ignore"] = DROP
            if record["ignore"]:
                self._note("ignore", f"ignore is {shown_value(record['ignore'])}", of, own)
                crowd = changes["iscrowd"] = 1
        area = record.get("area")
        if type(area) not in NUMBERS or not 0 < area < FARTHEST**2:
            kind = "area_missing" if area is None else "area_wrong"
            changes["area"] = box[2] * box[3]
            self._note(kind, f"area is {shown_value(area)}, the box's {changes['area']:.6g}", of, own)
        if "keypoints" in record or "num_keypoints" in record:
            self._fill_keypoints(record, changes, of, own)
        mask = record.get("segmentation")
        if mask and not _is_mask(mask, image):
            # Detectron2 would drop the whole object, box and all.
            mask = [polygon for polygon in mask if _is_polygon(polygon)] if isinstance(mask, list) else []
            changes["segmentation"] = mask
            self._note("mask_broken", f"{len(mask)} usable polygons are left", of, own)
        self.kept["crowds" if crowd else "objects"] += 1
        self.kept["run_lengths"] += isinstance(mask, dict) and not crowd
        if not crowd and image.width:
            self.extents.extend((*box[2:], image.width, image.height))
        if crowd:
            self._note("crowd", "an iscrowd region", of, own)
        if self._options.masks and not mask:
            x, y, width, height = box
            changes["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
            changes["iscrowd"] = 1
            if not crowd:
                self.kept["bare"] += 1
                self._note("mask_missing", "training and evaluation pass over it", of, own)

    def _fill_keypoints(self, record: dict, changes: dict, of: Any, own: Any) -> None:
        points = record.get("keypoints")
        names = self._categories[changes.get("category_id", record["category_id"])]["keypoints"]
        expected = 3 * len(names) if isinstance(names, list) and names else None
        if points and not (
            isinstance(points, list)
            and len(points) % 3 == 0
            and expected in (None, len(points))
            and all(type(value) in NUMBERS and -FARTHEST < value < FARTHEST for value in points)
        ):
            self._note("keypoints_wrong", f"{shown_value(points)} instead of x, y, v for each keypoint", of, own)
            changes["keypoints"], changes["num_keypoints"] = DROP, 0
        elif points and type(record.get("num_keypoints")) is not int:
            changes["num_keypoints"] = sum(visibility > 0 for visibility in points[2::3])
            self._note("num_keypoints_missing", f"{changes['num_keypoints']} are labelled", of, own)


def _overlaps(box: list, width: int, height: int) -> bool:
    x, y, box_width, box_height = box
    return x < width and y < height and x + box_width > 0 and y + box_height > 0


def _is_inside(box: list, image: ImageEntry) -> bool:
    x, y, width, height = box
    return x >= 0 and y >= 0 and x + width <= image.width and y + height <= image.height


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    try:
        # One number that is not finite spoils the sum; quicker than one by one.
        return math.isfinite(sum(polygon)) and -FARTHEST < min(polygon) and max(polygon) < FARTHEST
    except (TypeError, OverflowError):
        return False


def _is_mask(segmentation: Any, image: ImageEntry) -> bool:
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        fits = size == [image.height, image.width] if image.width else _is_size(size)
        return fits and fill_exactly(segmentation.get("counts"), size[0] * size[1])
    return isinstance(segmentation, list) and all(map(_is_polygon, segmentation))


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < FARTHEST for side in size)
