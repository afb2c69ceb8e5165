"""What can be wrong with a set of annotated images, and the report of what was found."""

import dataclasses
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tabulate import tabulate

from fpn_d2.errors import shown
from fpn_d2.files import UNFINISHED, writing

# What becomes of a record with a defect.
STOP = "stops"  # nothing sound can be made of the set as it is
SKIP = "left out"  # the record is of no use; the others are
MEND = "mended"  # a wrong value is replaced by the right one
FILL = "filled in"  # what COCO's tools ask for and can be derived; no defect
TELL = "kept"  # unusual, and used as it is; no defect

# kind -> (what becomes of it, what it is called where it is counted)
KINDS: dict[str, tuple[str, str]] = {
    # the file
    "json_empty": (STOP, "an empty file"),
    "json_invalid": (STOP, "text that is not valid json"),
    "json_too_deep": (STOP, "json nested without end"),
    "not_coco": (STOP, "another structure than COCO's"),
    "byte_order_mark": (FILL, "a byte order mark"),
    "info_missing": (FILL, "no 'info'"),
    "ids_with_point": (FILL, "ids with a decimal point, as 7.0"),
    "entry_not_object": (SKIP, "an entry that is no object"),
    # images
    "image_id_wrong": (SKIP, "an image id that is neither a whole number nor text"),
    "image_id_twice": (SKIP, "an image id that is used twice"),
    "image_ids_mixed": (STOP, "image ids of which some are numbers and some text"),
    "image_id_beyond_64_bits": (TELL, "an image id beyond 64 bits"),
    "image_id_text": (TELL, "an image id that is text"),
    "file_name_wrong": (SKIP, "an image without a usable file name"),
    "file_outside_folder": (SKIP, "an image file outside the image folder"),
    "file_named_twice": (TELL, "an image file that is named twice"),
    "file_missing": (SKIP, "an image file that is missing"),
    "file_empty": (SKIP, "an empty image file"),
    "file_not_regular": (SKIP, "an image file that is a folder, a pipe or a device"),
    "file_unreadable": (SKIP, "an image file that may not be read"),
    "not_an_image": (SKIP, "a file that is no image"),
    "file_truncated": (SKIP, "an image file that is cut short or broken"),
    "image_too_large": (SKIP, "an image too large to decode"),
    "size_differs": (MEND, "a recorded size that differs from the file's"),
    "size_missing": (FILL, "an image without recorded size"),
    "exif_ambiguous": (SKIP, "a recorded size from before the turn that EXIF asks for"),
    "exif_turned": (TELL, "an image that EXIF turns"),
    "pixels_refused": (SKIP, "pixels that have no right reading as 8 bits"),
    "pixels_16_bit": (TELL, "16-bit pixels"),
    "pixels_float": (TELL, "floating-point pixels"),
    "pixels_cmyk": (TELL, "CMYK pixels"),
    "pixels_palette": (TELL, "pixels from a palette"),
    "pixels_alpha": (TELL, "an alpha channel"),
    "pixels_unusual": (TELL, "another kind of pixels"),
    "image_tiny": (TELL, "an image of a few pixels"),
    "image_flat": (TELL, "a very flat image"),
    "several_frames": (TELL, "a file of several pictures"),
    "too_many_objects": (SKIP, "an image with more objects than can be matched with anchors"),
    "many_objects": (TELL, "an image with thousands of annotations"),
    # categories
    "category_id_wrong": (SKIP, "a category id that is no whole number of 64 bits"),
    "category_id_twice": (SKIP, "a category that is there twice"),
    "category_id_two_names": (STOP, "a category id with two names"),
    "category_name_missing": (MEND, "a category without a name"),
    "category_name_unprintable": (MEND, "a category name that cannot be printed"),
    "category_name_twice": (TELL, "a category name that stands for several ids"),
    "category_ids_text": (FILL, "category ids that are text"),
    "category_ids_sparse": (TELL, "category ids with gaps"),
    # annotations
    "no_annotations": (TELL, "no annotations"),
    "nothing_left": (STOP, "nothing left to train on"),
    "annotation_id_wrong": (MEND, "an annotation id that is no whole number of 64 bits"),
    "annotation_id_twice": (SKIP, "an annotation id that is used twice"),
    "annotations_numbered": (FILL, "annotations without ids from 1"),
    "image_unknown": (SKIP, "an annotation of an image that does not exist"),
    "image_left_out": (SKIP, "an annotation of an image that is left out"),
    "category_missing": (SKIP, "an annotation without a category"),
    "category_unknown": (SKIP, "an annotation of an unknown category"),
    "box_missing": (SKIP, "an annotation without a box"),
    "box_wrong_type": (SKIP, "a box that is not four numbers"),
    "box_not_finite": (SKIP, "a box that is not finite"),
    "box_beyond_reason": (SKIP, "a box of more pixels than an image has"),
    "box_negative": (SKIP, "a box of negative width or height"),
    "box_without_area": (SKIP, "a box without area"),
    "box_outside": (SKIP, "a box outside its image"),
    "box_partly_outside": (TELL, "a box partly outside its image"),
    "box_like_corners": (TELL, "a box that looks like x1 y1 x2 y2"),
    "boxes_are_corners": (STOP, "boxes that are x1 y1 x2 y2, not x y width height"),
    "area_wrong": (MEND, "an area that is negative, zero or no number"),
    "area_missing": (FILL, "an annotation without area"),
    "iscrowd_wrong": (MEND, "an iscrowd that is neither 0 nor 1"),
    "iscrowd_missing": (FILL, "an annotation without iscrowd"),
    "ignore": (FILL, "an object marked with ignore, which becomes a crowd"),
    "crowd": (TELL, "a crowd"),
    "mask_broken": (MEND, "a mask with unusable polygons"),
    "mask_missing": (MEND, "an object without mask, which becomes a crowd"),
    "masks_missing": (STOP, "no masks at all"),
    "masks_are_run_lengths": (STOP, "masks as run lengths"),
    "keypoints_wrong": (MEND, "keypoints that are not triples of numbers"),
    "num_keypoints_missing": (FILL, "keypoints without their number"),
    # Pascal VOC
    "xml_unreadable": (SKIP, "an XML file that cannot be read"),
    "xml_missing": (SKIP, "an image without an XML file"),
    "object_unnamed": (SKIP, "an object without a class name"),
    "difficult": (TELL, "an object marked as difficult"),
}


@dataclasses.dataclass(frozen=True)
class Defect:
    """One finding. ``image`` and ``annotation`` are ids as the file has them; None where it is not about one."""

    kind: str
    message: str
    image: Any = None
    annotation: Any = None

    def where(self) -> str:
        """Phrase that names the record."""
        parts = [f"image {shown(self.image, 40)}"] if self.image is not None else []
        parts += [f"annotation {shown(self.annotation, 40)}"] if self.annotation is not None else []
        return ", ".join(parts)

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where(), self.message)))


class Report:
    """Counts of what was found, with the first of each kind; the whole list is kept on disk, not in memory."""

    def __init__(self, source: str):
        """
        Args:
            source: Name of the set, for the messages.
        """
        self.source = shown(source, 300)
        self.counts: Counter[str] = Counter()
        self.first: dict[str, Defect] = {}
        self.totals: dict[str, int] = {}  # images, annotations, categories: as they are in the file
        self._list = tempfile.SpooledTemporaryFile(max_size=1 << 22, mode="w+", encoding="utf-8")  # noqa: SIM115

    def add(self, kind: str, message: str, image: Any = None, annotation: Any = None) -> None:
        """Note one finding; ``message`` is a sentence without its full stop."""
        defect = Defect(kind, message, image, annotation)
        if not self.counts[kind]:
            self.first[kind] = defect
        self.counts[kind] += 1
        self._list.write(json.dumps([kind, message, _plain(image), _plain(annotation)]) + "\n")

    def count(self, *fates: str) -> int:
        """Number of findings that are dealt with in one of these ways."""
        return sum(n for kind, n in self.counts.items() if KINDS[kind][0] in fates)

    def defects(self) -> Iterator[Defect]:
        """All findings, in the order in which they were made."""
        self._list.seek(0)
        for line in self._list:
            yield Defect(*json.loads(line))
        self._list.seek(0, os.SEEK_END)

    def kinds(self, *fates: str) -> list[str]:
        """Kinds that were found and are dealt with in one of these ways, the most frequent first."""
        return [kind for kind, _ in self.counts.most_common() if KINDS[kind][0] in fates]

    def phrase(self, *fates: str) -> str:
        """Counts by kind, with the first of each: "3 x a box without area (first: image 1, annotation 7: ...)"."""
        return "; ".join(map(self.counted, self.kinds(*fates)))

    def counted(self, kind: str) -> str:
        """The part of `phrase` on one kind that was found."""
        first = "first: " if self.counts[kind] > 1 else ""
        return f"{self.counts[kind]} x {KINDS[kind][1]} ({first}{self.first[kind]})"

    def reasons(self) -> str:
        """Why the set cannot be used as it is; empty if it can."""
        return "; ".join(self.first[kind].message for kind in self.kinds(STOP))

    def table(self) -> str:
        """What was found, for people: a line for each kind, the gravest first."""
        totals = ", ".join(f"{number} {key}" for key, number in self.totals.items())
        rows = [
            [self.counts[kind], KINDS[kind][1], fate, str(self.first[kind])]
            for fate in (STOP, SKIP, MEND, FILL, TELL)
            for kind in self.kinds(fate)
        ]
        head = f"{self.source}: {totals}" if totals else self.source
        if not rows:
            return f"{head}\nNo defects."
        return f"{head}\n" + tabulate(rows, ["count", "what", "is", "first"], disable_numparse=True)

    def write(self, path: str | os.PathLike, **more: Any) -> None:
        """Write all of it as json: ``source``, ``totals``, ``counts`` by kind, ``defects`` one a line.

        Args:
            path: The file; it appears whole or not at all.
            **more: Further entries at the top.

        Raises:
            UserError: It cannot be written.
        """
        head = {"source": self.source, **more, "totals": self.totals, "counts": dict(self.counts.most_common())}
        partial = f"{os.fspath(path)}{UNFINISHED}"
        with writing(path), open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(head, indent=1)[:-2] + ',\n "defects": [')
            for number, defect in enumerate(self.defects()):
                record = {"kind": defect.kind, "fate": KINDS[defect.kind][0]}
                record |= {"image_id": defect.image, "annotation_id": defect.annotation, "message": defect.message}
                file.write((",\n  " if number else "\n  ") + json.dumps(record))
            file.write("\n ]\n}\n")
        os.replace(partial, path)


def _plain(value: Any) -> Any:
    """An id for the report: as it is where it is a number or a short text, else in words."""
    if value is None or (type(value) is int and abs(value) < 1 << 63):
        return value
    return shown(value) if not isinstance(value, bool) else repr(value)
