import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_d2.data import TrainingMapper
from fpn_d2.data.mapper import ColorJitter

from .small_sets import HEIGHT, WIDTH, config, write_image


@pytest.fixture
def record(tmp_path):
    write_image(tmp_path / "a.png")
    return {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 5,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [
            {
                "bbox": [2, 3, 12, 20],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 1,
                "segmentation": [[2, 3, 12, 3, 12, 20, 2, 20]],
            },
            {"bbox": [0, 0, 5, 5], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 1},
        ],
    }


def small_config(tmp_path, **keys):
    cfg = config(tmp_path)
    cfg.INPUT.MIN_SIZE_TRAIN = (HEIGHT, HEIGHT + 7)
    cfg.INPUT.MIN_SIZE_TEST = HEIGHT
    cfg.merge_from_list([part for key, value in keys.items() for part in (key.replace("__", "."), value)])
    return cfg


def same(first, second):
    assert torch.equal(first["image"], second["image"])
    assert first.keys() == second.keys()
    if "instances" in first:
        assert torch.equal(first["instances"].gt_boxes.tensor, second["instances"].gt_boxes.tensor)
        assert torch.equal(first["instances"].gt_classes, second["instances"].gt_classes)
        assert first["instances"].get_fields().keys() == second["instances"].get_fields().keys()


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_without_our_keys_exactly_detectron2s_mapper(tmp_path, record, is_train, crop, mask):
    cfg = small_config(tmp_path, INPUT__CROP__ENABLED=crop, MODEL__MASK_ON=mask)
    ours, theirs = TrainingMapper(cfg, is_train), DatasetMapper(cfg, is_train)
    assert isinstance(ours, TrainingMapper)
    assert ours.recompute_boxes == theirs.recompute_boxes == (is_train and crop and mask)
    for seed in range(8):
        results = []
        for mapper in (ours, theirs):
            np.random.seed(seed)
            results.append(mapper(record))
        same(*results)


def test_inference_is_not_augmented(tmp_path, record):
    cfg = small_config(tmp_path, INPUT__VERTICAL_FLIP=True, INPUT__COLOR_JITTER=0.5)
    same(TrainingMapper(cfg, False)(record), DatasetMapper(cfg, False)(record))


def test_vertical_flip_turns_image_and_boxes_over_half_of_the_time(tmp_path, record):
    cfg = small_config(tmp_path, INPUT__RANDOM_FLIP="none", INPUT__MIN_SIZE_TRAIN=(HEIGHT,))
    upright = TrainingMapper(cfg, True)(record)
    cfg.INPUT.VERTICAL_FLIP = True
    mapper = TrainingMapper(cfg, True)
    turned = 0
    for _ in range(100):
        result = mapper(record)
        if torch.equal(result["image"], upright["image"]):
            assert result["instances"].gt_boxes.tensor.tolist() == [[2, 3, 12, 20]]
        else:
            turned += 1
            assert torch.equal(result["image"], upright["image"].flip(1))
            assert result["instances"].gt_boxes.tensor.tolist() == [[2, HEIGHT - 20, 12, HEIGHT - 3]]
    assert 30 < turned < 70


def test_vertical_flip_is_refused_with_keypoints(tmp_path):
    cfg = small_config(tmp_path, INPUT__VERTICAL_FLIP=True, MODEL__KEYPOINT_ON=True)
    cfg.DATASETS.TRAIN = ("keypoints_coco_2017_train",)
    with pytest.raises(ValueError, match="VERTICAL_FLIP does not go with MODEL.KEYPOINT_ON"):
        TrainingMapper(cfg, True)


def test_colour_jitter_changes_colours_only(tmp_path, record):
    cfg = small_config(tmp_path, INPUT__RANDOM_FLIP="none", INPUT__MIN_SIZE_TRAIN=(HEIGHT,))
    plain = TrainingMapper(cfg, True)(record)
    cfg.INPUT.COLOR_JITTER = 0.4
    mapper = TrainingMapper(cfg, True)
    results = [mapper(record) for _ in range(3)]
    for result in results:
        assert result["image"].dtype == torch.uint8 and not torch.equal(result["image"], plain["image"])
        assert torch.equal(result["instances"].gt_boxes.tensor, plain["instances"].gt_boxes.tensor)
    assert not torch.equal(results[0]["image"], results[1]["image"])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), strength=st.floats(0.01, 0.9))
def test_colour_jitter_does_the_same_to_rgb_and_bgr(seed, strength):
    image = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    results = {}
    for image_format, pixels in (("RGB", image), ("BGR", np.ascontiguousarray(image[:, :, ::-1]))):
        np.random.seed(seed)
        results[image_format] = ColorJitter(strength, image_format).get_transform(pixels).apply_image(pixels)
    difference = results["RGB"].astype(int) - results["BGR"][:, :, ::-1].astype(int)
    assert abs(difference).max() <= 1


def test_saturation_leaves_the_luma_and_moves_colours_from_or_to_grey(monkeypatch):
    """The third factor alone: with brightness and contrast held at 1, the luma of BT.601 stays."""
    image = np.random.default_rng(0).integers(60, 180, (8, 8, 3), dtype=np.uint8)
    draws = iter([1.0, 1.0, 0.5])
    monkeypatch.setattr(np.random, "uniform", lambda *_: next(draws))
    changed = ColorJitter(0.5, "BGR").get_transform(image).apply_image(image)
    bgr = np.array([0.114, 0.587, 0.299])
    assert abs(changed @ bgr - image @ bgr).max() < 1.0
    assert np.ptp(changed.astype(float), axis=2).sum() == pytest.approx(
        0.5 * np.ptp(image.astype(float), axis=2).sum(), rel=0.05
    )


def test_colour_jitter_of_grey_images(tmp_path, record):
    mapper = TrainingMapper(small_config(tmp_path, INPUT__COLOR_JITTER=0.3, INPUT__FORMAT="L"), True)
    assert mapper(record)["image"].shape[0] == 1


@pytest.mark.parametrize("strength", [-0.1, 1.0, 2.0])
def test_colour_jitter_out_of_range(tmp_path, strength):
    with pytest.raises(ValueError, match="INPUT.COLOR_JITTER to be at least 0 and less than 1"):
        TrainingMapper(small_config(tmp_path, INPUT__COLOR_JITTER=strength), True)


def test_missing_image(tmp_path, record):
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"Image .*a.png \(image id 5\): the file does not exist"):
        TrainingMapper(small_config(tmp_path), True)(record)


@pytest.mark.parametrize("kind", ["text", "empty", "png", "jpg"])
def test_broken_image(tmp_path, record, kind):
    record["file_name"] = str(tmp_path / f"broken.{kind}")
    if kind in ("png", "jpg"):  # cut off in the middle
        write_image(tmp_path / f"whole.{kind}")
        content = (tmp_path / f"whole.{kind}").read_bytes()
        content = content[: len(content) // 2]
    else:
        content = b"no image" if kind == "text" else b""
    (tmp_path / f"broken.{kind}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken.{kind} \(image id 5\): the file cannot be read as an image"):
        TrainingMapper(small_config(tmp_path), True)(record)


def test_image_of_another_size_than_the_record_says(tmp_path, record):
    record["width"] += 1
    with pytest.raises(ValueError, match=r"image id 5\): Mismatched image shape.*\(40, 30\).*\(41, 30\)"):
        TrainingMapper(small_config(tmp_path), True)(record)
