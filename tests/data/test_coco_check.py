import copy
import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_d2.data.coco_annotations import CheckOptions
from fpn_d2.data.coco_check import CocoCheck, check_coco
from fpn_d2.data.defects import KINDS, MEND, SKIP, STOP
from fpn_d2.data.json_stream import records_of
from tests.messy_data import CASES, sound_content, write_messy

from .small_sets import HEIGHT, WIDTH, coco_content, write_coco


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, coco_content())
    return folder / "images"


def check(content, folder, **options):
    found = CocoCheck(lambda: records_of(content), "set.json", folder, CheckOptions(**options))
    found.run()
    return found


def repaired(found):
    """The set as it is to be used, as one dictionary."""
    content = {}
    for key, index, value in found.repaired():
        if index is None:
            content[key] = value
        else:
            content[key] = content[key] + [value]  # a list of its own
    return content


def bad_kinds(found):
    return {kind for kind in found.report.counts if KINDS[kind][0] in (STOP, SKIP, MEND)}


def test_sound_content_stays_as_it_is(images):
    found = check(coco_content(), images)
    assert not bad_kinds(found) and not found.changed
    assert set(found.report.counts) == {"category_ids_sparse", "crowd"}
    assert repaired(found) == coco_content()
    assert found.report.totals == {"images": 3, "annotations": 4, "categories": 2}


@pytest.mark.parametrize("name", CASES)
def test_messy_sets(tmp_path, name):
    """Each fault is found, by itself; what is left passes the check and has what COCO's tools need."""
    case = CASES[name]
    json_file, folder = write_messy(case, tmp_path)
    options = CheckOptions(masks=case.masks, polygons_only=case.masks)
    found = check_coco(tmp_path / "set.json", tmp_path / "images", options)
    assert set(case.kinds) <= set(found.report.counts)
    assert bad_kinds(found) <= set(case.kinds)
    assert found.stopped == bool(found.report.kinds(STOP)) == case.stops
    if found.stopped:
        return
    content = repaired(found)
    json.dumps(content, allow_nan=False)
    again = check(content, tmp_path / "images", masks=case.masks)
    assert not bad_kinds(again) and not again.changed
    if not bad_kinds(found) & {"mask_missing"}:
        lost = found.report.count(SKIP)
        total = len(content["images"]) + len(content["annotations"]) + len(content["categories"])
        assert total >= 14 - lost


def test_findings_name_image_and_annotation(images):
    content = coco_content()
    content["annotations"][2]["bbox"] = [1, 2, 0, 4]
    content["images"][2]["file_name"] = "gone.png"
    found = check(content, images)
    findings = {defect.kind: defect for defect in found.report.defects()}
    assert (findings["box_without_area"].image, findings["box_without_area"].annotation) == (3, 3)
    assert (findings["file_missing"].image, findings["file_missing"].annotation) == (9, None)
    assert "1 x a box without area (image 3, annotation 3: [1, 2, 0, 4] in an image of 40 x 30)" in (
        found.report.phrase(SKIP)
    )


def test_report_for_machines(images, tmp_path):
    content = coco_content()
    content["annotations"][0]["bbox"] = None
    content["annotations"][2]["bbox"] = "a\x1b[31mb"
    found = check(content, images)
    found.report.write(tmp_path / "report.json", used="copy.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["source"], report["used"], report["totals"]["annotations"]) == ("set.json", "copy.json", 4)
    assert report["counts"] == {"category_ids_sparse": 1, "box_missing": 1, "box_wrong_type": 1, "crowd": 1}
    assert {"kind": "box_missing", "fate": "left out", "image_id": 7, "annotation_id": 1} | report["defects"][1] == (
        report["defects"][1]
    )
    assert len(report["defects"]) == 4 and not list(tmp_path.glob("*.unfinished"))
    assert "\x1b" not in found.report.table() and r"\x1b[31m" in found.report.table()


def test_many_findings_are_all_in_the_report_and_few_in_the_message(images, tmp_path):
    content = coco_content()
    content["annotations"] += [{**content["annotations"][0], "id": 100 + i, "bbox": [0, 0, 0, i]} for i in range(500)]
    found = check(content, images)
    assert found.report.counts["box_without_area"] == 500 and len(found.report.phrase(SKIP)) < 200
    found.report.write(tmp_path / "report.json")
    defects = json.loads((tmp_path / "report.json").read_text())["defects"]
    assert [d["annotation_id"] for d in defects if d["kind"] == "box_without_area"] == list(range(100, 600))


def test_what_is_left_out_and_what_stays(images):
    content = coco_content()
    content["annotations"][0]["bbox"] = [500, 0, 5, 5]
    found = check(content, images)
    assert [annotation["id"] for annotation in repaired(found)["annotations"]] == [2, 3, 5]
    content["images"][0]["file_name"] = "gone.png"
    found = check(content, images)
    assert [annotation["id"] for annotation in repaired(found)["annotations"]] == [2, 3]
    assert [image["id"] for image in repaired(found)["images"]] == [3, 9]


def test_box_partly_outside_stays_as_it_is(images):
    content = coco_content()
    content["annotations"][2]["bbox"] = [-1, -1, WIDTH + 5, HEIGHT + 5]
    found = check(content, images)
    assert not found.changed and found.report.counts["box_partly_outside"] == 1


def test_recorded_size_is_not_believed_over_the_file(images):
    content = coco_content()
    content["images"][1] |= {"width": 10, "height": 5}  # the boxes at 20, 5 would be outside
    found = check(content, images)
    assert bad_kinds(found) == {"size_differs"}
    fixed = repaired(found)
    assert (fixed["images"][1]["width"], fixed["images"][1]["height"]) == (WIDTH, HEIGHT)
    assert len(fixed["annotations"]) == 4


def test_without_images_the_recorded_size_is_all_there_is():
    content = coco_content()
    content["annotations"][2]["bbox"] = [WIDTH, 0, 5, 5]
    del content["images"][2]["width"]
    found = check(content, None)
    assert bad_kinds(found) == {"box_outside"} and found.report.counts["size_missing"] == 1


def test_corners_are_told_from_sizes_only_together(images):
    content = coco_content()
    corners = copy.deepcopy(content)
    for annotation in corners["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x + 15, y + 5, x + 15 + w, y + 5 + h]
    corners["annotations"][2]["bbox"] = [22, 5, 37, 25]
    found = check(corners, images)
    assert found.report.kinds(STOP) == ["boxes_are_corners"]
    as_corners = CocoCheck(lambda: records_of(corners), "set.json", images, CheckOptions(corners=True))
    as_corners.run()
    assert not bad_kinds(as_corners) and as_corners.changed
    assert [a["bbox"] for a in repaired(as_corners)["annotations"]] == [
        [a["bbox"][0], a["bbox"][1], a["bbox"][2] - a["bbox"][0], a["bbox"][3] - a["bbox"][1]]
        for a in corners["annotations"]
    ]
    corners["annotations"][0]["bbox"] = [30, 3, 10, 12]  # one that cannot be corners
    found = check(corners, images)
    assert not found.report.kinds(STOP) and found.report.counts["box_like_corners"] > 0


def test_missing_files_with_the_folder_named_twice_are_told(images):
    content = coco_content()
    content["images"][0]["file_name"] = "images/b.png"
    found = check(content, images)
    assert "names without the folder are there" in found.report.phrase(SKIP)
    for image in content["images"]:
        image["file_name"] = "images/" + image["file_name"].removeprefix("images/")
    found = check(content, images)
    assert found.stopped and "names without the folder are there" in found.report.phrase(STOP)


def test_what_can_be_derived_is_filled_in(images):
    content = coco_content()
    del content["info"]
    del content["images"][0]["width"], content["images"][1]["height"]
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    content["annotations"][0]["keypoints"] = [1, 2, 2, 0, 0, 0, 3, 4, 1]
    found = check(content, images)
    assert not bad_kinds(found) and found.changed
    fixed = repaired(found)
    assert fixed["info"] == {}
    assert {(image["width"], image["height"]) for image in fixed["images"]} == {(WIDTH, HEIGHT)}
    assert [annotation["area"] for annotation in fixed["annotations"]] == [120, 76.5, 300, 100]
    assert {annotation["iscrowd"] for annotation in fixed["annotations"]} == {0}
    assert fixed["annotations"][0]["num_keypoints"] == 2


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [None, 1, 2, 3], ["a", "b", "c", "d"], [True, 7, 2**64, -3]])
def test_annotations_are_numbered_from_one_where_coco_would_go_wrong(images, ids):
    content = coco_content()
    for annotation, value in zip(content["annotations"], ids, strict=True):
        annotation["id"] = value
    found = check(content, images)
    assert [annotation["id"] for annotation in repaired(found)["annotations"]] == [1, 2, 3, 4]
    assert found.changed and found.report.counts["annotations_numbered"] == 1


def test_ignored_objects_become_crowd(images):
    content = coco_content()
    content["annotations"][0]["ignore"] = 1
    content["annotations"][1]["ignore"] = 0
    fixed = repaired(check(content, images))
    assert [annotation["iscrowd"] for annotation in fixed["annotations"]] == [1, 0, 0, 1]
    assert not any("ignore" in annotation for annotation in fixed["annotations"])


def test_broken_polygon_does_not_cost_the_box(images):
    content = coco_content()
    good = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0]
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4], good]
    content["annotations"][1]["segmentation"] = [[1, 2, 3, 4]]
    content["annotations"][2]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": 5}
    fixed = repaired(check(content, images))
    assert [a.get("segmentation") for a in fixed["annotations"]] == [[good], [], [], None]


def test_keypoints_of_another_number_go(images):
    content = coco_content()
    content["categories"][0]["keypoints"] = ["nose", "tail"]
    content["annotations"][0] |= {"keypoints": [1, 2, 2], "num_keypoints": 1}
    content["annotations"][2] |= {"keypoints": [1, 2, 2, 3, 4, 2]}
    found = check(content, images)
    assert found.report.counts["keypoints_wrong"] == 1
    first, _, third, _ = repaired(found)["annotations"]
    assert "keypoints" not in first and first["num_keypoints"] == 0 and third["num_keypoints"] == 2


def test_masks_wanted_but_absent(images):
    assert "boxes only, but MODEL.MASK_ON needs masks" in check(coco_content(), images, masks=True).report.phrase(STOP)


def test_object_without_mask_becomes_crowd_when_masks_are_used(images):
    content = coco_content()
    content["annotations"][0]["segmentation"] = [[1, 1, 5, 1, 5, 5]]
    found = check(content, images, masks=True)
    fixed = repaired(found)
    assert [annotation["iscrowd"] for annotation in fixed["annotations"]] == [0, 1, 1, 1]
    assert found.report.counts["mask_missing"] == 2
    # What pycocotools makes of the stand-in is the box.
    (polygon,) = fixed["annotations"][2]["segmentation"]
    rle = mask_util.merge(mask_util.frPyObjects([polygon], HEIGHT, WIDTH))
    assert mask_util.toBbox(rle).tolist() == [20, 5, 15, 20]


def test_run_length_masks_need_bitmask_format(images):
    content = coco_content()
    rle = mask_util.encode(np.asfortranarray(np.ones((HEIGHT, WIDTH), np.uint8)))
    for annotation in content["annotations"]:
        annotation["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
    found = check(content, images, masks=True, polygons_only=True)
    assert "set INPUT.MASK_FORMAT to bitmask" in found.report.phrase(STOP)
    found = check(content, images, masks=True)
    assert not bad_kinds(found) and repaired(found) == content


def test_images_alone_will_do_for_testing(images):
    content = coco_content()
    del content["annotations"]
    found = check(content, images, training=False)
    assert not bad_kinds(found) and "annotations" not in repaired(found)
    assert check(content, images).stopped
    content["annotations"] = []
    assert not check(content, images, training=False).stopped


def test_crowds_alone_are_nothing_to_train_on(images):
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    assert "nothing_left" in check(content, images).report.counts
    assert not check(content, images, training=False).stopped


def test_files_outside_the_folder_are_taken_where_that_is_asked_for(tmp_path):
    for name in ("absolute path to an image elsewhere", "path with .. to an image elsewhere"):
        write_messy(CASES[name], tmp_path / name)
        found = check_coco(tmp_path / name / "set.json", tmp_path / name / "images", CheckOptions(outside=True))
        assert not bad_kinds(found)


def test_image_with_very_many_objects_is_named(images):
    content = coco_content()
    content["annotations"] += [{**content["annotations"][0], "id": 100 + i} for i in range(5001)]
    assert check(content, images).report.counts["many_objects"] == 1


def test_image_with_more_objects_than_allowed_is_left_out_with_them(images):
    content = coco_content()
    crowded = content["annotations"][0]["image_id"]
    content["annotations"] += [{**content["annotations"][0], "id": 100}]
    before = sum(a["image_id"] == crowded for a in content["annotations"])
    for most, kept in ((before, True), (before - 1, False)):
        found = check(content, images, most_objects=most)
        assert found.report.counts["too_many_objects"] == (not kept)
        repaired = [(key, record) for key, index, record in found.repaired() if index is not None]
        assert any(key == "images" and record["id"] == crowded for key, record in repaired) == kept
        assert any(key == "annotations" and record["image_id"] == crowded for key, record in repaired) == kept
    assert "MAX_OBJECTS_PER_IMAGE" in found.report.phrase("left out")


def test_full_check_decodes_every_pixel(tmp_path):
    content = sound_content()
    write_coco(tmp_path, content)
    for image in content["images"]:
        image["width"], image["height"] = WIDTH, HEIGHT
    path = tmp_path / "images" / "4.png"
    data = bytearray(path.read_bytes())
    middle = data.index(b"IDAT") + 4
    data[middle : middle + 40] = bytes(40)  # the structure stays whole
    path.write_bytes(data)
    assert not bad_kinds(check(content, tmp_path / "images"))
    assert check(content, tmp_path / "images", full=True).report.counts["file_truncated"] == 1


_anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 50) | st.floats() | st.text(max_size=3) | st.just(2**64),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    record=st.sampled_from(["images", "categories", "annotations"]),
    index=st.integers(0, 1),
    key=st.sampled_from(
        ["id", "file_name", "width", "height", "name", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore"]
        + ["segmentation", "keypoints", "num_keypoints"]
    ),
    value=_anything,
    masks=st.booleans(),
)
def test_any_value_anywhere_is_mended_or_refused_in_words(images, record, index, key, value, masks):
    """No value crashes the check; what passes is usable by COCO's tools, and passes again as it is."""
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1, 1, 5, 1, 5, 5]]
    content[record][index][key] = value
    found = check(content, images, masks=masks)
    assert found.report.table().isprintable() or "\n" in found.report.table()
    if found.stopped:
        assert found.report.phrase(STOP)
        return
    fixed = repaired(found)
    for annotation in fixed["annotations"]:
        assert type(annotation["id"]) is int and annotation["id"] >= 1
        assert type(annotation["iscrowd"]) is int and annotation["iscrowd"] in (0, 1)
        assert math.isfinite(annotation["area"])
        assert min(annotation["bbox"][2:]) > 0 and all(map(math.isfinite, annotation["bbox"]))
        assert all(len(polygon) >= 6 for polygon in annotation.get("segmentation") or [])
    again = check(fixed, images, masks=masks)
    assert not bad_kinds(again) and not again.changed


def test_ids_with_a_decimal_point_become_whole_numbers(images):
    content = coco_content()
    for key in ("images", "annotations", "categories"):
        for record in content[key]:
            record.update({name: float(record[name]) for name in ("id", "image_id", "category_id") if name in record})
    found = check(content, images)
    assert not bad_kinds(found) and found.report.counts["ids_with_point"] == 3  # once for each list
    fixed = repaired(found)
    assert fixed == coco_content()
    ids = [record[name] for key in ("images", "annotations", "categories") for record in fixed[key] for name in record
           if name in ("id", "image_id", "category_id")]  # fmt: skip
    assert {type(own) for own in ids} == {int}
    content["annotations"][0]["image_id"] = 7.5
    assert check(content, images).report.counts["image_unknown"] == 1


@pytest.mark.parametrize(("texts", "numbers"), [(("3", "12"), [3, 12]), (("ant", "12"), [1, 2]), (("0", "00"), [1, 2])])
def test_category_ids_of_text_get_numbers(images, texts, numbers):
    content = coco_content()
    names = dict(zip([category["id"] for category in content["categories"]], texts, strict=True))
    expected = [numbers[texts.index(names[a["category_id"]])] for a in content["annotations"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = names[annotation["category_id"]]
    for category in content["categories"]:
        category["id"] = names[category["id"]]
    found = check(content, images)
    assert not bad_kinds(found) and found.report.counts["category_ids_text"] == 1
    fixed = repaired(found)
    assert [category["id"] for category in fixed["categories"]] == numbers
    assert [annotation["category_id"] for annotation in fixed["annotations"]] == expected
    assert [category["id"] for category in found.categories()] == numbers


@pytest.mark.parametrize("counts", [[9, 1 << 40], "zz", [1, 2]])
def test_run_lengths_that_do_not_fill_their_image_are_broken(images, counts):
    content = coco_content()
    content["annotations"][0]["segmentation"] = {"size": [30, 40], "counts": counts}
    assert check(content, images).report.counts["mask_broken"] == 1
