"""Against Detectron2's own transforms: within one grey level where OpenCV enlarges, the same bits everywhere else.

What is enlarged by compiled code has the same bits too: test_enlarge.py.
"""

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fpn_d2.data import enlarge, fast_transforms
from fpn_d2.data.fast_transforms import FastAugInput, transform_image
from fpn_d2.data.image_loading import to_chw


def pixels(height, width, seed=0, channels=3, extreme=False):
    """Noise; ``extreme``: black and white only, where the rounding of weights costs most."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return (image // 128 * 255).astype(np.uint8) if extreme else image


def difference(transform, image):
    ours, theirs = transform_image(transform, image.copy()), transform.apply_image(image.copy())
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return abs(ours.astype(float) - theirs.astype(float)).max(initial=0)


@pytest.fixture(autouse=True)
def _without_compiled_code(monkeypatch):
    monkeypatch.setattr(enlarge, "library", lambda: None)
    assert not fast_transforms.enlarges_to_the_bit()


@pytest.fixture
def by_opencv(monkeypatch):
    """Counts the images that OpenCV resizes."""
    calls = []
    resize = cv2.resize
    monkeypatch.setattr(cv2, "resize", lambda *args, **kwargs: calls.append(1) or resize(*args, **kwargs))
    return calls


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    new_height=st.integers(1, 200),
    new_width=st.integers(1, 200),
    channels=st.sampled_from([1, 3]),
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_resizing_of_any_size_to_any_size(height, width, new_height, new_width, channels, extreme, seed):
    image = pixels(height, width, seed, channels, extreme)
    grows = new_height >= height and new_width >= width
    assert difference(T.ResizeTransform(height, width, new_height, new_width), image) <= (1 if grows else 0)


@pytest.mark.parametrize("new_size", [(480, 640), (640, 853), (800, 1067), (960, 1280)])
def test_resizing_of_usual_sizes(by_opencv, new_size):
    for seed in range(2):
        assert difference(T.ResizeTransform(480, 640, *new_size), pixels(480, 640, seed, extreme=seed == 1)) <= 1
    assert by_opencv


@pytest.mark.parametrize("new_size", [(479, 1067), (800, 639), (240, 320), (384, 512)])
def test_what_shrinks_on_a_side_is_left_to_pillow(by_opencv, new_size):
    assert difference(T.ResizeTransform(480, 640, *new_size), pixels(480, 640)) == 0
    assert not by_opencv


@pytest.mark.parametrize(
    "view",
    [
        lambda image: image[:, :, ::-1],
        lambda image: image[:, ::-1],
        lambda image: image[::-1, ::-1, ::-1],
        lambda image: image[3:20, 5:24],
        lambda image: image[3:20, 5:24, ::-1],
        lambda image: image[::2, ::2],
    ],
)
def test_views(by_opencv, view):
    image = view(pixels(30, 40))
    height, width = image.shape[:2]
    transform = T.ResizeTransform(height, width, 2 * height + 1, 2 * width + 3)
    ours = transform_image(transform, image)
    assert by_opencv
    assert abs(ours.astype(int) - transform.apply_image(np.ascontiguousarray(image))).max() <= 1


class Doubled(T.ResizeTransform):
    def apply_image(self, img, interp=None):
        return img.repeat(2, axis=0).repeat(2, axis=1)


LEFT_ALONE = {
    "nearest": (T.ResizeTransform(30, 40, 61, 83, Image.NEAREST), pixels(30, 40)),
    "bicubic": (T.ResizeTransform(30, 40, 61, 83, Image.BICUBIC), pixels(30, 40)),
    "transparency": (T.ResizeTransform(30, 40, 61, 83), pixels(30, 40, channels=4)),
    "two channels": (T.ResizeTransform(30, 40, 61, 83), pixels(30, 40, channels=2)),
    "no channels": (T.ResizeTransform(30, 40, 61, 83), pixels(30, 40)[:, :, 0]),
    "float": (T.ResizeTransform(30, 40, 61, 83), pixels(30, 40).astype(np.float32)),
    "very long": (T.ResizeTransform(2, 4097, 2, 4100), pixels(2, 4097)),
    "subclass": (Doubled(30, 40, 60, 80), pixels(30, 40)),
    "mirrored": (T.HFlipTransform(40), pixels(30, 40)),
    "upside down": (T.VFlipTransform(30), pixels(30, 40)),
    "part": (T.CropTransform(3, 4, 20, 10), pixels(30, 40)),
    "brighter": (T.BlendTransform(0, 0.2, 1.1), pixels(30, 40)),
    "turned": (T.RotationTransform(30, 40, 17), pixels(30, 40)),
    "nothing": (T.NoOpTransform(), pixels(30, 40)),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_all_else_is_detectron2s_to_the_bit(by_opencv, case):
    assert difference(*LEFT_ALONE[case]) == 0
    assert not by_opencv


def test_an_image_of_another_size_than_the_transform_is_refused_as_by_detectron2():
    with pytest.raises(AssertionError):
        transform_image(T.ResizeTransform(30, 40, 61, 83), pixels(30, 41))


def test_a_list_of_transforms(by_opencv):
    parts = [T.CropTransform(3, 4, 20, 10), T.ResizeTransform(10, 20, 30, 55), T.HFlipTransform(55)]
    assert difference(T.TransformList(parts), pixels(30, 40)) <= 1
    assert by_opencv


def test_input_with_boxes_and_stuff():
    transform = T.ResizeTransform(30, 40, 61, 83)
    results = []
    for kind in (FastAugInput, T.AugInput):
        boxes, stuff = np.array([[1.0, 2.0, 30.0, 25.0]]), pixels(30, 40)[:, :, 0]
        results.append(kind(pixels(30, 40), boxes=boxes, sem_seg=stuff))
        results[-1].transform(transform)
    ours, theirs = results
    assert abs(ours.image.astype(int) - theirs.image).max() == 1  # not the same path
    assert np.array_equal(ours.boxes, theirs.boxes) and np.array_equal(ours.sem_seg, theirs.sem_seg)


CHAINS = {
    "mirrored": [T.ResizeTransform(30, 40, 61, 83), T.HFlipTransform(83)],
    "mirrored twice": [T.ResizeTransform(30, 40, 61, 83), T.HFlipTransform(83), T.HFlipTransform(83)],
    "in between nothing": [T.ResizeTransform(30, 40, 61, 83), T.NoOpTransform(), T.HFlipTransform(83)],
    "in between turned over": [T.ResizeTransform(30, 40, 61, 83), T.VFlipTransform(61), T.HFlipTransform(83)],
    "in between a part": [T.ResizeTransform(30, 40, 61, 83), T.CropTransform(5, 6, 50, 40), T.HFlipTransform(50)],
    "in between enlarged again": [
        *[T.ResizeTransform(30, 40, 61, 83), T.ResizeTransform(61, 83, 70, 90), T.HFlipTransform(90)]
    ],
    "not enlarged": [T.HFlipTransform(40), T.ResizeTransform(30, 40, 20, 20), T.HFlipTransform(20)],
    "then brighter": [T.ResizeTransform(30, 40, 61, 83), T.HFlipTransform(83), T.BlendTransform(0, 0.2, 0.9)],
    "then turned": [T.ResizeTransform(30, 40, 61, 83), T.HFlipTransform(83), T.RotationTransform(61, 83, 17)],
}


@pytest.mark.parametrize("step", [1, -1], ids=["as read", "channels reversed"])
@pytest.mark.parametrize("chain", CHAINS)
def test_what_follows_an_enlarged_image(chain, step):
    """Each is mirrored once, whether in place or not, and an image that was handed over is never written to."""
    given = pixels(30, 40)
    kept, seen = given.copy(), FastAugInput(given[:, :, ::step])
    for transform in CHAINS[chain]:
        seen.transform(transform)
    # To the bit: what Detectron2's transforms make of what was enlarged here.
    expected = given[:, :, ::step]
    for transform in CHAINS[chain]:
        enlarge = isinstance(transform, T.ResizeTransform)
        image = np.ascontiguousarray(expected)
        expected = transform_image(transform, image) if enlarge else transform.apply_image(image)
    assert np.array_equal(seen.image, expected) and np.array_equal(given, kept)


def test_mirroring_leaves_an_image_of_somebody_elses_alone():
    planes = pixels(61, 83).transpose(2, 0, 1).copy()
    seen = FastAugInput(pixels(30, 40))
    seen.transform(T.ResizeTransform(30, 40, 61, 83))
    seen.image = planes.transpose(1, 2, 0)  # as an augmentation may do
    before = planes.copy()
    seen.transform(T.HFlipTransform(83))
    assert np.array_equal(planes, before) and np.array_equal(seen.image, before.transpose(1, 2, 0)[:, ::-1])


def test_the_models_input_is_what_was_enlarged():
    seen = FastAugInput(pixels(30, 40))
    seen.transform(T.ResizeTransform(30, 40, 61, 83))
    assert np.shares_memory(to_chw(seen.image).numpy(), seen.image)
