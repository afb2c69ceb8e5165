"""Compiled enlarging of images against Pillow, to the bit, and against its definition in whole numbers."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fpn_d2.data import enlarge, fast_transforms

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _needs_library():
    if enlarge.library() is None:
        pytest.skip("no C++ compiler on this machine, or short vectors: compiled enlarging is NOT tested")


def pixels(height, width, seed=0, channels=3, extreme=False):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return (image // 128 * 255).astype(np.uint8) if extreme else image


def by_pillow(image, height, width):
    bands = [Image.fromarray(band).resize((width, height), Image.BILINEAR) for band in image.transpose(2, 0, 1)]
    return np.stack([np.asarray(band) for band in bands])


def by_definition(row, new_size):
    """One row or column, cell by cell: a triangle of weights in steps of 2 ** -22, a sum rounded to whole numbers."""
    found = []
    for new in range(new_size):
        centre = (new + 0.5) * len(row) / new_size
        weights = {old: 1 - abs(old + 0.5 - centre) for old in range(len(row)) if abs(old + 0.5 - centre) < 1}
        whole = {old: math.floor(weight / sum(weights.values()) * 2**22 + 0.5) for old, weight in weights.items()}
        found.append((sum(int(row[old]) * weight for old, weight in whole.items()) + 2**21) >> 22)
    return found


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    more_rows=st.integers(0, 150),
    more_columns=st.integers(0, 150),
    channels=st.integers(1, 4),
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_size_to_any_larger_size(height, width, more_rows, more_columns, channels, extreme, seed):
    image = pixels(height, width, seed, channels, extreme)
    new_size = height + more_rows, width + more_columns
    assert np.array_equal(enlarge.enlarge(image, *new_size), by_pillow(image, *new_size))


@pytest.mark.parametrize("new_size", [(480, 640), (640, 853), (800, 1067), (960, 1280), (481, 3000)])
def test_usual_sizes(new_size):
    image = pixels(480, 640, extreme=True)
    planes = enlarge.enlarge(image, *new_size)
    assert planes.shape == (3, *new_size) and planes.flags.c_contiguous
    assert np.array_equal(planes, by_pillow(image, *new_size))


def test_very_long_sides():
    for size, new_size in (((2, 9001), (3, 9002)), ((9001, 2), (9002, 3))):
        image = pixels(*size)
        assert np.array_equal(enlarge.enlarge(image, *new_size), by_pillow(image, *new_size))


@pytest.mark.parametrize("size,new_size", [((3, 5), (7, 18)), ((1, 1), (4, 3)), ((6, 4), (6, 17)), ((9, 2), (40, 2))])
def test_against_the_definition(size, new_size):
    image = pixels(*size)
    planes = image.transpose(2, 0, 1)
    stretched = np.array([[by_definition(row, new_size[1]) for row in plane] for plane in planes])
    expected = np.array([[by_definition(column, new_size[0]) for column in plane.T] for plane in stretched])
    assert np.array_equal(enlarge.enlarge(image, *new_size), expected.transpose(0, 2, 1))


@pytest.mark.parametrize(
    "view",
    [
        lambda image: image[:, :, ::-1],
        lambda image: image[:, ::-1],
        lambda image: image[::-1, ::-1, ::-1],
        lambda image: image[3:20, 5:24],
        lambda image: image[::2, ::2],
        lambda image: np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0),
        lambda image: image[:, :, 1:],
    ],
)
def test_views(view):
    image = view(pixels(30, 40))
    before = image.copy()
    assert np.array_equal(enlarge.enlarge(image, 61, 83), by_pillow(before, 61, 83))
    assert np.array_equal(image, before)


@pytest.mark.skipif(sys.platform != "linux", reason="no mprotect: what is read is NOT tested")
@pytest.mark.parametrize("size", [(7, 19), (5, 16), (3, 33)])
def test_nothing_behind_the_image_is_read(size):
    """It ends where a page ends, and the next must not be touched; a process that does so is killed."""
    code = f"""
import ctypes, mmap, numpy as np
from fpn_d2.data import enlarge
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
image = np.frombuffer(memory, np.uint8)[page - {math.prod(size) * 3} : page].reshape({(*size, 3)})
image[:] = 7
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
assert (enlarge.enlarge(image, 40, 70) == 7).all()
print("alive", flush=True)
import os; os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "alive\n" and done.returncode == 0, done.stderr


@pytest.mark.parametrize("width", [47, 48, 49])
def test_nothing_beside_the_result_is_written(width, monkeypatch):
    memory, number = torch.full((5000,), 99, dtype=torch.uint8), 3 * 20 * width
    monkeypatch.setattr(enlarge.memory, "empty", lambda shape, dtype: memory[64 : 64 + number].view(shape))
    image = pixels(7, 19)
    assert np.array_equal(enlarge.enlarge(image, 20, width), by_pillow(image, 20, width))
    assert (memory[:64] == 99).all() and (memory[64 + number :] == 99).all()


def test_as_detectron2_resizes():
    """The transform goes to compiled code where it enlarges, and gives Detectron2's bits."""
    for image in (pixels(30, 40), pixels(30, 40)[:, :, ::-1], pixels(30, 40, channels=1)):
        transform = T.ResizeTransform(30, 40, 61, 83)
        ours = fast_transforms.transform_image(transform, image)
        assert np.array_equal(ours, transform.apply_image(image)) and ours.strides[1] == 1


@pytest.mark.parametrize("flag,lanes", [("-mno-avx512f", 8), ("-mno-avx", None)])
def test_narrower_vectors(flag, lanes, tmp_path, monkeypatch):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("not an x86-64 processor with AVX2: its inner loop is NOT tested")
    monkeypatch.setenv("FPN_D2_CACHE", str(tmp_path))
    monkeypatch.setattr(enlarge.OP, "flags", (*enlarge.OP.flags, flag))
    enlarge.OP.forget()
    try:
        assert (enlarge.library() and enlarge.OP.ask("enlarge_lanes")) == lanes
        image = pixels(31, 45)
        planes = enlarge.enlarge(image, 64, 83)
        assert planes is None if lanes is None else np.array_equal(planes, by_pillow(image, 64, 83))
    finally:
        enlarge.OP.forget()


def test_no_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(enlarge.library(), "enlarge_image", lambda problem: -1)
    with pytest.raises(MemoryError, match="Enlarging of images, compiled .enlarge_image., ran out of memory"):
        enlarge.enlarge(pixels(7, 19), 20, 30)


def test_a_pillow_with_other_bits_is_left_to_itself(monkeypatch):
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *a: Image.eval(real(image, *a), lambda v: v ^ 1))
    enlarge.OP.forget()
    try:
        assert enlarge.library() is None and not fast_transforms.enlarges_to_the_bit()
    finally:
        enlarge.OP.forget()
