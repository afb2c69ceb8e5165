"""Annotated sets with one fault each, made by code, and what stock Detectron2 and this package do with them.

    python -m tests.messy_data           the table in Markdown, for docs/reliability.md; takes some minutes
    python -m tests.messy_data NAME ...  of some
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

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


def _simple() -> None:
    """Faults of one entry."""
    annotation = ("annotations", 0)
    for name, kind, value in (
        ("box of zero width", "box_without_area", [4, 5, 0, 9]),
        ("box of negative height", "box_negative", [4, 30, 9, -9]),
        ("box with NaN", "box_not_finite", [4, float("nan"), 9, 9]),
        ("box with infinity", "box_not_finite", [4, 5, float("inf"), 9]),
        ("box outside its image", "box_outside", [WIDTH + 5, 5, 9, 9]),
        ("box of text", "box_wrong_type", ["4", "5", "9", "9"]),
        ("box of three numbers", "box_wrong_type", [4, 5, 9]),
        ("box that is an object", "box_wrong_type", {"x": 4, "y": 5, "w": 9, "h": 9}),
        ("empty box", "box_missing", []),
        ("no box", "box_missing", ...),
        ("box with integers of 2^63", "box_beyond_reason", [4, 5, 2**63, 2**63]),
        ("box with 1e300", "box_beyond_reason", [4, 5, 1e300, 9]),
    ):
        messy(name, kind)(setting(*annotation, "bbox", to=value))
    messy("box with integers of 2^63, masks on", "box_beyond_reason", masks=True)(
        setting(*annotation, "bbox", to=[4, 5, 2**63, 2**63])
    )
    messy("polygon with 1e300, masks on", "mask_broken", "mask_missing", masks=True)(
        setting(*annotation, "segmentation", to=[[1, 1, 1e300, 1, 5, 1e300]])
    )
    messy("polygon of two points, masks on", "mask_broken", "mask_missing", masks=True)(
        setting(*annotation, "segmentation", to=[[1, 1, 5, 5]])
    )
    messy("run lengths of another size, masks on", "mask_broken", "mask_missing", masks=True)(
        setting(*annotation, "segmentation", to={"size": [9, 9], "counts": [40, 41]})
    )
    messy("box partly outside", "box_partly_outside")(setting(*annotation, "bbox", to=[-5, -5, 20, 20]))
    messy("box that looks like x1 y1 x2 y2", "box_like_corners")(setting(*annotation, "bbox", to=[30, 30, 50, 45]))
    messy("negative area", "area_wrong")(setting(*annotation, "area", to=-5))
    messy("zero area", "area_wrong")(setting(*annotation, "area", to=0))
    messy("area as text", "area_wrong")(setting(*annotation, "area", to="168"))
    messy("iscrowd 2", "iscrowd_wrong")(setting(*annotation, "iscrowd", to=2))
    messy("crowd", "crowd")(setting(*annotation, "iscrowd", to=1))
    messy("unknown category", "category_unknown")(setting(*annotation, "category_id", to=9))
    messy("no category", "category_missing")(setting(*annotation, "category_id", to=...))
    messy("category id as text in an annotation", "category_unknown")(setting(*annotation, "category_id", to="1"))
    messy("image that does not exist", "image_unknown")(setting(*annotation, "image_id", to=99))
    messy("annotation without image", "image_unknown")(setting(*annotation, "image_id", to=...))
    messy("annotation id used twice", "annotation_id_twice")(setting("annotations", 3, "id", to=1))
    messy("annotation id true", "annotation_id_wrong")(setting(*annotation, "id", to=True))
    messy("annotation id of text", "annotations_numbered")(setting(*annotation, "id", to="a"))
    messy("annotation id beyond 64 bits", "annotation_id_wrong")(setting(*annotation, "id", to=2**70))
    messy("annotation id zero", "annotations_numbered")(setting(*annotation, "id", to=0))
    messy("annotation that is a number", "entry_not_object")(setting(*annotation, to=5))
    messy("image that is a list", "entry_not_object", "image_unknown")(setting("images", 3, to=[4]))
    messy("image id true", "image_id_wrong", "image_unknown")(setting("images", 3, "id", to=True))
    messy("image id beyond 64 bits", "image_id_beyond_64_bits")(_big_image_id)
    messy("image id used twice", "image_id_twice", "image_left_out", "image_unknown")(setting("images", 3, "id", to=1))
    messy("image ids of numbers and text", "image_ids_mixed", stops=True)(setting("images", 3, "id", to="4"))
    messy("image without id", "image_id_wrong", "image_unknown")(setting("images", 3, "id", to=...))
    messy("image without file name", "file_name_wrong", "image_left_out")(setting("images", 3, "file_name", to=...))
    messy("file name with NUL", "file_name_wrong", "image_left_out")(setting("images", 3, "file_name", to="4\0.png"))
    messy("image file that is missing", "file_missing", "image_left_out")(
        setting("images", 3, "file_name", to="gone.png")
    )
    messy("recorded size of another image", "size_differs")(_wrong_size)
    messy("no recorded size", "size_missing")(setting("images", 0, "width", to=...))
    messy("recorded size as text", "size_missing")(setting("images", 0, "width", to="64"))
    messy("category without name", "category_name_missing")(setting("categories", 0, "name", to=...))
    messy("category name with escape sequences", "category_name_unprintable")(
        setting("categories", 0, "name", to="\x1b[2J\x1b]0;title\x07ant")
    )
    messy("category name of 20,000 characters", "category_name_unprintable")(
        setting("categories", 0, "name", to="a" * 20_000)
    )
    messy("category id as text", "category_id_wrong", "category_unknown")(setting("categories", 0, "id", to="1"))
    messy("two names for a category id", "category_id_two_names", stops=True)(setting("categories", 1, "id", to=1))
    messy("two categories of one name", "category_name_twice")(setting("categories", 1, "name", to="ant"))
    messy("no categories", "not_coco", stops=True)(setting("categories", to=...))
    messy("no annotations at all", "not_coco", stops=True)(setting("annotations", to=...))
    messy("empty list of annotations", "nothing_left", stops=True)(setting("annotations", to=[]))
    messy("annotations that are an object", "not_coco", stops=True)(setting("annotations", to={}))


def _big_image_id(content: dict, folder: Path) -> None:
    content["images"][0]["id"] = 2**63
    content["annotations"][0]["image_id"] = content["annotations"][1]["image_id"] = 2**63


def _wrong_size(content: dict, folder: Path) -> None:
    content["images"][0] |= {"width": 20, "height": 15}


_simple()


@messy("all boxes as x1 y1 x2 y2", "boxes_are_corners", stops=True)
def _(content: dict, folder: Path) -> None:
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x + 20, y + 5, x + 20 + w, y + 5 + h]


@messy("text image ids", "image_id_text")
def _(content: dict, folder: Path) -> None:
    for record in (*content["images"], *content["annotations"]):
        key = "image_id" if "image_id" in record else "id"
        record[key] = f"{record[key]:04d}"


@messy("sparse category ids", "category_ids_sparse")
def _(content: dict, folder: Path) -> None:
    for record in content["categories"]:
        record["id"] *= 10
    for record in content["annotations"]:
        record["category_id"] *= 10


@messy("byte order mark", "byte_order_mark")
def _(content: dict, folder: Path) -> bytes:
    return b"\xef\xbb\xbf" + json.dumps(content).encode()


@messy("json in UTF-16", "byte_order_mark")
def _(content: dict, folder: Path) -> bytes:
    return json.dumps(content).encode("utf-16")


@messy("empty json", "json_empty", stops=True)
def _(content: dict, folder: Path) -> bytes:
    return b""


@messy("json cut short", "json_invalid", stops=True)
def _(content: dict, folder: Path) -> bytes:
    return json.dumps(content).encode()[:-60]


@messy("json nested 200,000 deep", "json_too_deep", stops=True)
def _(content: dict, folder: Path) -> bytes:
    return b'{"images": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@messy("json that is a list", "not_coco", stops=True)
def _(content: dict, folder: Path) -> bytes:
    return json.dumps(content["annotations"]).encode()


@messy("number of 5,000 digits", "json_invalid", stops=True)
def _(content: dict, folder: Path) -> bytes:
    return json.dumps(content).replace('"area": 168', '"area": ' + "9" * 5000, 1).encode()


def of_file(name: str, *kinds: str) -> Callable:
    """A fault of the last image's file, which ``spoil(path)`` makes."""

    def add(spoil: Callable[[Path], None]) -> Callable:
        def spoil_file(content: dict, folder: Path) -> None:
            path = folder / "images" / "4.png"
            path.unlink()
            spoil(path)
            if path.is_file() and not os.path.islink(path):
                try:
                    with Image.open(path) as image:
                        content["images"][3]["width"], content["images"][3]["height"] = image.size
                except Exception:  # no image: it keeps the size of the one that was there
                    pass

        messy(name, *kinds)(spoil_file)
        return spoil

    return add


def noise(*shape: int, high: int = 256, kind: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(kind)


@of_file("empty image file", "file_empty", "image_left_out")
def _(path: Path) -> None:
    path.touch()


@of_file("image file cut short", "file_truncated", "image_left_out")
def _(path: Path) -> None:
    write_image(path, WIDTH, HEIGHT)
    path.write_bytes(path.read_bytes()[:-2000])


@of_file("text as an image file", "not_an_image", "image_left_out")
def _(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>")


@of_file("FIFO as an image file", "file_not_regular", "image_left_out")
def _(path: Path) -> None:
    os.mkfifo(path)


@of_file("folder as an image file", "file_not_regular", "image_left_out")
def _(path: Path) -> None:
    path.mkdir()


@of_file("links in a circle as an image file", "file_unreadable", "image_left_out")
def _(path: Path) -> None:
    path.symlink_to(path.name)


@of_file("PNG of 210 megapixels", "image_too_large", "image_left_out")
def _(path: Path) -> None:
    Image.new("1", (15_000, 14_000)).save(path)


@of_file("16-bit PNG", "pixels_16_bit")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH, high=65536, kind=np.uint16)).save(path)


@of_file("floating-point TIFF in 0..1", "pixels_float")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH).astype(np.float32) / 255).save(path, "TIFF")


@of_file("floating-point TIFF in -1000..1000", "pixels_refused", "image_left_out")
def _(path: Path) -> None:
    Image.fromarray((noise(HEIGHT, WIDTH).astype(np.float32) - 128) * 8).save(path, "TIFF")


@of_file("32-bit TIFF of whole numbers", "pixels_refused", "image_left_out")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH, high=1 << 30, kind=np.int32)).save(path, "TIFF")


@of_file("CMYK JPEG", "pixels_cmyk")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH, 4), "CMYK").save(path, "JPEG")


@of_file("palette PNG", "pixels_palette")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH, 3)).convert("P").save(path)


@of_file("PNG with alpha", "pixels_alpha")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH, 4)).save(path)


@of_file("image of 1 x 1", "image_tiny", "box_outside")
def _(path: Path) -> None:
    Image.fromarray(noise(1, 1, 3)).save(path)


@of_file("image of 4000 x 10", "image_flat", "box_outside")
def _(path: Path) -> None:
    Image.fromarray(noise(10, 4000, 3)).save(path)


@messy("EXIF turns an image, size recorded upright", "exif_turned")
def _(content: dict, folder: Path) -> None:
    _turned(content, folder)
    content["images"][3] |= {"width": HEIGHT, "height": WIDTH}


@messy("EXIF turns an image, size recorded as stored", "exif_ambiguous", "image_left_out")
def _(content: dict, folder: Path) -> None:
    _turned(content, folder)


def _turned(content: dict, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(HEIGHT, WIDTH, 3)).save(folder / "images" / "4.jpg", exif=exif)
    content["images"][3]["file_name"] = "4.jpg"


@messy("absolute path to an image elsewhere", "file_outside_folder", "image_left_out")
def _(content: dict, folder: Path) -> None:
    (folder / "images" / "4.png").rename(folder / "4.png")
    content["images"][3]["file_name"] = str(folder / "4.png")


@messy("path with .. to an image elsewhere", "file_outside_folder", "image_left_out")
def _(content: dict, folder: Path) -> None:
    (folder / "images" / "4.png").rename(folder / "4.png")
    content["images"][3]["file_name"] = "../4.png"
