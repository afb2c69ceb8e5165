import numpy as np
import pytest
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.structures import BoxMode
from PIL import Image

from fpn_d2.data.coco_annotations import CheckOptions
from fpn_d2.data.coco_check import check_voc
from fpn_d2.data.defects import MEND, SKIP, STOP
from fpn_d2.data.voc_format import read_voc
from fpn_d2.errors import UserError

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
    found = check_voc(voc, "val", None, CheckOptions())
    assert [value for key, index, value in found.repaired() if key == "images" and index is not None] == [
        {"id": 1, "file_name": "three.png", "width": 50, "height": 20}
    ]
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
    with pytest.raises(UserError, match=f"{missing}.* Did you mean .*{missing}s"):
        read_voc(voc, "train")


def test_missing_split_names_the_near_one(voc):
    with pytest.raises(UserError, match=r"split 'trian'.*trian.txt\. Did you mean .*train.txt"):
        read_voc(voc, "trian")


def test_empty_split(voc):
    (voc / "ImageSets" / "Main" / "train.txt").write_text("\n")
    with pytest.raises(UserError, match="lists no image"):
        read_voc(voc, "train")


def test_missing_image_and_annotation_are_left_out(voc):
    (voc / "JPEGImages" / "one.jpg").unlink()
    found = check_voc(voc, "train", None, CheckOptions(training=False))
    assert found.report.counts["file_missing"] == 1 and "has no image one" in found.report.phrase(SKIP)
    write_image(voc / "JPEGImages" / "one.jpg")
    (voc / "Annotations" / "two.xml").unlink()
    found = check_voc(voc, "train", None, CheckOptions())
    assert found.report.counts["xml_missing"] == 1 and "has no two.xml" in found.report.phrase(SKIP)
    names = [value["file_name"] for key, index, value in found.repaired() if key == "images" and index is not None]
    assert names == ["one.jpg"]


def test_class_that_is_not_in_the_list_is_left_out(voc):
    found = check_voc(voc, "train", ["cat", "dog"], CheckOptions())
    assert "object 0 of one.xml: wolf is none of cat, dog" in found.report.phrase(SKIP)
    assert len([1 for key, i, _ in found.repaired() if key == "annotations" and i is not None]) == 1


OBJECT = "<name>cat</name><bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>2</xmax><ymax>3</ymax></bndbox>"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<annotation><object>", "xml_unreadable"),
        ("<annotation><object><name>cat</name></object></annotation>", "box_missing"),
        (f"<annotation><object>{OBJECT.format('a')}</object></annotation>", "box_missing"),
        (f"<annotation><object>{OBJECT.format('nan')}</object></annotation>", "box_not_finite"),
        (f"<annotation><object>{OBJECT.format('30')}</object></annotation>", "box_negative"),
        ("<annotation><object><bndbox/></object></annotation>", "object_unnamed"),
        ("<?xml version='1.0' encoding='klingon'?><annotation/>", "xml_unreadable"),
        ("", "xml_unreadable"),
    ],
)
def test_broken_xml_costs_its_record(voc, text, kind):
    (voc / "Annotations" / "one.xml").write_text(text)
    found = check_voc(voc, "train", None, CheckOptions(training=False))
    assert found.report.counts[kind] == 1
    for key, index, value in found.repaired():
        assert not (key == "annotations" and index is not None), value


@pytest.mark.parametrize("encoding", ["gbk", "big5", "shift_jis", "utf-16", "iso-8859-1", "utf-8", "utf-8-sig"])
def test_encodings(voc, encoding):
    name = "wölf" if encoding == "iso-8859-1" else "日本" if encoding != "gbk" else "斑马"
    text = (voc / "Annotations" / "one.xml").read_text().replace("wolf", name)
    declared = f"<?xml version='1.0' encoding='{encoding.removesuffix('-sig')}'?>\n"
    (voc / "Annotations" / "one.xml").write_bytes((declared + text).encode(encoding))
    found = check_voc(voc, "train", None, CheckOptions())
    assert not found.report.count(STOP, SKIP, MEND)
    assert name in [category["name"] for category in found.categories()]


def test_undeclared_encoding_is_named(voc):
    text = (voc / "Annotations" / "one.xml").read_text().replace("wolf", "斑马")
    (voc / "Annotations" / "one.xml").write_bytes(text.encode("gbk"))
    found = check_voc(voc, "train", None, CheckOptions(training=False))
    assert "not in UTF-8: its first line has to name its encoding" in found.report.phrase(SKIP)


def test_difficult_objects_are_trained_on_and_count_for_nothing_in_the_figures(voc):
    write_xml(voc, "one", [("wolf", (1, 1, 20, 20))], extra="<difficult>1</difficult>")
    for training in (True, False):
        content = read_voc(voc, "train", training=training)
        assert [a["iscrowd"] for a in content["annotations"]] == [int(not training)]
        assert check_voc(voc, "train", None, CheckOptions(training=training)).report.counts["difficult"] == 1


def test_recorded_size_is_not_believed(voc):
    write_xml(voc, "one", [("wolf", (1, 1, WIDTH, HEIGHT))], size=(10, 10))
    found = check_voc(voc, "train", None, CheckOptions())
    assert found.report.counts["size_differs"] == 1 and not found.report.counts["box_outside"]


def test_all_xml_files_without_a_split(voc):
    assert [image["file_name"] for image in read_voc(voc, None)["images"]] == ["one.jpg", "three.png", "two.jpg"]


def test_no_object_anywhere(voc):
    for name in ("one", "two", "three"):
        write_xml(voc, name, [])
    with pytest.raises(UserError, match="hold no object"):
        read_voc(voc, "train")


def test_image_suffix_in_capitals(voc):
    (voc / "JPEGImages" / "one.jpg").unlink()
    Image.new("RGB", (WIDTH, HEIGHT)).save(voc / "JPEGImages" / "one.JPG")
    assert read_voc(voc, "train")["images"][0]["file_name"] == "one.JPG"
