"""Reads a folder in Pascal VOC's layout into COCO's, so that both take the same way from there.

Detectron2's own reader (``detectron2.data.datasets.pascal_voc``) asks for ``.jpg`` files, complete XML and a list of
classes known beforehand; this one does not. Boxes come out the same: VOC's corners are 1-based and inclusive, so 1 is
subtracted from xmin and ymin. Objects marked as difficult are trained on, as they are there; in a set that is only
evaluated on they become crowds, so that to find one, or to miss it, counts for nothing, as VOC has it.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from pathlib import Path

from fpn_d2.errors import UserError, shown
from fpn_d2.files import locate

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_ENCODING = re.compile(rb"^(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)[\"'][^>]*\?>")
_EXPAT_READS = ("utf-8", "utf8", "utf-16", "us-ascii", "iso-8859-1")


def read_voc(
    folder: Path,
    split: str | None,
    classes: list[str] | None = None,
    *,
    note: Callable[..., None] = lambda *_: None,
    training: bool = True,
) -> dict:
    """Read one split of a Pascal VOC folder.

    Args:
        folder: Holds ``Annotations/*.xml``, ``ImageSets/Main/<split>.txt`` and ``JPEGImages``.
        split: Name of the list of images, such as "train"; None: all that have an XML file.
        classes: The classes in the order of their indices. If None, all that occur in ``Annotations``, sorted; in
            the whole folder, so that all splits agree.
        note: Takes what is wrong with a record that is left out: its kind, a message, the image's name.
        training: Whether difficult objects are ordinary ones, not crowds.

    Returns:
        The content of a COCO-format json whose ``file_name`` are relative to ``JPEGImages``.

    Raises:
        UserError: If a part of the layout is missing, there is no image, or nothing in it has a class.
    """
    annotation_folder = locate(folder / "Annotations", f"the annotations of {folder}", folder=True)
    image_folder = locate(folder / "JPEGImages", f"the images of {folder}", folder=True)
    xml_stems = {path.stem for path in annotation_folder.glob("*.xml")}
    names = sorted(xml_stems) if split is None else _names(folder, split)
    by_stem = {path.stem: path.name for path in image_folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES}
    if classes is None:
        found = _all_objects(annotation_folder, sorted(xml_stems))
        classes = sorted({name for objects in found for name, _, _ in objects if name})
        if not classes:
            raise UserError(f"the XML files in {annotation_folder} hold no object that can be read")
    category_ids = {name: index for index, name in enumerate(classes, start=1)}

    images, annotations = [], []
    for index, name in enumerate(names, start=1):
        if name not in by_stem:
            note("file_missing", f"{image_folder} has no image {shown(name)}", name)
            continue
        try:
            size, objects = _objects(annotation_folder / f"{name}.xml")
        except FileNotFoundError:
            note("xml_missing", f"{annotation_folder} has no {shown(name)}.xml", name)
            continue
        except (ValueError, OSError) as error:
            note("xml_unreadable", shown(str(error), 200), name)
            continue
        images.append({"id": index, "file_name": by_stem[name], "width": size[0], "height": size[1]})
        for number, (class_name, box, difficult) in enumerate(objects):
            if class_name not in category_ids:
                kind = "category_unknown" if class_name else "object_unnamed"
                there = f"{shown(class_name)} is none of {shown(', '.join(classes), 200)}" if class_name else ""
                note(kind, f"object {number} of {shown(name)}.xml" + (f": {there}" if there else ""), index)
                continue
            if difficult:
                note("difficult", "trained on" if training else "counts for nothing in the figures", index)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": category_ids[class_name],
                    "bbox": box,
                    "area": box[2] * box[3] if box else 0,
                    "iscrowd": int(difficult and not training),
                }
            )
    return {
        "info": {"description": f"{split or 'all'} of {folder}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
    }


def _names(folder: Path, split: str) -> list[str]:
    list_file = locate(folder / "ImageSets" / "Main" / f"{split}.txt", f"the split {split!r} of {folder}")
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{list_file} is not text in UTF-8") from None
    # A line may carry more than the name: VOC's lists per class add 1, 0 or -1.
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise UserError(f"{list_file} lists no image")
    return names


def _all_objects(folder: Path, stems: Iterable[str]) -> Iterable[list[tuple]]:
    for stem in stems:
        try:
            yield _objects(folder / f"{stem}.xml")[1]
        except (ValueError, OSError):  # said where the image is used
            continue


def _objects(xml_file: Path) -> tuple[tuple[int, int], list[tuple[str, list[float] | None, bool]]]:
    """Width and height as stated, or zeros; of each object the class, the box [x, y, width, height], if it is
    difficult.
    """
    root = _parse(xml_file)
    try:
        size = (int(root.findtext("size/width", "0")), int(root.findtext("size/height", "0")))
    except ValueError:
        size = (0, 0)
    objects = []
    for element in root.findall("object"):
        name = (element.findtext("name") or "").strip()
        try:
            corners = [float(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        except (TypeError, ValueError):
            corners = None
        box = None
        if corners:
            left, top = max(corners[0] - 1.0, 0.0), max(corners[1] - 1.0, 0.0)
            box = [left, top, corners[2] - left, corners[3] - top]
        objects.append((name, box, (element.findtext("difficult") or "0").strip() not in ("0", "")))
    return size, objects


def _parse(xml_file: Path) -> ET.Element:
    """The XML file's root; in whatever encoding its first line names that Python knows.

    Raises:
        ValueError: It is no XML, or not in its encoding.
        OSError: It cannot be read.
    """
    data = xml_file.read_bytes()
    declared = _ENCODING.match(data)
    encoding = declared[1].decode() if declared else "utf-8"
    try:
        if encoding.lower() not in _EXPAT_READS:  # gbk, big5, shift_jis, ...: expat knows no multi-byte encodings
            return ET.fromstring(data[declared.end() :].decode(encoding))
        return ET.fromstring(data)
    except LookupError:
        raise ValueError(f"{xml_file.name} is in {shown(encoding)}, which is no encoding that Python knows") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{xml_file.name} is not text in {encoding} as it says: {error.reason}") from None
    except ET.ParseError as error:
        hint = "" if declared or _is_utf8(data) else "; it is not in UTF-8: its first line has to name its encoding"
        raise ValueError(f"{xml_file.name} is not valid XML: {error}{hint}") from None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
