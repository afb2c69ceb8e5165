import copy
import os

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetMapper, MapDataset
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, PolygonMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from fpn_d2.data import TrainingMapper, enlarge
from fpn_d2.data.mapper import ColorJitter
from fpn_d2.errors import UserError

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


def same(first, second, grey_levels=0):
    """All fields equal to the bit, images to within ``grey_levels``."""
    assert first.keys() == second.keys()
    assert first["image"].is_contiguous() and first["image"].shape == second["image"].shape
    assert first["image"].dtype == second["image"].dtype
    assert (first["image"].double() - second["image"].double()).abs().max() <= grey_levels
    for name in first.keys() - {"image", "instances", "proposals", "sem_seg"}:
        assert first[name] == second[name]
    if "sem_seg" in first:
        assert torch.equal(first["sem_seg"], second["sem_seg"]) and first["sem_seg"].dtype == second["sem_seg"].dtype
    for name in first.keys() & {"instances", "proposals"}:
        assert first[name].image_size == second[name].image_size
        fields, others = first[name].get_fields(), second[name].get_fields()
        assert fields.keys() == others.keys()
        for field, value in fields.items():
            value, other = (getattr(v, "tensor", v) for v in (value, others[field]))
            assert type(value) is type(other)
            if isinstance(value, PolygonMasks):
                for polygons, expected in zip(value.polygons, other.polygons, strict=True):
                    assert all(map(np.array_equal, polygons, expected)) and len(polygons) == len(expected)
            else:
                assert torch.equal(value, other) and value.dtype == other.dtype


@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_without_our_keys_detectron2s_mapper(tmp_path, record, numerics, is_train, crop, mask):
    cfg = small_config(tmp_path, INPUT__CROP__ENABLED=crop, MODEL__MASK_ON=mask, MODEL__NUMERICS=numerics)
    ours, theirs = TrainingMapper(cfg, is_train), DatasetMapper(cfg, is_train)
    assert isinstance(ours, TrainingMapper) and ours.exact == (numerics == "exact")
    assert ours.recompute_boxes == theirs.recompute_boxes == (is_train and crop and mask)
    before = copy.deepcopy(record)
    for seed in range(8):
        results = []
        for mapper in (ours, theirs):
            np.random.seed(seed)
            results.append(mapper(record))
        same(*results, grey_levels=int(is_train and not ours.exact))
    assert record == before


@pytest.fixture
def photograph(tmp_path):
    """A JPEG with all that Detectron2's mapper knows: polygons, run lengths, key points, stuff, proposals."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    coarse.resize((80, 60), Image.BICUBIC).save(tmp_path / "photograph.jpg", quality=92)
    Image.fromarray(rng.integers(0, 5, (60, 80), dtype=np.uint8)).save(tmp_path / "stuff.png")
    annotations = []
    for index in range(7):
        x, y = rng.uniform(0, 50, 2).tolist()
        w, h = rng.uniform(4, 30, 2).tolist()
        mask = np.zeros((60, 80), np.uint8, order="F")
        mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
        annotations.append(
            {
                "bbox": [x, y, w, h],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": index % 3,
                "segmentation": [[x, y, x + w, y, x + w, y + h], [x, y, x, y + h, x + w, y + h]],
                "run_lengths": mask_util.encode(mask),
                "keypoints": np.concatenate([rng.uniform(0, 60, (17, 2)), rng.integers(0, 3, (17, 1))], 1).reshape(-1),
            }
        )
    boxes = rng.uniform(0, 30, (12, 4)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return {
        "file_name": str(tmp_path / "photograph.jpg"),
        "image_id": 5,
        "height": 60,
        "width": 80,
        "annotations": annotations,
        "sem_seg_file_name": str(tmp_path / "stuff.png"),
        "proposal_boxes": boxes,
        "proposal_objectness_logits": np.linspace(1, -1, 12),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }


AUGMENTATIONS = {
    "none": [],
    "larger": [T.ResizeShortestEdge((90, 120), 200, "choice"), T.RandomFlip()],
    "larger, to a range": [
        T.ResizeShortestEdge((60, 160), 170, "range"),
        T.RandomFlip(horizontal=False, vertical=True),
    ],
    "smaller": [T.ResizeShortestEdge((30, 45), 200, "choice"), T.RandomFlip()],
    "part": [T.RandomCrop("relative_range", (0.4, 0.4)), T.ResizeShortestEdge(100), T.RandomFlip(), T.RandomFlip()],
    "flip first": [T.RandomFlip(), T.Resize((101, 133)), T.RandomFlip(horizontal=False, vertical=True)],
    "large scale": [T.ResizeScale(1.0, 2.0, 100, 120), T.FixedSizeCrop((90, 90))],
    "turned": [T.RandomRotation([-20, 20]), T.ResizeShortestEdge(100)],
    "extent": [T.RandomExtent((0.8, 1.2), (0.1, 0.1)), T.RandomFlip()],
    "colours, then larger": [T.RandomBrightness(0.7, 1.3), T.RandomLighting(9.0), T.ResizeShortestEdge(100)],
    "sometimes": [T.RandomApply(T.ResizeShortestEdge(100), 0.5), T.RandomApply(T.HFlipTransform(80), 0.0)],
}
TASKS = {
    "boxes": {},
    "polygons": {"use_instance_mask": True},
    "tight boxes": {"use_instance_mask": True, "recompute_boxes": True},
    "bit masks": {"use_instance_mask": True, "instance_mask_format": "bitmask"},
    "run lengths": {"use_instance_mask": True, "instance_mask_format": "bitmask"},
    "key points": {"use_keypoint": True, "keypoint_hflip_indices": np.arange(17)[::-1].copy()},
    "proposals": {"precomputed_proposal_topk": 8},
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("augmentations", AUGMENTATIONS)
def test_every_augmentation_with_every_task(photograph, augmentations, task):
    for annotation in photograph["annotations"]:
        run_lengths = annotation.pop("run_lengths")
        if task == "run lengths":
            annotation["segmentation"] = run_lengths
    settings = {"augmentations": AUGMENTATIONS[augmentations], "image_format": "BGR", **TASKS[task]}
    if task != "proposals":
        for name in ("proposal_boxes", "proposal_objectness_logits", "proposal_bbox_mode"):
            del photograph[name]
    mappers = [TrainingMapper(True, **settings), TrainingMapper(True, exact=True, **settings)]
    theirs = DatasetMapper(True, **settings)
    before = copy.deepcopy(photograph)
    for seed in range(3):
        results = []
        for mapper in (theirs, *mappers):
            np.random.seed(seed)
            results.append(mapper(photograph))
            results[-1]["next"] = np.random.rand()  # as many random numbers were drawn
        same(results[1], results[0], grey_levels=1)
        same(results[2], results[0])
    assert str(photograph) == str(before)


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L", "YUV-BT.601"])
@pytest.mark.parametrize("is_train", [True, False])
def test_formats(photograph, image_format, is_train):
    photograph = {name: photograph[name] for name in ("file_name", "height", "width")}
    settings = {"augmentations": [T.Resize((90, 120)), T.HFlipTransform(120)], "image_format": image_format}
    ours = TrainingMapper(is_train, **settings)(photograph)
    same(ours, DatasetMapper(is_train, **settings)(photograph), grey_levels=int(is_train))
    same(TrainingMapper(is_train, exact=True, **settings)(photograph), DatasetMapper(is_train, **settings)(photograph))


def test_compiled_code_enlarges_to_the_bit_for_training_and_evaluation(photograph, monkeypatch):
    if enlarge.library() is None:
        pytest.skip("no C++ compiler on this machine: its enlarging of images is NOT tested")
    calls, real = [], enlarge.enlarge
    monkeypatch.setattr(enlarge, "enlarge", lambda *args: calls.append(1) or real(*args))
    for is_train in (True, False):
        calls.clear()
        arguments = {"augmentations": [T.Resize((90, 120))], "image_format": "BGR"}
        ours = TrainingMapper(is_train, **arguments)(photograph)["image"]
        assert len(calls) == 1 and torch.equal(ours, DatasetMapper(is_train, **arguments)(photograph)["image"])


def test_what_is_compiled_is_compiled_before_there_are_workers(monkeypatch):
    calls = []
    monkeypatch.setattr(enlarge, "library", lambda: calls.append(1))
    TrainingMapper(True, exact=True, augmentations=[], image_format="BGR")
    assert not calls
    TrainingMapper(True, augmentations=[], image_format="BGR")
    assert calls


def test_without_it_opencv_enlarges_for_training_and_pillow_for_evaluation(photograph, monkeypatch):
    monkeypatch.setattr(enlarge, "library", lambda: None)
    calls = []
    resize = cv2.resize
    monkeypatch.setattr(cv2, "resize", lambda *args, **kwargs: calls.append(1) or resize(*args, **kwargs))
    for is_train, channels in ((True, 3), (False, 0)):
        calls.clear()
        TrainingMapper(is_train, augmentations=[T.Resize((90, 120))], image_format="BGR")(photograph)
        assert len(calls) == channels


def test_a_subclass_may_transform_annotations_itself(tmp_path, record):
    class Mine(TrainingMapper):
        def _transform_annotations(self, dataset_dict, transforms, image_shape):
            dataset_dict.pop("annotations")[0]["bbox"][0] = 99
            dataset_dict["mine"] = image_shape

    before = copy.deepcopy(record)
    result = Mine(small_config(tmp_path), True)(record)
    assert result["mine"] == tuple(result["image"].shape[1:]) and "instances" not in result
    assert record == before


def test_what_the_model_gets_shares_nothing_with_the_record(photograph):
    photograph["mine"] = {"list": [1]}
    result = TrainingMapper(True, augmentations=[], image_format="BGR")(photograph)
    result["mine"]["list"].append(2)
    result["instances"].gt_boxes.tensor.zero_()
    assert photograph["mine"] == {"list": [1]} and any(photograph["annotations"][0]["bbox"])


def test_unknown_numerics(tmp_path):
    with pytest.raises(UserError, match="MODEL.NUMERICS is 'quick'; expected one of fast, exact"):
        TrainingMapper(small_config(tmp_path, MODEL__NUMERICS="quick"), True)


def test_forked_workers_run_opencv_on_one_thread(tmp_path, record):
    """Its threads, which have run in the parent here, do not live through a fork."""
    mapper = TrainingMapper(small_config(tmp_path, INPUT__RANDOM_FLIP="none", INPUT__MIN_SIZE_TRAIN=(600,)), True)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        cv2.resize(np.zeros((900, 900, 3), np.uint8), (2000, 2000))
        expected = mapper(record)
        loader = DataLoader(
            MapDataset([record] * 4, lambda record: (mapper(record), cv2.getNumThreads())),
            batch_size=None,
            num_workers=2,
            timeout=60,
            multiprocessing_context="fork",
        )
        for result, threads_there in loader:
            same(result, expected)
            assert threads_there == 1
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(threads)


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
    with pytest.raises(UserError, match="VERTICAL_FLIP does not go with MODEL.KEYPOINT_ON"):
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
    with pytest.raises(UserError, match="INPUT.COLOR_JITTER to be at least 0 and less than 1"):
        TrainingMapper(small_config(tmp_path, INPUT__COLOR_JITTER=strength), True)


def break_file(path, kind):
    """Put something into the place of an image that cannot be used."""
    path.unlink(missing_ok=True)
    if kind == "cut":
        write_image(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "deep":
        Image.fromarray(np.full((HEIGHT, WIDTH), 1 << 20, np.int32)).save(path, "TIFF")
    elif kind != "gone":
        path.write_bytes(b"no image" if kind == "text" else b"")


BROKEN = {
    "gone": "does not exist",
    "text": "cannot be read as an image",
    "empty": "is empty",
    "cut": "cannot be read as an image",
    "pipe": "is no regular file",
    "folder": "is no regular file",
    "circle": "symbolic links",
    "deep": "no right reading as 8 bits",
}


@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_file_that_cannot_be_used_is_left_out_with_a_warning(tmp_path, record, caplog, numerics, kind, suffix):
    record["file_name"] = str(tmp_path / f"bad.{suffix}")
    break_file(tmp_path / f"bad.{suffix}", kind)
    cfg = small_config(tmp_path, MODEL__NUMERICS=numerics, DATASETS__MAX_BAD_IMAGES=1)
    mapper = TrainingMapper(cfg, True)
    assert mapper(record) is None and mapper(record) is None
    (warning,) = caplog.messages
    assert f"bad.{suffix} (image id 5): " in warning and BROKEN[kind] in warning
    assert "It is left out, the 1. of at most 1" in warning and len(mapper.bad_images) == 1
    with pytest.raises(UserError, match=r"gone.png .*MAX_BAD_IMAGES is 1: look after the disk"):
        mapper({**record, "file_name": str(tmp_path / "gone.png")})

    mapper = TrainingMapper(cfg, False)
    blank = mapper(record)
    assert blank["image"].shape == (3, HEIGHT, WIDTH) and not blank["image"].any()
    assert BROKEN[kind] in blank["unreadable"] and (blank["height"], blank["width"]) == (HEIGHT, WIDTH)


def test_no_bad_image_is_allowed_where_the_limit_is_zero(tmp_path, record):
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"a.png \(image id 5\): .*does not exist. DATASETS.MAX_BAD_IMAGES is 0"):
        TrainingMapper(small_config(tmp_path, DATASETS__MAX_BAD_IMAGES=0), True)(record)


def test_bad_images_are_counted_over_all_workers(tmp_path, record):
    mapper = TrainingMapper(small_config(tmp_path), True)
    records = [{**record, "file_name": str(tmp_path / f"gone{i}.png")} for i in range(8)]
    workers = DataLoader(MappedRecords(records, mapper), num_workers=2, batch_size=None)
    assert [item for item in workers] == [None] * 8
    assert len(mapper.bad_images) == 8


class MappedRecords:
    def __init__(self, records, mapper):
        self.records, self.mapper = records, mapper

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.mapper(self.records[index])


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_the_size_is_that_of_the_file(tmp_path, record, caplog, numerics):
    record["width"] += 1
    for is_train in (True, False):
        mapped = TrainingMapper(small_config(tmp_path, MODEL__NUMERICS=numerics), is_train)(record)
        assert (mapped["height"], mapped["width"]) == (HEIGHT, WIDTH)
        assert "it is 40 x 30, not 41 x 30 as recorded: that is used" in caplog.messages.pop()
    record["width"], record["height"] = HEIGHT, WIDTH
    assert TrainingMapper(small_config(tmp_path, MODEL__NUMERICS=numerics), True)(record) is None
    assert "recorded as 30 x 40: its boxes may be meant either way" in caplog.text


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_deep_pixels_are_scaled(tmp_path, record, numerics):
    deep = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH)
    Image.fromarray(deep).save(tmp_path / "a.png")
    image = TrainingMapper(small_config(tmp_path, MODEL__NUMERICS=numerics), False)(record)["image"]
    assert len(image.unique()) > 200 and 120 < image.float().mean() < 135


@pytest.mark.parametrize("size", [(4000, 10), (10, 4000), (40_000, 10), (1, 1), (1, 30_000)])
@pytest.mark.parametrize("is_train", [True, False])
def test_flat_images_work_or_are_named(tmp_path, record, caplog, size, is_train):
    width, height = size
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / "a.png")
    record |= {"width": width, "height": height, "annotations": [{**record["annotations"][0], "bbox": [0, 0, 1, 1]}]}
    mapped = TrainingMapper(small_config(tmp_path), is_train)(record)
    if max(size) <= 4000:
        assert min(mapped["image"].shape) >= 1 and "unreadable" not in mapped
    else:
        assert mapped is None if is_train else "too flat" in mapped["unreadable"]
        assert f"{width} x {height} pixels are too flat for the sizes in INPUT" in caplog.text
