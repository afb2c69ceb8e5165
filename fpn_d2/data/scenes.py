"""A generator of synthetic detection scenes in COCO format: seeded, quick to make, hard enough to need a pyramid.

A scene is a textured background with objects of several classes at random places. Sizes are spread log-uniformly, so
that small and large objects are about equally many per octave and every level of a pyramid has work. Later objects
cover parts of earlier ones; boxes and masks are those of the visible part, as in COCO. Some images hold no object.
"""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

from fpn_d2.errors import UserError
from fpn_d2.files import writable_folder

from . import textures
from .shapes import SHAPES, render

# Written into every set of scenes; raise it whenever the same parameters give other pixels or annotations.
GENERATOR_VERSION = 2
# No object is placed so that less than this share of it, or of one placed before, stays visible.
MIN_VISIBLE = 0.4
PARAMETERS_FILE = "scenes.json"
_PLACEMENT_TRIES = 12
_JPEG_QUALITY = 95


def make_scenes(
    folder: str | os.PathLike,
    *,
    train: int = 600,
    val: int = 150,
    image_size: int = 256,
    seed: int = 0,
    min_size: float = 12.0,
    max_size: float | None = None,
    max_objects: int = 8,
    empty: float = 0.05,
    own_colour: float = 0.0,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Make scenes, or keep those that are there already with the same parameters.

    The folder appears complete or not at all: everything is written beside it first and renamed at the end. Scene
    ``i`` of a split depends on the seed and the drawing parameters only, not on how many scenes are made.

    Args:
        folder: Where to put ``images/{train,val}/*.jpg``, ``annotations/instances_{train,val}.json`` and
            ``scenes.json``, which records the parameters.
        train: Number of training scenes.
        val: Number of validation scenes.
        image_size: Height and width of a scene in pixels.
        seed: Same seed and parameters, same files to the last byte (with the same numpy and OpenCV).
        min_size: Smallest object, as sqrt(width * height) of its box before occlusion, in pixels.
        max_size: Largest object, measured likewise; 0.7 of ``image_size`` if None.
        max_objects: Each scene that is not empty is given 1 to this many objects. Fewer where there is no room.
        empty: Share of scenes without any object, 0 to 1.
        own_colour: Share of objects that have the colour of their class, 0 to 1. The others have any colour, so that
            at 0 only the shape tells the class, which takes a network trained from scratch long to learn.
        overwrite: Replace scenes that were made with other parameters.
        progress: Show a progress bar.

    Returns:
        The folder.

    Raises:
        UserError: If a parameter is out of range, or if the folder holds something else than these scenes.
    """
    folder = Path(folder).expanduser()
    if max_size is None:
        max_size = 0.7 * image_size
    parameters = {
        "generator_version": GENERATOR_VERSION,
        "train": train,
        "val": val,
        "image_size": image_size,
        "seed": seed,
        "min_size": float(min_size),
        "max_size": float(max_size),
        "max_objects": max_objects,
        "empty": float(empty),
        "own_colour": float(own_colour),
        "classes": list(SHAPES),
    }
    _check_parameters(parameters)
    if _made_before(folder, parameters, overwrite):
        return folder

    writable_folder(folder.parent)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    replaced = work.with_suffix(".replaced")
    try:
        with tqdm(total=train + val, desc="Making scenes", unit="scene", disable=not progress) as bar:
            for split_index, (split, count) in enumerate((("train", train), ("val", val))):
                _write_split(work, split, split_index, count, parameters, bar)
        (work / PARAMETERS_FILE).write_text(json.dumps(parameters, indent=2) + "\n")
        work.chmod(0o755)  # mkdtemp makes it private
        if overwrite and folder.exists():
            folder.rename(replaced)
        try:
            work.rename(folder)
        except OSError:  # another process was quicker: fine if it made the same
            if not _made_before(folder, parameters, overwrite=False):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return folder


def draw_scene(
    rng: np.random.Generator,
    *,
    image_size: int,
    min_size: float,
    max_size: float,
    objects: int,
    own_colour: float = 0.0,
) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """Draw one scene.

    Args:
        rng: Source of all randomness.
        image_size: Height and width in pixels.
        min_size: Smallest object, as sqrt(width * height) of its box before occlusion, in pixels.
        max_size: Largest object, measured likewise.
        objects: Number of objects to place; one that finds no room after several tries is left out.
        own_colour: Share of objects that have the colour of their class.

    Returns:
        The image, uint8 (image_size, image_size, 3) in BGR order, and for each object its class and the mask of its
        visible part, boolean (image_size, image_size), in the order of painting.
    """
    image = textures.background(rng, image_size, image_size)
    owner = np.full((image_size, image_size), -1, np.int32)  # which object is seen at each pixel
    names: list[str] = []
    full_areas: list[float] = []
    sizes = np.exp(rng.uniform(math.log(min_size), math.log(max_size), objects))
    # Large ones come first, more or less: so most objects find room, and yet some large ones cover small ones.
    sizes = sizes[np.argsort(-sizes * np.exp(rng.normal(0.0, 0.5, objects)), kind="stable")]
    for size in sizes:
        name = str(rng.choice(list(SHAPES)))
        alpha = render(name, float(size), rng.uniform(0.0, 2.0 * np.pi), float(np.exp(rng.uniform(-0.2, 0.2))))
        place = _find_place(rng, alpha, owner, full_areas)
        if place is None:
            continue
        rows, columns, alpha_part = place
        hue = list(SHAPES).index(name) / len(SHAPES) if rng.random() < own_colour else None
        _paint(rng, image, rows, columns, alpha_part, hue)
        owner[rows, columns][alpha_part > 0.5] = len(names)
        names.append(name)
        full_areas.append(float((alpha > 0.5).sum()))
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.0, 5.0))
    pixels = np.clip(np.round(image), 0, 255).astype(np.uint8)
    return pixels, [(name, owner == index) for index, name in enumerate(names)]


def _find_place(
    rng: np.random.Generator, alpha: np.ndarray, owner: np.ndarray, full_areas: list[float]
) -> tuple[slice, slice, np.ndarray] | None:
    """A random place, partly outside the image now and then, that leaves enough of every object visible.

    Returns:
        The rows and columns of the image that the object touches and the part of ``alpha`` that falls on them, or
        None if there was no such place in a few tries.
    """
    height, width = alpha.shape
    image_height, image_width = owner.shape
    solid = alpha > 0.5
    area = solid.sum()
    seen_before = np.bincount(owner[owner >= 0], minlength=len(full_areas))
    for _ in range(_PLACEMENT_TRIES):
        margin = 0.4 if rng.random() < 0.2 else 0.0  # share of a side that may lie outside
        top = int(round(rng.uniform(-margin * height, image_height - height + margin * height)))
        left = int(round(rng.uniform(-margin * width, image_width - width + margin * width)))
        rows = slice(max(top, 0), min(top + height, image_height))
        columns = slice(max(left, 0), min(left + width, image_width))
        part = np.s_[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        if solid[part].sum() < max(1.0, MIN_VISIBLE * area):
            continue
        covered = owner[rows, columns][solid[part]]
        hidden = np.bincount(covered[covered >= 0], minlength=len(full_areas))
        # Objects that are not touched keep what they have, so all of them may be tested alike.
        if all(seen_before[i] - hidden[i] >= MIN_VISIBLE * full for i, full in enumerate(full_areas)):
            return rows, columns, alpha[part]
    return None


def _paint(
    rng: np.random.Generator, image: np.ndarray, rows: slice, columns: slice, alpha: np.ndarray, hue: float | None
) -> None:
    below = image[rows, columns]
    weight = alpha[:, :, None]
    mean = (below * weight).sum(axis=(0, 1)) / weight.sum()
    surface = textures.fill(rng, *alpha.shape, against=mean, hue=hue)
    below += weight * (surface - below)


def _write_split(work: Path, split: str, split_index: int, count: int, parameters: dict, bar: tqdm) -> None:
    image_folder = work / "images" / split
    image_folder.mkdir(parents=True)
    category_ids = {name: index for index, name in enumerate(SHAPES, start=1)}
    images, annotations = [], []
    for index in range(count):
        rng = np.random.default_rng([parameters["seed"], split_index, index])
        share = parameters["empty"]
        is_empty = math.floor((index + 1) * share) > math.floor(index * share)  # evenly spread, the share exact
        pixels, objects = draw_scene(
            rng,
            image_size=parameters["image_size"],
            min_size=parameters["min_size"],
            max_size=parameters["max_size"],
            objects=0 if is_empty else int(rng.integers(1, parameters["max_objects"] + 1)),
            own_colour=parameters["own_colour"],
        )
        file_name = f"{index:06d}.jpg"
        _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        (image_folder / file_name).write_bytes(encoded.tobytes())
        height, width = pixels.shape[:2]
        images.append({"id": index + 1, "file_name": file_name, "height": height, "width": width})
        for name, mask in objects:
            rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": category_ids[name],
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "area": int(mask_util.area(rle)),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
                }
            )
        bar.update()
    annotation_file = work / "annotations" / f"instances_{split}.json"
    annotation_file.parent.mkdir(exist_ok=True)
    content = {
        "info": {"description": "Synthetic scenes of fpn_d2", "parameters": parameters},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for name, i in category_ids.items()],
    }
    annotation_file.write_text(json.dumps(content))


def _check_parameters(parameters: dict) -> None:
    for key in ("train", "val", "image_size", "max_objects", "seed"):
        low = 0 if key == "seed" else 1
        if isinstance(parameters[key], bool) or not isinstance(parameters[key], int) or parameters[key] < low:
            raise UserError(f"Expected {key} to be a whole number of at least {low}, got {parameters[key]!r}.")
    if parameters["image_size"] < 32:
        raise UserError(f"Expected image_size of at least 32 pixels, got {parameters['image_size']}.")
    low, high = parameters["min_size"], parameters["max_size"]
    if not 4.0 <= low <= high <= parameters["image_size"]:
        raise UserError(
            f"Expected 4 <= min_size <= max_size <= image_size ({parameters['image_size']} pixels), "
            f"got min_size {low:g} and max_size {high:g}."
        )
    for key in ("empty", "own_colour"):
        if not 0.0 <= parameters[key] <= 1.0:
            raise UserError(f"Expected the share {key} to lie between 0 and 1, got {parameters[key]:g}.")


def _made_before(folder: Path, parameters: dict, overwrite: bool) -> bool:
    """Whether the folder holds these very scenes.

    Raises:
        UserError: If it holds anything else that may not be overwritten.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    record = folder / PARAMETERS_FILE
    if not record.is_file():
        raise UserError(f"{folder} exists and does not hold scenes made here; choose another folder.")
    found = json.loads(record.read_text())
    if found == parameters:
        return True
    if overwrite:
        return False
    different = [key for key in parameters if found.get(key) != parameters[key]]
    raise UserError(
        f"{folder} holds scenes with other parameters ("
        + ", ".join(f"{key} {found.get(key)!r} there, {parameters[key]!r} asked for" for key in different)
        + "); choose another folder, or overwrite them with --overwrite."
    )
