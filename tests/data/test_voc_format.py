import numpy as np
import pytest
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.structures import BoxMode
from PIL import Image

from fpn_d2.data.voc_format import read_voc

from .small_sets import HEIGHT, WIDTH, write_image, write_xml


def test_boxes_and_classes_are_those_of_detectron2s_reader(voc, monkeypatch):
    monkeypatch.setitem(vars(np), "str", str)  # Detectron2 v0.6 uses the name that numpy 1.24 dropped
    (voc / "ImageSets" / "Main" / "train.txt").write_text("one\ntwo\n")
    classes = ["emu", "wolf", "cat"]
    ours = read_voc(voc, "train", classes)
    theirs = load_voc_instances(str(voc), "train", classes)
    for image, record in zip(ours["images"], theirs, strict=True):
        assert (image["width"], image["height"]) == (record["width"], record["height"])
        assert str(voc / "JPEGImages" / image["file_name"]) == record["file_name"]
        annotations = [a for a in ours["annotations"] if a["image_id"] == image["id"]]
        assert [BoxMode.convert(a["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for a in annotations] == [
            obj["bbox"] for obj in record["annotations"]
        ]
        assert [a["category_id"] - 1 for a in annotations] == [obj["category_id"] for obj in record["annotations"]]


def test_classes_come_sorted_from_the_whole_folder(voc):
    for split in ("train", "val"):
        assert [c["name"] for c in read_voc(voc, split)["categories"]] == ["cat", "emu", "wolf"]


def test_png_without_stated_size_and_zero_based_box(voc):
    content = read_voc(voc, "val")
    assert content["images"] == [{"id": 1, "file_name": "three.png", "width": 50, "height": 20}]
    assert content["annotations"][0]["bbox"] == [0, 0, 9, 9]
    assert content["annotations"][0]["area"] == 81


def test_first_pixel_is_number_one(voc):
    """Boxes count pixels from 1, both ends included; those of some tools count from 0."""
    for corners, expected in (((1, 1, 3, 4), [0, 0, 3, 4]), ((2, 3, 3, 4), [1, 2, 2, 2]), ((0, 1, 3, 4), [0, 0, 3, 4])):
        write_xml(voc, "three", [("emu", corners)], size=None, extra="")
        (annotation,) = read_voc(voc, "val")["annotations"]
        assert annotation["bbox"] == expected and annotation["area"] == expected[2] * expected[3]


@pytest.mark.parametrize("missing", ["Annotations", "JPEGImages"])
def test_missing_part_of_the_layout(voc, missing):
    (voc / missing).rename(voc / (missing + "s"))
    with pytest.raises(FileNotFoundError, match=f"{missing}.* Did you mean .*{missing}s"):
        read_voc(voc, "train")


def test_missing_split_names_the_near_one(voc):
    with pytest.raises(FileNotFoundError, match=r"split 'trian'.*trian.txt\. Did you mean .*train.txt"):
        read_voc(voc, "trian")


def test_empty_split(voc):
    (voc / "ImageSets" / "Main" / "train.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no image"):
        read_voc(voc, "train")


def test_missing_image_and_annotation(voc):
    (voc / "JPEGImages" / "one.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 names have not an image in .*JPEGImages: one"):
        read_voc(voc, "train")
    write_image(voc / "JPEGImages" / "one.jpg")
    (voc / "Annotations" / "two.xml").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 names have not an XML file in .*Annotations: two"):
        read_voc(voc, "train")


def test_class_that_is_not_in_the_list(voc):
    with pytest.raises(ValueError, match="one.xml names the class 'wolf'; the classes are cat, dog"):
        read_voc(voc, "train", ["cat", "dog"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "one.xml is not valid XML"),
        (
            "<annotation><object><name>cat</name></object></annotation>",
            "one.xml: object 0: expected a name and a bndbox",
        ),
        (
            "<annotation><object><name>cat</name><bndbox><xmin>a</xmin><ymin>1</ymin><xmax>2</xmax><ymax>3</ymax>"
            "</bndbox></object></annotation>",
            "one.xml: object 0: expected .* four numbers",
        ),
    ],
)
def test_broken_xml(voc, text, message):
    (voc / "Annotations" / "one.xml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_voc(voc, "train")


def test_no_object_anywhere(voc):
    for name in ("one", "two", "three"):
        write_xml(voc, name, [])
    with pytest.raises(ValueError, match="hold no object"):
        read_voc(voc, "train")


def test_image_suffix_in_capitals(voc):
    (voc / "JPEGImages" / "one.jpg").unlink()
    Image.new("RGB", (WIDTH, HEIGHT)).save(voc / "JPEGImages" / "one.JPG")
    assert read_voc(voc, "train")["images"][0]["file_name"] == "one.JPG"
