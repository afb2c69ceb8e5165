"""Small data sets for the tests, written into a folder that the test owns."""

import copy
import json
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode, get_cfg
from PIL import Image

from fpn_d2 import add_fpn_d2_config

WIDTH, HEIGHT = 40, 30

# Category and image ids with gaps and out of order, an image without objects, a crowd, a polygon.
COCO = {
    "info": {},
    "images": [
        {"id": 7, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        {"id": 3, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 9, "file_name": "empty.png", "width": WIDTH, "height": HEIGHT},
    ],
    "categories": [{"id": 20, "name": "zebra"}, {"id": 4, "name": "ant"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 20, "bbox": [2, 3, 10, 12], "area": 120, "iscrowd": 0},
        {"id": 2, "image_id": 3, "category_id": 4, "bbox": [0, 0, 8.5, 9], "area": 76.5, "iscrowd": 0},
        {"id": 3, "image_id": 3, "category_id": 20, "bbox": [20, 5, 15, 20], "area": 300, "iscrowd": 0},
        {"id": 5, "image_id": 7, "category_id": 4, "bbox": [15, 15, 10, 10], "area": 100, "iscrowd": 1},
    ],
}


def coco_content() -> dict:
    """A copy of ``COCO`` that the test may spoil."""
    return copy.deepcopy(COCO)


def write_image(path: Path, width: int = WIDTH, height: int = HEIGHT) -> None:
    """Write an image of noise that depends on the file's name only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def write_coco(folder: Path, content: dict) -> tuple[str, str]:
    """Write the json and the images that it lists; return the paths of the json and of the image folder."""
    json_file = folder / "set.json"
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(content))
    for image in content.get("images", []):
        if isinstance(image, dict) and isinstance(image.get("file_name"), str):
            write_image(folder / "images" / image["file_name"])
    (folder / "images").mkdir(exist_ok=True)
    return str(json_file), str(folder / "images")


def write_xml(
    folder: Path,
    name: str,
    objects: list,
    size: tuple | None = (WIDTH, HEIGHT),
    extra: str = "<difficult>0</difficult>",
) -> None:
    """Write the annotation of one image in Pascal VOC's format; ``objects`` are pairs of class and corners."""
    parts = [f"<annotation><filename>{name}</filename>"]
    if size:
        parts.append(f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>")
    for label, (xmin, ymin, xmax, ymax) in objects:
        parts.append(
            f"<object><name>{label}</name>{extra}<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin>"
            f"<xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"
        )
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{name}.xml").write_text("".join(parts) + "</annotation>")


def config(output: Path, **datasets) -> CfgNode:
    """Detectron2's configuration with our keys and the given keys of ``DATASETS``."""
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.OUTPUT_DIR = str(output)
    for key, value in datasets.items():
        cfg.DATASETS[key] = value
    return cfg
