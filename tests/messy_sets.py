"""What makes a set with one fault: the sound set, and the ways to spoil it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from tests.data.small_sets import write_image

WIDTH, HEIGHT = 64, 48


@dataclasses.dataclass(frozen=True)
class Messy:
    """One set with one fault.

    ``spoil(content, folder)`` changes the content of the json, or the files below ``folder``; bytes that it returns
    are the json. ``kinds`` are those of the defects that have to be found, and no others that stop, leave out or mend.
    """

    name: str
    spoil: Callable[[dict, Path], bytes | None]
    kinds: tuple[str, ...]
    stops: bool = False  # whether nothing can be trained on whatever DATASETS.ON_BAD_DATA says
    masks: bool = False


CASES: dict[str, Messy] = {}


def messy(name: str, *kinds: str, **options: bool) -> Callable:
    def add(spoil: Callable) -> Callable:
        CASES[name] = Messy(name, spoil, kinds, **options)
        return spoil

    return add


def sound_content() -> dict:
    """Four images, two classes, two objects on each image."""
    images = [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2, 3, 4)]
    annotations = []
    for image in images:
        for k in (0, 1):
            box = [4 + 20 * k, 5 + 3 * image["id"], 14 + k, 12]
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "category_id": k + 1, "bbox": box})
            annotations[-1] |= {"area": box[2] * box[3], "iscrowd": 0}
    categories = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def write_messy(case: Messy, folder: Path) -> tuple[str, str]:
    """Write the set of ``case``; its json and its folder of images."""
    content = sound_content()
    for image in content["images"]:
        write_image(folder / "images" / image["file_name"], WIDTH, HEIGHT)
    if case.masks:
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    raw = case.spoil(content, folder)
    (folder / "set.json").write_bytes(json.dumps(content).encode() if raw is None else raw)
    return str(folder / "set.json"), str(folder / "images")


def setting(*path: object, to: object) -> Callable:
    """Sets one entry of the content; ``...`` takes it away."""

    def spoil(content: dict, folder: Path) -> None:
        node = content
        for key in path[:-1]:
            node = node[key]
        if to is ...:
            del node[path[-1]]
        else:
            node[path[-1]] = to

    return spoil
