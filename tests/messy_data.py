"""Annotated sets with one fault each, made by code, and what the check of data finds in them.

`tests.messy_table` shows what stock Detectron2 and this package do with them.
"""

import json
from pathlib import Path

from tests import messy_images
from tests.messy_sets import CASES, HEIGHT, WIDTH, Messy, messy, setting, sound_content, write_messy

# messy_images adds the sets with faults of image files to CASES.
__all__ = ["CASES", "Messy", "messy_images", "sound_content", "write_messy"]


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
        ("box of null", "box_wrong_type", [None, None, None, None]),
        ("box of true and false", "box_wrong_type", [True, True, True, True]),
        ("box in a list of boxes", "box_wrong_type", [[4, 5, 9, 9]]),
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
    messy("run lengths, masks on", "masks_are_run_lengths", masks=True, stops=True)(
        setting(*annotation, "segmentation", to={"size": [HEIGHT, WIDTH], "counts": [100, 40, HEIGHT * WIDTH - 140]})
    )
    messy("crowd of run lengths that mean nothing, masks on", "mask_broken", masks=True)(_crowd_of_nonsense)
    messy("no masks though they are on", "masks_missing", "mask_missing", masks=True, stops=True)(_without_masks)
    messy("keypoints that are not triples", "keypoints_wrong")(setting(*annotation, "keypoints", to=[1, 2]))
    messy("box partly outside", "box_partly_outside")(setting(*annotation, "bbox", to=[-5, -5, 20, 20]))
    messy("box that looks like x1 y1 x2 y2", "box_like_corners")(setting(*annotation, "bbox", to=[30, 30, 50, 45]))
    messy("negative area", "area_wrong")(setting(*annotation, "area", to=-5))
    messy("zero area", "area_wrong")(setting(*annotation, "area", to=0))
    messy("area as text", "area_wrong")(setting(*annotation, "area", to="168"))
    messy("iscrowd 2", "iscrowd_wrong")(setting(*annotation, "iscrowd", to=2))
    messy("infinite area", "area_wrong")(setting(*annotation, "area", to=float("inf")))
    messy("iscrowd true", "iscrowd_missing")(setting(*annotation, "iscrowd", to=True))
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
    messy("ids with a decimal point", "ids_with_point")(_ids_with_point)
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
    messy("image that is there twice", "image_id_twice")(
        lambda content, _: content["images"].append(content["images"][0])
    )
    messy("category that is there twice", "category_id_twice")(
        lambda content, _: content["categories"].append(content["categories"][0])
    )
    messy("category without name", "category_name_missing")(setting("categories", 0, "name", to=...))
    messy("category name with escape sequences", "category_name_unprintable")(
        setting("categories", 0, "name", to="\x1b[2J\x1b]0;title\x07ant")
    )
    messy("category name of 20,000 characters", "category_name_unprintable")(
        setting("categories", 0, "name", to="a" * 20_000)
    )
    messy("category name with half of a character", "category_name_unprintable")(
        setting("categories", 0, "name", to="ant\ud800")
    )
    messy("category name that is a number", "category_name_missing")(setting("categories", 0, "name", to=5))
    messy("category id as text", "category_id_wrong", "category_unknown")(setting("categories", 0, "id", to="1"))
    messy("two names for a category id", "category_id_two_names", stops=True)(setting("categories", 1, "id", to=1))
    messy("two categories of one name", "category_name_twice")(setting("categories", 1, "name", to="ant"))
    messy("no categories", "not_coco", stops=True)(setting("categories", to=...))
    messy("no annotations at all", "not_coco", stops=True)(setting("annotations", to=...))
    messy("empty list of annotations", "nothing_left", stops=True)(setting("annotations", to=[]))
    messy("annotations that are null", "not_coco", stops=True)(setting("annotations", to=None))
    messy("empty list of images", "not_coco", stops=True)(setting("images", to=[]))
    messy("annotations that are an object", "not_coco", stops=True)(setting("annotations", to={}))


def _big_image_id(content: dict, folder: Path) -> None:
    content["images"][0]["id"] = 2**63
    content["annotations"][0]["image_id"] = content["annotations"][1]["image_id"] = 2**63


def _wrong_size(content: dict, folder: Path) -> None:
    content["images"][0] |= {"width": 20, "height": 15}


def _crowd_of_nonsense(content: dict, folder: Path) -> None:
    content["annotations"][0] |= {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [9, 1 << 40]}}


def _without_masks(content: dict, folder: Path) -> None:
    for annotation in content["annotations"]:
        del annotation["segmentation"]


def _ids_with_point(content: dict, folder: Path) -> None:
    """As tables leave them that had an empty cell."""
    for record in (*content["images"], *content["annotations"], *content["categories"]):
        for key in ("id", "image_id", "category_id"):
            if key in record:
                record[key] = float(record[key])


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


@messy("category ids of text everywhere", "category_ids_text")
def _(content: dict, folder: Path) -> None:
    for record in (*content["categories"], *content["annotations"]):
        key = "category_id" if "category_id" in record else "id"
        record[key] = str(record[key])


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


@messy("json with text behind it", "json_invalid", stops=True)
def _(content: dict, folder: Path) -> bytes:
    return json.dumps(content).encode() + b"\n// end"


@messy("json in Latin-1", "json_invalid", stops=True)
def _(content: dict, folder: Path) -> bytes:
    content["categories"][0]["name"] = "frelon g\u00e9ant"
    return json.dumps(content, ensure_ascii=False).encode("latin-1")


@messy("two lists of annotations", "json_invalid", stops=True)
def _(content: dict, folder: Path) -> bytes:
    return json.dumps(content).encode()[:-1] + b', "annotations": []}'


@messy("100,000 annotations on one image", "many_objects")
def _(content: dict, folder: Path) -> None:
    first = content["annotations"][0]
    content["annotations"] += [{**first, "id": 100 + i} for i in range(100_000)]
