"""Reads a folder in Pascal VOC's layout into COCO's, so that both take the same way from there.

Detectron2's own reader (``detectron2.data.datasets.pascal_voc``) asks for ``.jpg`` files, complete XML and a list of
classes known beforehand; this one does not. Boxes come out the same: VOC's corners are 1-based and inclusive, so 1 is
subtracted from xmin and ymin. Objects marked as difficult are ordinary objects, as they are there.
"""

import xml.etree.ElementTree as ET
from pathlib import Path

from fpn_d2.files import locate

from .coco_check import image_size

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def read_voc(folder: Path, split: str, classes: list[str] | None = None) -> dict:
    """Read one split of a Pascal VOC folder.

    Args:
        folder: Holds ``Annotations/*.xml``, ``ImageSets/Main/<split>.txt`` and ``JPEGImages``.
        split: Name of the list of images, such as "train".
        classes: The classes in the order of their indices. If None, all that occur in ``Annotations``, sorted; in
            the whole folder, so that all splits agree.

    Returns:
        The content of a COCO-format json whose ``file_name`` are relative to ``JPEGImages``.

    Raises:
        FileNotFoundError: If a part of the layout, an image or an annotation is missing.
        ValueError: If an XML file cannot be read as VOC's, or names a class that is not in ``classes``.
    """
    annotation_folder = locate(folder / "Annotations", f"the annotations of {folder}", folder=True)
    image_folder = locate(folder / "JPEGImages", f"the images of {folder}", folder=True)
    list_file = locate(folder / "ImageSets" / "Main" / f"{split}.txt", f"the split {split!r} of {folder}")
    # A line may carry more than the name: VOC's lists per class add 1, 0 or -1.
    names = [line.split()[0] for line in list_file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{list_file} lists no image.")
    files = {path.name: path for path in sorted(image_folder.iterdir())}
    by_stem = {path.stem: path for path in files.values() if path.suffix.lower() in _IMAGE_SUFFIXES}
    xml_stems = {path.stem for path in annotation_folder.glob("*.xml")}
    for what, place, known in (("an image", image_folder, by_stem), ("an XML file", annotation_folder, xml_stems)):
        missing = [name for name in names if name not in known]
        if missing:
            raise FileNotFoundError(
                f"{list_file}: {len(missing)} of {len(names)} names have not {what} in {place}: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else '.'}"
            )
    if classes is None:
        stems = sorted(xml_stems)
        classes = sorted({name for stem in stems for name, _ in _objects(annotation_folder / f"{stem}.xml")[1]})
        if not classes:
            raise ValueError(f"The XML files in {annotation_folder} hold no object.")
    category_ids = {name: index for index, name in enumerate(classes, start=1)}

    images, annotations = [], []
    for index, name in enumerate(names, start=1):
        xml_file = annotation_folder / f"{name}.xml"
        size, objects = _objects(xml_file)
        width, height = size or image_size(by_stem[name])
        images.append({"id": index, "file_name": by_stem[name].name, "width": width, "height": height})
        for class_name, (left, top, right, bottom) in objects:
            if class_name not in category_ids:
                raise ValueError(f"{xml_file} names the class {class_name!r}; the classes are {', '.join(classes)}.")
            left, top = max(left - 1.0, 0.0), max(top - 1.0, 0.0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": category_ids[class_name],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": f"{split} of {folder}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
    }


def _objects(xml_file: Path) -> tuple[tuple[int, int] | None, list[tuple[str, tuple[float, ...]]]]:
    """The image's width and height, if they are stated, and class and corners of each object of one XML file."""
    try:
        root = ET.parse(xml_file).getroot()
    except ET.ParseError as error:
        raise ValueError(f"{xml_file} is not valid XML: {error}.") from error
    try:
        size = (int(root.findtext("size/width", "0")), int(root.findtext("size/height", "0")))
    except ValueError:
        size = (0, 0)
    objects = []
    for number, element in enumerate(root.findall("object")):
        name = (element.findtext("name") or "").strip()
        corners = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            box = tuple(float(corner) for corner in corners)
        except (TypeError, ValueError):
            box = ()
        if not name or not box:
            raise ValueError(
                f"{xml_file}: object {number}: expected a name and a bndbox of four numbers xmin, ymin, xmax, ymax, "
                f"got the name {name!r} and {corners}."
            )
        objects.append((name, box))
    return (size if min(size) > 0 else None), objects
