import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fpn_d2.data.coco_check import check_coco

from .small_sets import HEIGHT, WIDTH, coco_content, write_coco


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, coco_content())
    return folder / "images"


def check(content, images, **options):
    return check_coco(content, "set.json", images, **options)


def test_good_content_stays_as_it_is(images):
    content = coco_content()
    notes, warnings = check(content, images)
    assert (notes, warnings) == ([], [])
    assert content == coco_content()


def spoil(path, value):
    """A function that sets (or, with ... as the value, deletes) one entry of the content."""

    def apply(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(["images"], ...), "set.json is not in COCO format: it has no 'images'"),
        (spoil(["annotations"], ...), "has no 'annotations'"),
        (spoil(["categories"], ...), "has no 'categories'"),
        (spoil(["annotations"], {}), "expected a list under 'annotations', got a dict"),
        (spoil(["annotations", 1], "x"), "entry 1 of 'annotations' is not an object but 'x'"),
        (spoil(["images"], []), "the list 'images' is empty"),
        (spoil(["categories"], []), "the list 'categories' is empty"),
        (spoil(["images", 1, "id"], 7), "the image id 7 is used more than once"),
        (spoil(["images", 1, "id"], ...), "image 1 of the list: expected a whole number or text as id, got None"),
        (spoil(["images", 1, "id"], "3"), "image ids are a mixture"),
        (spoil(["images", 1, "file_name"], ...), "image id 3: expected text as file_name"),
        (spoil(["categories", 1, "id"], 20), "the category id 20 is used more than once"),
        (spoil(["categories", 1, "id"], "4"), "category 1 of the list: expected a whole number as id, got '4'"),
        (spoil(["categories", 1, "name"], None), "category id 4: expected text as name"),
        (spoil(["annotations", 2, "id"], 1), "the annotation id 1 is used more than once"),
        (spoil(["annotations", 2, "id"], [1]), r"annotation id \[1\] \(entry 2\): expected a whole number"),
        (
            spoil(["annotations", 2, "image_id"], 8),
            r"annotation id 3 \(entry 2\): image_id 8 is not the id of any image",
        ),
        (spoil(["annotations", 2, "image_id"], ...), "image_id None is not the id of any image"),
        (spoil(["annotations", 2, "category_id"], 5), "category_id 5 is not the id of any category"),
        (spoil(["annotations", 2, "bbox"], ...), "annotation id 3 .*expected bbox to be four numbers.*got None"),
        (spoil(["annotations", 2, "bbox"], []), "expected bbox to be four numbers"),
        (spoil(["annotations", 2, "bbox"], [1, 2, 3]), "expected bbox to be four numbers"),
        (spoil(["annotations", 2, "bbox"], [1, 2, 3, "4"]), "expected bbox to be four numbers"),
        (spoil(["annotations", 2, "bbox"], [1, 2, 3, None]), "expected bbox to be four numbers"),
        (spoil(["annotations"], []), "holds no object to train on"),
    ],
)
def test_broken_structure_is_an_error_that_names_file_and_record(images, change, message):
    content = coco_content()
    change(content)
    with pytest.raises(ValueError, match=message) as caught:
        check(content, images)
    assert str(caught.value).startswith("set.json")


def test_json_that_is_no_object_is_an_error(images):
    with pytest.raises(ValueError, match="not in COCO format: expected an object .* got a list"):
        check([], images)


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ([2, 2, 0, 5], "without area"),
        ([2, 2, 5, 0], "without area"),
        ([2, 2, -5, 5], "negative"),
        ([math.nan, 2, 5, 5], "not finite"),
        ([2, 2, math.inf, 5], "not finite"),
        ([WIDTH, 2, 5, 5], "outside"),
        ([2, HEIGHT, 5, 5], "outside"),
        ([-5, 2, 5, 5], "outside"),
    ],
)
def test_single_unusable_box_is_left_out_with_a_warning(images, box, fault):
    content = coco_content()
    content["annotations"][2]["bbox"] = box
    _, warnings = check(content, images)
    assert [annotation["id"] for annotation in content["annotations"]] == [1, 2, 5]
    (warning,) = warnings
    assert "1 of 4 annotations are left out" in warning and fault in warning and "id 3" in warning


def test_box_partly_outside_is_kept(images):
    content = coco_content()
    content["annotations"][2]["bbox"] = [-1, -1, WIDTH + 5, HEIGHT + 5]
    assert check(content, images) == ([], [])
    assert len(content["annotations"]) == 4


def test_one_warning_counts_all_faults(images):
    content = coco_content()
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    content["annotations"][2]["bbox"] = [0, 0, 5, 0]
    content["annotations"][3]["bbox"] = [500, 0, 5, 5]
    _, warnings = check(content, images)
    (warning,) = warnings
    assert "3 of 4 annotations are left out: 2 with a box without area (first: id 1), 1 with a box outside" in warning


def test_missing_images_are_counted_and_named(images):
    content = coco_content()
    for index in range(5):
        content["images"].append({"id": 100 + index, "file_name": f"gone{index}.png", "width": 9, "height": 9})
    with pytest.raises(
        FileNotFoundError, match=r"5 of 8 images are not in .*: gone0.png, gone1.png, gone2.png, \.\.\."
    ):
        check(content, images)


def test_folder_named_twice_is_told(images):
    content = coco_content()
    content["images"][0]["file_name"] = "images/b.png"
    with pytest.raises(FileNotFoundError, match="1 of 3 images .* names without the folder are there"):
        check(content, images)


def test_what_can_be_derived_is_filled_in(images):
    content = coco_content()
    del content["info"]
    del content["images"][0]["width"], content["images"][1]["height"]
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    content["annotations"][0]["keypoints"] = [1, 2, 2, 0, 0, 0, 3, 4, 1]
    notes, warnings = check(content, images)
    assert notes and not warnings
    assert content["info"] == {}
    assert {(image["width"], image["height"]) for image in content["images"]} == {(WIDTH, HEIGHT)}
    assert [annotation["area"] for annotation in content["annotations"]] == [120, 76.5, 300, 100]
    assert {annotation["iscrowd"] for annotation in content["annotations"]} == {0}
    assert content["annotations"][0]["num_keypoints"] == 2


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [None, 1, 2, 3], ["a", "b", "c", "d"]])
def test_annotations_are_numbered_from_one_where_coco_would_go_wrong(images, ids):
    content = coco_content()
    for annotation, value in zip(content["annotations"], ids, strict=True):
        annotation["id"] = value
    notes, _ = check(content, images)
    assert [annotation["id"] for annotation in content["annotations"]] == [1, 2, 3, 4]
    assert "annotations numbered from 1" in notes


def test_ignored_objects_become_crowd(images):
    content = coco_content()
    content["annotations"][0]["ignore"] = 1
    content["annotations"][1]["ignore"] = 0
    check(content, images)
    assert [annotation["iscrowd"] for annotation in content["annotations"]] == [1, 0, 0, 1]
    assert not any("ignore" in annotation for annotation in content["annotations"])


def test_broken_polygon_does_not_cost_the_box(images):
    content = coco_content()
    good = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0]
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4], good]
    content["annotations"][1]["segmentation"] = [[1, 2, 3, 4]]
    content["annotations"][2]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": 5}
    check(content, images)
    assert [a.get("segmentation") for a in content["annotations"]] == [[good], [], [], None]


def test_masks_wanted_but_absent(images):
    with pytest.raises(ValueError, match="boxes only, but MODEL.MASK_ON needs masks"):
        check(coco_content(), images, masks=True)


def test_object_without_mask_becomes_crowd_when_masks_are_used(images):
    content = coco_content()
    content["annotations"][0]["segmentation"] = [[1, 1, 5, 1, 5, 5]]
    notes, warnings = check(content, images, masks=True)
    assert [annotation["iscrowd"] for annotation in content["annotations"]] == [0, 1, 1, 1]
    assert notes and "2 of 3 objects have no usable mask (first: id 2)" in warnings[0]
    # What pycocotools makes of the stand-in is the box.
    (polygon,) = content["annotations"][2]["segmentation"]
    rle = mask_util.merge(mask_util.frPyObjects([polygon], HEIGHT, WIDTH))
    assert mask_util.toBbox(rle).tolist() == [20, 5, 15, 20]


def test_run_length_masks_need_bitmask_format(images):
    content = coco_content()
    rle = mask_util.encode(np.asfortranarray(np.ones((HEIGHT, WIDTH), np.uint8)))
    for annotation in content["annotations"]:
        annotation["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
    with pytest.raises(ValueError, match="set INPUT.MASK_FORMAT to bitmask"):
        check(content, images, masks=True, polygons_only=True)
    assert check(content, images, masks=True) == ([], [])


def test_images_alone_will_do_for_testing(images):
    content = coco_content()
    del content["annotations"]
    assert check(content, images, need_annotations=False) == ([], [])
    assert "annotations" not in content


def test_categories_of_the_same_name_are_told(images):
    content = coco_content()
    content["categories"][1]["name"] = "zebra"
    _, warnings = check(content, images)
    assert "share the name 'zebra'" in warnings[0]


def test_size_read_from_a_file_follows_exif(tmp_path):
    content = coco_content()
    content["images"] = [{"id": 1, "file_name": "turned.jpg"}]
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [0, 0, 5, 5]}]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "turned.jpg", exif=exif)
    check(content, tmp_path)
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (HEIGHT, WIDTH)


def test_unreadable_image_without_stated_size(tmp_path):
    content = coco_content()
    content["images"] = [{"id": 1, "file_name": "text.jpg"}]
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match="text.jpg cannot be read as an image"):
        check(content, tmp_path)


_anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 50) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    record=st.sampled_from(["images", "categories", "annotations"]),
    index=st.integers(0, 1),
    key=st.sampled_from(
        ["id", "file_name", "width", "height", "name", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore"]
        + ["segmentation"]
    ),
    value=_anything,
    masks=st.booleans(),
)
def test_any_value_anywhere_is_mended_or_refused_in_words(images, record, index, key, value, masks):
    """No value crashes the check with anything else than its own errors; what passes is usable by COCO's tools."""
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1, 1, 5, 1, 5, 5]]
    content[record][index][key] = value
    try:
        check(content, images, masks=masks)
    except (ValueError, FileNotFoundError) as error:
        assert str(error).startswith("set.json")
        return
    json.dumps(content)
    for annotation in content["annotations"]:
        assert isinstance(annotation["id"], int) and annotation["id"] >= 1
        assert annotation["iscrowd"] in (0, 1)
        assert math.isfinite(annotation["area"])
        assert min(annotation["bbox"][2:]) > 0 and all(map(math.isfinite, annotation["bbox"]))
        assert all(len(polygon) >= 6 for polygon in annotation.get("segmentation") or [])
