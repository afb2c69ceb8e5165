"""Images in, instances in the images' own pixels out."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image

from fpn_d2.errors import UserError
from fpn_d2.inference import Predictor
from tests.inference.finder import Finder, finder, finder_cfg, picture

SCENE = picture(48, 96, (0, 10, 6, 30, 26), (2, 60, 20, 90, 44))
BOXES = {0: [10, 6, 30, 26], 2: [60, 20, 90, 44]}


def check(instances, boxes=BOXES, size=(48, 96), within=1.0):
    assert instances.image_size == size
    assert sorted(instances.pred_classes.tolist()) == sorted(boxes)
    for box, label in zip(instances.pred_boxes.tensor, instances.pred_classes.tolist(), strict=True):
        torch.testing.assert_close(box, torch.tensor(boxes[label], dtype=torch.float32), atol=within, rtol=0)


@pytest.mark.parametrize("size", [24, 48, 96])
def test_boxes_are_in_the_images_own_pixels_whatever_the_network_is_shown(size):
    predictor = finder(size)
    check(predictor(SCENE, channels="BGR"), within=48 / size + 0.01)
    assert predictor.model.batches == [[(3, size, 2 * size)]]


def test_channel_order_of_arrays_has_to_be_said_and_counts():
    check(finder(48)(SCENE[:, :, ::-1], channels="RGB"))
    swapped = finder(48)(SCENE, channels="RGB")
    assert sorted(swapped.pred_classes.tolist()) == [0, 2] and swapped.pred_boxes.tensor[0, 0] == 60
    for said in (None, "bgr", "HSV"):
        with pytest.raises(UserError, match="channels='BGR'"):
            finder()(SCENE, channels=said)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_model_gets_the_channel_order_of_its_configuration(tmp_path, image_format):
    cfg = finder_cfg(48)
    cfg.INPUT.FORMAT = image_format
    predictor = Predictor(Finder(), cfg)
    Image.fromarray(SCENE[:, :, ::-1]).save(tmp_path / "scene.png")
    boxes = BOXES if image_format == "BGR" else {2: BOXES[0], 0: BOXES[2]}
    for image in (tmp_path / "scene.png", str(tmp_path / "scene.png"), Image.open(tmp_path / "scene.png")):
        check(predictor(image), boxes)
    check(predictor(SCENE, channels="BGR"), boxes)


def test_grey_images(tmp_path):
    grey = picture(48, 96, (0, 10, 6, 30, 26))[:, :, 0]
    for image in (grey, Image.fromarray(grey)):
        instances = finder(48)(image)
        assert sorted(instances.pred_classes.tolist()) == [0, 1, 2]  # all channels are alike


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, kind):
    """The stored pixels are such that turning them as the tag says gives the scene."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transpose that undoes each orientation
    stored = Image.fromarray(SCENE[:, :, ::-1])
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{kind}"
    stored.save(path, exif=exif, quality=95)
    for image in (path, Image.open(path)):
        check(finder(48)(image), within=2.0)


def test_a_list_comes_back_in_order_and_in_batches_of_one_size():
    wide, tall = SCENE, np.ascontiguousarray(SCENE.transpose(1, 0, 2))
    predictor = finder(48, batch_size=2)
    results = predictor([wide, tall, wide, tall, wide], channels="BGR")
    assert [r.image_size for r in results] == [(48, 96), (96, 48)] * 2 + [(48, 96)]
    for result in results[::2]:
        check(result)
    assert sorted(map(len, predictor.model.batches)) == [1, 2, 2]
    assert all(len(set(batch)) == 1 for batch in predictor.model.batches)
    assert finder()([]) == []


def test_detections_below_the_score_are_left_out():
    image = picture(48, 96, (0, 10, 6, 30, 26), (0, 10, 6, 12, 40), (1, 50, 10, 70, 30))  # the first is an L now
    assert finder(48)(image, channels="BGR").pred_classes.tolist() == [0, 1]
    kept = finder(48, min_score=0.99)(image, channels="BGR")
    assert kept.pred_classes.tolist() == [1] and float(kept.scores.min()) >= 0.99


def test_results_can_be_changed():
    result = finder(48)(SCENE, channels="BGR")
    result.pred_boxes.tensor += 1  # tensors of inference mode refuse it
    result.scores.requires_grad_(True)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (SCENE.astype(np.float32), "array of float32"),
        (SCENE[:, :, :2], r"shape \(48, 96, 2\)"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\)"),
        ("nowhere/at_all.jpg", "there is no image nowhere/at_all.jpg"),
        (7, "got a int"),
        ([7], "an image is a int"),
    ],
)
def test_what_is_no_image_is_refused(image, text):
    with pytest.raises(UserError, match=text):
        finder()(image, channels="BGR")


def test_broken_file_is_one_sentence(tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8nothing")
    with pytest.raises(UserError, match="bad.jpg cannot be read as an image"):
        finder()(bad)
    with pytest.raises(UserError, match="is a folder"):
        finder()(tmp_path)


def test_construction_refuses_what_does_not_fit():
    cfg = finder_cfg()
    with pytest.raises(UserError, match="3 classes, but 2 names"):
        Predictor(Finder(), cfg, class_names=("a", "b"))
    with pytest.raises(UserError, match="batch size is 0"):
        Predictor(Finder(), cfg, batch_size=0)
    cfg = get_cfg()
    cfg.MODEL.LOAD_PROPOSALS = True
    with pytest.raises(UserError, match="LOAD_PROPOSALS"):
        Predictor(Finder(), cfg)
